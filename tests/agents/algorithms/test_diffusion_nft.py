"""DiffusionNFT: the loss on images that are better and worse than the mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dpok_gym.diffusion import expand
from tests.agents.algorithms.support import MakeAgent, change, gradient, take_batches, whole_batch


def make_batch(make_agent: MakeAgent, **kwargs: Any) -> tuple[Any, Any]:
    agent = make_agent("DiffusionNFT", kl_coef=0.0, **kwargs)
    batch = whole_batch(agent)
    change(agent, 0.05)
    return agent, batch


@pytest.mark.slow
@pytest.mark.parametrize("space", ["output", "velocity", "clean"])
def test_the_first_step_is_weighted_by_the_advantage(space: str, make_agent: MakeAgent) -> None:
    """While the policy is the old one, the gradient is that of A || v - target ||^2, whatever beta is."""
    agent = make_agent("DiffusionNFT", kl_coef=0.0, space=space, beta=0.3)
    batch = whole_batch(agent)
    assert batch.weight.min() < -0.1
    assert batch.weight.max() > 0.1
    actual = gradient(agent, batch)
    with agent.policy.adapter_enabled():
        output = agent.policy.predict_output(batch.state, guidance_scale=1.0)
        error = expand(agent.process.table.error_scale(space)[batch.step], output) * (output - batch.target)
        loss = batch.weight * error.square().mean((1, 2, 3))
        parts = torch.autograd.grad(loss.sum(), agent.policy.denoiser_parameters())
    expected = torch.cat([part.flatten() for part in parts])
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_normalised_errors(make_agent: MakeAgent) -> None:
    """Each squared error is divided by its mean absolute error, a constant without a gradient."""
    agent, batch = make_batch(make_agent, normalize_errors=True, beta=1.0)
    table = agent.process.table
    with torch.no_grad():
        loss, _ = agent.loss(batch)
        output = agent.policy.predict_output(batch.state, guidance_scale=1.0)
        old = agent.old_output(batch)
    scale = (table.noise / table.signal)[batch.step]
    sides = []
    for each in (output, 2 * old - output):
        error = scale[:, None, None, None] * (each - batch.target)
        sides.append((error.square().mean((1, 2, 3)), error.abs().mean((1, 2, 3))))
    r = (1 + batch.weight) / 2
    expected = r * sides[0][0] / sides[0][1] + (1 - r) * sides[1][0] / sides[1][1]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    # For an image of r = 1 only the positive side counts: the gradient is that of the squared error over a constant.
    best = replace(batch, weight=torch.ones_like(batch.weight)).take(slice(0, 1))
    normalised = gradient(agent, best)
    agent.normalize_errors = False
    torch.testing.assert_close(normalised * sides[0][1][0], gradient(agent, best), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_better_images_are_matched_and_worse_ones_avoided(make_agent: MakeAgent) -> None:
    agent = make_agent("DiffusionNFT", kl_coef=0.0, learning_rate=1e-3, batch_size=None, n_epochs=10)
    batch = whole_batch(agent)
    with torch.no_grad():
        before = agent.squared_error(batch, agent.policy.predict_output(batch.state))
    for _ in range(10):
        with agent.optimizer_step():
            agent.backward(batch)
    with torch.no_grad():
        change_of_error = agent.squared_error(batch, agent.policy.predict_output(batch.state)) - before
    assert (batch.weight * change_of_error).mean() < 0


def test_bad_arguments(make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match="beta must be a number above 0"):
        make_agent("DiffusionNFT", beta=0.0)
    with pytest.raises(ValueError, match="space must be"):
        make_agent("DiffusionNFT", space="pixels")


def test_weights_are_advantages(make_agent: MakeAgent) -> None:
    agent = make_agent("DiffusionNFT", batch_size=None, advantage_clip=1.0)
    (batch,) = take_batches(agent)
    buffer = agent.rollout_buffer
    expected = agent.advantages(buffer.final_rewards, buffer.prompts)
    for latents, weight in zip(batch.latents, batch.weight, strict=True):
        image = int((buffer.latents[:, -1] == latents).flatten(1).all(1).nonzero())
        assert weight == expected[image]
