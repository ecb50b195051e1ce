"""The figures of :mod:`benchmarks.compare`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.figures import LEVEL, describe_seeds, explain, save, scale_kl, smooth, tidy
from benchmarks.runs import Record
from benchmarks.statistics import interquartile_band, interquartile_mean

#: The panels of a row of the curves: the score shown, and the cost that it is shown against.
BY_IMAGES = (("reward", "images"), ("alignment", "images"), ("quality", "images"))
BY_COST = (("alignment", "images"), ("alignment", "num_function_evaluations"), ("alignment", "seconds"))
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

#: The label of the runs without training.
PRE_TRAINED = "pre-trained"

#: Points at which a curve is drawn.
_POINTS = 30


def curves(
    records: Sequence[Record], tasks: Sequence[str], path: Path, panels: Sequence[tuple[str, str]] = BY_IMAGES
) -> None:
    """Draws how training images get better, with a row of panels for each task.

    The curves are interquartile means over seeds of running means, with 95 % bootstrap intervals, against the cost of
    the model that drew the images. The final evaluation draws other images, so it stands apart, as a diamond.
    Supervised algorithms first draw with the pre-trained model; they learn in the rest of their curve. A panel ends
    where the second lowest curve does: if one algorithm ruins the images, the others can still be told apart.

    Args:
        records: of the runs.
        tasks: names of the tasks.
        path: file to write.
        panels: the score and the cost of each panel of a row.
    """
    colours = _colours(records)
    figure = Figure(figsize=(3.3 * len(panels), 1.3 + 2.4 * len(tasks)), layout="constrained")
    cells = figure.subplots(len(tasks), len(panels), squeeze=False)
    handles: dict[str, Any] = {}
    for row, task in zip(cells, tasks, strict=True):
        for axes, (score, cost) in zip(row, panels, strict=True):
            ranges = []
            for label, colour in colours.items():
                runs = [record for record in _select(records, label, task) if record["curve"]]
                if runs:
                    ranges.append(_band(axes, runs, score, cost, colour, label))
            scores = [record["scores"]["training"][score] for record in _select(records, PRE_TRAINED, task)]
            level = math.inf
            if scores:
                level = interquartile_mean([scores]).value
                axes.axhline(level, **LEVEL)
            if len(ranges) > 1:
                _set_limits(axes, ranges, level)
            axes.set_xlabel(NAMES[cost])
            axes.set_title(f"{task}: {NAMES[score]}", fontsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            tidy(axes)
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    lines = [handles[label] for label in colours if label in handles]
    names = [label for label in colours if label in handles]
    figure.legend(lines, names, loc="outside upper center", ncols=5, frameon=False)
    explain(
        figure,
        f"Lines and bands: means over {describe_seeds(records)} seeds of the images of the training, with 95 % "
        "intervals. Diamonds: the final evaluation, of other images. Dashed: the pre-trained model in that evaluation.",
    )
    save(figure, path)


def _set_limits(axes: Axes, ranges: Sequence[tuple[float, float]], level: float) -> None:
    """Sets the range of y: the level, and the curves, without the lowest one, from their lowest to highest values."""
    low = min(sorted(low for low, _ in ranges)[1], level)
    high = max(high for _, high in ranges)
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
    figure = Figure(figsize=(10, 1.3 + 2.4 * len(tasks)), layout="constrained")
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
            scale_kl(axes, 10)
            axes.set_title(f"{task}: {NAMES[score]}", fontsize=10)
            tidy(axes)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=5, frameon=False)
    explain(figure, f"Small points: each of {describe_seeds(records)} seeds. Large ones: their interquartile mean.")
    save(figure, path)


def _select(records: Sequence[Record], label: str, task: str) -> list[Record]:
    return [record for record in records if (record["label"], record["task"]) == (label, task)]


def _band(axes: Axes, runs: Sequence[Record], score: str, cost: str, colour: Any, label: str) -> tuple[float, float]:
    """Draws the interquartile mean of the runs' curves, its interval, and that of the final evaluations.

    Returns:
        The lowest and the highest value of both means.
    """
    smoothed = [smooth(run["curve"], itemgetter(score), itemgetter(cost)) for run in runs]
    # Only where all seeds have points.
    first = max(x[0] for x, _ in smoothed)
    last = min(x[-1] for x, _ in smoothed)
    at = np.linspace(first, last, _POINTS)
    middle, low, high = interquartile_band([np.interp(at, x, y) for x, y in smoothed])
    axes.plot(at, middle, color=colour, linewidth=1.8, label=label)
    axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
    x, y = (interquartile_mean([[run["curve"][-1][name] for run in runs]]).value for name in (cost, score))
    axes.plot([x], [y], "D", color=colour, markersize=6, markeredgecolor="white", zorder=4)
    return min(middle.min(), y), max(middle.max(), y)


def _colours(records: Sequence[Record]) -> dict[str, Any]:
    """Returns a colour for each algorithm: first the strong ones of the palette, then the pale ones."""
    labels = dict.fromkeys(record["label"] for record in records)
    palette = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    return dict(zip(labels, palette[::2] + palette[1::2], strict=False))
