"""DiffusionNFT and AWM where their optimum is known."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from agents import AWM, DiffusionNFT
from agents.common.algorithm import DenoisingAlgorithm
from dpok_gym.mixture.exact import GaussianSampler, GridPolicy
from dpok_gym.samplers import State

PROMPT = "one gaussian"
GRID = np.linspace(-6, 6, 601)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_models")]


def make_agent(cls: type[DenoisingAlgorithm], n_images: int, n_steps: int, **kwargs: Any) -> Any:
    env = gymnasium.make_vec(
        "DPOK-Mixture-v0",
        num_envs=n_images,
        model="mixture-1d",
        prompts=[PROMPT],
        reward="mixture-linear",
        num_inference_steps=n_steps,
        device="cpu",
    )
    settings: dict[str, Any] = {
        "group_size": n_images,
        "advantage_clip": 3.0,  # so that next to no advantage is cut off
        "space": "output",
        "old_decay": 0.0,
        "learning_rate": 1e-2,
        "max_grad_norm": 100.0,
        "micro_batch_size": None,
        "policy_kwargs": {"max_batch_size": None},
        "seed": 0,
        "device": "cpu",
    }
    return cls(env=env, **settings | kwargs)


def exact_sampler(agent: Any) -> GaussianSampler:
    model = agent.process.model
    return GaussianSampler.of(model.mixtures[PROMPT], agent.process.table, model.denoiser.alphas_cumprod)


def on_grid(agent: Any, reference: bool = False) -> GridPolicy:
    conditioning = agent.process.encode([PROMPT] * len(GRID))

    def mean(t: int, latents: Tensor) -> Tensor:
        steps = torch.full((len(latents),), t)
        return agent.policy.transition(State(latents, steps, conditioning), reference)[0]

    return GridPolicy.of(mean, agent.process.table.std, GRID)


def moments(agent: Any) -> tuple[float, float]:
    policy = on_grid(agent)
    mean = policy.expectation(lambda x: x)
    return mean, policy.expectation(lambda x: (x - mean) ** 2) ** 0.5


def test_each_iteration_of_nft_tilts_the_images_anew() -> None:
    """An iteration that learns to the end multiplies the density by exp(A / beta); there is no place to rest."""
    n, steps, beta = 2048, 5, 1.0
    agent = make_agent(DiffusionNFT, n, steps, beta=beta, normalize_errors=False, batch_size=512, n_epochs=15)
    sampler = exact_sampler(agent)
    std = sampler.covariance.item() ** 0.5
    # A = (x - mean) / (3 std), so its slope is 1 / (3 std).
    shift = sampler.optimal_shift(torch.tensor([1 / (3 * std)]).double(), beta).item()
    means = [0.0]
    for _ in range(4):
        agent.learn(n * steps, reset_num_timesteps=False)
        means.append(moments(agent)[0])
    assert means[1] == pytest.approx(shift, rel=0.1)
    assert all(0.5 * shift < gain < 1.3 * shift for gain in np.diff(means))
    assert means[4] > std  # four tilts, and no end


@pytest.mark.parametrize(("cls", "kwargs"), [(DiffusionNFT, {"normalize_errors": False}), (AWM, {})])
def test_with_a_kl_gaussian_data_is_tilted_once(cls: type[DenoisingAlgorithm], kwargs: dict[str, Any]) -> None:
    """Both rest at p_pre exp(A / kl_coef), the optimum of a KL penalty of kl_coef x 3 std."""
    n, steps, kl_coef = 256, 20, 0.5
    agent = make_agent(cls, n, steps, kl_coef=kl_coef, batch_size=1280, final_lr_fraction=0.02, **kwargs)
    agent.learn(20 * n * steps)
    mean, std = moments(agent)
    sampler = exact_sampler(agent)
    expected = sampler.optimal_shift(torch.tensor([1 / (3 * std)]).double(), kl_coef).item()
    assert expected > 0.5 * sampler.covariance.item() ** 0.5  # there is something to learn
    assert mean == pytest.approx(expected, rel=0.1)
    assert std**2 == pytest.approx(sampler.covariance.item(), rel=0.15)


def test_an_anchor_holds_the_policy() -> None:
    """The images of the pre-trained model count for the same distance: the policy ends nearer to it."""
    kl = {}
    for anchor_coef in (0.0, 0.5):
        agent = make_agent(
            DiffusionNFT, 256, 5, normalize_errors=False, batch_size=640, anchor_coef=anchor_coef, anchor_images=256
        )
        agent.learn(20 * 256 * 5)
        exploring = agent.process.table.exploring.numpy()
        kl[anchor_coef] = on_grid(agent).step_kl(on_grid(agent, reference=True))[exploring].sum()
    assert kl[0.5] < 0.5 * kl[0.0]
