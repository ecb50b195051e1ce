"""Figures of a run. They are drawn without pyplot, so nothing here depends on a display or on what else is plotted."""

from __future__ import annotations

import csv
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

from agents.evaluation import Evaluation
from dpok_gym.rewards.preference_fit import Measured

INK, FAINT = "#262626", "#8c8c8c"
#: Blue and orange of the Okabe-Ito palette, and its green for aligned pictures: told apart by every eye.
REWARD, KL, ALIGNED, NOT_ALIGNED = "#0072B2", "#D55E00", "#009E73", "#c4c4c4"

#: What SB3 and the rollout log under ``rollout/`` beside the reward's components.
_NO_COMPONENTS = {"pictures", "valid_share", "ep_rew_mean", "ep_len_mean"}
_CELL = 1.05  # inches, of a picture with its margin


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Reads the rows of SB3's ``progress.csv``, without its empty cells."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def learning_curve(rows: Sequence[Mapping[str, float]], path: str | Path, title: str = "") -> Path:
    """Draws every component of the reward, and the KL to the pre-trained model, against the pictures drawn.

    Supervised algorithms log the loss against the optimiser steps in its place, others that have no KL nothing.

    Args:
        rows: of the log, see :func:`read_log`; there may be none yet.
        path: of the file to write.
        title: above the figure.
    """
    names = [name.removeprefix("rollout/") for row in rows for name in row if name.startswith("rollout/")]
    components = [name for name in dict.fromkeys(names) if name not in _NO_COMPONENTS]
    drawing = [row for row in rows if "rollout/pictures" in row]
    pictures = [row["rollout/pictures"] for row in drawing]
    is_supervised = any("train/denoising_loss" in row for row in rows)
    has_kl = len(drawing) < 2 or any("train/kl_to_pretrained" in row for row in rows)  # the second row has the first
    n_panels = len(components) + (is_supervised or has_kl or not components)
    figure = Figure(figsize=(7, 0.6 + 1.9 * n_panels), layout="constrained")
    panels = figure.subplots(n_panels, 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, components, strict=False):
        _curve(axes, _points(pictures, drawing, f"rollout/{name}"), REWARD)
        axes.set_ylabel(name)
    by_pictures = panels[:-1] if is_supervised else panels
    for axes in by_pictures:
        axes.sharex(panels[0])
    if len(by_pictures):
        by_pictures[-1].set_xlabel("pictures drawn by the pre-trained model" if is_supervised else "pictures drawn")
    if is_supervised:
        steps = [row.get("train/n_updates", 0.0) for row in rows]
        _curve(panels[-1], _points(steps, rows, "train/denoising_loss"), KL)
        panels[-1].set(ylabel="denoising loss", xlabel="optimiser steps")
    elif has_kl:
        # An update's KL is logged with the rollout after it, and is that of the policy that drew the rollout before it.
        _curve(panels[-1], _points(pictures[:-1], drawing[1:], "train/kl_to_pretrained"), KL)
        panels[-1].set_ylabel("KL to pre-trained\n(nats per picture)")
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


def picture_grid(
    pictures: NDArray[np.uint8],
    labels: Sequence[str],
    path: str | Path,
    title: str = "",
    aligned: NDArray[np.bool_] | None = None,
    columns: int = 8,
) -> Path:
    """Draws pictures (N, H, W, 3) with a label above each.

    Args:
        pictures: uint8.
        labels: N texts.
        path: of the file to write.
        title: above all.
        aligned: (N,) which ones get the frame and the tick of a fully aligned picture; None for no frames.
        columns: pictures side by side.
    """
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    wrapped = [textwrap.fill(label, 18) for label in labels]
    lines = max(text.count("\n") + 1 for text in wrapped)
    figure, cells = _cells(rows, columns, title, gap=0.16 * lines, legend=aligned is not None)
    for k, axes in enumerate(cells.flat):
        if k >= len(pictures):
            axes.set_visible(False)
            continue
        _show(axes, pictures[k], None if aligned is None else bool(aligned[k]))
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
    """Draws pictures of the same seeds and prompts before and after training, one above the other.

    Args:
        before: of N pictures.
        after: of the same prompts and seeds.
        path: of the file to write.
        title: above all.
        labels: of the two rows.
        columns: pairs side by side; at most ``blocks * columns`` are shown, evenly spaced and not chosen.
        blocks: pairs of rows.

    Raises:
        ValueError: if the prompts differ.
    """
    if before.prompts != after.prompts:
        raise ValueError("the two evaluations must be of the same prompts in the same order")
    shown = min(len(before), blocks * columns)
    chosen = [k * len(before) // shown for k in range(shown)]
    columns = min(columns, shown)
    blocks = math.ceil(shown / columns)
    single = len(set(before.prompts)) == 1
    wrapped = ["" if single else textwrap.fill(before.prompts[k], 18) for k in chosen]
    lines = max(text.count("\n") + 1 for text in wrapped) if not single else 0
    title = "\n".join(part for part in (title, f"“{before.prompts[0]}”" if single else "") if part)
    judged = after.aligned is not None
    figure, cells = _cells(2 * blocks, columns, title, gap=0.16 * lines, legend=judged, margin=1.35, paired=True)
    for axes in cells.flat:
        axes.set_visible(False)
    for row, (evaluation, label) in enumerate(zip((before, after), labels, strict=True)):
        aligned = evaluation.aligned
        for k, index in enumerate(chosen):
            axes = cells[2 * (k // columns) + row, k % columns]
            axes.set_visible(True)
            _show(axes, evaluation.pictures[index], None if aligned is None else bool(aligned[index]))
            if row == 0:
                axes.set_title(wrapped[k], fontsize=7, color=INK, pad=4, parse_math=False)
        share = evaluation.aligned_share
        score = f"reward {evaluation.mean_reward:.3g}" if share is None else f"{share:.0%} aligned"
        for axes in cells[row::2, 0]:
            text = f"{label}\n{score}\n(of {len(evaluation)})"
            axes.text(-0.12, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=8, color=INK)
    return _save(figure, path)


def calibration(measured: Measured, path: str | Path, title: str = "") -> Path:
    """Draws how often a reward's favourite was chosen, against how likely the reward held that to be.

    Args:
        measured: on choices that the reward was not learned from.
        path: of the file to write.
        title: above the figure.
    """
    figure = Figure(figsize=(4.6, 4.9), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    predicted, observed, counts = map(np.array, (measured.predicted, measured.observed, measured.counts))
    interval = 1.96 * np.sqrt(observed * (1 - observed) / counts)
    axes.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1, linestyle="--", label="as predicted")
    style: dict[str, Any] = {"fmt": "o-", "color": REWARD, "linewidth": 1.8, "markersize": 4, "elinewidth": 1}
    axes.errorbar(predicted, observed, interval, label="observed, with 95 % interval", **style)
    axes.legend(loc="lower right", frameon=False, fontsize=8, labelcolor=INK)
    axes.set(ylabel="share of the choices that fell on it", xlim=(0.49, 1.01))
    below.bar(predicted, counts, width=0.03, color=REWARD)
    below.set(xlabel="probability that the reward gives its favourite of two", ylabel="choices")
    for panel in (axes, below):
        panel.spines[["top", "right"]].set_visible(False)
    scores = f"agreement {measured.agreement:.1%}, expected calibration error {measured.calibration_error:.3f}"
    figure.suptitle("\n".join(part for part in (title, scores) if part), color=INK, fontsize=10)
    return _save(figure, path)


def _cells(
    rows: int, columns: int, title: str, gap: float, legend: bool, margin: float = 0.15, paired: bool = False
) -> tuple[Figure, NDArray]:
    """A figure of square cells, laid out in inches: whatever the number of rows, text has the room it needs.

    Args:
        rows: of pictures.
        columns: of pictures.
        title: above all, perhaps of several lines.
        gap: room for labels above each row (above every second one if ``paired``).
        legend: whether to explain frames below.
        margin: on the left.
        paired: whether rows come in pairs that belong together.
    """
    width = max(margin + columns * _CELL + 0.15, 4.2)
    title = "\n".join(textwrap.fill(line, int(11 * width)) for line in title.split("\n"))
    top = 0.12 + 0.22 * (title.count("\n") + 1) * bool(title)
    columns_of_legend = 2 if width > 6 else 1
    bottom = (0.42 if columns_of_legend == 2 else 0.6) if legend else 0.1
    least = 0.14  # between two pairs
    offsets, height = [], top
    for row in range(rows):
        height += gap + (least if row else 0.06) if not paired or row % 2 == 0 else 0
        offsets.append(height)
        height += _CELL
    height += bottom
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
        figure.text(
            *(0.5, 1 - 0.1 / height, title),
            ha="center",
            va="top",
            fontsize=10,
            color=INK,
            linespacing=1.4,
            parse_math=False,  # the prompt may have two "$"
        )
    if legend:
        handles = [
            Patch(facecolor="none", edgecolor=ALIGNED, linewidth=2.2, label="✓ all that was asked for, nothing else"),
            Patch(
                facecolor="none", edgecolor=NOT_ALIGNED, linewidth=2.2, label="something is missing, wrong or too much"
            ),
        ]
        figure.legend(
            handles=handles, loc="lower center", ncols=columns_of_legend, frameon=False, fontsize=8, labelcolor=INK
        )
    return figure, cells


def _show(axes: Axes, picture: NDArray[np.uint8], aligned: bool | None) -> None:
    """One picture, framed and ticked if that is to be told."""
    axes.imshow(picture, interpolation="nearest")
    if aligned is None:
        axes.spines[:].set_visible(False)
        return
    axes.spines[:].set(color=ALIGNED if aligned else NOT_ALIGNED, linewidth=2.2)
    if aligned:
        badge = {"boxstyle": "square,pad=0.12", "facecolor": ALIGNED, "edgecolor": "none"}
        corner: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 7, "color": "white", "fontweight": "bold"}
        axes.text(0.985, 0.985, "✓", transform=axes.transAxes, bbox=badge, **corner)


def _points(x: Sequence[float], rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """The points of a curve; a row without the value has none."""
    return [(at, row[name]) for at, row in zip(x, rows, strict=True) if name in row]


def _curve(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """The points faintly, and their running mean."""
    if not points:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        return
    x, y = np.array(points, float).T
    window = max(1, len(y) // 15)
    if window > 1:
        axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
    weights = np.ones(window)
    smooth = np.convolve(y, weights, "same") / np.convolve(np.ones_like(y), weights, "same")
    axes.plot(x, smooth, color=colour, linewidth=1.8, marker="o" if len(x) < 3 else None)


def _save(figure: Figure, path: str | Path) -> Path:
    figure.savefig(path, dpi=160, facecolor="white")
    return Path(path)
