"""The best value of E[r] - beta KL, against closed forms and independent computations."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from dpok_gym import DenoisingVectorEnv
from dpok_gym.mixture.exact import GaussianSampler, GridPolicy, best_policy
from dpok_gym.mixture.model import MixtureModel
from dpok_gym.mixture.optimum import (
    Array,
    best_means,
    interpolate,
    optimal_transition,
    prompt_value,
    smoothed,
    value_of,
)
from dpok_gym.prompts import PromptSet

GRID = np.linspace(-6, 6, 601)


def make(model: str, prompts: object, reward: object, n_steps: int, **arguments: Any) -> DenoisingVectorEnv:
    common = {"decode_batch_size": 256, "device": "cpu"}
    return DenoisingVectorEnv(
        1, model=model, prompts=prompts, reward=reward, num_inference_steps=n_steps, **common | arguments
    )


def half(x: Array) -> Array:
    return 0.5 * x


def bump(x: Array) -> Array:
    return np.exp(-0.5 * (x - 1) ** 2)


@pytest.mark.parametrize("beta", [1.0, 0.25])
@pytest.mark.parametrize(("reward", "function"), [({"mixture-linear": 0.5}, half), ("mixture-bump", bump)])
def test_one_dimension(reward: object, function, beta: float) -> None:
    """The value of the policy that another implementation of dynamic programming finds."""
    env = make("mixture-1d", "two modes", reward, 10)
    conditioning = env.process.encode(["two modes"] * len(GRID))

    def mean(step: int, latents: torch.Tensor) -> torch.Tensor:
        return env.process.transition(env.process.state(latents, step, conditioning))[0]

    reference = GridPolicy.of(mean, env.process.table.std, GRID)
    best = best_policy(reference, function, beta)
    expected = best.expectation(function) - beta * best.step_kl(reference).sum()
    assert env.optimal_value(beta) == pytest.approx(expected, abs=2e-5)
    assert expected > reference.expectation(function)


@pytest.mark.slow
@pytest.mark.parametrize("sde_steps", [None, (5, 8)])
def test_gaussian_data_in_two_dimensions(sde_steps: tuple[int, int] | None) -> None:
    """In closed form: the mean moves along the covariance given x_T, and costs half of what it gains."""
    env = make("mixture", "one gaussian", "mixture-linear", 20, sde_steps=sde_steps)
    assert isinstance(env.model, MixtureModel)
    data = env.model.mixtures["one gaussian"]
    sampler = GaussianSampler.of(data, env.process.table, env.model.denoiser.alphas_cumprod)
    slope = torch.tensor([1.0, 0.0]).double()
    gain = (slope @ sampler.optimal_shift(slope, 0.5)).item() / 2
    assert env.optimal_value(0.5) == pytest.approx((slope @ sampler.mean).item() + gain, abs=2e-5)


@pytest.mark.slow
def test_a_reward_of_one_coordinate_needs_one_dimension() -> None:
    """The modes at (-1, 0) and (1, 0) are those of one dimension, and noise in the other."""
    plane, line = (make(model, "two modes", {"mixture-linear": 0.5}, 20) for model in ("mixture", "mixture-1d"))
    assert plane.optimal_value(0.25) == pytest.approx(line.optimal_value(0.25), abs=2e-5)


@pytest.mark.slow
def test_the_bound_of_unrestricted_transitions() -> None:
    """beta log E[exp(r / beta) | x_T], averaged over x_T, is what no policy can exceed; small steps come near it."""
    env, beta, n = make("mixture-1d", "two modes", "mixture-bump", 50), 0.25, 400
    latents = np.random.default_rng(0).standard_normal((200, 1, 1, 1), np.float32).repeat(n, 0)
    noise = torch.Generator().manual_seed(0)
    conditioning = env.process.encode(["two modes"] * len(latents))
    start = torch.from_numpy(latents)
    with torch.no_grad():
        for step in env.process.denoise(start, conditioning, lambda _: torch.randn(start.shape, generator=noise)):
            final = step.next_latents
    rewards = bump(final.double().numpy().reshape(200, n))
    bound = beta * np.log(np.exp(rewards / beta).mean(1))
    value = env.optimal_value(beta)
    assert rewards.mean() + 0.05 < value < bound.mean() + 4 * bound.std() / math.sqrt(200)


def test_a_finer_grid_changes_little() -> None:
    env = make("mixture-1d", "two modes", "mixture-bump", 10)
    coarse, fine = (prompt_value(env.process, "two modes", env.rewards_of, 0.25, spacing) for spacing in (0.04, 0.01))
    assert coarse == pytest.approx(fine, abs=2e-5)


def test_the_best_policy_has_the_best_value() -> None:
    """Two prompts at once; the last step is deterministic."""
    prompts = PromptSet("both", ("one gaussian", "two modes"), weights=(1.0, 3.0))
    env = make("mixture-1d", prompts, "mixture-bump", 10, sde_steps=(0, 9))
    optimal = optimal_transition(env.process, env.prompts, env.rewards_of, 0.25)
    best, start = (
        value_of(env.process, env.prompts, env.rewards_of, 0.25, transition)
        for transition in (optimal, env.process.transition)
    )
    assert best == pytest.approx(env.optimal_value(0.25), abs=3e-4)
    assert best > start + 0.05


def test_prompts_count_by_their_weights() -> None:
    reward = {"mixture-linear": 0.5}
    one, two = (make("mixture-1d", prompt, reward, 4).optimal_value(1.0) for prompt in ("one gaussian", "two modes"))
    both = PromptSet("both", ("one gaussian", "two modes"), weights=(1.0, 3.0))
    assert make("mixture-1d", both, reward, 4).optimal_value(1.0) == pytest.approx(0.25 * one + 0.75 * two, abs=1e-12)


def test_it_leaves_the_environment_alone() -> None:
    env = make("mixture-1d", "two modes", "mixture-bump", 4)
    env.reset(seed=0)
    env.optimal_value(1.0)
    assert env.process.num_function_evaluations == 0
    env.step(np.zeros((1, 1, 1, 1), np.float32))


class TestPieces:
    x = np.linspace(-3, 3, 61)

    def test_smoothed(self) -> None:
        """E[(x + s n)^2] = x^2 + s^2, whether the noise is finer than the grid or not."""
        for std in (0.02, 0.3):
            values = smoothed(self.x, self.x**2, std)
            np.testing.assert_allclose(values[20:41], self.x[20:41] ** 2 + std**2, atol=1e-7)
        plane = self.x[:, None] ** 2 * np.ones(61) + self.x**2
        np.testing.assert_allclose(smoothed(self.x, plane, 0.3)[30, 30], 2 * 0.09, atol=1e-7)

    def test_best_means(self) -> None:
        """max_m -(m - 1)^2 - c (m - m_0)^2 = -c / (1 + c) (1 - m_0)^2, with c = beta / (2 std^2)."""
        c = 0.5 / (2 * 0.4**2)
        expected = -c / (1 + c) * (1 - self.x) ** 2
        found, means = best_means(self.x, -((self.x - 1) ** 2), 0.4, 0.5)
        # The slopes of both terms cancel: m = (1 + c m_0) / (1 + c).
        np.testing.assert_allclose(means[10:51, 0], ((1 + c * self.x) / (1 + c))[10:51], atol=1e-6)
        np.testing.assert_allclose(found[10:51], expected[10:51], atol=1e-9)
        plane = -((self.x - 1) ** 2)[:, None] - ((self.x - 0.5) ** 2)
        found, _ = best_means(self.x, plane, 0.4, 0.5)
        other = -c / (1 + c) * (0.5 - self.x) ** 2
        np.testing.assert_allclose(found[10:51, 10:51], (expected[:, None] + other)[10:51, 10:51], atol=1e-9)

    def test_interpolate(self) -> None:
        plane = np.sin(self.x)[:, None] * np.cos(self.x)
        points = np.array([[0.123, -0.456], [1.0, 0.0], [9.0, 0.0]])
        expected = [math.sin(0.123) * math.cos(0.456), math.sin(1.0), math.sin(3.0)]
        np.testing.assert_allclose(interpolate(self.x, plane, points), expected, atol=1e-5)
