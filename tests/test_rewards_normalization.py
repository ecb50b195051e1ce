"""Rewards standardised before they are weighted: by what they were so far, or by fixed numbers."""

import json
import math

import numpy as np
import pytest
import torch

from dpok_gym import DenoisingEnv, DenoisingVectorEnv
from dpok_gym.rewards import make_reward
from dpok_gym.rewards.normalization import RunningStatistics

BATCHES = ([1.0, 5.0, 3.0], [100.0], [-2.0, 0.5])


def returning(*batches):
    """A reward that says these values, call by call."""
    remaining = iter(batches)

    def fixed(images, prompts):
        return next(remaining)

    return fixed


def judge(reward, n):
    return reward(torch.zeros(n, 3, 2, 2), ["a prompt"] * n)


def running(function, weight=1.0, non_finite="error"):
    return make_reward({function: {"weight": weight, "normalize": "running"}}, non_finite)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_equal_numpys(offset):
    statistics, seen = RunningStatistics(), []
    assert (statistics.mean, statistics.std) == (0.0, 1.0)
    for batch in BATCHES:
        batch = [offset + value for value in batch]
        seen += batch
        statistics.update(torch.tensor(batch))
        statistics.update(torch.tensor([]))
        assert statistics.mean == pytest.approx(np.mean(seen), rel=1e-12)
        assert statistics.std == pytest.approx(np.std(seen), rel=1e-6)
        assert statistics.count == len(seen)


def test_totals_are_standardised_and_components_raw():
    reward, seen = running(returning(*BATCHES), weight=2.0), []
    for values in BATCHES:
        seen += values
        batch = judge(reward, len(values))
        expected = 2 * (np.array(values) - np.mean(seen)) / np.std(seen)
        np.testing.assert_allclose(batch.total, expected, rtol=1e-6)
        assert batch.components["fixed"].tolist() == values
        assert torch.equal(batch.weighted["fixed"], batch.total)


def test_weights_compare_rewards_of_different_scales():
    def small(images, prompts):
        return {"tiny": [0.001, 0.003], "dark": [5.0, 3.0]}

    def large(images, prompts):
        return [2000.0, 4000.0]

    settings = {"normalize": "running"}
    batch = judge(make_reward({small: settings, large: settings | {"weight": 0.5}}), 2)
    assert {name: values.tolist() for name, values in batch.weighted.items()} == {
        "tiny": [-1.0, 1.0],
        "dark": [1.0, -1.0],
        "large": [-0.5, 0.5],
    }
    assert batch.total.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-9, 1e6])
def test_a_constant_is_not_blown_up(value):
    reward = running(returning([value] * 3, [value]))
    assert judge(reward, 3).total.tolist() == [0.0] * 3
    assert judge(reward, 1).total.abs().item() <= 1e-6 * abs(value)


def test_masked_pictures_do_not_count():
    values = [1.0, math.nan, 3.0]
    batch = judge(running(returning(values), non_finite="mask"), 3)
    assert batch.total.tolist() == [-1.0, 0.0, 1.0]
    assert batch.valid.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="reward 'fixed' for the prompt 'a prompt' is not finite"):
        judge(running(returning(values)), 3)


def test_evaluations_see_raw_rewards_and_leave_no_trace():
    reward = running(returning([1.0, 3.0], [100.0], [2.0]), weight=2.0)
    judge(reward, 2)
    before = reward.state_dict()
    with reward.evaluating():
        assert judge(reward, 1).total.tolist() == [200.0]
    assert reward.state_dict() == before
    assert judge(reward, 1).total.tolist() == [0.0]  # the mean of 1, 3 and 2


def test_state_goes_on():
    reward = running(returning(*BATCHES))
    judge(reward, 3)
    saved = json.loads(json.dumps(reward.state_dict()))
    again = running(returning(*BATCHES[1:]))
    again.load_state_dict(saved)
    for values in BATCHES[1:]:
        assert torch.equal(judge(again, len(values)).total, judge(reward, len(values)).total)


def test_fixed_numbers():
    reward = make_reward({returning([1.0, 5.0]): {"weight": 3.0, "normalize": [2.0, 0.5]}})
    with reward.evaluating():  # they are part of the reward, and stay
        assert judge(reward, 2).total.tolist() == [-6.0, 18.0]
    assert reward.state_dict() == {}
    several = make_reward({returning({"sharp": [1.0], "dark": [1.0]}): {"normalize": (0, 1)}})
    with pytest.raises(ValueError, match=r"the components sharp, dark, which one .* cannot normalise; use"):
        judge(several, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": 1.0}, "unknown settings weights of the reward 'jpeg-.*it has 'weight', 'normalize'"),
        ({"normalize": "batch"}, "must be 'running', a pair .*not 'batch'"),
        ({"normalize": "12"}, "not '12'"),
        ({"normalize": True}, "not True"),
        ({"normalize": [0.0]}, r"not \[0.0\]"),
        ({"normalize": [0.0, 0.0]}, "positive std"),
        ({"normalize": [math.nan, 1.0]}, "finite numbers"),
        ({"normalize": [0.0, math.inf]}, "finite numbers"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_reward({"jpeg-compressibility": settings})


def test_environments_can_be_given_it_by_name():
    def play(env):
        env.reset(seed=0)
        for _ in range(2):
            last = env.step(np.random.default_rng(0).standard_normal(env.action_space.shape, np.float32))
        return last

    names = {"jpeg-compressibility": {"normalize": [-2.0, 0.5]}, "shapes-quality": 0.0}
    options = {"reward": names, "num_inference_steps": 2, "device": "cpu"}
    _, rewards, _, _, infos = play(DenoisingVectorEnv(2, **options))
    raw = infos["final_info"]["rewards"]["jpeg-compressibility"]
    np.testing.assert_allclose(rewards, (raw + 2) / 0.5, rtol=1e-6)
    env = DenoisingEnv(**options)
    _, reward, _, _, info = play(env)
    assert reward == pytest.approx((info["rewards"]["jpeg-compressibility"] + 2) / 0.5)
    assert env.reward is env.batch.reward
