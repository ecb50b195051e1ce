"""Statistics of a handful of seeds, as Agarwal et al. (2021, The Statistical Precipice of deep RL) advise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import DegenerateDataWarning, bootstrap, monte_carlo_test, t, trim_mean

#: An array of numbers.
Numbers = NDArray[np.float64]
#: What a p-value is called by.
Label = TypeVar("Label", bound=Hashable)


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


def mean_band(curves: ArrayLike) -> tuple[Numbers, Numbers, Numbers]:
    """Computes the mean at each point of curves.

    Args:
        curves: (seeds, points).

    Returns:
        The mean and both ends of its interval, (points,) each.
    """
    return _bounds([np.asarray(curves).T], np.mean)


def mean_over_tasks(by_task: Sequence[ArrayLike]) -> Interval:
    """Computes the mean of a task's runs, and the mean of these over tasks: each task weighs the same.

    Args:
        by_task: for each task the runs' numbers, one for each seed. The bootstrap resamples within tasks (stratified).
    """

    def statistic(*samples: Numbers, axis: int = -1) -> Numbers:
        return np.mean([sample.mean(axis) for sample in samples], axis=0)

    return _interval(by_task, statistic)


def pooled_interquartile_mean(by_task: Sequence[ArrayLike]) -> Interval:
    """Computes the mean of the middle half of all tasks' runs together, as rliable does (Agarwal et al., 2021).

    The runs of easy and of hard tasks are what is left out, and a task with more runs weighs more.

    Args:
        by_task: for each task the runs' numbers, one for each seed, normalised so that tasks can be compared. The
            bootstrap resamples within tasks (stratified).
    """

    def statistic(*samples: Numbers, axis: int = -1) -> Numbers:
        return np.asarray(trim_mean(np.concatenate(samples, axis), 0.25, axis=axis))

    return _interval(by_task, statistic)


def difference_of_means(ours: ArrayLike, theirs: ArrayLike) -> Interval:
    """Computes how far the mean of our runs of one task is above that of theirs.

    Args:
        ours: one number for each seed.
        theirs: the same of the other algorithm; the number of runs may differ.
    """

    def statistic(one: Numbers, other: Numbers, axis: int = -1) -> Numbers:
        return np.asarray(one.mean(axis) - other.mean(axis))

    return _interval([ours, theirs], statistic)


def permutation_test(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike], *, n_resamples: int = 99_999) -> float:
    """Tests whether our runs and theirs differ in the mean over tasks.

    If the algorithms are alike, the runs of a task could have had each other's labels. So the labels are permuted at
    random within each task (stratified), which ``scipy.stats.permutation_test`` cannot do.

    Args:
        ours: for each task the runs' numbers, one for each seed. Runs with the same seed are not taken for pairs.
        theirs: the same of the other algorithm, for the same tasks; the number of runs may differ.
        n_resamples: number of random permutations. No p-value is below ``2 / (n_resamples + 1)``, which ``holm``
            multiplies by the number of comparisons.

    Returns:
        The two-sided p-value, twice the smaller one-sided one. The permutations are the same in each call.
    """
    sizes, pooled = [], []
    for one, other in zip(ours, theirs, strict=True):
        both = np.concatenate([np.asarray(one, np.float64), np.asarray(other, np.float64)])
        sizes.append(len(np.asarray(one)))
        pooled.append(both - both.mean())  # the same differences, and rounding does not part those that are equal

    def difference(*samples: Numbers, axis: int = -1) -> Numbers:
        tasks = zip(samples, sizes, strict=True)
        return np.mean([task[..., :size].mean(axis) - task[..., size:].mean(axis) for task, size in tasks], axis=0)

    rng = np.random.default_rng(0)
    shuffles = [partial(_shuffled, runs, rng) for runs in pooled]
    settings = {"n_resamples": n_resamples, "batch": 10_000, "axis": -1, "vectorized": True}
    # SciPy's types leave out that there may be several samples, each with its own null distribution.
    return float(monte_carlo_test(pooled, shuffles, difference, **settings).pvalue)  # type: ignore[call-overload]


def _shuffled(runs: Numbers, rng: np.random.Generator, size: tuple[int, int]) -> Numbers:
    return rng.permuted(np.broadcast_to(runs, size), axis=-1)


def holm(p_values: Mapping[Label, float]) -> dict[Label, float]:
    """Corrects p-values for the number of comparisons (Holm, 1979).

    The smallest of m is multiplied by m, the next by m - 1 and so on. Calling those up to 0.05 significant then makes
    any false call at all with a probability of at most 5 %, however the tests depend on each other.

    Args:
        p_values: of each comparison.

    Returns:
        The adjusted p-values in the same order, at most 1 each. None is below that of a smaller p-value.
    """
    adjusted: dict[Label, float] = {}
    largest = 0.0
    for rank, label in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[label]))
        adjusted[label] = largest
    return {label: adjusted[label] for label in p_values}


def smallest_difference(
    by_task_a: Sequence[ArrayLike], by_task_b: Sequence[ArrayLike], n_comparisons: int = 1
) -> float:
    """Computes the true difference in the mean over tasks that :func:`permutation_test` would see with 80 % power.

    The level is 5 %, corrected for the number of comparisons (Bonferroni's method; Holm's is as strict as long as no
    other comparison shows anything). The difference is that of a t-test, whose power is about the same: with Welch's
    degrees of freedom, as the samples may differ in spread.

    Args:
        by_task_a: for each task the runs' numbers, one for each seed. Their spread and number count, not their mean.
        by_task_b: the same of the other algorithm, for the same tasks.
        n_comparisons: that are made at once.

    Returns:
        The difference, in the unit of the numbers. It is NaN if a task has one run only, or if there are so few runs
        that no difference would be seen: even of all permutations, the smallest p-value is above the corrected level.
    """
    tasks = [(np.asarray(one), np.asarray(other)) for one, other in zip(by_task_a, by_task_b, strict=True)]
    sizes = np.array([(len(one), len(other)) for one, other in tasks])
    one_sided = 0.025 / n_comparisons
    n_permutations = math.prod(math.comb(int(one + other), int(one)) for one, other in sizes)
    if sizes.min() < 2 or 1 / n_permutations >= one_sided:
        return math.nan
    # Of the means of the samples.
    variances = np.array([(one.var(ddof=1), other.var(ddof=1)) for one, other in tasks]) / sizes
    error = np.sqrt(variances.sum()) / len(sizes)
    if not error:
        return 0.0
    freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
    return float((t.ppf(1 - one_sided, freedom) + t.ppf(0.8, freedom)) * error)


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
