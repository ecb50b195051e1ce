"""The learning curve of a run."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from agents.cli.plots import ALIGNED, FAINT, INK, KL, REWARD, save
from agents.common.evaluation import Evaluation
from agents.common.metrics import METRICS
from agents.common.monitor import HELD_OUT
from agents.common.rollouts import shorten_names
from dpok_gym.choices.agreement import wilson_interval

_ALIGNED_SHARE = "rollout/aligned_share"
#: Losses of a fit, in rows of the log that are of no rollout, with their labels.
_FIT_LOSSES = {
    "train/denoising_loss": "denoising loss",
    "train/preference_loss": "preference loss\n(guessing gives 0.69)",
}

#: Points of a curve: x and y.
_Points = list[tuple[float, float]]


@dataclass(frozen=True)
class _Panel:
    """One panel: a curve, and what the evaluations before and after the training say of the same number.

    Attributes:
        label: of the y axis.
        points: of the curve.
        colour: of the curve.
        before: the pre-trained model's mean; None if it was not evaluated.
        after: mean, lower and upper end of the 95 % interval of the fine-tuned model; None if it was not evaluated.
        kind: "reward"; "share", shown in %; "kl", which begins at 0; or "loss", against optimiser steps.
    """

    label: str
    points: _Points
    colour: str = REWARD
    before: float | None = None
    after: tuple[float, float, float] | None = None
    kind: Literal["reward", "share", "kl", "loss"] = "reward"


def learning_curve(
    rows: Sequence[Mapping[str, float]],
    path: str | Path,
    title: str = "",
    before: Evaluation | None = None,
    after: Evaluation | None = None,
    held_out: Sequence[str] = (),
) -> Path:
    """Draws how a training went: aligned images, each reward and the KL to the pre-trained model, against the images.

    A row of the log is about images of the model before its update. So the curves begin at 0 images, with the
    pre-trained model. The evaluations, which draw other images than the training, stand apart: as a line for the
    pre-trained model, and as a diamond for the fine-tuned one.

    For algorithms that fit images of a fixed set, their loss against the optimiser steps takes the place of the KL.
    Algorithms that log neither have no such panel.

    Args:
        rows: rows of the log, see :func:`agents.cli.logs.read_log`; there may be none yet.
        path: file to write.
        title: text above the figure.
        before: evaluation of the pre-trained model.
        after: evaluation of the fine-tuned model.
        held_out: names of the held-out rewards.
    """
    panels = _panels(rows, before, after, held_out)
    figure = Figure(figsize=(7, 1.1 + 0.25 * title.count("\n") + 1.65 * len(panels)), layout="constrained")
    axes_of = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    per_iteration = _images_of_first_iteration([row for row in rows if "rollout/images" in row])
    end = max((row["rollout/images"] for row in rows if "rollout/images" in row), default=None)
    smoothed = 0
    for axes, panel in zip(axes_of, panels, strict=True):
        smoothed = max(smoothed, _draw(axes, panel, None if panel.kind == "loss" else end))
    fits = any(panel.kind == "loss" for panel in panels)
    by_images = [axes for axes, panel in zip(axes_of, panels, strict=True) if panel.kind != "loss"]
    for axes in by_images:
        axes.sharex(by_images[0])
        axes.label_outer()
    if by_images:
        drawn_by = "images drawn by the pre-trained model" if fits else "images that the model has learned from"
        by_images[-1].set_xlabel(drawn_by)
        by_images[-1].xaxis.set_tick_params(labelbottom=True)
    if fits:
        axes_of[-1].set_xlabel("optimiser steps")
    figure.align_ylabels()
    _add_legend(figure, panels, per_iteration, smoothed, before, after)
    if title:
        wrapped = "\n".join(textwrap.fill(line, 78) for line in title.split("\n"))
        figure.suptitle(wrapped, color=INK, fontsize=11, parse_math=False)  # the prompt may have two "$"
    return save(figure, path)


def _panels(
    rows: Sequence[Mapping[str, float]], before: Evaluation | None, after: Evaluation | None, held_out: Sequence[str]
) -> list[_Panel]:
    """Returns what to draw, from top to bottom."""
    rollouts = [row for row in rows if "rollout/images" in row]
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))  # without repetitions, in the order of the log
    starts = _starts(rollouts)
    panels = []

    def points(name: str) -> _Points:
        return [(x, row[name]) for x, row in zip(starts, rollouts, strict=True) if name in row]

    if _ALIGNED_SHARE in names:
        level = None if before is None else before.aligned_share
        share = None if after is None or after.aligned is None else _share(after.aligned)
        panels.append(_Panel("fully aligned\nimages", points(_ALIGNED_SHARE), ALIGNED, level, share, "share"))
    for name in names:
        if name.startswith("rollout/") and name not in METRICS:  # a component of the reward
            component = name.removeprefix("rollout/")
            panels.append(_reward_panel(component, "trained on", points(f"rollout/{component}"), before, after))
    for short, name in zip(shorten_names(list(held_out)), held_out, strict=True):  # the log has short names
        if f"{HELD_OUT}{short}" in names:
            panels.append(_reward_panel(name, "not trained on", points(f"{HELD_OUT}{short}"), before, after))
    losses = [name for name in _FIT_LOSSES if any(name in row and "rollout/images" not in row for row in rows)]
    if losses:
        fitted = [
            (row["train/n_updates"], row[losses[0]]) for row in rows if {"train/n_updates", losses[0]} <= row.keys()
        ]
        panels.append(_Panel(_FIT_LOSSES[losses[0]], fitted, KL, kind="loss"))
    elif not rollouts or "train/kl_to_reference" in names:
        # The mean over an update, in the middle of which the model has learned from half of the images.
        middles = [(x + row["rollout/images"]) / 2 for x, row in zip(starts, rollouts, strict=True)]
        kl = [
            (x, row["train/kl_to_reference"])
            for x, row in zip(middles, rollouts, strict=True)
            if "train/kl_to_reference" in row
        ]
        label = "KL to pre-trained\n(nats per image)"
        final = None if after is None else _mean(after.kl)
        panels.append(_Panel(label, [(0.0, 0.0), *kl] if kl else [], KL, after=final, kind="kl"))
    if not panels:
        panels.append(_Panel("reward", []))
    return panels


def _reward_panel(name: str, use: str, points: _Points, before: Evaluation | None, after: Evaluation | None) -> _Panel:
    level = None if before is None else before.mean(name)
    values = None if after is None else after.rewards.get(name)
    return _Panel(
        f"{textwrap.shorten(name, 24)}\n({use})", points, REWARD, level, None if values is None else _mean(values)
    )


def _starts(rollouts: Sequence[Mapping[str, float]]) -> list[float]:
    """Returns how many images the model had learned from when it drew those of each row."""
    ends = [row["rollout/images"] for row in rollouts]
    return [ends[0] - _images_of_first_iteration(rollouts), *ends[:-1]] if ends else []


def _images_of_first_iteration(rollouts: Sequence[Mapping[str, float]]) -> float:
    """Returns the images of the first row, which may be the middle of a run whose log was damaged."""
    ends = [row["rollout/images"] for row in rollouts]
    return 0.0 if not ends else ends[0] if len(ends) == 1 else min(ends[0], ends[1] - ends[0])


def _share(values: NDArray[np.bool_]) -> tuple[float, float, float]:
    low, high = wilson_interval(int(values.sum()), len(values))
    return float(values.mean()), low, high


def _mean(values: NDArray[np.float64]) -> tuple[float, float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return (np.nan,) * 3
    mean, reach = finite.mean(), 1.96 * finite.std() / np.sqrt(len(finite))
    return float(mean), float(mean - reach), float(mean + reach)


def _draw(axes: Axes, panel: _Panel, end: float | None) -> int:
    """Draws a panel; returns how many points its running mean goes over.

    Args:
        axes: of the panel.
        panel: what to draw.
        end: where the evaluation of the fine-tuned model stands; None for nowhere.
    """
    axes.set_ylabel(panel.label, fontsize=9, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    if panel.kind == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if not panel.points:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        return 0
    x, y = np.array(panel.points, float).T
    window = max(1, len(y) // 15)
    if window > 1:
        axes.plot(x, y, color=panel.colour, alpha=0.4, linewidth=0.8)
    weights = np.ones(window)
    # Near the ends the window reaches over fewer points, so the sum is divided by their number.
    smooth = np.convolve(y, weights, "same") / np.convolve(np.ones_like(y), weights, "same")
    if panel.kind == "kl":
        smooth[0] = y[0]  # the KL of the pre-trained model is known
    marker = "o" if len(x) < 3 else None  # a line of one point cannot be seen
    axes.plot(x, smooth, color=panel.colour, linewidth=1.8, marker=marker)
    if panel.before is not None:
        axes.axhline(panel.before, color=FAINT, linewidth=1.2, linestyle="--", zorder=1)
    if panel.after is not None and end is not None:
        mean, low, high = panel.after
        error = np.array([[mean - low], [high - mean]]).clip(min=0)
        style: dict[str, Any] = {
            "fmt": "D",
            "color": INK,
            "markersize": 5,
            "elinewidth": 1.2,
            "capsize": 2.5,
            "zorder": 4,
        }
        axes.errorbar([end], [mean], error, clip_on=False, **style)
    if panel.kind == "kl":
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0, right=1.015 * end if end else None)
    return window


def _add_legend(
    figure: Figure,
    panels: Sequence[_Panel],
    per_iteration: float,
    window: int,
    before: Evaluation | None,
    after: Evaluation | None,
) -> None:
    """Explains the lines, below the panels."""
    fits = any(panel.kind == "loss" for panel in panels)
    each = "each row of the log" if fits or not per_iteration else f"each iteration ({per_iteration:.0f} images)"
    handles: list[Line2D] = []
    labels: list[str] = []
    if window > 1:
        handles += [Line2D([], [], color=INK, alpha=0.4, linewidth=0.8), Line2D([], [], color=INK, linewidth=1.8)]
        labels += [each, f"mean of {window} of them"]
    elif window:
        handles, labels = [Line2D([], [], color=INK, linewidth=1.8)], [each]
    if before is not None and any(panel.before is not None for panel in panels):
        handles.append(Line2D([], [], color=FAINT, linewidth=1.2, linestyle="--"))
        labels.append(f"pre-trained model, {len(before)} other images")
    if after is not None and any(panel.after is not None for panel in panels):
        handles.append(Line2D([], [], color=INK, linestyle="", marker="D", markersize=5))
        labels.append(f"fine-tuned model, the same {len(after)} seeds (95 % interval)")
    if handles:
        style: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK}
        figure.legend(handles, labels, loc="outside lower center", ncols=2, **style)
