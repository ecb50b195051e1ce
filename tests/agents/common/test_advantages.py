"""Advantages against numbers computed by hand, and Stable-Baselines3's."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from agents.common.advantages import center, generalized_advantages, leave_one_out, standardize_in_groups


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- From rewards and values


def test_advantages_of_dpok() -> None:
    """With gamma = lambda = 1 and a reward at the end: A = r - V, and the return is r."""
    rewards = tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -2.0]])
    values = tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 3.0]])
    advantages, returns = generalized_advantages(rewards, values)
    torch.testing.assert_close(advantages, tensor([[0.5, 0.75, 0.875], [-3.0, -4.0, -5.0]]))
    torch.testing.assert_close(returns, tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]]))


@pytest.mark.parametrize(
    ("gamma", "gae_lambda", "expected"),
    [
        # The errors are 1 + 2/2 - 1 = 1, 2 + 3/2 - 2 = 1.5 and 4 - 3 = 1; each is worth gamma lambda of the next.
        (0.5, 0.5, [1 + 0.25 * 1.75, 1.75, 1.0]),
        (0.5, 0.0, [1.0, 1.5, 1.0]),
        (0.5, 1.0, [1 + 0.5 * (2 + 0.5 * 4) - 1, 2 + 0.5 * 4 - 2, 1.0]),
    ],
)
def test_advantages_by_hand(gamma: float, gae_lambda: float, expected: list[float]) -> None:
    values = tensor([[1.0, 2.0, 3.0]])
    advantages, returns = generalized_advantages(tensor([[1.0, 2.0, 4.0]]), values, gamma, gae_lambda)
    torch.testing.assert_close(advantages, tensor([expected]))
    torch.testing.assert_close(returns, tensor([expected]) + values)


def test_discounted_returns() -> None:
    rewards = tensor([[0.0, 0.0, 8.0]])
    _, returns = generalized_advantages(rewards, torch.zeros_like(rewards), gamma=0.5)
    torch.testing.assert_close(returns, tensor([[2.0, 4.0, 8.0]]))


def test_advantages_equal_those_of_stable_baselines3() -> None:
    n, steps, gamma, gae_lambda = 3, 5, 0.9, 0.8
    rewards, values = torch.randn(2, n, steps)
    space = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(steps, space, space, "cpu", gae_lambda, gamma, n)
    for t in range(steps):
        nothing = np.zeros((n, 1), np.float32)
        buffer.add(nothing, nothing, rewards[:, t].numpy(), np.full(n, t == 0), values[:, t], torch.zeros(n))
    buffer.compute_returns_and_advantage(torch.zeros(n), np.ones(n, bool))
    advantages, returns = generalized_advantages(rewards, values, gamma, gae_lambda)
    torch.testing.assert_close(advantages, torch.from_numpy(buffer.advantages.T))
    torch.testing.assert_close(returns, torch.from_numpy(buffer.returns.T))


# --- Normalised over a rollout

ALL = torch.ones(4, dtype=torch.bool)
SOME = torch.tensor([True, False, True, False])


def random_advantages() -> Tensor:
    return 3 + 2 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_centred_by_hand() -> None:
    plain = tensor([[1.0, 3.0], [5.0, 9.0]])
    assert center(plain, ALL[:2]).tolist() == [[-2.0, -3.0], [2.0, 3.0]]


def test_images_that_are_not_valid_have_no_part_in_the_mean() -> None:
    plain = random_advantages()
    plain[~SOME] = 1e6
    torch.testing.assert_close(center(plain, SOME)[SOME], center(plain[SOME], ALL[:2]))


def test_one_image_or_none_has_nothing_to_be_compared_with() -> None:
    plain = random_advantages()
    one = torch.arange(4) == 2
    for valid in (~ALL, one):
        assert torch.equal(center(plain, valid), plain)


# --- In groups


def test_standardized_in_groups_by_hand() -> None:
    rewards = tensor([1.0, 10.0, 3.0, 30.0, 5.0])
    groups = torch.tensor([0, 7, 0, 7, 0])
    # Group 0: mean 3, variance 8/3. Group 7: mean 20, standard deviation 10.
    expected = tensor([-2 / (8 / 3) ** 0.5, -1.0, 0.0, 1.0, 2 / (8 / 3) ** 0.5])
    torch.testing.assert_close(standardize_in_groups(rewards, groups), expected, rtol=1e-5, atol=1e-5)


def test_one_standard_deviation_for_all_groups() -> None:
    rewards, groups = tensor([1.0, 3.0, 10.0, 10.0]), torch.tensor([0, 0, 1, 1])
    # Group means 2 and 10; the standard deviation of all four is that of (-5, -3, 4, 4).
    expected = tensor([-1.0, 1.0, 0.0, 0.0]) / (66 / 4) ** 0.5
    torch.testing.assert_close(standardize_in_groups(rewards, groups, False), expected, rtol=1e-5, atol=1e-5)


def test_a_group_without_differences_has_no_advantage() -> None:
    rewards = tensor([2.0, 2.0, 5.0])
    assert standardize_in_groups(rewards, torch.tensor([1, 1, 4])).tolist() == [0.0] * 3


@pytest.mark.parametrize("std_of_group", [True, False])
@pytest.mark.parametrize("value", [0.3, 21.37, 1000.7])
def test_equal_rewards_are_not_scaled_up(value: float, std_of_group: bool) -> None:
    """Their mean in float32 is a little off; and so may be one of them, which the same image got in another batch."""
    rewards, groups = torch.full((24,), value), torch.zeros(24, dtype=torch.int64)
    assert standardize_in_groups(rewards, groups, std_of_group).tolist() == [0.0] * 24
    rewards[5] = torch.nextafter(rewards[5], torch.tensor(torch.inf))
    assert standardize_in_groups(rewards, groups, std_of_group).abs().max() < 1e-6 * value


def test_small_differences_of_small_rewards_count() -> None:
    rewards, groups = torch.tensor([1e-9, 3e-9]), torch.tensor([0, 0])
    assert standardize_in_groups(rewards, groups).tolist() == pytest.approx([-1.0, 1.0])


def test_leave_one_out_by_hand() -> None:
    rewards = tensor([1.0, 10.0, 3.0, 30.0, 5.0, 7.0])
    groups = torch.tensor([0, 1, 0, 1, 0, 2])
    # The last one is alone: it is compared with the mean of all others, 49 / 5.
    expected = tensor([1 - 4, 10 - 30, 3 - 3, 30 - 10, 5 - 2, 7 - 9.8])
    torch.testing.assert_close(leave_one_out(rewards.float(), groups).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_single_image_keeps_its_reward() -> None:
    assert leave_one_out(torch.tensor([4.0]), torch.tensor([3])).tolist() == [4.0]


def test_an_images_own_reward_is_no_part_of_its_baseline() -> None:
    """Which is why the baseline adds no bias."""
    groups = torch.tensor([0, 0, 0, 1])
    for image in range(4):
        rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
        baseline = rewards[image] - leave_one_out(rewards, groups)[image]
        rewards[image] = 100
        torch.testing.assert_close(rewards[image] - leave_one_out(rewards, groups)[image], baseline)
