"""The logs of a run: ``progress.csv`` and TensorBoard's files. A resumed run appends to the rows of its checkpoint."""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter, Logger
from torch.utils.tensorboard import SummaryWriter

from agents.common.checkpoint import flush_to_disk
from dpok_gym.utils.files import replacing


class CSVLog(KVWriter):
    """A row of ``progress.csv`` for each iteration.

    A new row is appended. Any other change is written into a copy of the file, which then replaces it. So a crash
    never loses a row.

    Args:
        path: the file.
        n_rows: the rows to keep of a file that is there already; later ones are cut off.
    """

    def __init__(self, path: Path, n_rows: int = 0) -> None:
        self._path = path
        self._columns, rows = _read_cells(path)
        #: Rows in the file.
        self.n_rows = min(n_rows, len(rows))
        if self.n_rows < n_rows:
            warnings.warn(
                f"{path} has {self.n_rows} of the {n_rows} rows that the run had logged; the others are lost",
                stacklevel=2,
            )
        if n_rows == 0:  # a new run may log other columns
            self._columns = []
        if path.is_file():
            self._replace(rows[: self.n_rows])

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Appends a row; a new column is empty in the rows before it."""
        values = _included(key_values, key_excluded, "csv")
        new = sorted(values.keys() - set(self._columns))
        # Not all columns are there in the first row: the first update comes after it, for example.
        if new:
            rows = _read_cells(self._path)[1]
            self._columns += new
            self._replace(rows)
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([values.get(name, "") for name in self._columns])
        self.n_rows += 1

    def flush(self) -> None:
        """Waits until the rows are on the disk."""
        if self._path.is_file():
            flush_to_disk(self._path)

    def close(self) -> None:
        """Does nothing: the file is open only while a row is written."""

    def _replace(self, rows: Sequence[Sequence[str]]) -> None:
        """Puts these rows, padded to the number of columns, in place of those in the file."""
        with replacing(self._path) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if self._columns:
                writer.writerow(self._columns)
            for row in rows:
                writer.writerow([*row, *[""] * (len(self._columns) - len(row))])


class TensorBoardLog(KVWriter):
    """The same rows for TensorBoard.

    The step of a row in TensorBoard is its number, counted from 1. The number of images would not do: it stays the same
    while a forward-process algorithm fits.

    Args:
        folder: the folder of the event files.
        n_rows: the rows to keep of those that are there already; TensorBoard drops later ones.
    """

    def __init__(self, folder: Path, n_rows: int = 0) -> None:
        purge_step = None
        # TensorBoard hides the older rows from this step on, so that a resumed run shows no row twice.
        if folder.is_dir() and any(folder.iterdir()):
            purge_step = n_rows + 1
            _wait_for_another_second(folder)
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._n_rows = n_rows

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Adds the row's numbers."""
        self._n_rows += 1
        for name, value in _included(key_values, key_excluded, "tensorboard").items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, self._n_rows)
        self._writer.flush()  # a killed run shows its last row too

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def make_logger(folder: Path, csv_log: CSVLog, tensorboard_log: TensorBoardLog) -> Logger:
    """Returns a logger for :meth:`agents.DPOK.set_logger` that writes both logs."""
    return Logger(str(folder), [csv_log, tensorboard_log])


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Reads the rows of ``progress.csv``, without their empty cells; none if there is no file."""
    columns, rows = _read_cells(Path(path))
    log = []
    for row in rows:
        cells = zip(columns, row, strict=False)  # a row that was cut off by a crash is shorter
        log.append({name: float(text) for name, text in cells if text})
    return log


def _wait_for_another_second(folder: Path) -> None:
    """Waits if the newest event file was made in this second.

    The name of an event file has the second in which it was made. TensorBoard reads the files in the order of their
    names, and must read the new one last.
    """
    made = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    if str(int(time.time())) in made:
        time.sleep(1)


def _read_cells(path: Path) -> tuple[list[str], list[list[str]]]:
    """Returns the columns' names and the rows; two empty lists if there is no file, or it is empty."""
    if not path.is_file():
        return [], []
    with open(path, newline="", encoding="utf-8") as file:
        columns, *rows = list(csv.reader(file)) or [[]]
    return columns, rows


def _included(values: Mapping[str, Any], excluded: Mapping[str, tuple[str, ...]], writer: str) -> dict[str, Any]:
    """Returns the values that Stable-Baselines3 does not exclude for a writer."""
    return {name: value for name, value in values.items() if writer not in (excluded.get(name) or ())}
