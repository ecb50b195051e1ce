"""Warnings while training: what goes wrong is seen in the log first, and said once.

Each detector is a pure function of the log's rows, one for each iteration. It returns what it has seen and what to do
about it, or None. Its thresholds are the constants here. A detector compares means over several iterations, so that the
noise of one iteration raises no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

Row = Mapping[str, float]
Detector = Callable[[Sequence[Row]], str | None]

#: The columns of the log that the detectors read, beside those of the parts of a held-out reward.
COLUMNS = (
    "rollout/images",
    "rollout/total_reward",
    "rollout/held_out_reward",
    "rollout/equal_share",
    "images/brightness",
    "images/saturation",
    "images/diversity",
    "train/clip_fraction",
    "train/kl_to_reference",
)

#: What the columns of these parts begin with.
HELD_OUT = "held_out/"

#: Iterations that a mean goes over: the first ones, and the latest ones.
WINDOW = 5
#: Rows that are kept: the first ones, and the latest ones.
FIRST_ROWS, LATEST_ROWS = 20, 180
#: Fewest iterations of a trend.
TREND = 10
#: Probability, by Student's t, that noise alone brings such a rise, or such a fall. The fall is the alarm, and it is
#: asked for after each iteration, so that of the fall is small.
RISE_BY_CHANCE, FALL_BY_CHANCE = 1e-2, 1e-4
#: Fall of the held-out reward in a trend, in standard deviations of the iterations around the trend: in a long training
#: a fall that does not matter can be significant too.
HELD_OUT_FALL = 2.0
#: Share of its first value that the diversity within a prompt must not fall below.
DIVERSITY_LEFT = 0.4
#: Change of brightness or saturation, both in [0, 1], that is more than learning what to draw.
RUNAWAY = 0.2
#: Share of the images whose prompt gives them all the same reward.
EQUAL_SHARE = 0.9
#: Share of the steps whose ratio was clipped.
CLIPPED = 0.5
#: Nats per image. Choosing the best of a million images is only 13 nats away from drawing one.
LARGE_KL = 100.0


class TrainingWarning(UserWarning):
    """Something that an agent has noticed in its training. The message says what to do."""


class Monitor:
    """Keeps the rows that the detectors need, and which of them have spoken.

    Attributes:
        rows: the first rows and the latest ones.
        warned: the warnings so far, by the detector's name.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.warned: dict[str, str] = {}

    def add(self, iteration: int, logged: Mapping[str, Any], unwanted: Collection[str] = ()) -> list[str]:
        """Takes in a row of the log; returns what is new to warn of.

        Args:
            iteration: its number, counted from 1.
            logged: by column; other columns than :data:`COLUMNS` and parts of a held-out reward, and values that are
                not finite, are left out.
            unwanted: parts of a held-out reward that are not meant to rise, and are left out too.
        """
        # Plain floats, which a checkpoint keeps as JSON.
        parts = {name for name in logged if name.startswith(HELD_OUT)} - {*unwanted}
        row = {name: float(logged[name]) for name in logged if name in COLUMNS or name in parts}
        self.rows.append({name: value for name, value in row.items() if math.isfinite(value)})
        if len(self.rows) > FIRST_ROWS + LATEST_ROWS:
            del self.rows[FIRST_ROWS]
        new = []
        for name, detector in DETECTORS.items():
            if name not in self.warned and (text := detector(self.rows)) is not None:
                self.warned[name] = f"iteration {iteration}: {text}"
                new.append(self.warned[name])
        return new

    def state_dict(self) -> dict[str, Any]:
        """Returns the JSON-able state."""
        return {"rows": list(self.rows), "warned": dict(self.warned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with what :meth:`state_dict` returned."""
        self.rows = [dict(row) for row in state["rows"]]
        self.warned = dict(state["warned"])


def reward_hacking(rows: Sequence[Row]) -> str | None:
    """The training reward rises while a held-out reward falls: over all rows, or over the latest half of them."""
    parts = dict.fromkeys(name for row in rows for name in row if name.startswith(HELD_OUT))
    for name in ("rollout/held_out_reward", *parts):
        both = [row for row in rows if name in row and "rollout/total_reward" in row]
        half = both[len(both) // 2 :]
        for latest, when in ((both, "since the training began"), (half, f"in the last {len(half)} iterations")):
            if len(latest) < TREND:
                break
            rise, rise_by_chance, _ = _trend(_column(latest, "rollout/total_reward"))
            change, by_chance, noise = _trend(_column(latest, name))
            rises = rise > 0 and rise_by_chance < RISE_BY_CHANCE
            if rises and -change > HELD_OUT_FALL * noise and by_chance < FALL_BY_CHANCE:
                return (
                    f"{when} the training reward rose by {rise:.3g} while "
                    f"{name.removeprefix('rollout/')} fell by {-change:.3g}: the model learns to please its reward "
                    "alone. Look at the images; take the checkpoint before it, hold the model nearer to the "
                    "pre-trained one (a larger kl_coef), or add the held-out reward to the training"
                )
    return None


def diversity_collapse(rows: Sequence[Row]) -> str | None:
    """Images of the same prompt become alike."""
    before, now = _ends(rows, "images/diversity")
    if not now < DIVERSITY_LEFT * before:
        return None
    return (
        f"images of the same prompt differ by {now:.3g} now, and by {before:.3g} at first: the model draws one image "
        "again and again. Take the checkpoint before it, and hold the model nearer to the pre-trained one (a larger "
        "kl_coef or a smaller learning_rate)"
    )


def brightness_runaway(rows: Sequence[Row]) -> str | None:
    """The images become much brighter or darker."""
    return _runaway(rows, "brightness")


def saturation_runaway(rows: Sequence[Row]) -> str | None:
    """The colours become much stronger or paler."""
    return _runaway(rows, "saturation")


def _runaway(rows: Sequence[Row], name: str) -> str | None:
    before, now = _ends(rows, f"images/{name}")
    if not abs(now - before) > RUNAWAY:
        return None
    return (
        f"the {name} of the images went from {before:.2f} to {now:.2f}: often the reward can be had so, without what "
        "was meant. Look at the images; hold the model nearer to the pre-trained one (a larger kl_coef), or add a "
        "reward that such images do not get"
    )


def equal_rewards(rows: Sequence[Row]) -> str | None:
    """All images of a prompt get the same reward."""
    share = _latest(rows, "rollout/equal_share")
    if not share > EQUAL_SHARE:
        return None
    return (
        f"for {share:.0%} of the images, all images of their prompt get the same reward, so there is nothing to learn "
        "from them. Use a finer reward, prompts of another difficulty, or more images of each prompt (group_size); if "
        "all is solved, stop"
    )


def clipped_ratios(rows: Sequence[Row]) -> str | None:
    """Most importance ratios are clipped."""
    share = _latest(rows, "train/clip_fraction")
    if not share > CLIPPED:
        return None
    return (
        f"{share:.0%} of the importance ratios are clipped, and teach nothing: the policy moves too far in an "
        "iteration. Take a smaller learning_rate, fewer n_epochs or a larger batch_size; or a larger clip_range"
    )


def large_kl(rows: Sequence[Row]) -> str | None:
    """The model is very far from the pre-trained one."""
    kl = _latest(rows, "train/kl_to_reference")
    if not kl > LARGE_KL:
        return None
    return (
        f"the KL to the pre-trained model is {kl:.3g} nats per image, and usually below {LARGE_KL:.0f}: look whether "
        "the images still are what was asked for. Take a smaller learning_rate or a larger kl_coef"
    )


def no_change(rows: Sequence[Row]) -> str | None:
    """The model stays where it was."""
    kl = _column(rows, "train/kl_to_reference")
    if len(kl) < WINDOW or kl[:WINDOW].any():  # the first iteration's is 0, as its update begins there
        return None
    return (
        f"after {WINDOW} iterations the KL to the pre-trained model is still exactly 0: nothing is learned. Look at "
        "the learning_rate, at train/grad_norm, and whether the rewards differ"
    )


#: All detectors, by name.
DETECTORS: dict[str, Detector] = {
    function.__name__: function
    for function in (
        reward_hacking,
        diversity_collapse,
        brightness_runaway,
        saturation_runaway,
        equal_rewards,
        clipped_ratios,
        large_kl,
        no_change,
    )
}


def _column(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    """Returns a column's values in the rows that have it."""
    return np.array([row[name] for row in rows if name in row], float)


def _ends(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Returns the means of a column's first and latest values; nan if there are not enough for both."""
    values = _column(rows, name)
    if len(values) < 2 * WINDOW:
        return math.nan, math.nan
    return float(values[:WINDOW].mean()), float(values[-WINDOW:].mean())


def _latest(rows: Sequence[Row], name: str) -> float:
    """Returns the mean of a column's latest values; nan if there are too few."""
    values = _column(rows, name)
    return float(values[-WINDOW:].mean()) if len(values) >= WINDOW else math.nan


def _trend(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Returns the change along the regression line of values, and how they spread around it.

    Returns:
        The change; the probability that noise alone brings one of this size; the values' deviation from the line.
    """
    n = len(values)
    time = np.linspace(-0.5, 0.5, n)
    slope = float(time @ values / (time @ time))
    residuals = values - values.mean() - slope * time
    deviation = math.sqrt(float(residuals @ residuals) / (n - 2))
    error = deviation / math.sqrt(float(time @ time))
    by_chance = float(stdtr(n - 2, -abs(slope) / error)) if error else float(not slope)
    return slope, by_chance, deviation
