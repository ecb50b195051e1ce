"""Statistics of a handful of seeds."""

import numpy as np
import pytest

from benchmarks import statistics
from benchmarks.statistics import improvement, interquartile_band, interquartile_mean, probability_of_improvement


def test_mean() -> None:
    numbers = np.random.default_rng(0).normal(size=400)
    mean = statistics.mean(numbers)
    assert mean.value == pytest.approx(numbers.mean())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * numbers.std() / 400**0.5, rel=0.1)


def test_interquartile_mean() -> None:
    mean = interquartile_mean([[0.0, 2.0, 3.0, 100.0], [1.0, 1.0, 4.0, -50.0]])
    assert mean.value == np.mean([np.mean([2, 3]), np.mean([1, 1])])  # of each task the middle half
    assert mean.low < mean.value < mean.high
    assert f"{mean:.2f}" == f"1.75 [{mean.low:.2f}, {mean.high:.2f}]"
    assert f"{interquartile_mean([[0.5]]):.2f}" == "0.50"  # one run has no interval


def test_interquartile_band() -> None:
    curves = np.random.default_rng(0).normal([0, 10, 20], size=(5, 3))
    band = interquartile_band(curves)
    points = [interquartile_mean([column]) for column in curves.T]
    np.testing.assert_allclose(np.array(band), np.array(points).T)
    assert np.isnan(interquartile_band(curves[:1])[1:]).all()


def test_intervals_get_narrower_and_are_resampled_within_tasks() -> None:
    rng = np.random.default_rng(0)
    few, many = (interquartile_mean([rng.normal(size=n)]) for n in (5, 500))
    assert many.high - many.low < 0.3 * (few.high - few.low)
    # The middle half's mean has 1.09 times a mean's standard deviation; 95 % are within 1.96 of these.
    assert many.high - many.low == pytest.approx(2 * 1.96 * 1.09 / 500**0.5, rel=0.15)
    # Tasks far apart: a bootstrap that mixed them would have wide intervals.
    apart = interquartile_mean([rng.normal(size=50), 1000 + rng.normal(size=50)])
    assert apart.high - apart.low < 50


def test_improvement() -> None:
    ours, theirs = [[3.0, 1.0], [5.0, 6.0]], [[2.0, 0.0], [5.0, 5.0]]
    difference = improvement(ours, theirs)
    assert difference.value == np.mean([1.0, 0.5])
    assert difference.low < difference.value < difference.high
    assert improvement(theirs, ours).value == -difference.value


def test_probability_of_improvement() -> None:
    probability = probability_of_improvement([[3.0, 1.0], [5.0, 5.0]], [[2.0, 0.0], [5.0, 6.0]])
    assert probability.value == np.mean([3 / 4, 1 / 4])
    assert probability.low <= probability.value <= probability.high
    assert probability_of_improvement([[1.0, 2.0]], [[0.0, 0.5]])[:3] == (1.0, 1.0, 1.0)
