"""Speed and memory of the published sizes on a GPU: ``python -m benchmarks.gpu --out benchmarks/results/gpu.json``.

It runs :mod:`benchmarks.throughput` with Stable Diffusion 1.5 and :mod:`benchmarks.denoiser` with both denoisers, each
in a process of its own, and one size of each compiled. It compares the figures with :data:`TARGETS`. A command that
ends with an error, as one without enough memory does, is shown, and the others go on.

``--plan`` prints the commands and the targets, and runs nothing; so does a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.throughput import OUTSIDE

BATCH_SIZES = [1, 2, 4, 8, 16, 32]

#: The size that is measured compiled: compilation takes minutes for each size.
COMPILED_SIZE = 16

_DEVICE = ["--device", "cuda", "--dtype", "bfloat16"]
_SD15 = ["benchmarks.throughput", "--model", "random-sd15", *_DEVICE]
_SD15 += ["--num-inference-steps", "10", "--guidance-scale", "7.5"]


def _commands(sizes: Sequence[int], *more: str) -> dict[str, list[str]]:
    """Returns the words of the measurements with each of some sizes."""
    numbers = list(map(str, sizes))
    return {
        "sd15": [*_SD15, "--micro-batch-size", "4", "--images", *numbers, *more],
        "sd15 denoiser": ["benchmarks.denoiser", "--model", "sd15", *_DEVICE, "--batch-sizes", *numbers, *more],
        "sd3 denoiser": ["benchmarks.denoiser", "--model", "sd3-medium", *_DEVICE, "--batch-sizes", *numbers, *more],
    }


#: The words after ``python -m`` of each measurement.
COMMANDS: dict[str, list[str]] = {
    **_commands(BATCH_SIZES),
    "sd15 update": [*_SD15, "--gradient-checkpointing", "--micro-batch-size", "1", "--images", "1"],
    **{f"{name} compiled": words for name, words in _commands([COMPILED_SIZE], "--compile").items()},
}


@dataclass
class Target:
    """A figure that should be reached.

    Attributes:
        what: the figure, in words, with its unit.
        command: the measurement that has it, in :data:`COMMANDS`.
        read: returns the figure of the results of the measurement.
        limit: the bound.
        is_upper: True if the figure must be at most the limit; False for at least.
    """

    what: str
    command: str
    read: Callable[[Mapping[str, Any]], float]
    limit: float
    is_upper: bool

    def describe(self) -> str:
        """Returns the bound in words."""
        return f"{'at most' if self.is_upper else 'at least'} {self.limit:g}"

    def is_met(self, value: float) -> bool:
        """Returns whether a figure keeps to the bound."""
        return value <= self.limit if self.is_upper else value >= self.limit


def _row(results: Mapping[str, Any], size: int) -> Mapping[str, Any]:
    """Returns the row of a number of images, or samples, side by side."""
    return next(row for row in results["rows"] if size in (row.get("images"), row.get("batch_size")))


def _speed(results: Mapping[str, Any]) -> float:
    speed: float = _row(results, COMPILED_SIZE)["images_per_second"]
    return speed


def _share_of_product(results: Mapping[str, Any], size: int, flops: str) -> float:
    return _row(results, size)[flops] / results["ceiling_flops"]


TARGETS = [
    Target(
        "peak GiB of a LoRA's update, micro-batch 1", "sd15 update", lambda found: _row(found, 1)["update_gib"], 8, True
    ),
    Target(
        "share of the matrix product while the compiled denoiser draws 16 images",
        "sd15 compiled",
        lambda found: _share_of_product(found, COMPILED_SIZE, "rollout_flops"),
        0.5,
        False,
    ),
    Target(
        "share of a rollout of 16 outside the networks and the reward",
        "sd15",
        lambda found: _row(found, COMPILED_SIZE)["shares"][OUTSIDE],
        0.03,
        True,
    ),
    Target(
        "compiled speed over eager, rollout of 16",
        "sd15 compiled",
        lambda found: _speed(found) / _speed(found["sd15"]),
        1,
        False,
    ),
    Target(
        "share of the matrix product, Stable Diffusion 3 medium, 16 samples, compiled",
        "sd3 denoiser compiled",
        lambda found: _share_of_product(found, COMPILED_SIZE, "flops"),
        0.5,
        False,
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the commands, prints the targets beside the figures, and writes all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, help="some of the measurements")
    parser.add_argument("--out", type=Path, help="JSON file to write; what it has of other measurements is kept")
    options = parser.parse_args(arguments)
    console, chosen = Console(width=120), options.only or list(COMMANDS)
    if options.plan or not torch.cuda.is_available():
        console.print("this would run:" if options.plan else "there is no GPU here; with one this would run:")
        for name in chosen:
            console.print(f"  python -m {shlex.join(COMMANDS[name])}", soft_wrap=True)
        console.print("and compare:")
        for target in TARGETS:
            console.print(f"  {target.what}: {target.describe()}", soft_wrap=True)
        return
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    for name in chosen:
        console.print(f"python -m {shlex.join(COMMANDS[name])}", soft_wrap=True)
        measured = run(COMMANDS[name])
        if measured is not None:
            results[name] = measured
        if options.out:
            options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(compare(results))


def run(words: Sequence[str]) -> Any:
    """Runs a measurement in a process of its own; returns its results, or None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        finished = subprocess.run([sys.executable, "-m", *words, "--out", str(out)], check=False)
        return None if finished.returncode else json.loads(out.read_text(encoding="utf-8"))


def compare(results: Mapping[str, Any]) -> Table:
    """Returns a table of the targets, each with the figure that was measured."""
    table = Table(title="targets")
    for heading in ("figure", "target", "measured", ""):
        table.add_column(heading)
    for target in TARGETS:
        measured, verdict = "not measured", ""
        if target.command in results:
            # A ratio of two measurements finds the other one beside the rows of its own.
            value = target.read({**results, **results[target.command]})
            measured, verdict = f"{value:.3g}", "met" if target.is_met(value) else "missed"
        table.add_row(target.what, target.describe(), measured, verdict)
    return table


if __name__ == "__main__":
    main()
