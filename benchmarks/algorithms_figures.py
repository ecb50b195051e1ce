"""The figures of :mod:`benchmarks.algorithms`; that of the long runs is in :mod:`benchmarks.over_optimisation`.

A method has the same colour, marker and line in all of them. Methods without training are grey and hollow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, MultipleLocator

from benchmarks.algorithms_records import PRETRAINED, numbers_of, passes, runs_of, score
from benchmarks.figures import (
    BLUE,
    DOTTED,
    FINE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Measure,
    common_range,
    describe_seeds,
    explain,
    make_panels,
    name_x,
    save,
    scale_kl,
    smooth,
    tidy,
)
from benchmarks.runs import Record
from benchmarks.statistics import mean, mean_band
from benchmarks.training_run import UNTRAINED

_GREY, _FAINT = "#6e6e6e", "#f3f3f3"


class Style(NamedTuple):
    """The look of a method.

    Attributes:
        colour: of its family.
        marker: of the method within the family.
        line: the same, for curves.
    """

    colour: str
    marker: str = "o"
    line: str = "-"


#: The styles of the methods of ``algorithms.yaml``. A variant without its KL is a triangle and dotted.
STYLES = {
    "DPOK": Style(BLUE),
    "DPOK, critic": Style(BLUE, "s", "--"),
    "DPOK, published": Style(BLUE, "D", "-."),
    "DPOK, no KL": Style(BLUE, "^", ":"),
    "DDPO": Style(ORANGE),
    "REINFORCE": Style(ORANGE, "s", "--"),
    "GRPO": Style(GREEN),
    "DiffusionNFT": Style(PURPLE),
    "AWM": Style(PURPLE, "s", "--"),
    "DiffusionDPO": Style(PURPLE, "D", "-."),
    "SFT": Style(SKY),
    "SFT, no KL": Style(SKY, "^", ":"),
    "RWR": Style(SKY, "s", "--"),
    "best of n, distilled": Style(SKY, "D", "-."),
    "DRaFT": Style(INK),
}
_OTHER = Style(RED, "X")  # of a method that is not among them
_UNTRAINED = Style(_GREY)

#: The panels of a row of the costs.
COSTS: dict[str, Measure] = {
    "images drawn": itemgetter("images"),
    "denoiser passes, thousands": lambda point: passes(dict(point)) / 1000,
    "seconds of one core": itemgetter("seconds"),
}

_ALIGNED = score("aligned", scale=100)


def gains(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str], path: Path) -> None:
    """Draws how many images are fully aligned in the end: a panel for each task, a row for each method.

    Args:
        records: of the runs.
        tasks: names of the tasks.
        labels: of the methods, from above; those without training are put below the others.
        path: file to write.
    """
    shown = [record for record in records if record["task"] in tasks and record["label"] in labels]
    trained = [label for label in labels if not _is_untrained(shown, label)]
    order = [*trained, *(label for label in labels if label not in trained)]
    rows = {label: place + 0.5 * (label not in trained) for place, label in enumerate(order)}
    columns = min(3, len(tasks))
    height = 0.19 * len(order) + 0.5
    figure, panels = make_panels(len(tasks), columns, (10, height), sharex=True, sharey=True)
    for axes, task in zip(panels, tasks, strict=True):
        axes.set_title(task, fontsize=10)
        for label, row in rows.items():
            if order.index(label) % 2 == 0:
                axes.axhspan(row - 0.5, row + 0.5, color=_FAINT, linewidth=0, zorder=0)
            _forest_row(axes, row, numbers_of(records, label, task, _ALIGNED), _style(label, label in trained))
        before = numbers_of(records, PRETRAINED, task, _ALIGNED)
        if before:
            axes.axvline(float(np.mean(before)), **DOTTED)
        if 0 < len(trained) < len(order):
            axes.axhline(len(trained) - 0.25, color=_GREY, linewidth=0.8)
        axes.grid(axis="x", color="#dcdcdc", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=8.5)
    panels[0].set_ylim(max(rows.values()) + 0.5, -0.5)
    panels[0].set_yticks(list(rows.values()), list(rows))
    lowest = min(_ALIGNED(record) or 0 for record in shown)
    panels[0].set_xlim(20 * math.floor(lowest / 20) - 3, 103)
    panels[0].xaxis.set_major_locator(MultipleLocator(20))
    name_x(panels, columns, "fully aligned images, %")
    seed = Line2D([], [], marker="o", markersize=3.5, color=_GREY, alpha=0.6, linestyle="", label="a seed")
    solid = Line2D([], [], marker="o", markersize=6, color=_GREY, linewidth=1.6, label="mean, 95 % interval")
    hollow = Line2D([], [], marker="o", markersize=6, color=_GREY, linewidth=1.6, markerfacecolor="white")
    hollow.set_label("the same, without training")
    level = Line2D([], [], label="pre-trained, mean", **DOTTED)
    figure.legend(handles=[seed, solid, hollow, level], loc="outside upper center", ncols=4, frameon=False)
    explain(
        figure,
        f"Share of the final images in which the judge finds nothing wrong, by task; {describe_seeds(shown)} seeds. "
        "Intervals: 95 % bootstrap intervals of the mean over seeds. Colours and markers: of the methods, as in the "
        "other figures. Below the line: the pre-trained model, drawn in some way, without training.",
    )
    save(figure, path, FINE)


def _forest_row(axes: Axes, row: float, values: Sequence[float], style: Style) -> None:
    """Draws the mean of a method with its interval, and below it the seeds, each a little lower than the last."""
    if not values:
        return
    interval = mean(values)
    if math.isfinite(interval.low):
        axes.plot([interval.low, interval.high], [row - 0.14] * 2, color=style.colour, linewidth=1.6, zorder=3)
    face = "white" if style is _UNTRAINED else style.colour
    look: dict[str, Any] = {"markersize": 4.6, "markeredgewidth": 1.1, "markerfacecolor": face, "zorder": 4}
    axes.plot([interval.value], [row - 0.14], style.marker, color=style.colour, **look)
    heights = row + np.linspace(0.16, 0.38, len(values))
    axes.scatter(values, heights, s=7, color=style.colour, alpha=0.6, linewidths=0, zorder=2)


def costs(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str], path: Path) -> None:
    """Draws how the alignment of training images grows with three costs: a row of panels for each task.

    The final evaluation draws other images, so it stands apart. A method that fits a fixed set of images draws all of
    them first.

    Args:
        records: of the runs.
        tasks: names of the tasks.
        labels: of the methods.
        path: file to write.
    """
    widths = [3.0] * len(COSTS) + [0.4 + 0.25 * len(labels)]
    figure = Figure(figsize=(10, 1.4 + 2.3 * len(tasks)), layout="constrained")
    cells = figure.subplots(len(tasks), len(widths), squeeze=False, sharey="row", width_ratios=widths)
    shown: dict[str, list[Record]] = {}
    for row, task in zip(cells, tasks, strict=True):
        by_label = {label: [run for run in runs_of(records, label, task) if run["curve"]] for label in labels}
        for place, (label, runs) in enumerate(by_label.items()):
            if runs:
                shown.setdefault(label, []).extend(runs)
                for axes, cost in zip(row, COSTS.values(), strict=False):
                    _learning_curve(axes, runs, cost, _style(label))
                _final(row[-1], place, numbers_of(runs, label, task, score("alignment")), _style(label))
        before = numbers_of(records, PRETRAINED, task, score("alignment"))
        for axes, name in zip(row, [*COSTS, "final evaluation"], strict=True):
            if before:
                axes.axhline(float(np.mean(before)), **DOTTED)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel(name, fontsize=9)
            tidy(axes)
        for axes in row[:-1]:
            axes.set_xlim(left=0)
        row[-1].set_xlim(-0.7, len(labels) - 0.3)
        row[-1].set_xticks([])
        row[0].set_ylabel("alignment")
        row[0].set_title(task, fontsize=10, loc="left", fontweight="bold")
    handles = [_handle(label, _style(label)) for label in labels if label in shown]
    handles.append(Line2D([], [], label=PRETRAINED, **DOTTED))
    columns = len(handles) if len(handles) <= 7 else math.ceil(len(handles) / 2)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    n_seeds = describe_seeds([run for runs in shown.values() for run in runs])
    explain(
        figure,
        "Lines and bands: alignment of the images drawn in training, as running means over five rollouts, and fewer at "
        f"the ends; means over {n_seeds} seeds with 95 % bootstrap intervals. Right: the final evaluation, "
        "of other images: each seed, and the mean with its interval. A backward pass counts as two passes. A method "
        "that fits a fixed set of images draws all of them first, so by images it rises only in the end.",
    )
    save(figure, path, FINE)


def curves(records: Sequence[Record], tasks: Sequence[str], families: Sequence[Sequence[str]], path: Path) -> None:
    """Draws how the alignment of training images grows with the passes: a row for each task, a panel for each family.

    Args:
        records: of the runs.
        tasks: names of the tasks.
        families: labels of the methods that share a panel.
        path: file to write.
    """
    columns = len(families)
    figure, panels = make_panels(len(tasks) * columns, columns, (10, 1.9), sharey="row", sharex="row")
    shown: list[Record] = []
    for place, (task, labels) in enumerate(itertools.product(tasks, families)):
        axes = panels[place]
        for label in labels:
            runs = [run for run in runs_of(records, label, task) if run["curve"]]
            if runs:
                _learning_curve(axes, runs, COSTS["denoiser passes, thousands"], _style(label))
                shown += runs
        before = numbers_of(records, PRETRAINED, task, score("alignment"))
        if before:
            axes.axhline(float(np.mean(before)), **DOTTED)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        tidy(axes)
        if place % columns == 0:
            axes.set_title(task, fontsize=10, loc="left", fontweight="bold")
            axes.set_ylabel("alignment", fontsize=9)
    for axes in panels[::columns]:  # the panels of a row share it, so it is set when all are drawn
        axes.set_xlim(left=0)
    name_x(panels, columns, "denoiser passes, thousands")
    labels = [label for family in families for label in family]
    handles = [_handle(label, _style(label)) for label in labels if label in {run["label"] for run in shown}]
    handles.append(Line2D([], [], label=PRETRAINED, **DOTTED))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    explain(
        figure,
        "Alignment of the images drawn in training, as running means over five rollouts, and fewer at the ends; means "
        f"over {describe_seeds(shown)} seeds with 95 % bootstrap intervals. A backward pass counts as two passes. A "
        "method that fits a fixed set of images draws all of them first: there its line is that of the pre-trained "
        "model.",
    )
    save(figure, path, FINE)


def _learning_curve(axes: Axes, runs: Sequence[Record], cost: Measure, style: Style) -> None:
    """Draws the mean of the runs' alignment with its interval."""
    smoothed = [smooth(run["curve"], itemgetter("alignment"), cost) for run in runs]
    at = common_range([x for x, _ in smoothed])
    middle, low, high = mean_band([np.interp(at, x, y) for x, y in smoothed])
    look: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "markevery": [-1], "clip_on": False}
    axes.plot(at, middle, color=style.colour, linestyle=style.line, marker=style.marker, linewidth=1.8, **look)
    axes.fill_between(at, low, high, color=style.colour, alpha=0.15, linewidth=0)


def _final(axes: Axes, place: float, values: Sequence[float], style: Style) -> None:
    """Draws the seeds of a method one above the other, and to the right their mean with its interval."""
    axes.scatter([place - 0.15] * len(values), values, s=9, color=style.colour, alpha=0.6, linewidths=0, clip_on=False)
    interval = mean(values)
    if math.isfinite(interval.low):
        axes.plot([place + 0.15] * 2, [interval.low, interval.high], color=style.colour, linewidth=1.6)
    look: dict[str, Any] = {"markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.5, "clip_on": False}
    axes.plot([place + 0.15], [interval.value], style.marker, color=style.colour, zorder=4, **look)


def _mark(axes: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> None:
    """Draws the seeds of a method faintly, and their mean."""
    axes.scatter(x, y, s=12, marker=style.marker, color=style.colour, alpha=0.5, linewidths=0, zorder=3, clip_on=False)
    look: dict[str, Any] = {"markersize": 7.5, "markeredgecolor": "white", "color": style.colour, "zorder": 4}
    axes.plot([np.mean(x)], [np.mean(y)], style.marker, clip_on=False, **look)


def frontier(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str], path: Path) -> None:
    """Draws where each run ends: the aligned share against the KL to the pre-trained model, a panel for each task.

    Args:
        records: of the runs.
        tasks: names of the tasks.
        labels: of the methods that train.
        path: file to write.
    """
    columns = min(2, len(tasks))
    figure, panels = make_panels(len(tasks), columns, (10, 3.3), sharex=True)
    shown: list[Record] = []
    for axes, task in zip(panels, tasks, strict=True):
        for label in labels:
            runs = [run for run in runs_of(records, label, task) if score("kl")(run) is not None]
            if runs:
                x, y = numbers_of(runs, label, task, score("kl")), numbers_of(runs, label, task, _ALIGNED)
                _mark(axes, x, y, _style(label))
                shown += runs
        before = numbers_of(records, PRETRAINED, task, _ALIGNED)
        if before:
            axes.axhline(float(np.mean(before)), **DOTTED)
        axes.set_title(task, fontsize=10)
        axes.set_ylabel("fully aligned, %")
        axes.margins(x=0.08, y=0.12)
        tidy(axes)
    scale_kl(panels[-1], 1)  # all share it; a run may be at 0
    name_x(panels, columns, "KL to the pre-trained model, nats per image")
    handles = [_handle(label, _style(label)) for label in labels if label in {run["label"] for run in shown}]
    handles.append(Line2D([], [], label="pre-trained, mean (its KL is 0)", **DOTTED))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    explain(
        figure,
        f"The final models. Small markers: each of {describe_seeds(shown)} seeds; large ones: their mean. Up and to "
        "the left is better: more aligned images, closer to the pre-trained model.",
    )
    save(figure, path, FINE)


def _is_untrained(records: Sequence[Record], label: str) -> bool:
    return any(record["algorithm"] == UNTRAINED for record in records if record["label"] == label)


def _style(label: str, is_trained: bool = True) -> Style:
    return STYLES.get(label, _OTHER) if is_trained else _UNTRAINED


def _handle(label: str, style: Style) -> Line2D:
    look: dict[str, Any] = {"linestyle": style.line, "linewidth": 1.8, "markersize": 6, "markeredgecolor": "white"}
    return Line2D([], [], color=style.colour, marker=style.marker, label=label, **look)
