"""The recipes on a GPU: ``python -m benchmarks.gpu_recipes --out benchmarks/results/gpu_recipes.json``.

Each file of ``benchmarks/recipes`` trains for two iterations with ``dpok train``, in a process of its own that may take
as much memory as the recipe's GPU has. The model has its full size and random weights. An iteration has as many images
as are drawn side by side, and an image ten steps: neither changes the memory much. The reward is
``jpeg-compressibility``, which has no network. The table has what ``--dry-run`` expects of the same command, the peaks
of the tensors and of the whole process, and the speed of the second iteration.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from agents.cli.dry_run import estimate_memory
from agents.cli.logs import read_log
from agents.cli.run_folder import LOG
from agents.cli.train import parse as parse_train
from agents.cli.train import run as run_train
from agents.common.memory import LIBRARIES, with_margin
from benchmarks.memory import RECIPES
from benchmarks.random_model import save_random
from dpok_gym.models.architecture import find_architecture

#: Options beside those of the recipe.
_SHORT = ["--reward", "jpeg-compressibility", "--held-out-reward", "None", "--num-inference-steps", "10"]
_SHORT += ["--eval-images", "4", "--device", "cuda"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [path.name for path in sorted(RECIPES.glob("*.yaml"))]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the recipes")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for the models")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # this process measures the one
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(RECIPES / options.only[0], options.work)))
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; python -m benchmarks.memory --recipes says what is expected on one")
    settings = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__}
    rows: dict[str, dict[str, float]] = {}
    for name in options.only:
        words = ["--measure", "--only", name, "--work", str(options.work)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_recipes", *words], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            print(f"{name} failed; its error is above")
            continue
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        if options.out:  # after each recipe, as all of them take long
            options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    show(rows, settings)


def measure(recipe: Path, work: Path) -> dict[str, float]:
    """Trains with a recipe on this process's GPU.

    Args:
        recipe: the file, named MODEL-NUMBERgb.yaml after its model and its GPU.
        work: folder for the model, which is written unless it is there.

    Returns:
        In GiB, ``counted`` (see :class:`agents.cli.dry_run.Memory`), ``tensors`` (peak of what torch has given out),
        ``reserved`` (peak of what torch has taken), and ``process`` (the same with the driver and the libraries);
        ``rollout`` and ``update``, in images per second of the second iteration.
    """
    name, gigabytes = recipe.stem.removesuffix("gb").split("-")
    folder = save_random(name, work / f"random-{name}")
    with tempfile.TemporaryDirectory() as out:
        words = ["--config", str(recipe), "--model", str(folder), *_SHORT]
        images = parse_train(words).config.n_envs
        words += ["--images-per-iteration", str(images), "--images", str(2 * images), "--out", out]
        memory = estimate_memory(parse_train(words).config, find_architecture(str(folder)))
        free, total = torch.cuda.mem_get_info()
        limit = float(gigabytes) * 1e9 - LIBRARIES
        torch.cuda.set_per_process_memory_fraction(min(limit, free) / total)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run_train(parse_train(words))
        row = read_log(Path(out) / LOG)[-1]
    peak = torch.cuda.max_memory_reserved()
    # What is taken now, and no tensor's, is the driver's and the libraries'.
    outside = total - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    sizes = {
        "counted": memory.counted,
        "tensors": torch.cuda.max_memory_allocated(),
        "reserved": peak,
        "process": peak + outside,
    }
    speeds = {part: row[f"time/{part}_images_per_second"] for part in ("rollout", "update")}
    return {what: size / 2**30 for what, size in sizes.items()} | speeds


def show(rows: Mapping[str, Mapping[str, float]], settings: Mapping[str, Any]) -> None:
    """Prints the table."""
    table = Table(title=f"{settings['hardware']}, torch {settings['torch']}; memory in GB")
    columns = ("counted", "tensors", "reserved", "process")
    for heading in ("recipe", "expected", *columns, "rollout, images/s", "update, images/s"):
        table.add_column(heading)
    for name, row in rows.items():
        sizes = [round(row[column] * 2**30) for column in columns]
        sizes = [with_margin(sizes[0], "cuda"), *sizes]
        table.add_row(
            name, *(f"{size / 1e9:.1f}" for size in sizes), *(f"{row[part]:.3g}" for part in ("rollout", "update"))
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
