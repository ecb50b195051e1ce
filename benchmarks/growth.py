"""The costs of a run as it grows: ``python -m benchmarks.growth``.

``dpok train`` draws more images, from more prompts, or more of them side by side. For each size it prints the
processor's time and the largest memory of the whole process, and what each further image, prompt or environment costs.
These costs are the slopes: if they stay the same from row to row, the run grows in proportion, and no faster. Images
and environments grow on the mixture world, prompts on the shapes: ten random words each, all distinct.

It takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import prompt_files
from benchmarks.large_run import Cost, train

SIZES = {"images": (1_000, 10_000, 100_000), "prompts": (1, 100, 10_000), "environments": (1, 64, 4_096)}
#: Images of a run whose environments or prompts grow.
_MIXTURE_IMAGES, _SHAPES_IMAGES = 8_192, 512


def words(what: str, size: int, folder: Path) -> list[str]:
    """Returns the arguments of ``dpok train`` for a run of some size.

    Args:
        what: a key of :data:`SIZES`.
        size: how many of them.
        folder: for files that the run reads.
    """
    common = ["--device", "cpu", "--eval-images", "4", "--num-inference-steps", "2", "--precision", "float32"]
    if what == "prompts":
        path = folder / f"{size}.txt"
        prompt_files.write(path, size)
        world = ["--env", "DPOK-Shapes-v0", "--prompts", str(path), "--reward", "jpeg-compressibility"]
        return [*common, *world, "--held-out-reward", "jpeg-compressibility", "--images", str(_SHAPES_IMAGES)]
    mixture = [*common, "--env", "DPOK-Mixture-v0"]
    if what == "images":
        return [*mixture, "--images", str(size), "--n-envs", "100", "--images-per-iteration", "1000"]
    per_iteration = str(_MIXTURE_IMAGES // 2)
    return [*mixture, "--images", str(_MIXTURE_IMAGES), "--n-envs", str(size), "--images-per-iteration", per_iteration]


def measure(what: str, sizes: Sequence[int]) -> Iterator[tuple[int, Cost]]:
    """Yields the costs of runs of these sizes."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            yield size, train(Path(folder) / "run", words(what, size, Path(folder)))


def show(what: str, costs: Sequence[tuple[int, Cost]]) -> None:
    """Prints the costs, and those of each further one since the row before."""
    table = Table(what, "processor, s", "peak, MiB", "each further one: ms", "each further one: KiB")
    before: tuple[int, Cost] | None = None
    for size, cost in costs:
        slopes = ["", ""]
        if before is not None:
            more = size - before[0]
            slopes = [
                f"{1e3 * (cost.processor_seconds - before[1].processor_seconds) / more:.2f}",
                f"{2**20 * (cost.peak_gib - before[1].peak_gib) / more:.1f}",
            ]
        table.add_row(f"{size:,}", f"{cost.processor_seconds:.1f}", f"{2**10 * cost.peak_gib:.0f}", *slopes)
        before = size, cost
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the runs and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*SIZES, []], help="what grows; all of them if none is given")
    options = parser.parse_args(arguments)
    for what in options.what or SIZES:
        show(what, list(measure(what, SIZES[what])))


if __name__ == "__main__":
    main()
