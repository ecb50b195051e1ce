"""The default ``dpok train`` over several seeds: ``python -m benchmarks.default_training``.

It runs the command as a user would, one process for each seed, and prints the scores, the wall time and the largest
resident memory of the whole process. Finished seeds are kept in ``--out`` and not run again.

Options of ``dpok train`` go behind ``--``; then give the runs a folder of their own. ``--against FOLDER`` compares the
speed with another checkout of this repository. The two run in turn, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpok_gym.utils.files import replacing

ROOT = Path(__file__).resolve().parent.parent


def run(checkout: Path, folder: Path, seed: int, words: Sequence[str] = ()) -> dict[str, Any]:
    """Trains, unless it is done already.

    Args:
        checkout: root of the repository whose code runs.
        folder: gets the run folder, and the record that this function returns.
        seed: of the run.
        words: further arguments of the command.

    Returns:
        The summary of the run, with ``wall_seconds`` and ``peak_gib`` of the process.

    Raises:
        RuntimeError: if the command fails.
    """
    run_folder, record = folder / f"seed{seed}", folder / f"seed{seed}.json"
    if not record.exists():
        # A run that was interrupted begins anew, or its time would be wrong.
        shutil.rmtree(run_folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        # Before version 0.2, the command was in agents/cli.py.
        module = "agents" if (checkout / "agents" / "__main__.py").is_file() else "agents.cli"
        command = [sys.executable, "-m", module, "train", "--seed", str(seed), "--out", str(run_folder.resolve())]
        command += words
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=checkout)  # python -m imports from the working folder first
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} in {checkout} failed with exit code {process.returncode}")
        summary = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))
        summary["wall_seconds"] = time.perf_counter() - started
        summary["peak_gib"] = usage.ru_maxrss / 2**20  # Linux counts in KiB
        with replacing(record) as part:
            part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return json.loads(record.read_text(encoding="utf-8"))


def run_in_turn(
    checkouts: Sequence[Path], folders: Sequence[Path], seed: int, words: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Trains with each checkout; for odd seeds in the opposite order. Returns the records in the order given."""
    order = list(range(len(checkouts)))
    if seed % 2:
        order.reverse()
    records = {index: run(checkouts[index], folders[index], seed, words) for index in order}
    return [records[index] for index in range(len(checkouts))]


def scores_table(records: Sequence[dict[str, Any]]) -> Table:
    """Returns a table of the scores, with a row for each seed."""
    headings = ("aligned before", "after", "quality before", "after", "KL, nats", "images", "seconds", "GiB")
    table = Table("seed", *headings, title="dpok train")
    for record in records:
        table.add_row(
            str(record["seed"]),
            f"{record['aligned_before']:.3f}",
            f"{record['aligned_after']:.3f}",
            f"{record['quality_before']:.3f}",
            f"{record['quality_after']:.3f}",
            f"{record['kl_to_pretrained']:.1f}",
            str(record["pictures"]),
            f"{record['wall_seconds']:.0f}",
            f"{record['peak_gib']:.2f}",
        )
    return table


def compare_times(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> str:
    """Returns what to print about the wall times of pairs of runs: the ratio of each pair, and the median."""
    lines, ratios = [], []
    for mine, other in zip(ours, theirs, strict=True):
        ratios.append(mine["wall_seconds"] / other["wall_seconds"])
        times = f"{mine['wall_seconds']:.1f} s here, {other['wall_seconds']:.1f} s there"
        lines.append(f"seed {mine['seed']}: {times}, ratio {ratios[-1]:.3f}")
    return "\n".join([*lines, f"median ratio {statistics.median(ratios):.3f}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("words", nargs="*", metavar="OPTION", help="of dpok train, behind --")
    parser.add_argument("--out", type=Path, default=Path("runs/default_training"), help="folder of the runs")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, to compare the times with")
    options = parser.parse_args(arguments)
    checkouts, folders = [ROOT], [options.out]
    if options.against is not None:
        checkouts.append(options.against.resolve())
        folders.append(options.out / "against")
    pairs = [run_in_turn(checkouts, folders, seed, options.words) for seed in range(options.seeds)]
    ours = [pair[0] for pair in pairs]
    Console().print(scores_table(ours))
    if options.against is not None:
        theirs = [pair[1] for pair in pairs]
        print(compare_times(ours, theirs))


if __name__ == "__main__":
    main()
