"""Sweeps: many training runs whose results are lines of a file.

A line is appended when its run ends. An interrupted sweep continues where it stopped, and a run whose description is in
the file is not made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.training_run import key_of, run

#: Folder of the benchmarks, with their settings; their results are in ``results``.
HERE = Path(__file__).parent

Description = dict[str, Any]
Record = dict[str, Any]
Run = Callable[[Description, Path | None], Record]


def sweep_options(documentation: str | None, settings: Path | None = None) -> argparse.ArgumentParser:
    """Returns the options of a command that makes a sweep.

    Args:
        documentation: of the command.
        settings: the command's own file of settings; None if it has none.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    if settings is not None:
        parser.add_argument("--settings", type=Path, default=settings, help="YAML file of the sweep")
    parser.add_argument("--out", type=Path, help="folder for runs, table and figures")
    parser.add_argument("--report", action="store_true", help="make no runs: table and figures of those there are")
    parser.add_argument("--processes", type=int, default=default_processes(), help="number of runs side by side")
    return parser


def default_processes() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sweep_and_report(
    descriptions: Sequence[Description],
    file: Path,
    options: argparse.Namespace,
    report: Callable[[list[Record]], None],
    images: bool = True,
    run: Run = run,
) -> None:
    """Makes the runs that are missing, and reports those there are, even if interrupted.

    Args:
        descriptions: of the runs; see :func:`benchmarks.training_run.run`.
        file: the file of JSON lines.
        options: see :func:`sweep_options`.
        report: is called with the records of the runs, unless there are none.
        images: see :func:`sweep`.
        run: see :func:`sweep`.
    """
    try:
        if not options.report:
            sweep(descriptions, file, options.processes, images, run)
    finally:
        records = [record for record in find_records(descriptions, file) if record]
        if records:
            report(records)
        print(f"{len(records)} of {len(descriptions)} runs are in {file}")


def sweep(descriptions: Sequence[Description], file: Path, processes: int, images: bool = True, run: Run = run) -> None:
    """Makes the runs that are missing in a file of JSON lines.

    Args:
        descriptions: of the runs.
        file: file to read and append to.
        processes: number of runs side by side, each with one thread.
        images: True to write a row of images of each run with the lowest seed into a folder beside the file.
        run: makes a run of its description and the file of its row of images, and returns the record.

    Raises:
        RuntimeError: if runs failed, once all others are made.
    """
    missing = []
    for description, record in zip(descriptions, find_records(descriptions, file), strict=True):
        if record is None:
            missing.append(description)
    if not missing:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_off_line(file)
    made_by = provenance()
    lowest_seed = min(description["seed"] for description in descriptions)
    failures = []
    with fresh_processes(processes) as pool:
        names: dict[Future[Record], str] = {}
        for description in missing:
            has_row = images and description["seed"] == lowest_seed
            row = row_file(file.parent, description["task"], description["label"]) if has_row else None
            name = f"{description['task']}, {description['label']}, seed {description['seed']}"
            names[pool.submit(run, description, row)] = name
        try:
            for future in tqdm(as_completed(names), total=len(names), unit=" runs"):
                error = future.exception()
                if error is None:
                    _append(file, future.result() | {"made_by": made_by})
                else:
                    failures.append(f"{names[future]}: {error}")
                    tqdm.write(f"failed: {failures[-1]}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise RuntimeError("\n".join(["runs failed; the others are kept:", *failures]))


def provenance() -> dict[str, str]:
    """Returns what made a run: the commit of this repository, which decides the weights too, and the version of torch.

    A commit with "+" had changes.
    """
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return {"commit": found.stdout.strip() or "not known", "torch": torch.__version__}


def fresh_processes(number: int) -> ProcessPoolExecutor:
    """Returns an executor in which each call has a fresh process with one thread.

    So a call's result is the same whatever was called before it. On Linux the processes are copies of one that has
    imported the libraries, which takes seconds.

    Args:
        number: of processes side by side.
    """
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(number, context, max_tasks_per_child=1, initializer=torch.set_num_threads, initargs=(1,))


def find_records(descriptions: Sequence[Description], file: Path) -> list[Record | None]:
    """Returns the record in a file for each description; None where there is none."""
    records = {key_of(record): record for record in read_records(file)}
    return [records.get(key_of(description)) for description in descriptions]


def read_records(file: Path) -> list[Record]:
    """Returns the records in a file.

    If there is no such file, there are none. A last line that was cut off is left out.

    Raises:
        ValueError: if another line is no JSON.
    """
    records = []
    for number, line in enumerate(_complete_lines(file), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} of {file} is no JSON: {error}; remove it to make that run again"
            ) from error
    return records


def row_file(folder: Path, task: str, label: str) -> Path:
    """Returns the file for the row of images of a run. Its name has no colon, which Windows does not allow.

    Args:
        folder: of the sweep.
        task: of the run.
        label: of the run.
    """
    return folder / "images" / f"{task}-{label.replace(': ', ' - ')}.png"


def _append(file: Path, record: Record) -> None:
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def _complete_lines(file: Path) -> Iterator[str]:
    """Yields the lines that end with a newline."""
    if file.is_file():
        yield from file.read_text(encoding="utf-8").split("\n")[:-1]


def _drop_cut_off_line(file: Path) -> None:
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
