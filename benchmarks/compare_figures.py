"""The figures of :mod:`benchmarks.compare`."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

from agents.cli import plots
from benchmarks.runs import Record, find_row_file
from benchmarks.statistics import interquartile_band, interquartile_mean
from dpok_gym import make_reward

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

#: The line of the pre-trained model.
LEVEL: dict[str, Any] = {"color": "#8c8c8c", "linestyle": "--", "linewidth": 1.2, "zorder": 1}

#: Points at which a curve is drawn, and rollouts that a running mean goes over.
_POINTS, _WINDOW = 30, 5


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
        f"Lines and bands: means over {_describe_seeds(records)} seeds of the images of the training, with 95 % "
        "intervals. Diamonds: the final evaluation, of other images. Dashed: the pre-trained model in that evaluation.",
    )
    save(figure, path)


def _describe_seeds(records: Sequence[Record]) -> str:
    """Returns how many seeds there are, such as "3 to 5"."""
    counts = Counter((record["label"], record["task"]) for record in records).values()
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


def explain(figure: Figure, text: str) -> None:
    """Writes below the panels what lines and points mean."""
    width = figure.get_size_inches()[0]
    figure.supxlabel("\n".join(textwrap.wrap(text, int(14.5 * width))), fontsize=8.5, color="#404040")


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
    explain(figure, f"Small points: each of {_describe_seeds(records)} seeds. Large ones: their interquartile mean.")
    save(figure, path)


def scale_kl(axes: Axes, linear: float) -> None:
    """Makes the x axis one of KLs: linear up to some nats, as the pre-trained model is at 0, and then logarithmic."""
    axes.set_xscale("symlog", linthresh=linear)
    axes.set_xlabel("KL to pre-trained, nats per image")
    high = axes.get_xlim()[1]
    # Room for the points at 0, whose halves would else be cut off.
    axes.set_xlim(-0.25 * linear, 1.3 * high)
    powers = [10.0**k for k in range(round(np.log10(linear)), int(np.log10(max(high, linear))) + 1)]
    ticks = [0.0, *powers]
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def grid(folder: Path, task: str, labels: Sequence[str], prompts: Sequence[str], path: Path) -> None:
    """Draws the rows of images of a task, one below the other, with ticks; runs that have none are left out.

    Args:
        folder: of the sweep.
        task: of the runs.
        labels: of the runs.
        prompts: of the images of a row.
        path: file to write; it is not written if there are no rows.
    """
    rows = {}
    for label in labels:
        file = find_row_file(folder, task, label)
        if file is not None:
            images = np.stack(np.split(np.asarray(Image.open(file)), len(prompts), axis=1))
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
            alignment = make_reward("shapes-alignment")(pixels, list(prompts)).total
            rows[label] = images, (alignment == 1).numpy()
    if rows:
        title = f"{task}: the same seeds and prompts in each row, not selected"
        plots.image_rows(rows, prompts, path, title)


def label_points(axes: Axes, points: Sequence[tuple[float, float, str]], renderer: Any) -> None:
    """Writes a text beside each point, where it hides no other text and no point, if there is such a place.

    Args:
        axes: of the points; the layout of its figure must be known.
        points: x, y and text of each.
        renderer: of the figure.
    """
    places = axes.transData.transform([(x, y) for x, y, _ in points])
    radius = 5 * axes.figure.dpi / 72  # of a marker
    taken = [Bbox.from_extents(*(place - radius), *(place + radius)) for place in places]
    directions = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1.6), (0, -1.6), (2.5, 0), (-2.5, 0))
    for x, y, text in points:
        for across, up in directions:
            style: dict[str, Any] = {
                "ha": ("right", "center", "left")[int(np.sign(across)) + 1],
                "va": ("top", "center", "bottom")[int(np.sign(up)) + 1],
            }
            label = axes.annotate(text, (x, y), (5 * across, 4 * up), textcoords="offset points", fontsize=8, **style)
            box = label.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            label = axes.annotate(text, (x, y), (5, 4), textcoords="offset points", fontsize=8)
        taken.append(label.get_window_extent(renderer))


def _select(records: Sequence[Record], label: str, task: str) -> list[Record]:
    return [record for record in records if (record["label"], record["task"]) == (label, task)]


def _band(axes: Axes, runs: Sequence[Record], score: str, cost: str, colour: Any, label: str) -> tuple[float, float]:
    """Draws the interquartile mean of the runs' curves, its interval, and that of the final evaluations.

    Returns:
        The lowest and the highest value of both means.
    """
    smooth = [_smooth(run["curve"], score, cost) for run in runs]
    # Only where all seeds have points.
    first = max(x[0] for x, _ in smooth)
    last = min(x[-1] for x, _ in smooth)
    at = np.linspace(first, last, _POINTS)
    middle, low, high = interquartile_band([np.interp(at, x, y) for x, y in smooth])
    axes.plot(at, middle, color=colour, linewidth=1.8, label=label)
    axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
    x, y = (interquartile_mean([[run["curve"][-1][name] for run in runs]]).value for name in (cost, score))
    axes.plot([x], [y], "D", color=colour, markersize=6, markeredgecolor="white", zorder=4)
    return min(middle.min(), y), max(middle.max(), y)


def _smooth(points: Sequence[dict[str, float]], score: str, cost: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Smooths one run's curve: a running mean over the rollouts; the points of a fit stay as they are.

    A fit draws no images, so all of its points have the same number of them. Of points at the same cost the last one
    counts. The last point of a curve is the final evaluation, which is left out.

    Args:
        points: of the curve.
        score: the score shown.
        cost: the cost that it is shown against.

    Returns:
        The costs, increasing, and the scores.
    """
    *points, final = points
    scores = np.array([point[score] for point in points])
    n_rollouts = sum(point["images"] < final["images"] for point in points)
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
