"""Statistics of a handful of seeds."""

import numpy as np
import pytest
import scipy.stats

from benchmarks import statistics
from benchmarks.statistics import (
    difference_of_means,
    holm,
    mean_band,
    mean_over_tasks,
    permutation_test,
    pooled_interquartile_mean,
    smallest_difference,
)


def test_mean() -> None:
    numbers = np.random.default_rng(0).normal(size=400)
    mean = statistics.mean(numbers)
    assert mean.value == pytest.approx(numbers.mean())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * numbers.std() / 400**0.5, rel=0.1)


def test_an_interval_as_text() -> None:
    mean = statistics.mean([0.0, 2.0, 3.0])
    assert f"{mean:.2f}" == f"1.67 [{mean.low:.2f}, {mean.high:.2f}]"
    assert f"{statistics.mean([0.5]):.2f}" == "0.50"  # one run has no interval


def test_mean_band() -> None:
    curves = np.random.default_rng(0).normal([0, 10, 20], size=(5, 3))
    points = [statistics.mean(column) for column in curves.T]
    np.testing.assert_allclose(np.array(mean_band(curves)), np.array(points).T)
    assert np.isnan(mean_band(curves[:1])[1:]).all()


def test_difference_of_means() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(2, 3, size=400), rng.normal(0, 4, size=400)
    difference = difference_of_means(ours, theirs)
    assert difference.value == pytest.approx(ours.mean() - theirs.mean())
    assert difference.high - difference.low == pytest.approx(2 * 1.96 * 5 / 400**0.5, rel=0.1)
    assert np.isnan(difference_of_means(ours[:1], theirs)[1:]).all()  # one run has no interval


def test_mean_over_tasks() -> None:
    mean = mean_over_tasks([[0.0, 2.0, 100.0, 6.0], [1.0, 3.0]])
    assert mean.value == np.mean([27, 2])  # both tasks weigh the same
    assert mean.low < mean.value < mean.high
    assert np.isnan(mean_over_tasks([[0.0, 2.0], [1.0]])[1:]).all()  # one run has no interval
    # Of tasks far apart, the variances of the tasks' means add up; a bootstrap that mixed them would be far wider.
    rng = np.random.default_rng(0)
    apart = mean_over_tasks([rng.normal(scale=3, size=400), 1000 + rng.normal(scale=4, size=400)])
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * 5 / 2 / 400**0.5, rel=0.1)


def test_pooled_interquartile_mean() -> None:
    rng = np.random.default_rng(0)
    by_task = [rng.normal(size=5), rng.normal(size=10), rng.normal(2, size=9)]
    pooled = pooled_interquartile_mean(by_task)
    assert pooled.value == pytest.approx(np.sort(np.concatenate(by_task))[6:18].mean())
    resampled = [np.sort(np.concatenate([rng.choice(task, task.size) for task in by_task])) for _ in range(4000)]
    bounds = np.percentile(np.array(resampled)[:, 6:18].mean(axis=1), [2.5, 97.5])
    np.testing.assert_allclose(pooled[1:], bounds, atol=0.05)


def test_pooled_interquartile_mean_leaves_out_the_extreme_tasks() -> None:
    assert pooled_interquartile_mean([[-100.0, -90.0], [1.0, 2.0], [3.0, 4.0], [90.0, 100.0]])[0] == 2.5
    # Tasks far apart: each resample's middle half is the middle task's, unless tasks are mixed.
    apart = pooled_interquartile_mean([[-1000.0] * 5, [0.0, 1.0] * 5, [1000.0] * 5])
    assert 0 <= apart.low < apart.high <= 1


@pytest.mark.parametrize("sizes", [(3, 3), (5, 7)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])  # with one, equal differences come out rounded differently
def test_permutation_test_of_one_task_is_that_of_scipy(sizes: tuple[int, int], offset: float) -> None:
    rng = np.random.default_rng(3)
    ours, theirs = (rng.normal(mean, size=size) for mean, size in zip([2, 0], sizes, strict=True))
    # All 20 or 792 permutations.
    exact = scipy.stats.permutation_test((ours, theirs), lambda *runs: np.mean(runs[0]) - np.mean(runs[1])).pvalue
    assert 0.01 < exact < 0.5
    # Twice a share of 99,999 permutations: four standard errors.
    error = 2 * (exact / 2 / 99_999) ** 0.5
    assert permutation_test([offset + ours], [offset + theirs]) == pytest.approx(exact, abs=4 * error)


def test_permutation_test_of_two_tasks_permutes_within_tasks() -> None:
    # Each task has six ways to choose two of four runs. Of the 36, the best is ours.
    ours, theirs = [[3.0, 4.0], [1003.0, 1004.0]], [[1.0, 2.0], [1001.0, 1002.0]]
    assert permutation_test(ours, theirs) == pytest.approx(2 / 36, abs=0.015)
    assert permutation_test(theirs, ours) == pytest.approx(2 / 36, abs=0.015)
    assert permutation_test(ours, ours) == 1


def test_permutation_test_of_clearly_different_samples() -> None:
    rng = np.random.default_rng(0)
    theirs = [rng.normal(1000 * task, size=7) for task in range(8)]
    ours = [rng.normal(3 + 1000 * task, size=5) for task in range(8)]
    assert permutation_test(ours, theirs) == 2 / 100_000  # no permutation is as good
    assert permutation_test(ours, theirs, n_resamples=19_999) == 2 / 20_000
    with pytest.raises(ValueError, match="longer than"):
        permutation_test(ours[:7], theirs)


def test_permutation_test_is_uniform_if_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(300):
        by_task = [(rng.normal(task, size=5), rng.normal(task, size=8)) for task in (0, 100)]
        p_values.append(permutation_test(*zip(*by_task, strict=True), n_resamples=999))
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01


def test_holm() -> None:
    assert holm({"a": 0.5, "b": 0.01, "c": 0.02, "d": 0.015}) == {
        "a": 0.5,
        "b": 0.04,
        "c": 0.045,  # not 2 * 0.02: it is no better than d
        "d": 0.045,
    }
    assert list(holm({"a": 0.5, "b": 0.01})) == ["a", "b"]
    assert holm({"a": 0.6, "b": 0.7, "c": 0.6}) == {"a": 1, "b": 1, "c": 1}
    assert holm({"a": 0.03}) == {"a": 0.03}
    assert holm({}) == {}


def test_smallest_difference() -> None:
    # The means of five runs with a variance of 1 have one of 0.2; 8 degrees of freedom.
    five = np.array([-1.0, -1.0, 0.0, 1.0, 1.0])
    seen = smallest_difference([five], [five + 100])
    assert seen == pytest.approx((2.30600 + 0.88889) * 0.4**0.5, rel=1e-4)  # quantiles of 0.975 and 0.8
    assert smallest_difference([five, five], [five, five]) < seen / 2**0.5
    assert smallest_difference([five], [five], n_comparisons=3) > seen
    assert smallest_difference([10 * five], [10 * five]) == pytest.approx(10 * seen)
    # Welch: if one sample has nearly all of the spread, its own four degrees of freedom count.
    seen = smallest_difference([five], [five / 1e6])
    assert seen == pytest.approx((2.77645 + 0.94096) * 0.2**0.5, rel=1e-4)
    assert smallest_difference([np.zeros(5)], [np.ones(5)]) == 0


def test_too_few_runs_show_no_difference() -> None:
    """Three runs each on two tasks have 400 permutations, so no p-value is below 0.005."""
    three = [[0.0, 1.0, 2.0]] * 2
    assert permutation_test([[0.0, 1.0, 2.0]] * 2, [[100.0, 101.0, 102.0]] * 2) == pytest.approx(0.005, rel=0.1)
    assert smallest_difference(three, three, n_comparisons=9) > 0
    assert np.isnan(smallest_difference(three, three, n_comparisons=10))
    assert np.isnan(smallest_difference([[0.0, 2.0], [1.0]], [[0.0, 2.0], [1.0, 2.0]]))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "n_tasks", "n_comparisons"), [((5, 5), 6, 55), ((3, 5), 2, 11)])
def test_the_smallest_difference_is_seen_in_four_of_five_cases(
    sizes: tuple[int, int], n_tasks: int, n_comparisons: int
) -> None:
    """By the permutation test, with so many runs as the comparison has."""
    rng = np.random.default_rng(0)
    seen, n = 0, 400
    for _ in range(n):
        ours, theirs = (rng.normal(size=(n_tasks, size)) for size in sizes)
        # Of samples with the true spread, and not of these few runs, whose spread is another one each time.
        alike = [list(both / both.std(ddof=1, axis=-1, keepdims=True)) for both in (ours, theirs)]
        ours = ours + smallest_difference(alike[0], alike[1], n_comparisons)
        seen += permutation_test(ours, theirs, n_resamples=19_999) < 0.05 / n_comparisons
    assert seen / n == pytest.approx(0.8, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(("n_tasks", "coverage"), [(1, 0.84), (6, 0.90)])
def test_intervals_of_five_runs_are_too_narrow(n_tasks: int, coverage: float) -> None:
    """As the tables of the comparison say."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        interval = mean_over_tasks(rng.normal(size=(n_tasks, 5)))
        held += interval.low <= 0 <= interval.high
    assert held / 1000 == pytest.approx(coverage, abs=0.03)
