"""The figures of :mod:`benchmarks.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.statistics import interquartile_mean

#: What curves are drawn against.
AXES = {"pictures": "pictures drawn", "network_calls": "denoiser calls", "seconds": "seconds of one core"}

#: Points of a curve.
_POINTS = 30


def curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Alignment in training against pictures, denoiser calls and time, a row of panels for each task."""
    tasks, colours = _tasks(records), _colours(records)
    figure = Figure(figsize=(12, 0.6 + 2.3 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(AXES), squeeze=False, sharey="row")
    for row, task in zip(panels, tasks, strict=True):
        for axes, (name, heading) in zip(row, AXES.items(), strict=True):
            for label, colour in colours.items():
                found = [r["curve"] for r in records if (r["label"], r["task"]) == (label, task) and r["curve"]]
                if found:
                    _band(axes, found, name, colour, label)
            axes.set_xlabel(heading)
            tidy(axes)
        row[0].set_ylabel(f"{task}\nalignment in training")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    save(figure, path)


def frontier(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Where each run ends: reward, alignment and quality against the KL to the pre-trained model."""
    tasks, colours = _tasks(records), _colours(records)
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
    figure.legend(handles, names, loc="outside upper center", ncols=5, frameon=False)
    save(figure, path)


def grid(folder: Path, tasks: Sequence[str], labels: Sequence[str], path: Path) -> None:
    """Pictures of the same seeds of each algorithm, a block for each task; what has none is left out."""
    rows = {
        (task, label): file for task in tasks for label in labels if (file := _row_of(folder, task, label)).is_file()
    }
    if not rows:
        return
    figure = Figure(figsize=(9, 0.5 + 0.95 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    latest = None
    for axes, ((task, label), file) in zip(panels, rows.items(), strict=True):
        axes.imshow(np.asarray(Image.open(file)), interpolation="nearest")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        if task != latest:
            axes.set_title(task, loc="left", fontsize=10, fontweight="bold")
            latest = task
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    save(figure, path)


def _row_of(folder: Path, task: str, label: str) -> Path:
    return folder / f"{task}-{label}.png"


def _band(axes: Axes, found: Sequence[list[dict[str, float]]], name: str, colour: Any, label: str) -> None:
    """Interquartile mean of the seeds' curves, and the range of the seeds."""
    last = min(points[-1][name] for points in found)
    x = np.linspace(max(points[0][name] for points in found), last, _POINTS) if len(found[0]) > 1 else np.array([last])
    y = np.array([np.interp(x, [p[name] for p in points], [p["alignment"] for p in points]) for points in found])
    middle = [interquartile_mean([column]).value for column in y.T]
    axes.plot(x, middle, color=colour, linewidth=1.8, label=label)
    axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.13, linewidth=0)


def _tasks(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(record["task"] for record in records))


def _colours(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    labels = dict.fromkeys(record["label"] for record in records)
    return dict(zip(labels, mpl.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]


def tidy(axes: Axes) -> None:
    """A light grid, and no frame above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
