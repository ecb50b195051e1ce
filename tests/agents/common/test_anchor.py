"""The anchor: the loss that diffusion models are trained with, on images of the pre-trained model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import DDPO, DPOK, BestOfN, DiffusionNFT, DRaFT
from agents.common.anchor import Anchor
from tests.agents.common.support import PROMPTS, perturb, snapshot
from tests.support import assert_same, redness

N, T = 4, 3
UPDATE = N * T

MakeAgent = Callable[..., Any]


class Redness:
    """A reward with a gradient."""

    differentiable = True

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return redness(images, prompts)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.score(images, prompts)


def gradient(agent: Any) -> Tensor:
    return torch.cat([value.grad.flatten() for value in agent.policy.denoiser_parameters()])


@pytest.mark.slow
def test_images_are_the_pretrained_models_and_depend_on_the_seed_alone(
    make_agent: MakeAgent, make_env: Callable[..., Any]
) -> None:
    def draw(n_envs: int = N, seed: int = 0, changed: bool = False) -> Anchor:
        # One state at a time, as the bits of a network's output depend on the size of its batch.
        agent = make_agent(make_env(n_envs), seed=seed, policy_kwargs={"max_batch_size": 1})
        if changed:
            perturb(agent.policy)
        return Anchor.draw(agent, 6)

    anchor = draw()
    assert anchor.latents.shape == (6, 4, 8, 8)
    assert set(anchor.prompts) <= set(PROMPTS)
    assert len(set(anchor.prompts)) > 1
    for other in (draw(n_envs=5), draw(changed=True)):
        assert_same(other.latents, anchor.latents)
        assert other.prompts == anchor.prompts
    assert not torch.equal(draw(seed=1).latents, anchor.latents)


@pytest.mark.slow
def test_a_step_adds_the_gradient_of_the_anchors_loss(make_agent: MakeAgent) -> None:
    """coef E[ || output - target ||^2 ] over a batch of the anchor, computed here without the update's code."""
    agent = make_agent(anchor_coef=0.5, anchor_images=6, batch_size=5, micro_batch_size=2, max_grad_norm=1e9)
    agent._metrics = {"grad_norm": [], "anchor_loss": []}
    perturb(agent.policy)
    with agent.optimizer_step():
        pass  # no loss of its own
    taken = gradient(agent)
    agent._n_updates -= 1  # the same batch again
    other = make_agent()
    perturb(other.policy)
    batch = agent._anchor.batch(agent)
    assert len(batch) == 5
    known = {tuple(latents.flatten().tolist()) for latents in agent._anchor.latents}
    assert {tuple(latents.flatten().tolist()) for latents in batch.latents} < known
    eps = batch.noisy - agent.process.table.signal[batch.step][:, None, None, None] * batch.latents
    eps = eps / agent.process.table.noise[batch.step][:, None, None, None]
    with other.policy.adapter_enabled():
        (0.5 * (other.policy.predict_output(batch.state) - eps).square().mean()).backward()
    torch.testing.assert_close(taken, gradient(other), rtol=1e-3, atol=1e-6)
    assert torch.cat(agent._metrics["anchor_loss"]).shape == (5,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [
        (DPOK, {}),
        (DDPO, {"batch_size": 5}),
        (BestOfN, {"n": 2, "n_gradient_steps": 2, "batch_size": 3}),
        (DiffusionNFT, {"group_size": 2}),
        (DRaFT, {}),
    ],
)
def test_every_algorithm_has_it(
    algorithm: Any, kwargs: dict[str, Any], make_agent: MakeAgent, make_env: Callable[..., Any]
) -> None:
    """Without a coefficient it costs no pass; with one, the update is another one, and goes on from a state."""
    learned, passes = [], []
    for coef in (0.0, 1.0):
        agent = make_agent(make_env(reward=Redness()), algorithm, anchor_coef=coef, anchor_images=3, **kwargs)
        agent.learn(UPDATE)
        learned.append(torch.cat([value.detach().flatten() for value in agent.policy.denoiser_parameters()]))
        passes.append(agent.process.num_function_evaluations)
        assert ("anchor_loss" in agent.latest_metrics) == bool(coef)
    assert not torch.equal(learned[0], learned[1])
    batch = min(3, kwargs.get("batch_size", 3))
    assert passes[1] - passes[0] == 3 * T + agent._n_updates * batch  # draws three images; each step takes a batch
    saved = copy.deepcopy(agent.state_dict())
    other = make_agent(make_env(reward=Redness()), algorithm, seed=5, anchor_coef=1.0, anchor_images=3, **kwargs)
    other.learn(UPDATE)
    other.load_state_dict(saved)
    for each in (agent, other):
        each.learn(UPDATE, reset_num_timesteps=False)
    assert_same(snapshot(other), snapshot(agent))
