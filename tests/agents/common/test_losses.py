"""Each term of the objectives against numbers computed by hand, Stable-Baselines3, and finite differences."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor
from torch.autograd import gradcheck

from agents.common import losses
from dpok_gym import diffusion

CLIP = 0.2
INSIDE, ABOVE, BELOW = 0.1, 0.5, -0.5  # log-ratios
UPPER, LOWER = math.exp(CLIP), math.exp(-CLIP)


def tensor(values: list, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def randn(*size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_(True)


@pytest.mark.parametrize(
    ("clipping", "log_ratio", "advantage", "loss", "has_gradient"),
    [
        ("pessimistic", 0.0, 2.0, -2.0, True),
        ("pessimistic", INSIDE, 2.0, -2 * math.exp(INSIDE), True),
        ("pessimistic", INSIDE, -2.0, 2 * math.exp(INSIDE), True),
        ("pessimistic", ABOVE, 2.0, -2 * UPPER, False),
        ("pessimistic", ABOVE, -2.0, 2 * math.exp(ABOVE), True),  # too likely, and bad: pushed back
        ("pessimistic", BELOW, 2.0, -2 * math.exp(BELOW), True),  # too unlikely, and good: pulled back
        ("pessimistic", BELOW, -2.0, 2 * LOWER, False),
        ("clamp", 0.0, 2.0, -2.0, True),
        ("clamp", INSIDE, 2.0, -2 * math.exp(INSIDE), True),
        ("clamp", INSIDE, -2.0, 2 * math.exp(INSIDE), True),
        ("clamp", ABOVE, 2.0, -2 * UPPER, False),
        ("clamp", ABOVE, -2.0, 2 * UPPER, False),
        ("clamp", BELOW, 2.0, -2 * LOWER, False),
        ("clamp", BELOW, -2.0, 2 * LOWER, False),
    ],
)
def test_policy_gradient_loss(
    clipping: losses.Clipping, log_ratio: float, advantage: float, loss: float, has_gradient: bool
) -> None:
    log_ratios = tensor([log_ratio, 0.0], requires_grad=True)
    found = losses.policy_gradient_loss(log_ratios, tensor([advantage, 1.0]), CLIP, clipping)
    torch.testing.assert_close(found, tensor([loss, -1.0]))
    found[0].backward()
    # d(-A rho) / d(log rho) = -A rho, the loss itself.
    torch.testing.assert_close(log_ratios.grad, tensor([loss if has_gradient else 0.0, 0.0]))


def test_unknown_clipping() -> None:
    with pytest.raises(ValueError, match="clipping must be one of 'pessimistic', 'clamp', got 'soft'"):
        losses.policy_gradient_loss(torch.zeros(1), torch.ones(1), CLIP, "soft")  # type: ignore[arg-type]


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 1.0), ("mean", math.exp(-(1 - 1 / 8) / 8))])
def test_expected_ratio(reduction: diffusion.Reduction, expected: float) -> None:
    # Taken per dimension (8 here), it falls with the distance (KL = 1 nat here): a constant advantage has a gradient.
    old_mean, std = torch.zeros(100_000, 8), torch.ones(100_000)
    actions = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0))
    log_ratio = diffusion.log_ratio(actions, old_mean + 0.5, old_mean, std, reduction)
    assert log_ratio.exp().mean().item() == pytest.approx(expected, abs=0.02)


def test_value_loss() -> None:
    values = tensor([1.0, -2.0, 3.0], requires_grad=True)
    found = losses.value_loss(values, tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(found, tensor([0.0, 4.0, 6.25]))
    found.sum().backward()
    torch.testing.assert_close(values.grad, tensor([0.0, -4.0, 5.0]))


def test_denoising_loss() -> None:
    output = tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    found = losses.denoising_loss(output, tensor([[[1.0, 0.0], [3.0, 5.0]], [[2.0, 0.0], [0.0, 0.0]]]))
    torch.testing.assert_close(found, tensor([(0 + 4 + 0 + 1) / 4, 4 / 4]))
    found.sum().backward()
    torch.testing.assert_close(output.grad, tensor([[[0.0, 1.0], [0.0, -0.5]], [[-1.0, 0.0], [0.0, 0.0]]]))


def test_advantages_of_dpok() -> None:
    """With gamma = lambda = 1 and a reward at the end: A = r - V, and the return is r."""
    rewards = tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -2.0]])
    values = tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 3.0]])
    advantages, returns = losses.generalized_advantages(rewards, values)
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
    advantages, returns = losses.generalized_advantages(tensor([[1.0, 2.0, 4.0]]), values, gamma, gae_lambda)
    torch.testing.assert_close(advantages, tensor([expected]))
    torch.testing.assert_close(returns, tensor([expected]) + values)


def test_advantages_equal_those_of_stable_baselines3() -> None:
    n, steps, gamma, gae_lambda = 3, 5, 0.9, 0.8
    rewards, values = torch.randn(2, n, steps)
    space = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(steps, space, space, "cpu", gae_lambda, gamma, n)
    for t in range(steps):
        nothing = np.zeros((n, 1), np.float32)
        buffer.add(nothing, nothing, rewards[:, t].numpy(), np.full(n, t == 0), values[:, t], torch.zeros(n))
    buffer.compute_returns_and_advantage(torch.zeros(n), np.ones(n, bool))
    advantages, returns = losses.generalized_advantages(rewards, values, gamma, gae_lambda)
    torch.testing.assert_close(advantages, torch.from_numpy(buffer.advantages.T))
    torch.testing.assert_close(returns, torch.from_numpy(buffer.returns.T))


B, SHAPE = 3, (2, 2, 2)
MEAN, OTHER, SAMPLE = (randn(B, *SHAPE, seed=seed) for seed in range(3))
STD = tensor([0.3, 1.0, 2.5])
SCHEDULE = diffusion.Schedule(
    torch.arange(B).flip(0), tensor([1.0, 0.9, 0.8]), tensor([-0.5, 0.1, 2.0]), STD, *tensor(3 * [[0.2, 0.5, 0.9]])
)
STEP = torch.tensor([2, 0, 1])
LOG_RATIOS = tensor([0.0, INSIDE, ABOVE, BELOW] * 2, requires_grad=True)
ADVANTAGES = tensor([1.5] * 4 + [-0.7] * 4, requires_grad=True)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda r, a: losses.policy_gradient_loss(r, a, CLIP, "pessimistic"), (LOG_RATIOS, ADVANTAGES)),
        (lambda r, a: losses.policy_gradient_loss(r, a, CLIP, "clamp"), (LOG_RATIOS, ADVANTAGES)),
        (losses.value_loss, (LOG_RATIOS, ADVANTAGES)),
        (losses.denoising_loss, (MEAN, OTHER)),
        (lambda s, m: diffusion.log_prob(s, m, STD, "sum"), (SAMPLE, MEAN)),
        (lambda s, m: diffusion.log_prob(s, m, STD, "mean"), (SAMPLE, MEAN)),
        (lambda s, m, o: diffusion.log_ratio(s, m, o, STD, "sum"), (SAMPLE, MEAN, OTHER)),
        (lambda s, m, o: diffusion.log_ratio(s, m, o, STD, "mean"), (SAMPLE, MEAN, OTHER)),
        (lambda m, o: diffusion.kl_divergence(m, o, STD), (MEAN, OTHER)),
        (lambda m, o: SCHEDULE.output_mse(STEP, m, o), (MEAN, OTHER)),
    ],
    ids=[
        "pessimistic", "clamp", "value", "denoising",
        "log_prob-sum", "log_prob-mean", "log_ratio-sum", "log_ratio-mean", "kl", "mse",
    ],
)  # fmt: skip
def test_gradients_equal_finite_differences(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    assert gradcheck(function, inputs)


def test_kl_is_the_weighted_difference_of_the_outputs() -> None:
    """output_coef^2 ||output - other_output||^2 / (2 std^2), with means that come from two outputs."""
    outputs, others, samples = (randn(B, *SHAPE, seed=seed).detach().float() for seed in (5, 6, 7))
    schedule = diffusion.Schedule(SCHEDULE.timesteps, *(getattr(SCHEDULE, name).float() for name in TABLES))
    mean, other = schedule.mean(STEP, samples, outputs), schedule.mean(STEP, samples, others)
    mse = schedule.output_mse(STEP, mean, other)
    torch.testing.assert_close(mse, (outputs - others).square().flatten(1).mean(1))
    weight = schedule.output_coef[STEP].square() / (2 * schedule.std[STEP].square())
    kl = diffusion.kl_divergence(mean, other, schedule.std[STEP])
    torch.testing.assert_close(kl, weight * mse * math.prod(SHAPE))


TABLES = ("sample_coef", "output_coef", "std", "alpha", "clean_sample_coef", "clean_output_coef")
