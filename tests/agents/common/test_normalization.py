"""Rewards standardised by what they were so far, before they are weighted."""

import json
import math

import numpy as np
import pytest
import torch

from agents.common.normalization import RewardNormalizer, RunningStatistics
from dpok_gym.rewards import RewardBatch

BATCHES = ([1.0, 5.0, 3.0], [100.0], [-2.0, 0.5])


def batch(weights: dict[str, float] | None = None, valid: list[bool] | None = None, **components: list) -> RewardBatch:
    """Returns the rewards of some images, by component."""
    values = {name: torch.tensor(numbers) for name, numbers in components.items()}
    n = len(next(iter(values.values())))
    weights = weights or dict.fromkeys(components, 1.0)
    is_valid = torch.tensor([True] * n if valid is None else valid)
    total = torch.stack([weights[name] * numbers for name, numbers in values.items()]).sum(dim=0)
    return RewardBatch(total.where(is_valid, 0.0), values, is_valid, weights)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_equal_numpys(offset: float) -> None:
    statistics, seen = RunningStatistics(), []
    assert (statistics.mean, statistics.std) == (0.0, 1.0)
    for values in BATCHES:
        shifted = [offset + value for value in values]
        seen += shifted
        statistics.update(torch.tensor(shifted))
        statistics.update(torch.tensor([]))
        assert statistics.mean == pytest.approx(np.mean(seen), rel=1e-12)
        assert statistics.std == pytest.approx(np.std(seen), rel=1e-6)
        assert statistics.count == len(seen)


def test_totals_are_standardised_and_the_batch_is_not_changed() -> None:
    normalizer, seen = RewardNormalizer(), []
    for values in BATCHES:
        seen += values
        rewards = batch({"r": 2.0}, r=values)
        total = normalizer(rewards)
        np.testing.assert_allclose(total, 2 * (np.array(values) - np.mean(seen)) / np.std(seen), rtol=1e-6)
        assert total.dtype == torch.float32
        assert rewards.components["r"].tolist() == values
        assert rewards.total.tolist() == [2 * value for value in values]


def test_weights_compare_rewards_of_different_scales() -> None:
    rewards = batch({"tiny": 1.0, "dark": 1.0, "large": 0.5}, tiny=[0.001, 0.003], dark=[5.0, 3.0], large=[2e3, 4e3])
    # -1 and 1, 1 and -1, half of -1 and 1.
    torch.testing.assert_close(RewardNormalizer()(rewards), torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-9, 1e6])
def test_a_constant_is_not_blown_up(value: float) -> None:
    normalizer = RewardNormalizer()
    assert normalizer(batch(r=[value] * 3)).tolist() == [0.0] * 3
    assert normalizer(batch(r=[value])).abs().item() <= 1e-6 * abs(value)


def test_images_without_a_valid_reward_do_not_count() -> None:
    normalizer = RewardNormalizer()
    rewards = batch(valid=[True, False, True, False], r=[1.0, math.nan, 3.0, 1e9], other=[2.0, 5.0, 2.0, math.inf])
    assert normalizer(rewards).tolist() == [-1.0, 0.0, 1.0, 0.0]
    assert normalizer.state_dict() == {"r": [2, 2.0, 2.0], "other": [2, 2.0, 0.0]}
    assert normalizer(batch(valid=[False], r=[5.0], other=[5.0])).tolist() == [0.0]
    assert normalizer.state_dict() == {"r": [2, 2.0, 2.0], "other": [2, 2.0, 0.0]}


def test_state_goes_on() -> None:
    normalizer = RewardNormalizer()
    normalizer(batch(r=BATCHES[0]))
    again = RewardNormalizer()
    again.load_state_dict(json.loads(json.dumps(normalizer.state_dict())))
    for values in BATCHES[1:]:
        assert torch.equal(again(batch(r=values)), normalizer(batch(r=values)))
    assert again.state_dict() == normalizer.state_dict()
