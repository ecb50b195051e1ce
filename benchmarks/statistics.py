"""Statistics of a handful of seeds, as Agarwal et al. (2021, The Statistical Precipice of deep RL) advise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import DegenerateDataWarning, bootstrap, trim_mean

#: An array of numbers.
Numbers = NDArray[np.float64]


class Interval(NamedTuple):
    """A statistic with its 95 % bootstrap interval, which is empty (NaN) if there is one run only."""

    value: float
    low: float
    high: float

    def __format__(self, written: str) -> str:
        spread = f" [{self.low:{written}}, {self.high:{written}}]" if np.isfinite(self.low) else ""
        return f"{self.value:{written}}{spread}"


def interquartile_mean(by_task: Sequence[ArrayLike]) -> Interval:
    """The mean of the middle half of a task's runs (of three runs all, of five three), and the mean of that over tasks.

    Tasks differ more than runs of one do, so the middle half of all runs together would be that of some tasks only.

    Args:
        by_task: the runs' numbers, a sequence of seeds for each task; resampled within each task (stratified).
    """
    return _interval(by_task, lambda *samples, axis: np.mean([_middle(sample, axis) for sample in samples], axis=0))


def interquartile_band(curves: ArrayLike) -> tuple[Numbers, Numbers, Numbers]:
    """The interquartile mean at each point of curves, and both ends of its interval; arguments (seeds, points)."""
    return _bounds([np.asarray(curves).T], _middle)


def improvement(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> Interval:
    """By how much the interquartile mean of ours is above that of theirs; arguments as in the next function."""

    def statistic(*samples: Numbers, axis: int = -1) -> Numbers:
        middles = [_middle(sample, axis) for sample in samples]
        half = len(samples) // 2
        return np.mean(middles[:half], axis=0) - np.mean(middles[half:], axis=0)

    return _interval([*ours, *theirs], statistic)


def _middle(sample: Numbers, axis: int) -> Numbers:
    return np.asarray(trim_mean(sample, 0.25, axis=axis))


def probability_of_improvement(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> Interval:
    """How likely a run of ours is better than one of theirs, the mean over tasks; ties count half.

    Args:
        ours: the runs' numbers, a sequence of seeds for each task.
        theirs: the same of the other algorithm, for the same tasks.
    """

    def statistic(*samples: Numbers, axis: int = -1) -> Numbers:
        half = len(samples) // 2
        shares = []
        for one, other in zip(samples[:half], samples[half:], strict=True):
            difference = one[..., :, None] - other[..., None, :]
            shares.append(((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-2, -1)))
        return np.mean(shares, axis=0)

    return _interval([*ours, *theirs], statistic)


def _interval(samples: Sequence[ArrayLike], statistic: Callable[..., Numbers]) -> Interval:
    return Interval(*map(float, _bounds(samples, statistic)))


def _bounds(samples: Sequence[ArrayLike], statistic: Callable[..., Numbers]) -> tuple[Numbers, Numbers, Numbers]:
    """A statistic over the last axis, which is resampled, and both ends of its interval, for each of the other axes."""
    arrays = [np.asarray(sample, np.float64) for sample in samples]
    value = statistic(*arrays, axis=-1)
    if any(array.shape[-1] < 2 for array in arrays):
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    settings = {"n_resamples": 2000, "axis": -1, "method": "percentile", "vectorized": True, "rng": 0}
    with warnings.catch_warnings(category=DegenerateDataWarning, action="ignore"):  # of runs that all agree
        found = bootstrap(arrays, statistic, **settings).confidence_interval  # type: ignore[call-overload]
    return value, found.low, found.high
