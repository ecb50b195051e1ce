"""DPOK goes where the optimum is known: in one dimension, where a policy's distribution can be integrated exactly."""

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from agents import DPOK
from dpok_gym.mixture.exact import GaussianSampler, GridPolicy, best_policy

T, BETA = 5, 0.5
GRID = np.linspace(-6, 6, 601)


def make_agent(prompt: str, **changes) -> DPOK:
    env = gymnasium.make_vec(
        "DPOK-Mixture-v0", num_envs=128, model="mixture-1d", prompts=[prompt], num_inference_steps=T
    )
    settings = {
        "learning_rate": 2e-2,
        "final_lr_fraction": 0.02,
        "step_weighting": "likelihood",
        "normalize_advantage": False,
        "kl_in": "reward",
        "kl_coef": BETA,
        "max_grad_norm": 100.0,
        "micro_batch_size": None,
        "vf_learning_rate": 3e-3,
        "policy_kwargs": {"critic_hidden": 32},
        "seed": 0,
        "device": "cpu",
    }
    return DPOK("DenoisingPolicy", env, **settings | changes)


def on_grid(agent: DPOK, prompt: str, reference: bool = False) -> GridPolicy:
    policy = agent.policy
    tokens = policy.model.tokenize([prompt]).expand(len(GRID), -1)

    def mean(t: int, latents: Tensor) -> Tensor:
        steps = torch.full((len(latents),), t)
        return policy.transition({"latent": latents, "step": steps, "prompt": tokens}, reference)[0]

    return GridPolicy.of(mean, policy.schedule.std, GRID)


def moments(policy: GridPolicy) -> tuple[float, float]:
    mean = policy.expectation(lambda x: x)
    return mean, policy.expectation(lambda x: (x - mean) ** 2)


def test_dpok_finds_the_optimum_of_gaussian_data() -> None:
    agent = make_agent("one gaussian")
    model = agent.policy.model
    sampler = GaussianSampler.of(model.mixtures["one gaussian"], agent.policy.schedule, model.denoiser.alphas_cumprod)
    exact_variance = sampler.covariance.item()
    shift = sampler.optimal_shift(torch.ones(1).double(), BETA).item()
    assert moments(on_grid(agent, "one gaussian")) == pytest.approx((0, exact_variance), abs=1e-4)
    agent.learn(40 * 128 * T)
    mean, variance = moments(on_grid(agent, "one gaussian"))
    assert shift > 0.5 * exact_variance**0.5  # there is something to learn
    assert abs(mean - shift) < 0.1 * exact_variance**0.5
    assert variance == pytest.approx(exact_variance, rel=0.1)


def test_dpok_finds_the_best_policy_of_two_modes() -> None:
    agent = make_agent("two modes")
    pretrained = on_grid(agent, "two modes", reference=True)

    def objective(policy: GridPolicy) -> float:
        return policy.expectation(lambda x: x) - BETA * policy.step_kl(pretrained).sum()

    best = best_policy(pretrained, lambda x: x, BETA)
    agent.learn(40 * 128 * T)
    learned = on_grid(agent, "two modes")
    gained = (objective(learned) - objective(pretrained)) / (objective(best) - objective(pretrained))
    assert 0.9 < gained < 1
    right = [policy.expectation(lambda x: 1.0 * (x > 0)) for policy in (pretrained, learned, best)]
    assert right[0] == pytest.approx(0.5, abs=0.01)
    assert right[1] == pytest.approx(right[2], abs=0.05)


def test_the_whole_denoiser_is_trained_unless_a_rank_is_given() -> None:
    agent = make_agent("two modes")
    assert agent.policy.lora is None
    assert {tuple(value.shape) for value in agent.policy.denoiser_parameters()} >= {(64, 64), (1, 64)}
    with pytest.raises(ValueError, match="no layer of the denoiser ends in"):
        make_agent("two modes", policy_kwargs={"lora_rank": 4})
    with pytest.raises(ValueError, match="too small for gradient checkpointing"):
        make_agent("two modes", policy_kwargs={"gradient_checkpointing": True})


def test_saved_and_loaded(tmp_path) -> None:
    agent = make_agent("two modes")
    agent.learn(128 * T)
    agent.save(tmp_path / "agent")
    loaded = DPOK.load(tmp_path / "agent", device="cpu")
    np.testing.assert_array_equal(on_grid(loaded, "two modes").means, on_grid(agent, "two modes").means)
    assert not np.array_equal(on_grid(agent, "two modes").means, on_grid(agent, "two modes", reference=True).means)
