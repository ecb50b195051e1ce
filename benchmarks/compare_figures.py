"""The figures of :mod:`benchmarks.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from benchmarks.runs import Record, find_row_file
from benchmarks.statistics import Numbers, interquartile_band, interquartile_mean

#: The panels of the curves: the score shown, and the cost that it is shown against.
PANELS = (
    ("alignment", "images"),
    ("alignment", "num_function_evaluations"),
    ("alignment", "seconds"),
    ("reward", "images"),
    ("quality", "images"),
)
NAMES = {
    "alignment": "alignment",
    "aligned": "share fully aligned",
    "reward": "reward trained on",
    "quality": "quality",
    "images": "images drawn",
    "num_function_evaluations": "denoiser calls",
    "seconds": "seconds of one core",
}
#: The panels of the frontier.
SCORES = ("reward", "aligned", "quality")

#: Points at which a curve is drawn, and rollouts that a running mean goes over.
_POINTS, _WINDOW = 30, 5


def curves(records: Sequence[Record], tasks: Sequence[str], path: Path) -> None:
    """Draws how training images get better, with a row of panels for each task.

    The curves are interquartile means over seeds of running means, with 95 % bootstrap intervals, against the cost of
    the model that drew the images. Supervised algorithms first draw with the pre-trained model; they learn in the rest
    of their curve. A panel ends where the second lowest curve does: if one algorithm ruins the images, the others can
    still be told apart.

    Args:
        records: of the runs.
        tasks: names of the tasks.
        path: file to write.
    """
    colours = _colours(records)
    figure = Figure(figsize=(3.6 * len(PANELS), 0.6 + 2.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(PANELS), squeeze=False)
    for row, task in zip(panels, tasks, strict=True):
        for axes, (score, cost) in zip(row, PANELS, strict=True):
            middles = []
            for label, colour in colours.items():
                by_seed = [record["curve"] for record in _select(records, label, task) if record["curve"]]
                if by_seed:
                    middles.append(_band(axes, by_seed, score, cost, colour, label))
            if len(middles) > 1:
                _set_limits(axes, middles)
            axes.set_xlabel(NAMES[cost])
            axes.set_title(f"{task}: {NAMES[score]}", fontsize=10)
            tidy(axes)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    save(figure, path)


def _set_limits(axes: Axes, middles: Sequence[Numbers]) -> None:
    """Sets the range of y to that of the curves without the lowest one."""
    low = sorted(middle.min() for middle in middles)[1]
    high = max(middle.max() for middle in middles)
    margin = 0.1 * (high - low)
    axes.set_ylim(low - margin, high + margin)


def frontier(records: Sequence[Record], tasks: Sequence[str], path: Path) -> None:
    """Draws where each run ends: reward, alignment and quality against the KL to the pre-trained model.

    Args:
        records: of the runs.
        tasks: names of the tasks.
        path: file to write.
    """
    colours = _colours(records)
    figure = Figure(figsize=(12, 0.6 + 2.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(SCORES), squeeze=False)
    for row, task in zip(panels, tasks, strict=True):
        for axes, score in zip(row, SCORES, strict=True):
            for label, colour in colours.items():
                results = [record["scores"]["training"] for record in _select(records, label, task)]
                if results:
                    x = [result["kl"] for result in results]
                    y = [result[score] for result in results]
                    axes.scatter(x, y, s=14, color=colour, alpha=0.45, linewidths=0)
                    middle = [interquartile_mean([values]).value for values in (x, y)]
                    axes.scatter(*middle, s=64, color=colour, edgecolors="white", label=label, zorder=3)
            # Linear up to 10 nats: the pre-trained model is at 0.
            axes.set_xscale("symlog", linthresh=10)
            axes.set_xlim(left=-1)
            axes.set_xlabel("KL to pre-trained, nats per image")
            axes.set_ylabel(NAMES[score])
            axes.set_title(task, fontsize=10)
            tidy(axes)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=6, frameon=False)
    save(figure, path)


def grid(folder: Path, task: str, labels: Sequence[str], path: Path) -> None:
    """Draws the rows of images of a task, one below the other; runs that have none are left out.

    Args:
        folder: of the sweep.
        task: of the runs.
        labels: of the runs.
        path: file to write; it is not written if there are no rows.
    """
    files = {label: find_row_file(folder, task, label) for label in labels}
    rows = {label: file for label, file in files.items() if file is not None}
    if not rows:
        return
    figure = Figure(figsize=(9, 0.4 + 0.95 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (label, file) in zip(panels, rows.items(), strict=True):
        axes.imshow(np.asarray(Image.open(file)), interpolation="nearest")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    panels[0].set_title(task, loc="left", fontsize=10, fontweight="bold")
    save(figure, path)


def _select(records: Sequence[Record], label: str, task: str) -> list[Record]:
    return [record for record in records if (record["label"], record["task"]) == (label, task)]


def _band(
    axes: Axes, by_seed: Sequence[list[dict[str, float]]], score: str, cost: str, colour: Any, label: str
) -> Numbers:
    """Draws the interquartile mean of the seeds' curves and its interval; returns the mean at the points drawn."""
    smooth = [_smooth(points, score, cost) for points in by_seed]
    # Only where all seeds have points.
    first = max(x[0] for x, _ in smooth)
    last = min(x[-1] for x, _ in smooth)
    at = np.linspace(first, last, _POINTS)
    middle, low, high = interquartile_band([np.interp(at, x, y) for x, y in smooth])
    axes.plot(at, middle, color=colour, linewidth=1.8, label=label)
    axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
    return middle


def _smooth(points: Sequence[dict[str, float]], score: str, cost: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Smooths one run's curve: a running mean over the rollouts; the points of a fit stay as they are.

    A fit draws no images, so all of its points have the same number of them. Of points at the same cost the last one
    counts.

    Args:
        points: of the curve.
        score: the score shown.
        cost: the cost that it is shown against.

    Returns:
        The costs, increasing, and the scores.
    """
    scores = np.array([point[score] for point in points])
    n_rollouts = sum(point["images"] < points[-1]["images"] for point in points)
    reach = _WINDOW // 2
    means = []
    for k in range(n_rollouts):
        window = scores[max(k - reach, 0) : min(k + reach + 1, n_rollouts)]
        means.append(window.mean())
    costs = [point[cost] for point in points]
    by_cost = dict(zip(costs, [*means, *scores[n_rollouts:]], strict=True))
    return np.array(list(by_cost)), np.array(list(by_cost.values()))


def _colours(records: Sequence[Record]) -> dict[str, Any]:
    """Returns a colour for each algorithm: first the strong ones of the palette, then the pale ones."""
    labels = dict.fromkeys(record["label"] for record in records)
    palette = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    return dict(zip(labels, palette[::2] + palette[1::2], strict=False))


def tidy(axes: Axes) -> None:
    """Draws a light grid, and no frame above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
