"""The figure of the long runs of :mod:`benchmarks.algorithms`: when does a method please the reward alone?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from benchmarks.algorithms_records import LONG, PRETRAINED, judged, runs_of
from benchmarks.figures import (
    BLUE,
    DOTTED,
    FINE,
    RED,
    Measure,
    common_range,
    describe_seeds,
    explain,
    make_panels,
    name_x,
    running_mean,
    save,
    tidy,
)
from benchmarks.runs import Record
from dpok_gym.shapes.choices import QUALITY_WEIGHT

#: The lines of a panel: their names and colours, and how they are read from a point of a curve.
PROXY, JUDGE = "reward", "judged"
_LINES: dict[str, tuple[str, str, Measure]] = {
    PROXY: ("the reward trained on", BLUE, itemgetter("reward")),
    JUDGE: ("the judge's verdict (alignment + a fifth of the quality)", RED, judged),
}


def over_optimisation(records: Sequence[Record], labels: Sequence[str], path: Path) -> None:
    """Draws the reward and the judge's verdict along the long runs, a panel for each method.

    Both are in standard deviations of an image of the pre-trained model, above its mean.

    Args:
        records: of the long runs, and of the pre-trained model on the task that these are of.
        labels: of the methods.
        path: file to write.

    Raises:
        ValueError: if there are no runs of the pre-trained model with the prompts and the reward of a long run.
    """
    by_label = {label: runs for label in labels if (runs := runs_of(records, label, LONG))}
    columns = min(4, len(by_label))
    figure, panels = make_panels(len(by_label), columns, (10, 1.9), sharex=True, sharey=True)
    has_fit = False
    for axes, (label, all_runs) in zip(panels, by_label.items(), strict=True):
        before = _before(records, all_runs[0])
        runs = [run for run in all_runs if "diverged" not in run]
        is_fit = any(_is_fit(run["curve"]) for run in runs)
        has_fit |= is_fit
        axes.set_title(label + " †" * is_fit, fontsize=9.5, loc="left")
        if runs:
            ends = _over_optimisation(axes, runs, before)
            axes.set_title(f"gap {ends[PROXY] - ends[JUDGE]:+.1f}", fontsize=8.5, loc="right", color="#404040")
        if len(runs) < len(all_runs):
            diverged = f"{len(all_runs) - len(runs)} of {len(all_runs)}: images became NaN"
            axes.text(0.5, 0.06, diverged, fontsize=8.5, ha="center", transform=axes.transAxes)
        axes.axhline(0, **DOTTED)
        start, spread = _level(before, JUDGE)
        axes.axhline((1 + QUALITY_WEIGHT - start) / spread, color=RED, linestyle="--", linewidth=0.9, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        tidy(axes)
    name_x(panels, columns, "images learnt from")
    figure.supylabel("standard deviations above\nthe pre-trained model", fontsize=9, multialignment="center")
    lines = [Line2D([], [], color=colour, linewidth=1.8, label=name) for name, colour, _ in _LINES.values()]
    gaps = [Patch(color=BLUE, alpha=0.2, label="the reward is ahead"), Patch(color=RED, alpha=0.2)]
    gaps[1].set_label("the judge is ahead")
    levels = [Line2D([], [], label=PRETRAINED, **DOTTED)]
    levels.append(Line2D([], [], color=RED, linestyle="--", linewidth=0.9, label="the highest verdict there is"))
    figure.legend(handles=[*lines, *gaps, *levels], loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    runs = [run for runs in by_label.values() for run in runs]
    text = (
        f"Long runs, {describe_seeds(runs)} of each method. Both numbers are above the mean of the pre-trained model's "
        "images, in standard deviations of these. Where the reward rises and the verdict does not, the reward is being "
        "hacked; but no verdict is above the dashed line. Lines: running means over a twentieth of the run. Diamonds, "
        "and the gap: the final evaluation."
    )
    if has_fit:
        text += " †: fits a fixed set of images; x is the share of the fit that is done, in images."
    explain(figure, text)
    save(figure, path, FINE)


def _over_optimisation(axes: Axes, runs: Sequence[Record], before: Sequence[Record]) -> dict[str, float]:
    """Draws both lines of a method and the gap between them; returns their means in the final evaluation."""
    means, ends = {}, {}
    at = common_range([_smoothed(run["curve"], judged)[0] for run in runs])
    for name, (_, colour, measure) in _LINES.items():
        start, spread = _level(before, name)
        smoothed = []
        for run in runs:
            smoothed.append((np.interp(at, *_smoothed(run["curve"], measure)) - start) / spread)
        if len(runs) > 1:
            for line in smoothed:
                axes.plot(at, line, color=colour, linewidth=0.7, alpha=0.6)
        means[name] = np.mean(smoothed, axis=0)
        axes.plot(at, means[name], color=colour, linewidth=1.8)
        finals = [(run["scores"]["training"][name] - start) / spread for run in runs]
        ends[name] = float(np.mean(finals))
        images = [run["curve"][-1]["images"] for run in runs]
        axes.plot(images, finals, "D", color=colour, markersize=5, markeredgecolor="white", zorder=4, clip_on=False)
    for ahead, behind in ((PROXY, JUDGE), (JUDGE, PROXY)):
        where = means[ahead] > means[behind]
        fill: dict[str, Any] = {"color": _LINES[ahead][1], "alpha": 0.2, "linewidth": 0, "interpolate": True}
        axes.fill_between(at, means[ahead], means[behind], where=where, **fill)
    return ends


def _smoothed(curve: Sequence[Mapping[str, float]], measure: Measure) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the numbers of images that a run had learnt from, and its running means over a twentieth of the curve.

    The points at both ends that lack neighbours are left out, but for the first one of a fit, which is a mean already.
    """
    x, points = learnt_from(curve)
    values = np.array([measure(point) for point in points])
    first = int(_is_fit(curve))
    reach = len(points) // 20 // 2
    means = running_mean(values[first:], 2 * reach + 1)
    inner = slice(reach, len(means) - reach)
    return np.append(x[:first], x[first:][inner]), np.append(values[:first], means[inner])


def along_images(curve: Sequence[Mapping[str, float]], images: float, measure: Measure) -> float | None:
    """Returns the running mean of a score when a run had learnt from so many images.

    Args:
        curve: of a run.
        images: their number.
        measure: the score.

    Returns:
        The mean; None if the run had ended before, or fits a fixed set of images.
    """
    if _is_fit(curve) or not curve or curve[-1]["images"] < images:
        return None
    return float(np.interp(images, *_smoothed(curve, measure)))


def learnt_from(curve: Sequence[Mapping[str, float]]) -> tuple[NDArray[Any], list[Mapping[str, float]]]:
    """Returns how many images a run had learnt from at each point of its curve, without the final evaluation.

    A method that draws while it learns has learnt from all images before. One that fits a fixed set has drawn all of
    them before it learns: they count in the share of the fit that is done, as passes with gradient. All points before
    the fit are of the pre-trained model, so they are one, at 0: the mean of them.

    Args:
        curve: of a run.

    Returns:
        The numbers of images, increasing, and the points.
    """
    *points, final = curve
    if not _is_fit(curve):
        return np.array([point["images"] for point in points]), points
    drawing = [point for point in points if point["images"] < final["images"]]
    fit = points[len(drawing) :]
    shares = [point["num_gradient_evaluations"] / final["num_gradient_evaluations"] for point in fit]
    start = {name: float(np.mean([point[name] for point in drawing])) for name in ("reward", "alignment", "quality")}
    return final["images"] * np.array([0.0, *shares]), [start, *fit]


def _is_fit(curve: Sequence[Mapping[str, float]]) -> bool:
    """Returns whether a run learns after it has drawn all images."""
    return len(curve) > 1 and curve[-2]["images"] == curve[-1]["images"]


def _before(records: Sequence[Record], run: Record) -> list[Record]:
    """Returns the runs of the pre-trained model on the task that a long run is of."""
    same = ("prompts", "splits", "reward", "environment")
    before = [record for record in records if record["label"] == PRETRAINED]
    before = [record for record in before if all(record.get(key) == run.get(key) for key in same)]
    if not before:
        raise ValueError(f"there are no runs of the pre-trained model with {run.get('prompts')!r} and {run['reward']}")
    return before


def _level(before: Sequence[Record], name: str) -> tuple[float, float]:
    """Returns the mean and the standard deviation of a score of the pre-trained model's images."""
    scores = [record["scores"]["training"] for record in before]
    return float(np.mean([each[name] for each in scores])), float(np.mean([each[f"{name}_std"] for each in scores]))
