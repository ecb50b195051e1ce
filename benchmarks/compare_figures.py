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

from benchmarks.statistics import interquartile_band, interquartile_mean

#: The panels of the curves: what is shown, against what.
PANELS = (
    ("alignment", "pictures"),
    ("alignment", "network_calls"),
    ("alignment", "seconds"),
    ("reward", "pictures"),
    ("quality", "pictures"),
)
NAMES = {
    "alignment": "alignment",
    "reward": "reward trained on",
    "quality": "quality",
    "pictures": "pictures drawn",
    "network_calls": "denoiser calls",
    "seconds": "seconds of one core",
}

#: Points of a curve, and how many rollouts their running mean goes over.
_POINTS, _WINDOW = 30, 5


def curves(records: Sequence[dict[str, Any]], tasks: Sequence[str], path: Path) -> None:
    """How training pictures get better, a row of panels for each task.

    Each point is of the model that had cost so much: interquartile means and 95 % bootstrap intervals over seeds, of
    running means. Supervised algorithms draw with the pre-trained model first; the rest of their curve is learning.
    A panel ends where the second lowest curve does: if one algorithm ruins the pictures, the others can be told apart.
    """
    colours = _colours(records)
    figure = Figure(figsize=(3.6 * len(PANELS), 0.6 + 2.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(PANELS), squeeze=False)
    for row, task in zip(panels, tasks, strict=True):
        for axes, (shown, against) in zip(row, PANELS, strict=True):
            middles = []
            for label, colour in colours.items():
                found = [r["curve"] for r in records if (r["label"], r["task"]) == (label, task) and r["curve"]]
                if found:
                    middles.append(_band(axes, found, shown, against, colour, label))
            if len(middles) > 1:
                low, high = sorted(middle.min() for middle in middles)[1], max(middle.max() for middle in middles)
                axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
            axes.set_xlabel(NAMES[against])
            axes.set_title(f"{task}: {NAMES[shown]}", fontsize=10)
            tidy(axes)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    save(figure, path)


def frontier(records: Sequence[dict[str, Any]], tasks: Sequence[str], path: Path) -> None:
    """Where each run ends: reward, alignment and quality against the KL to the pre-trained model."""
    colours = _colours(records)
    shown = {"reward": "reward trained on", "aligned": "share fully aligned", "quality": "quality"}
    figure = Figure(figsize=(12, 0.6 + 2.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(shown), squeeze=False)
    for row, task in zip(panels, tasks, strict=True):
        for axes, (name, heading) in zip(row, shown.items(), strict=True):
            for label, colour in colours.items():
                found = [r["scores"]["training"] for r in records if (r["label"], r["task"]) == (label, task)]
                if found:
                    x, y = [it["kl"] for it in found], [it[name] for it in found]
                    axes.scatter(x, y, s=14, color=colour, alpha=0.45, linewidths=0)
                    middle = [interquartile_mean([values]).value for values in (x, y)]
                    axes.scatter(*middle, s=64, color=colour, edgecolors="white", label=label, zorder=3)
            axes.set_xscale("symlog", linthresh=10)
            axes.set_xlim(left=-1)
            axes.set_xlabel("KL to pre-trained, nats per picture")
            axes.set_ylabel(heading)
            axes.set_title(task, fontsize=10)
            tidy(axes)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=6, frameon=False)
    save(figure, path)


def grid(folder: Path, task: str, labels: Sequence[str], path: Path) -> None:
    """Pictures of the same seeds of each algorithm; those that have none are left out."""
    rows = {label: file for label in labels if (file := folder / f"{task}-{label}.png").is_file()}
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


def _band(
    axes: Axes, found: Sequence[list[dict[str, float]]], shown: str, against: str, colour: Any, label: str
) -> NDArray:
    """Draws the interquartile mean of the seeds' curves, which is returned, and its interval."""
    seeds = [_smooth(points, shown, against) for points in found]
    x = np.linspace(max(at[0] for at, _ in seeds), min(at[-1] for at, _ in seeds), _POINTS)
    middle, low, high = interquartile_band([np.interp(x, at, y) for at, y in seeds])
    axes.plot(x, middle, color=colour, linewidth=1.8, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    return middle


def _smooth(points: Sequence[dict[str, float]], shown: str, against: str) -> tuple[NDArray, NDArray]:
    """One run's curve, increasing in x: a running mean of what is drawn, and of what is fitted thereafter all points.

    Of points at the same x, as a fit's are against pictures, the last one counts.
    """
    y = np.array([point[shown] for point in points])
    drawing = sum(point["pictures"] < points[-1]["pictures"] for point in points)
    reach = _WINDOW // 2
    means = [y[max(k - reach, 0) : min(k + reach + 1, drawing)].mean() for k in range(drawing)]
    last = {point[against]: value for point, value in zip(points, [*means, *y[drawing:]], strict=True)}
    return np.array(list(last)), np.array(list(last.values()))


def _colours(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    labels = dict.fromkeys(record["label"] for record in records)
    return dict(zip(labels, mpl.colormaps["tab20"].colors[::2] + mpl.colormaps["tab20"].colors[1::2], strict=False))  # type: ignore[attr-defined]


def tidy(axes: Axes) -> None:
    """A light grid, and no frame above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
