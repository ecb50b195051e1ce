"""Rewards standardised by fixed numbers before they are weighted."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpok_gym import DenoisingEnv, DenoisingVectorEnv
from dpok_gym.rewards import Reward, RewardBatch, make_reward
from dpok_gym.rewards.normalization import standardize


def score(reward: Reward, n: int) -> RewardBatch:
    return reward(torch.zeros(n, 3, 2, 2), ["a prompt"] * n)


def fixed(images: Tensor, prompts: list[str]) -> list[float]:
    return [1.0, 5.0]


def test_totals_are_standardised_and_components_raw() -> None:
    batch = score(make_reward({fixed: {"weight": 3.0, "normalize": [2.0, 0.5]}}), 2)
    assert batch.total.tolist() == [-6.0, 18.0]
    assert batch.components["fixed"].tolist() == [1.0, 5.0]
    assert batch.weights == {"fixed": 3.0}
    assert batch.total.dtype == torch.float32


def test_weights_compare_rewards_of_different_scales() -> None:
    def small(images: Tensor, prompts: list[str]) -> list[float]:
        return [0.001, 0.003]

    def large(images: Tensor, prompts: list[str]) -> list[float]:
        return [2000.0, 4000.0]

    spec = {small: {"normalize": [0.002, 0.001]}, large: {"weight": 0.5, "normalize": (3000, 1000)}}
    torch.testing.assert_close(score(make_reward(spec), 2).total, torch.tensor([-1.5, 1.5]))


def test_standardize_keeps_the_precision_of_large_offsets() -> None:
    # In float32 alone, the mean would be rounded to 16777216.
    values = torch.tensor([16777216.0, 16777218.0])
    assert standardize(values, 16777217.0, 1.0).tolist() == [-1.0, 1.0]


def test_one_pair_cannot_normalise_several_components() -> None:
    def several(images: Tensor, prompts: list[str]) -> dict[str, list[float]]:
        return {"sharp": [1.0], "dark": [1.0]}

    reward = make_reward({several: {"normalize": (0, 1)}})
    with pytest.raises(ValueError, match=r"the components sharp, dark, which one .* cannot normalise; .*=True"):
        score(reward, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": 1.0}, "unknown settings weights of the reward 'jpeg-.*it has 'weight', 'normalize'"),
        ({"normalize": "running"}, "'jpeg-.*cannot be 'running': .*pass normalize_rewards=True to the learner"),
        ({"normalize": "batch"}, r"must be a pair \[mean, std\] .*or None, not 'batch'"),
        ({"normalize": "12"}, "not '12'"),
        ({"normalize": True}, "not True"),
        ({"normalize": [0.0]}, r"not \[0.0\]"),
        ({"normalize": [0.0, 0.0]}, "positive std"),
        ({"normalize": [math.nan, 1.0]}, "finite numbers"),
        ({"normalize": [0.0, math.inf]}, "finite numbers"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_reward({"jpeg-compressibility": settings})


def test_environments_can_be_given_it_by_name() -> None:
    def play(env: Any) -> tuple:
        env.reset(seed=0)
        for _ in range(2):
            last = env.step(np.random.default_rng(0).standard_normal(env.action_space.shape, np.float32))
        return last

    names = {"jpeg-compressibility": {"normalize": [-2.0, 0.5]}, "shapes-quality": 0.0}
    options: dict[str, Any] = {"reward": names, "num_inference_steps": 2, "device": "cpu"}
    _, rewards, _, _, infos = play(DenoisingVectorEnv(2, **options))
    raw = infos["final_info"]["rewards"]["jpeg-compressibility"]
    np.testing.assert_allclose(rewards, (raw + 2) / 0.5, rtol=1e-6)
    env = DenoisingEnv(**options)
    _, reward, _, _, info = play(env)
    assert reward == pytest.approx((info["rewards"]["jpeg-compressibility"] + 2) / 0.5)
