"""The recipes on a GPU: ``python -m benchmarks.gpu_recipes --out benchmarks/results/gpu_recipes.json``.

Each file of ``benchmarks/recipes`` trains for two iterations with ``dpok train``, in a process of its own that may take
as much memory as the recipe's GPU has. The model has its full size and random weights, and the command is shorter than
the recipe's own: an iteration has as many images as are drawn side by side, an image ten steps, and the reward is
``jpeg-compressibility``, which has no network. The table has what ``--dry-run`` expects of the same command, the peaks
of the tensors and of the whole process, and the speed of the second iteration. No other process may use the GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
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
    """Measures, prints and writes; ends with an error if a recipe failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [path.name for path in sorted(RECIPES.glob("*.yaml"), key=lambda path: model_and_gigabytes(path.name))]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the recipes")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for the models")
    parser.add_argument("--out", type=Path, help="JSON file to write; what it has of other recipes is kept")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # measure one, in this process
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(RECIPES / options.only[0], options.work)))
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; python -m benchmarks.memory --recipes says what is expected on one")
    rows: dict[str, dict[str, Any]] = {}
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text(encoding="utf-8"))
    failed = []
    for name in options.only:
        words = ["--measure", "--only", name, "--work", str(options.work)]
        command = [sys.executable, "-m", "benchmarks.gpu_recipes", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(name)
            continue
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        if options.out:  # after each recipe, as all of them take long
            ordered = {name: rows[name] for name in names if name in rows}
            options.out.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    show({name: rows[name] for name in names if name in rows})
    if failed:
        sys.exit(f"failed, with the errors above: {', '.join(failed)}")


def model_and_gigabytes(name: str) -> tuple[str, int]:
    """Returns the model that a recipe is for and the memory of its GPU in GB, by its name MODEL-NUMBERgb.yaml."""
    model, _, gigabytes = name.removesuffix("gb.yaml").partition("-")
    return model, int(gigabytes)


def measure(recipe: Path, work: Path) -> dict[str, Any]:
    """Trains with a recipe on this process's GPU.

    Args:
        recipe: the file.
        work: folder for the model, which is written unless it is there.

    Returns:
        ``hardware`` and ``torch``; in GiB, ``counted`` (see :class:`agents.cli.dry_run.Memory`), ``tensors`` (peak of
        what torch has given out), ``reserved`` (peak of what torch has taken), and ``process`` (the same with the
        driver and the libraries); ``rollout`` and ``update``, in images per second of the second iteration.
    """
    name, gigabytes = model_and_gigabytes(recipe.name)
    folder = work / f"random-{name}"
    # In a process of its own: the model would stay in this one's memory for a while.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(save_random, name, folder).result()
    with tempfile.TemporaryDirectory() as out:
        words = ["--config", str(recipe), "--model", str(folder), *_SHORT]
        images = parse_train(words).config.n_envs
        words += ["--images-per-iteration", str(images), "--images", str(2 * images), "--out", out]
        memory = estimate_memory(parse_train(words).config, find_architecture(str(folder)))
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(gigabytes * 1e9 - LIBRARIES, free) / total)
        torch.cuda.reset_peak_memory_stats()
        run_train(parse_train(words))
        row = read_log(Path(out) / LOG)[-1]
    peak = torch.cuda.max_memory_reserved()
    # What is taken now, and not by torch, is the driver's and the libraries'.
    outside = total - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    sizes = {
        "counted": memory.counted,
        "tensors": torch.cuda.max_memory_allocated(),
        "reserved": peak,
        "process": peak + outside,
    }
    speeds = {part: row[f"time/{part}_images_per_second"] for part in ("rollout", "update")}
    software = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__}
    return software | {what: size / 2**30 for what, size in sizes.items()} | speeds


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the table."""
    table = Table(title="memory in GB")
    columns = ("counted", "tensors", "reserved", "process")
    for heading in ("recipe", "hardware", "expected", *columns, "rollout, images/s", "update, images/s"):
        table.add_column(heading)
    for name, row in rows.items():
        sizes = [round(row[column] * 2**30) for column in columns]
        sizes = [with_margin(sizes[0], "cuda"), *sizes]
        speeds = (f"{row[part]:.3g}" for part in ("rollout", "update"))
        table.add_row(name, row["hardware"], *(f"{size / 1e9:.1f}" for size in sizes), *speeds)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
