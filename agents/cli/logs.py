"""The logs of a run: ``progress.csv`` and TensorBoard's files. A resumed run goes on after the rows of its checkpoint.

Each checkpoint holds a copy of ``progress.csv``, from which a resumed run makes both logs anew. So no row is lost or
doubled, whatever has happened to the files.
"""

from __future__ import annotations

import csv
import io
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from stable_baselines3.common.logger import KVWriter
from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from dpok_gym.utils.files import naming, replacing


class CSVLog(KVWriter):
    """A row of ``progress.csv`` for each iteration.

    A new row is appended. A new column is written into a copy of the file, which then replaces it. So a crash never
    loses a row.

    Args:
        path: the file. If it is there, rows are added to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns = _read_cells(path)[0]

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Appends a row; a new column is empty in the rows before it.

        Raises:
            WriteError: if the file cannot be written.
        """
        values = _included(key_values, key_excluded, "csv")
        new = sorted(values.keys() - set(self._columns))
        # Not all columns are there in the first row: the first update comes after it, for example.
        if new:
            rows = _read_cells(self._path)[1]
            self._columns += new
            _write_rows(self._path, self._columns, rows)
        with naming(self._path), open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([values.get(name, "") for name in self._columns])

    def close(self) -> None:
        """Does nothing: the file is open only while a row is written."""


class TensorBoardLog(KVWriter):
    """The same rows for TensorBoard, in one file.

    The step of a row in TensorBoard is its number, counted from 1. The number of images would not do: it stays the same
    while a forward-process algorithm fits.

    Args:
        folder: the folder of the file; files of TensorBoard that are there already are removed.
        rows: the rows that are logged already.

    Attributes:
        path: the file.

    Raises:
        WriteError: if the file cannot be written.
    """

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, float]] = ()) -> None:
        self._n_rows, now = 0, time.time()
        self.path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        with naming(self.path):
            folder.mkdir(exist_ok=True)
            for old in folder.glob("*tfevents*"):
                old.unlink()
            self._file = open(self.path, "wb")  # noqa: SIM115 (open until close())
            self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2", source_metadata=SourceMetadata(writer="dpok")), now)
        # A TensorBoard that is running forgets the points that it has read.
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=1), now)
        seconds = [row.get("time/time_elapsed", 0.0) for row in rows]
        for row, elapsed in zip(rows, seconds, strict=True):
            self._add(row, now - seconds[-1] + elapsed)
        self._flush()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Adds the row's numbers.

        Raises:
            WriteError: if the file cannot be written.
        """
        # What progress.csv has and no more, since the file is made from it when the run is resumed.
        values = _included(key_values, key_excluded, "csv")
        self._add({name: value for name, value in values.items() if not isinstance(value, str)}, time.time())
        self._flush()  # a killed run shows its last row too

    def add_image(self, name: str, png: bytes, step: int) -> None:
        """Adds an image.

        Args:
            name: TensorBoard shows the images of a name in one place, the last one first.
            png: content of a PNG file.
            step: number of the row that it belongs to; 0 for the beginning.

        Raises:
            WriteError: if the file cannot be written.
        """
        with Image.open(io.BytesIO(png)) as opened:
            width, height = opened.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(Event(summary=Summary(value=[Summary.Value(tag=name, image=image)]), step=step), time.time())
        self._flush()

    def close(self) -> None:
        """Ends the file."""
        with naming(self.path):
            self._file.close()

    def _add(self, row: Mapping[str, float], wall_time: float) -> None:
        self._n_rows += 1
        scalars = [Summary.Value(tag=name, simple_value=float(value)) for name, value in row.items()]
        self._write(Event(summary=Summary(value=scalars), step=self._n_rows), wall_time)

    def _write(self, event: Event, wall_time: float) -> None:
        event.wall_time = wall_time
        with naming(self.path):
            self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        with naming(self.path):
            self._records.flush()


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Reads the rows of ``progress.csv``, without their empty cells; none if there is no file.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        columns, rows = _read_cells(Path(path))
        return [{name: float(text) for name, text in zip(columns, row, strict=True) if text} for row in rows]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Puts these rows, padded to the number of columns, in place of those in the file."""
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if columns:
            writer.writerow(columns)
        for row in rows:
            writer.writerow([*row, *[""] * (len(columns) - len(row))])


def _read_cells(path: Path) -> tuple[list[str], list[list[str]]]:
    """Returns the columns' names and the rows; two empty lists if there is no file, or it is empty."""
    if not path.is_file():
        return [], []
    text = path.read_text(encoding="utf-8")
    if "\0" in text:
        raise ValueError("it is full of zeros, as after a power cut")
    if text and not text.endswith("\n"):  # the next row would go on in the same line
        raise ValueError("its last row is cut off")
    columns, *rows = list(csv.reader(text.splitlines())) or [[]]
    if any(len(row) != len(columns) for row in rows):
        raise ValueError("a row has not as many cells as there are columns")
    return columns, rows


def _included(values: Mapping[str, Any], excluded: Mapping[str, tuple[str, ...]], writer: str) -> dict[str, Any]:
    """Returns the values that Stable-Baselines3 does not exclude for a writer."""
    return {name: value for name, value in values.items() if writer not in (excluded.get(name) or ())}
