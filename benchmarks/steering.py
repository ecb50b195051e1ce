"""Steering without training, at equal cost: ``python -m benchmarks.steering``.

The pre-trained model of the shapes world draws images that best-of-n, Feynman-Kac steering and SVDD choose with the
reward ``shapes-preference``. The judge's alignment and quality are measured beside it; nothing is chosen by them. The
cost is counted in calls of the denoiser, in decoded and scored images, and in seconds. The rows are written as they
come, and a run that was stopped goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter
from rich.console import Console
from rich.table import Table

from agents.common.evaluation import cycle_prompts, sample_images
from agents.common.steering import SVDD, UNSTEERED, BestOf, FKSteering, Steering
from benchmarks.diversity import pixel_diversity
from benchmarks.figures import explain, save, tidy
from dpok_gym.prompts import load_prompts
from dpok_gym.utils.files import replacing
from dpok_gym.vector_env import DenoisingVectorEnv

#: The prompts, by the name of the task.
TASKS = {"count": "three green squares", "many": "shapes"}
PARTICLES = (2, 4, 8)
NUM_INFERENCE_STEPS = 10

#: The methods by label, as a function of the particles. The differences of two rewards are about 0.5.
METHODS: dict[str, Callable[[int], Steering]] = {
    "best of n": BestOf,
    "FK": lambda k: FKSteering(k, temperature=0.3, resample_every=3),
    "SVDD": SVDD,
}
PRETRAINED = "pre-trained"

#: The panels of the figure: a score and a cost, with their titles.
_PANELS = (
    ("aligned", "denoiser_calls"),
    ("quality", "denoiser_calls"),
    ("reward", "denoiser_calls"),
    ("reward", "seconds"),
)
_TITLES = {
    "aligned": "share fully aligned",
    "quality": "quality",
    "reward": "reward steered by",
    "denoiser_calls": "denoiser calls for an image",
    "seconds": "seconds of one core for an image",
}
_COLOURS = dict(zip(METHODS, ("#555555", "#D55E00", "#0072B2"), strict=True))


def measure(task: str, label: str, steering: Steering, n_images: int, seed: int) -> dict[str, Any]:
    """Draws images and scores them.

    Args:
        task: a key of ``TASKS``.
        label: of the method.
        steering: the method.
        n_images: number of images.
        seed: of the first image.

    Returns:
        The mean of each score, with its standard error over the images as ``"<score>_error"``; ``diversity``; and the
        cost of one image.
    """
    prompts = load_prompts(TASKS[task])
    reward = {"shapes-preference": 1.0, "shapes-alignment": 0.0, "shapes-quality": 0.0}
    env = DenoisingVectorEnv(
        64,
        prompts=prompts,
        reward=reward,
        num_inference_steps=NUM_INFERENCE_STEPS,
        decode_batch_size=16,
        device="cpu",
    )
    started = time.process_time()
    evaluation = sample_images(env.process, env, cycle_prompts(prompts.train, n_images), seed, steering=steering)
    seconds = time.process_time() - started
    assert evaluation.aligned is not None  # the shapes world has a judge
    columns = {
        "aligned": evaluation.aligned.astype(float),
        "quality": evaluation.rewards["shapes-quality"],
        "reward": evaluation.reward,
    }
    row: dict[str, Any] = {"task": task, "label": label, "particles": steering.n_particles, "images": n_images}
    for name, values in columns.items():
        row |= {name: float(values.mean()), f"{name}_error": float(values.std(ddof=1) / np.sqrt(n_images))}
    return row | {
        "seed": seed,
        "diversity": pixel_diversity(evaluation.images, evaluation.prompts),
        "denoiser_calls": env.process.num_function_evaluations / n_images,
        "reward_calls": steering.reward_calls(NUM_INFERENCE_STEPS),
        "seconds": round(seconds / n_images, 3),
    }


def run(n_images: int, seed: int, file: Path) -> list[dict[str, Any]]:
    """Measures what the file does not have yet.

    Args:
        n_images: for each row.
        seed: of the images.
        file: JSON to read and to write.

    Returns:
        The rows.
    """
    wanted: list[tuple[str, str, Steering]] = [(task, PRETRAINED, UNSTEERED) for task in TASKS]
    wanted += [(task, label, make(k)) for k in PARTICLES for task in TASKS for label, make in METHODS.items()]
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    by_key = {tuple(row[name] for name in ("task", "label", "particles", "images", "seed")): row for row in known}
    rows = []
    for task, label, steering in wanted:
        key = (task, label, steering.n_particles, n_images, seed)
        rows.append(by_key.get(key) or measure(task, label, steering, n_images, seed))
        if key not in by_key:
            print(rows[-1], flush=True)
            with replacing(file) as part:
                part.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def make_table(rows: list[dict[str, Any]]) -> Table:
    """Returns the rows as a table, with standard errors."""
    table = Table("prompts", "method", title_justify="left")
    for heading in ("k", "aligned, %", "quality", "reward", "diversity", "denoiser calls", "rewards", "seconds"):
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: (row["task"], row["particles"])):
        table.add_row(
            row["task"],
            row["label"],
            str(row["particles"]),
            f"{100 * row['aligned']:.1f} ± {100 * row['aligned_error']:.1f}",
            f"{row['quality']:.3f} ± {row['quality_error']:.3f}",
            f"{row['reward']:.2f} ± {row['reward_error']:.2f}",
            f"{row['diversity']:.3f}" if row["diversity"] is not None else "",
            f"{row['denoiser_calls']:.0f}",
            str(row["reward_calls"]),
            f"{row['seconds']:.2f}",
        )
    return table


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws each score against the cost of an image; the bars are standard errors.

    Args:
        rows: of :func:`run`.
        path: file to write.
    """
    figure = Figure(figsize=(11, 1.2 + 2.5 * len(TASKS)), layout="constrained")
    panels = figure.subplots(len(TASKS), len(_PANELS), squeeze=False, sharex="col")
    for row_of_panels, task in zip(panels, TASKS, strict=True):
        for axes, (score, cost) in zip(row_of_panels, _PANELS, strict=True):
            for label, colour in _COLOURS.items():
                # All curves begin with the image that is drawn alone.
                points = [row for row in rows if row["task"] == task and row["label"] in (label, PRETRAINED)]
                points.sort(key=lambda row: row[cost])
                x, y, error = ([point[name] for point in points] for name in (cost, score, f"{score}_error"))
                axes.errorbar(x, y, error, color=colour, marker="o", markersize=4, capsize=2, label=label)
            axes.set_xscale("log", base=2)
            if cost == "denoiser_calls":
                axes.set_xticks(sorted({row[cost] for row in rows}))
            axes.xaxis.set_major_formatter(FormatStrFormatter("%.2g"))
            axes.set_title(f"{task}: {_TITLES[score]}", fontsize=10)
            tidy(axes)
    for axes, (_, cost) in zip(panels[-1], _PANELS, strict=True):
        axes.set_xlabel(_TITLES[cost])
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    n_images = next(iter(rows))["images"]
    explain(
        figure,
        f"Each point: the mean of {n_images} images of the pre-trained model, with its standard error. From left to "
        "right 1, 2, 4 and 8 particles; 1 is no steering.",
    )
    save(figure, path)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="for each row")
    parser.add_argument("--seed", type=int, default=9_000_000, help="of the first image")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the file and figure")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = run(options.images, options.seed, options.out / "steering.json")
    Console(width=140).print(make_table(rows))
    draw_figure(rows, options.out / "steering.png")


if __name__ == "__main__":
    main()
