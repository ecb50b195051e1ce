"""Figures of images. They are drawn without pyplot, so nothing here depends on a display or on other figures."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from numpy.typing import NDArray

from agents.common.evaluation import Evaluation, shown_images
from dpok_gym.choices.agreement import wilson_interval
from dpok_gym.rewards.preference.fit import Measured
from dpok_gym.utils.files import replacing

INK, FAINT = "#262626", "#8c8c8c"
#: Blue, orange and (for aligned images) green of the Okabe-Ito palette, which colour-blind people can tell apart.
REWARD, KL, ALIGNED, NOT_ALIGNED = "#0072B2", "#D55E00", "#009E73", "#c4c4c4"

#: Colours of series, of the same palette.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_CELL = 1.05  # inches, of an image with its margin


def image_grid(
    images: NDArray[np.uint8],
    labels: Sequence[str],
    path: str | Path,
    title: str = "",
    aligned: NDArray[np.bool_] | None = None,
    columns: int = 8,
) -> Path:
    """Draws images with a label above each.

    Args:
        images: (N, H, W, 3) uint8.
        labels: N texts.
        path: file to write.
        title: text above the figure.
        aligned: (N,) True for the images that get the frame and the tick of a fully aligned one; None for no frames.
        columns: images side by side.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    wrapped = [wrap_caption(label) for label in labels]
    lines = max(text.count("\n") + 1 for text in wrapped)
    figure, cells = make_cells(rows, columns, title, gap=0.16 * lines, legend=aligned is not None)
    for k, axes in enumerate(cells.flat):
        if k >= len(images):
            axes.set_visible(False)
            continue
        _show(axes, images[k], _entry(aligned, k))
        axes.set_title(wrapped[k], fontsize=7, color=INK, pad=4, parse_math=False)
    return save(figure, path)


def image_rows(
    rows: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.bool_] | None]],
    captions: Sequence[str],
    path: str | Path,
    title: str = "",
) -> Path:
    """Draws rows of images of the same prompts, one below the other.

    Args:
        rows: by the text beside the row, (N, H, W, 3) uint8 and (N,), True for the images that get the tick of a fully
            aligned one, or None for no ticks.
        captions: the prompts of the N columns; a single one for all stands in the title.
        path: file to write.
        title: text above the figure.
    """
    if len(set(captions)) == 1:
        title, captions = "\n".join(part for part in (title, f"“{captions[0]}”") if part), [""] * len(captions)
    wrapped = [wrap_caption(text) for text in captions]
    gap = 0.16 * max(text.count("\n") + 1 for text in wrapped) if any(wrapped) else 0.0
    judged = any(aligned is not None for _, aligned in rows.values())
    figure, cells = make_cells(len(rows), len(captions), title, gap, legend=judged, margin=1.35, block=len(rows))
    for axes_of_row, (label, (images, aligned)) in zip(cells, rows.items(), strict=True):
        text = wrap_caption(label)
        if aligned is not None:
            text += f"\n{aligned.sum()} of {len(images)} aligned"
        style: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 8, "color": INK}
        axes_of_row[0].text(-0.12, 0.5, text, transform=axes_of_row[0].transAxes, **style)
        for k, axes in enumerate(axes_of_row):
            _show(axes, images[k], _entry(aligned, k))
    for axes, text in zip(cells[0], wrapped, strict=True):
        axes.set_title(text, fontsize=7, color=INK, pad=4, parse_math=False)
    return save(figure, path)


def before_after(
    before: Evaluation,
    after: Evaluation,
    path: str | Path,
    title: str = "",
    labels: tuple[str, str] = ("pre-trained", "fine-tuned"),
    columns: int = 8,
    blocks: int = 2,
) -> Path:
    """Draws images of the same seeds and prompts before and after training, one above the other.

    Args:
        before: N images.
        after: the images of the same prompts and seeds.
        path: file to write.
        title: text above the figure.
        labels: texts beside the two rows.
        columns: pairs side by side; at most ``blocks * columns`` are shown, see
            :func:`~agents.common.evaluation.shown_images`.
        blocks: pairs of rows.

    Raises:
        ValueError: if the prompts differ.
    """
    if before.prompts != after.prompts:
        raise ValueError("the two evaluations must be of the same prompts in the same order")
    chosen = shown_images(before.prompts, blocks * columns)
    shown = len(chosen)
    columns = min(columns, shown)
    blocks = math.ceil(shown / columns)
    captions, gap = [""] * shown, 0.0
    if len(set(before.prompts)) == 1:  # which then stands in the title
        title = "\n".join(part for part in (title, f"“{before.prompts[0]}”") if part)
    else:
        captions = [wrap_caption(before.prompts[k]) for k in chosen]
        gap = 0.16 * max(text.count("\n") + 1 for text in captions)
    judged = after.aligned is not None
    figure, cells = make_cells(2 * blocks, columns, title, gap, legend=judged, margin=1.35, block=2)
    for axes in cells.flat:
        axes.set_visible(False)
    for row, (evaluation, label) in enumerate(zip((before, after), labels, strict=True)):
        for k, index in enumerate(chosen):
            axes = cells[2 * (k // columns) + row, k % columns]
            axes.set_visible(True)
            _show(axes, evaluation.images[index], _entry(evaluation.aligned, index))
            if row == 0:
                axes.set_title(captions[k], fontsize=7, color=INK, pad=4, parse_math=False)
        text = f"{label}\n{_score(evaluation)}\n(of {len(evaluation)})"
        for axes in cells[row::2, 0]:
            axes.text(-0.12, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=8, color=INK)
    return save(figure, path)


def scatter(
    panels: Mapping[str, NDArray[np.float64]], prompts: Sequence[str], path: str | Path, reach: float, title: str = ""
) -> Path:
    """Draws where images lie in a plane, a panel beside the other.

    Args:
        panels: the positions (N, 2) of the images of each panel, by its title.
        prompts: of the N images; each prompt has its colour.
        path: file to write.
        reach: the panels go from -reach to reach.
        title: text above the figure.
    """
    figure = Figure(figsize=(2.9 * len(panels) + 0.2, 4.5), layout="constrained")
    cells = figure.subplots(1, len(panels), squeeze=False, subplot_kw={"box_aspect": 1})[0]
    names, kinds = list(dict.fromkeys(prompts)), np.array(prompts)
    for axes, (label, points) in zip(cells, panels.items(), strict=True):
        for name, colour in zip(names, itertools.cycle(_COLOURS)):
            axes.scatter(*points[kinds == name].T, s=7, color=colour, alpha=0.6, linewidths=0, label=f"“{name}”")
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="first coordinate of the position")
        axes.set_title(label, fontsize=9, color=INK)
        axes.axhline(0, color="#e6e6e6", linewidth=0.8, zorder=0)
        axes.axvline(0, color="#e6e6e6", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    cells[0].set_ylabel("second coordinate")
    handles, labels = cells[0].get_legend_handles_labels()
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK, "markerscale": 2}
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(names), **style)
    text = f"each point is one of {len(prompts)} images, of the same noise in each panel"
    legend.set_title(text, FontProperties(size=8))
    figure.suptitle(title, color=INK, fontsize=11, parse_math=False)
    return save(figure, path)


def calibration(measured: Measured, path: str | Path, title: str = "") -> Path:
    """Draws how often people chose a reward's favourite, against the probability that the reward gave to it.

    Args:
        measured: agreement with choices that the reward was not learned from.
        path: file to write.
        title: text above the figure.
    """
    figure = Figure(figsize=(4.6, 4.9), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    predicted, observed, counts = map(np.array, (measured.predicted, measured.observed, measured.counts))
    ends = [wilson_interval(round(share * n), n) for share, n in zip(measured.observed, measured.counts, strict=True)]
    interval = np.abs(np.transpose(ends) - observed).clip(min=0)  # (2, bins): below and above
    axes.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1, linestyle="--", label="as predicted")
    style: dict[str, Any] = {"fmt": "o-", "color": REWARD, "linewidth": 1.8, "markersize": 4, "elinewidth": 1}
    axes.errorbar(predicted, observed, interval, label="observed, with 95 % interval", **style)
    axes.legend(loc="lower right", frameon=False, fontsize=8, labelcolor=INK)
    axes.set(ylabel="share of the choices that fell on it", xlim=(0.49, 1.01))
    below.bar(predicted, counts, width=0.03, color=REWARD)
    below.set(xlabel="probability that the reward gives its favourite of two", ylabel="choices")
    for panel in (axes, below):
        panel.spines[["top", "right"]].set_visible(False)
    low, high = measured.interval
    scores = f"agreement {measured.agreement:.1%} ({low:.0%} to {high:.0%})\n"
    scores += f"expected calibration error {measured.calibration_error:.3f}"
    figure.suptitle("\n".join(part for part in (title, scores) if part), color=INK, fontsize=10)
    return save(figure, path)


def make_cells(
    rows: int, columns: int, title: str, gap: float, legend: bool, margin: float = 0.15, block: int = 1
) -> tuple[Figure, NDArray[Any]]:
    """Makes a figure of square cells, laid out in inches, so that texts fit for any number of rows.

    Args:
        rows: rows of images.
        columns: columns of images.
        title: text above the figure, of one or several lines.
        gap: space for labels above each block of rows.
        legend: True to explain the frames below.
        margin: space on the left.
        block: rows that belong together, with the same labels.

    Returns:
        The figure, and its axes (rows, columns).
    """
    width = max(margin + columns * _CELL + 0.15, 4.2)
    title = "\n".join(textwrap.fill(line, int(11 * width)) for line in title.split("\n"))
    height = 0.12
    if title:
        height += 0.22 * (title.count("\n") + 1)
    offsets = []
    for row in range(rows):
        if row % block == 0:
            height += gap + 0.06
            height += 0.08 if row else 0  # between two blocks
        offsets.append(height)
        height += _CELL
    legend_columns = 2 if width > 6 else 1
    height += 0.6 - 0.18 * (legend_columns - 1) if legend else 0.1
    margin += (width - (margin + columns * _CELL + 0.15)) / 2
    figure = Figure(figsize=(width, height))
    side = _CELL - 0.1
    cells = np.empty((rows, columns), object)
    for row, offset in enumerate(offsets):
        for column in range(columns):
            left = margin + column * _CELL
            box = (left / width, 1 - (offset + side) / height, side / width, side / height)
            cells[row, column] = figure.add_axes(box, xticks=[], yticks=[])
    if title:
        style: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 10, "color": INK, "linespacing": 1.4}
        figure.text(0.5, 1 - 0.1 / height, title, parse_math=False, **style)  # the prompt may have two "$"
    if legend:
        _add_legend(figure, legend_columns)
    return figure, cells


def wrap_caption(text: str) -> str:
    """Returns a text in lines that are no wider than an image."""
    return textwrap.fill(text, 18)


def _add_legend(figure: Figure, columns: int) -> None:
    """Explains the frames."""
    meanings = {
        ALIGNED: "✓ all that was asked for, nothing else",
        NOT_ALIGNED: "something is missing, wrong or too much",
    }
    handles = []
    for colour, label in meanings.items():
        handles.append(Patch(facecolor="none", edgecolor=colour, linewidth=2.2, label=label))
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK}
    figure.legend(handles=handles, loc="lower center", ncols=columns, **style)


def _show(axes: Axes, image: NDArray[np.uint8], aligned: bool | None) -> None:
    """Shows an image, with a frame and a tick; with neither if ``aligned`` is None."""
    axes.imshow(image, interpolation="nearest")
    if aligned is None:
        axes.spines[:].set_visible(False)
        return
    colour = ALIGNED if aligned else NOT_ALIGNED
    axes.spines[:].set(color=colour, linewidth=2.2)
    if aligned:
        badge = {"boxstyle": "square,pad=0.12", "facecolor": ALIGNED, "edgecolor": "none"}
        corner: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 7, "color": "white", "fontweight": "bold"}
        axes.text(0.985, 0.985, "✓", transform=axes.transAxes, bbox=badge, **corner)


def _entry(values: NDArray[np.bool_] | None, index: int) -> bool | None:
    return None if values is None else bool(values[index])


def _score(evaluation: Evaluation) -> str:
    share = evaluation.aligned_share
    return f"reward {evaluation.mean_reward:.3g}" if share is None else f"{share:.0%} aligned"


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as a PNG file; returns its path."""
    path = Path(path)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=160, facecolor="white")
    return path
