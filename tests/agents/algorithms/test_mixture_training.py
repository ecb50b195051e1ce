"""DPOK goes where the optimum is known: in one dimension, where a policy's distribution can be integrated exactly."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from agents import DPOK, PRESETS
from agents.common.algorithm import DenoisingAlgorithm
from dpok_gym.mixture.exact import GaussianSampler, GridPolicy, best_policy
from dpok_gym.samplers import State
from tests.agents.algorithms.support import collect

T, N, BETA = 5, PRESETS["exact-objective"].common["images_per_iteration"], 0.5
GRID = np.linspace(-6, 6, 601)

pytestmark = pytest.mark.usefixtures("fresh_models")


#: Iterations of a training: half of the preset's.
ITERATIONS = 30


def make_agent(prompt: str, num_inference_steps: int = T, **changes: Any) -> DPOK:
    settings = PRESETS["exact-objective"].algorithm_kwargs("dpok")
    env = gymnasium.make_vec(
        "DPOK-Mixture-v0",
        num_envs=changes.get("images_per_iteration", settings["images_per_iteration"]),
        model="mixture-1d",
        prompts=[prompt],
        reward="mixture-linear",
        num_inference_steps=num_inference_steps,
        device="cpu",
    )
    return DPOK(env=env, **settings | {"seed": 0, "device": "cpu", "micro_batch_size": None, "kl_coef": BETA} | changes)


def on_grid(agent: DenoisingAlgorithm, prompt: str, reference: bool = False) -> GridPolicy:
    policy, process = agent.policy, agent.process
    conditioning = process.encode([prompt] * len(GRID))

    def mean(t: int, latents: Tensor) -> Tensor:
        steps = torch.full((len(latents),), t)
        return policy.transition(State(latents, steps, conditioning), reference)[0]

    return GridPolicy.of(mean, process.table.std, GRID)


def moments(policy: GridPolicy) -> tuple[float, float]:
    mean = policy.expectation(lambda x: x)
    return mean, policy.expectation(lambda x: (x - mean) ** 2)


def objective(policy: GridPolicy, reference: GridPolicy) -> float:
    """E[ r(x_0) ] - beta E[ sum_t KL_t ], with r(x) = x."""
    return policy.expectation(lambda x: x) - BETA * float(policy.step_kl(reference).sum())


@pytest.mark.slow
@pytest.mark.parametrize("kl_placement", ["reward", "loss"])
def test_gradient_of_the_whole_objective(kl_placement: str) -> None:
    """With the KL in the reward it is that of Eq. 8 over the steps that explore; in the loss, a term is missing.

    The last two of five steps do not explore. They stay out of this: their own KL alone holds them.
    """
    n, explore, prompt = 2048, 3, "two modes"
    plain = {"images_per_iteration": n, "use_critic": False, "normalize_loss": False}
    agent = make_agent(prompt, kl_placement=kl_placement, **plain)
    assert agent.process.table.exploring.tolist() == [True] * explore + [False] * 2
    bias = list(agent.policy.denoiser_parameters())[-1]
    assert bias.shape == (1,)
    bias.data += 1.5  # away from the reference, so that there is a KL
    reference, start = on_grid(agent, prompt, reference=True), on_grid(agent, prompt)

    def exact(shift: float) -> float:
        bias.data += shift
        means = on_grid(agent, prompt).means
        bias.data -= shift
        moved = GridPolicy(GRID, np.concatenate([means[:explore], start.means[explore:]]), start.std)
        kl = moved.step_kl(reference)[:explore]
        return moved.expectation(lambda x: x) - BETA * float(kl.sum())

    expected = (exact(0.01) - exact(-0.01)) / 0.02
    estimates = []
    for _ in range(4):
        collect(agent, n)
        buffer = agent.rollout_buffer
        buffer.advantages = agent.advantages(buffer)
        (batch,) = buffer.batches(None, np.random.default_rng(0))
        loss, _ = agent.loss(batch.take(batch.step < explore))
        (slope,) = torch.autograd.grad(loss.sum() / n, [bias])
        estimates.append(-slope.item())
        agent.images_drawn += n
    error = np.std(estimates, ddof=1) / 2

    assert error < 0.05 * abs(expected)
    if kl_placement == "reward":
        assert np.mean(estimates) == pytest.approx(expected, abs=4 * error)
    else:
        assert abs(np.mean(estimates) - expected) > 10 * error


@pytest.mark.slow
def test_dpok_finds_the_optimum_of_gaussian_data() -> None:
    agent = make_agent("one gaussian")
    model: Any = agent.process.model
    sampler = GaussianSampler.of(model.mixtures["one gaussian"], agent.process.table, model.denoiser.alphas_cumprod)
    exact_variance = sampler.covariance.item()
    shift = sampler.optimal_shift(torch.ones(1).double(), BETA).item()
    assert moments(on_grid(agent, "one gaussian")) == pytest.approx((0, exact_variance), abs=1e-4)
    agent.learn(ITERATIONS * N * T)
    mean, variance = moments(on_grid(agent, "one gaussian"))
    assert shift > 0.5 * exact_variance**0.5  # there is something to learn
    assert abs(mean - shift) < 0.1 * exact_variance**0.5
    assert variance == pytest.approx(exact_variance, rel=0.1)


@pytest.mark.slow
def test_dpok_finds_the_best_policy_of_two_modes() -> None:
    agent = make_agent("two modes")
    reference = on_grid(agent, "two modes", reference=True)
    best = best_policy(reference, lambda x: x, BETA)
    agent.learn(ITERATIONS * N * T)
    learned = on_grid(agent, "two modes")
    to_gain = objective(best, reference) - objective(reference, reference)
    gained = (objective(learned, reference) - objective(reference, reference)) / to_gain
    assert 0.9 < gained < 1
    right = [policy.expectation(lambda x: (x > 0).astype(np.float64)) for policy in (reference, learned, best)]
    assert right[0] == pytest.approx(0.5, abs=0.01)
    assert right[1] == pytest.approx(right[2], abs=0.05)


def test_the_whole_denoiser_is_trained_unless_a_rank_is_given() -> None:
    agent = make_agent("two modes")
    assert agent.policy.lora is None
    assert {tuple(value.shape) for value in agent.policy.denoiser_parameters()} >= {(64, 64), (1, 64)}
    with pytest.raises(ValueError, match="no layer of the denoiser ends in"):
        make_agent("two modes", policy_kwargs={"lora_rank": 4, "target_modules": ["to_q"]})
    with pytest.raises(ValueError, match="too small for gradient checkpointing"):
        make_agent("two modes", policy_kwargs={"gradient_checkpointing": True})


@pytest.mark.slow
def test_a_whole_denoiser_goes_on_from_a_state() -> None:
    agent, other = make_agent("two modes"), make_agent("two modes", seed=1)
    agent.learn(N * T)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    trained = on_grid(agent, "two modes").means
    np.testing.assert_array_equal(on_grid(other, "two modes").means, trained)
    assert not np.array_equal(trained, on_grid(agent, "two modes", reference=True).means)
    for each in (agent, other):
        each.learn(N * T, reset_num_timesteps=False)
    np.testing.assert_array_equal(on_grid(other, "two modes").means, on_grid(agent, "two modes").means)
    assert not np.array_equal(on_grid(other, "two modes").means, trained)
