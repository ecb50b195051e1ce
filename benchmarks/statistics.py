"""Statistics of a handful of seeds, as Agarwal et al. (2021, The Statistical Precipice of deep RL) advise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import DegenerateDataWarning, bootstrap, trim_mean


class Interval(NamedTuple):
    """A statistic with its 95 % bootstrap interval, which is empty (NaN) if there is one run only."""

    value: float
    low: float
    high: float

    def __format__(self, written: str) -> str:
        spread = f" [{self.low:{written}}, {self.high:{written}}]" if np.isfinite(self.low) else ""
        return f"{self.value:{written}}{spread}"


def interquartile_mean(by_task: Sequence[ArrayLike]) -> Interval:
    """The mean of the middle half of all runs.

    Args:
        by_task: the runs' numbers, a sequence of seeds for each task; resampled within each task (stratified).
    """

    def statistic(*samples: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return np.asarray(trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis))

    return _interval(by_task, statistic)


def probability_of_improvement(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> Interval:
    """How likely a run of ours is better than one of theirs, the mean over tasks; ties count half.

    Args:
        ours: the runs' numbers, a sequence of seeds for each task.
        theirs: the same of the other algorithm, for the same tasks.
    """

    def statistic(*samples: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        half = len(samples) // 2
        shares = []
        for one, other in zip(samples[:half], samples[half:], strict=True):
            difference = one[..., :, None] - other[..., None, :]
            shares.append(((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-2, -1)))
        return np.mean(shares, axis=0)

    return _interval([*ours, *theirs], statistic)


def _interval(samples: Sequence[ArrayLike], statistic: Callable[..., NDArray[np.float64]]) -> Interval:
    arrays = [np.asarray(sample, np.float64) for sample in samples]
    value = float(statistic(*arrays, axis=-1))
    if any(len(array) < 2 for array in arrays):
        return Interval(value, np.nan, np.nan)
    settings = {"n_resamples": 2000, "method": "percentile", "vectorized": True, "rng": 0}
    with warnings.catch_warnings(category=DegenerateDataWarning, action="ignore"):  # of runs that all agree
        found = bootstrap(arrays, statistic, **settings).confidence_interval  # type: ignore[call-overload]
    return Interval(value, float(found.low), float(found.high))
