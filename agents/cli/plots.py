"""Figures of a run. They are drawn without pyplot, so nothing here depends on a display or on other figures."""

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
from matplotlib.patches import Patch
from numpy.typing import NDArray

from agents.common.evaluation import Evaluation
from dpok_gym.choices.agreement import wilson_interval
from dpok_gym.rewards.preference.fit import Measured
from dpok_gym.utils.files import replacing

INK, FAINT = "#262626", "#8c8c8c"
#: Blue, orange and (for aligned images) green of the Okabe-Ito palette, which colour-blind people can tell apart.
REWARD, KL, ALIGNED, NOT_ALIGNED = "#0072B2", "#D55E00", "#009E73", "#c4c4c4"

#: The column under ``rollout/`` of the reward that is not trained on.
_HELD_OUT = "held_out_reward"
#: Columns under ``rollout/`` that are no components of a reward.
_NO_COMPONENTS = {
    "images",
    "valid_share",
    "ep_rew_mean",
    "ep_len_mean",
    "total_reward",
    "reward_std",
    "equal_share",
}
_CELL = 1.05  # inches, of an image with its margin


def learning_curve(rows: Sequence[Mapping[str, float]], path: str | Path, title: str = "") -> Path:
    """Draws every component of the reward, and the KL to the pre-trained model, against the images drawn.

    For forward-process algorithms the denoising loss against the optimiser steps takes the place of the KL. Algorithms
    that log neither have no such panel.

    Args:
        rows: rows of the log, see :func:`agents.cli.logs.read_log`; there may be none yet.
        path: file to write.
        title: text above the figure.
    """
    names = dict.fromkeys(itertools.chain.from_iterable(rows))  # without repetitions, in the order of the log
    logged = [name.removeprefix("rollout/") for name in names if name.startswith("rollout/")]
    components = [name for name in logged if name not in _NO_COMPONENTS]
    components.sort(key=_HELD_OUT.__eq__)  # what is trained on comes first; the rest keeps its order
    rollouts = [row for row in rows if "rollout/images" in row]
    fits = any("train/denoising_loss" in row for row in rows)
    has_kl = not rollouts or any("train/kl_to_reference" in row for row in rows)
    n_panels = len(components) + (fits or has_kl or not components)
    figure = Figure(figsize=(7, 0.6 + 1.9 * n_panels), layout="constrained")
    panels = figure.subplots(n_panels, 1, squeeze=False)[:, 0]
    # The last panel, for the KL or the loss, is left out by this zip.
    for axes, name in zip(panels, components, strict=False):
        _curve(axes, _points(rollouts, "rollout/images", f"rollout/{name}"), REWARD)
        axes.set_ylabel("held-out reward\n(not trained on)" if name == _HELD_OUT else name)
    # The panel of the denoising loss has another x axis, so it does not share that of the others.
    by_images = panels[:-1] if fits else panels
    for axes in by_images:
        axes.sharex(panels[0])
    if len(by_images):
        label = "images drawn by the pre-trained model" if fits else "images drawn"
        by_images[-1].set_xlabel(label)
    if fits:
        _curve(panels[-1], _points(rows, "train/n_updates", "train/denoising_loss"), KL)
        panels[-1].set(ylabel="denoising loss", xlabel="optimiser steps")
    elif has_kl:
        _curve(panels[-1], _points(rollouts, "rollout/images", "train/kl_to_reference"), KL)
        panels[-1].set_ylabel("KL to pre-trained\n(nats per image)")
        panels[-1].set_ylim(bottom=0)
    figure.align_ylabels()
    for axes in panels:
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title, color=INK, fontsize=11)
    return _save(figure, path)


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
    wrapped = [textwrap.fill(label, 18) for label in labels]
    lines = max(text.count("\n") + 1 for text in wrapped)
    figure, cells = _cells(rows, columns, title, gap=0.16 * lines, legend=aligned is not None)
    for k, axes in enumerate(cells.flat):
        if k >= len(images):
            axes.set_visible(False)
            continue
        _show(axes, images[k], _entry(aligned, k))
        axes.set_title(wrapped[k], fontsize=7, color=INK, pad=4, parse_math=False)
    return _save(figure, path)


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
        columns: pairs side by side; at most ``blocks * columns`` are shown, evenly spaced and not selected.
        blocks: pairs of rows.

    Raises:
        ValueError: if the prompts differ.
    """
    if before.prompts != after.prompts:
        raise ValueError("the two evaluations must be of the same prompts in the same order")
    shown = min(len(before), blocks * columns)
    # Evenly spaced: the prompts of an evaluation come in turn, so the first images alone might miss some.
    chosen = [k * len(before) // shown for k in range(shown)]
    columns = min(columns, shown)
    blocks = math.ceil(shown / columns)
    captions, gap = [""] * shown, 0.0
    if len(set(before.prompts)) == 1:  # which then stands in the title
        title = "\n".join(part for part in (title, f"“{before.prompts[0]}”") if part)
    else:
        captions = [textwrap.fill(before.prompts[k], 18) for k in chosen]
        gap = 0.16 * max(text.count("\n") + 1 for text in captions)
    judged = after.aligned is not None
    figure, cells = _cells(2 * blocks, columns, title, gap, legend=judged, margin=1.35, paired=True)
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
    return _save(figure, path)


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
    return _save(figure, path)


def _cells(
    rows: int, columns: int, title: str, gap: float, legend: bool, margin: float = 0.15, paired: bool = False
) -> tuple[Figure, NDArray[Any]]:
    """Makes a figure of square cells, laid out in inches, so that texts fit for any number of rows.

    Args:
        rows: rows of images.
        columns: columns of images.
        title: text above the figure, of one or several lines.
        gap: space for labels above each row (above every second one if ``paired``).
        legend: True to explain the frames below.
        margin: space on the left.
        paired: True if rows come in pairs that belong together.

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
        if not paired or row % 2 == 0:
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


def _points(rows: Sequence[Mapping[str, float]], x: str, y: str) -> list[tuple[float, float]]:
    """Returns the points of a curve; a row without one of the two values has none."""
    return [(row[x], row[y]) for row in rows if x in row and y in row]


def _curve(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """Draws the points faintly, and their running mean."""
    if not points:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        return
    x, y = np.array(points, float).T
    window = max(1, len(y) // 15)
    if window > 1:
        axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
    weights = np.ones(window)
    # Near the ends the window reaches over fewer points, so the sum is divided by their number.
    smooth = np.convolve(y, weights, "same") / np.convolve(np.ones_like(y), weights, "same")
    marker = "o" if len(x) < 3 else None  # a line of one point cannot be seen
    axes.plot(x, smooth, color=colour, linewidth=1.8, marker=marker)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=160, facecolor="white")
    return path
