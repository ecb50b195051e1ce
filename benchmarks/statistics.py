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
    """A statistic with its 95 % bootstrap interval; the ends are NaN if there is one run only.

    Attributes:
        value: the statistic.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float

    def __format__(self, format_spec: str) -> str:
        text = f"{self.value:{format_spec}}"
        if np.isfinite(self.low):
            text += f" [{self.low:{format_spec}}, {self.high:{format_spec}}]"
        return text


def mean(numbers: ArrayLike) -> Interval:
    """Computes the mean of runs of one task.

    Args:
        numbers: one for each seed.
    """
    return _interval([numbers], np.mean)


def interquartile_mean(by_task: Sequence[ArrayLike]) -> Interval:
    """Computes the mean of the middle half of a task's runs, and the mean of these over tasks.

    With three runs all of them count, with five the middle three. The means are taken within tasks, because tasks
    differ more than the runs of one task: the middle half of all runs together would leave whole tasks out.

    Args:
        by_task: for each task the runs' numbers, one for each seed. The bootstrap resamples within tasks (stratified).
    """

    def statistic(*samples: Numbers, axis: int = -1) -> Numbers:
        return np.mean([_middle(sample, axis) for sample in samples], axis=0)

    return _interval(by_task, statistic)


def interquartile_band(curves: ArrayLike) -> tuple[Numbers, Numbers, Numbers]:
    """Computes the interquartile mean at each point of curves.

    Args:
        curves: (seeds, points).

    Returns:
        The mean and both ends of its interval, (points,) each.
    """
    return _bounds([np.asarray(curves).T], _middle)


def improvement(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> Interval:
    """Computes how far the interquartile mean of our runs is above that of theirs.

    Args:
        ours: for each task the runs' numbers, one for each seed.
        theirs: the same of the other algorithm, for the same tasks.
    """

    def statistic(*samples: Numbers, axis: int = -1) -> Numbers:
        middles = [_middle(sample, axis) for sample in samples]
        half = len(samples) // 2
        return np.mean(middles[:half], axis=0) - np.mean(middles[half:], axis=0)

    return _interval([*ours, *theirs], statistic)


def _middle(sample: Numbers, axis: int) -> Numbers:
    return np.asarray(trim_mean(sample, 0.25, axis=axis))


def probability_of_improvement(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> Interval:
    """Computes the probability that a run of ours is better than one of theirs, as a mean over tasks.

    Ties count half.

    Args:
        ours: for each task the runs' numbers, one for each seed.
        theirs: the same of the other algorithm, for the same tasks.
    """

    def statistic(*samples: Numbers, axis: int = -1) -> Numbers:
        half = len(samples) // 2
        shares = []
        for one, other in zip(samples[:half], samples[half:], strict=True):
            difference = one[..., :, None] - other[..., None, :]  # of each run of ours and each of theirs
            shares.append(((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-2, -1)))
        return np.mean(shares, axis=0)

    return _interval([*ours, *theirs], statistic)


def _interval(samples: Sequence[ArrayLike], statistic: Callable[..., Numbers]) -> Interval:
    return Interval(*map(float, _bounds(samples, statistic)))


def _bounds(samples: Sequence[ArrayLike], statistic: Callable[..., Numbers]) -> tuple[Numbers, Numbers, Numbers]:
    """Computes a statistic over the last axis, which is resampled, and both ends of its interval.

    Args:
        samples: arrays with the same leading axes.
        statistic: takes the arrays, and the keyword ``axis``.

    Returns:
        Three arrays, in the shape of the leading axes.
    """
    arrays = [np.asarray(sample, np.float64) for sample in samples]
    value = statistic(*arrays, axis=-1)
    if any(array.shape[-1] < 2 for array in arrays):
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    settings = {"n_resamples": 2000, "axis": -1, "method": "percentile", "vectorized": True, "rng": 0}
    # SciPy warns where all runs agree; the interval is then that one number.
    with warnings.catch_warnings(category=DegenerateDataWarning, action="ignore"):
        interval = bootstrap(arrays, statistic, **settings).confidence_interval  # type: ignore[call-overload]
    return value, interval.low, interval.high
