"""Parts that the figures of the benchmarks share."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

from agents.cli import plots
from benchmarks.runs import Record
from dpok_gym import make_reward

# Of the Okabe-Ito palette, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
INK = "#262626"

#: The line of the pre-trained model.
LEVEL: dict[str, Any] = {"color": "#8c8c8c", "linestyle": "--", "linewidth": 1.2, "zorder": 1}

#: The same where it must not be taken for the line of a method.
DOTTED: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1.2, "zorder": 1}

#: Dots per inch of figures with many panels, which are read on a phone too.
FINE = 150

#: Points at which a mean of curves is drawn.
_POINTS = 40

#: Rollouts that a running mean goes over.
_WINDOW = 5

#: A number of a point of a curve.
Measure = Callable[[Mapping[str, float]], float]


def explain(figure: Figure, text: str) -> None:
    """Writes below the panels what lines and points mean."""
    width = figure.get_size_inches()[0]
    figure.supxlabel("\n".join(textwrap.wrap(text, int(14.5 * width))), fontsize=8.5, color="#404040")


def describe_seeds(records: Sequence[Record]) -> str:
    """Returns how many seeds there are, such as "3 to 5"."""
    counts = Counter((record["label"], record["task"]) for record in records).values()
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


def tidy(axes: Axes) -> None:
    """Draws a light grid, and no frame above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight")


def make_panels(n: int, columns: int, size: tuple[float, float], **share: Any) -> tuple[Figure, list[Axes]]:
    """Makes a figure with n panels.

    Args:
        n: number of the panels.
        columns: panels side by side.
        size: width of the figure and height of a row, in inches.
        share: arguments of ``Figure.subplots``.
    """
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(size[0], 1.2 + size[1] * rows), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False, **share)
    panels = list(cells.flat)
    for axes in panels[n:]:
        axes.set_visible(False)
    return figure, panels[:n]


def name_x(panels: Sequence[Axes], columns: int, text: str) -> None:
    """Writes the ticks of x below all panels, and its name below the last row."""
    for axes in panels:
        axes.tick_params(axis="x", labelbottom=True, labelsize=8.5)
    for axes in panels[(len(panels) - 1) // columns * columns :]:
        axes.set_xlabel(text, fontsize=9)


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


def grid(files: Mapping[str, Path], task: str, prompts: Sequence[str], path: Path) -> None:
    """Draws the rows of images of a task, one below the other, with ticks; runs that have none are left out.

    Args:
        files: of the rows, by the labels of the runs.
        task: what the figure is called by.
        prompts: of the images of a row.
        path: file to write; it is not written if there are no rows.
    """
    rows = {}
    for label, file in files.items():
        if file.is_file():
            images = np.stack(np.split(np.asarray(Image.open(file)), len(prompts), axis=1))
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
            alignment = make_reward("shapes-alignment")(pixels, list(prompts)).total
            rows[label] = images, (alignment == 1).numpy()
    if rows:
        title = f"{task}: the same seeds and prompts in each row, not selected"
        plots.image_rows(rows, prompts, path, title)


# -------------------------------------------------------------------------------------------------------------- curves


def smooth(points: Sequence[Mapping[str, float]], score: Measure, cost: Measure) -> tuple[NDArray[Any], NDArray[Any]]:
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
    scores = np.array([score(point) for point in points])
    n_rollouts = sum(point["images"] < final["images"] for point in points)
    means = running_mean(scores[:n_rollouts], _WINDOW)
    costs = [cost(point) for point in points]
    by_cost = dict(zip(costs, [*means, *scores[n_rollouts:]], strict=True))
    return np.array(list(by_cost)), np.array(list(by_cost.values()))


def running_mean(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Returns the means of each value and its neighbours, as many before it as after it; at the ends of fewer.

    So the first value stays as it is, and a curve that rises is not lifted there.

    Args:
        values: (n,)
        window: number of values that a mean goes over; an even one counts as the next odd one.
    """
    last = len(values) - 1
    reaches = [min(window // 2, k, last - k) for k in range(len(values))]
    return np.array([values[k - reach : k + reach + 1].mean() for k, reach in enumerate(reaches)])


def common_range(curves: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Returns the places at which a mean of curves is drawn: only where all seeds have points."""
    return np.linspace(max(x[0] for x in curves), min(x[-1] for x in curves), _POINTS)


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
