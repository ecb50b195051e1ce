"""DDPO: rewards standardised for each prompt, and its two estimators of the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpok_gym import diffusion
from tests.agents.algorithms.support import DIMS, UPDATE, MakeAgent, N, T, gradient, whole_batch

tensor = torch.tensor


def test_standardises_by_prompt(make_agent: MakeAgent) -> None:
    agent = make_agent("DDPO-IS", statistics_size=4, min_count=3, advantage_clip=1.2)
    prompts, images = ["a", "b", "a", "b"], torch.arange(4)
    rewards = tensor([0.0, 10.0, 2.0, 14.0])
    # Two rewards of each prompt are too few: those of all four stand in.
    expected = ((rewards - 6.5) / rewards.std(correction=0)).clamp(max=1.2)
    torch.testing.assert_close(agent.image_advantages(rewards, prompts, images), expected)
    # Now (0, 2, 1, 3) are known of the first prompt and (10, 14, 18, 10) of the second; -1.34 and 1.5 are clipped.
    advantages = agent.image_advantages(tensor([1.0, 18.0, 3.0, 10.0]), prompts, images)
    expected = tensor([-0.5 / 1.25**0.5, 1.2, 1.2, -3 / 11**0.5])
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)
    # The oldest is forgotten.
    agent.image_advantages(tensor([7.0]), ["a"], torch.arange(1))
    assert agent.latest_rewards["a"] == [2.0, 1.0, 3.0, 7.0]


@pytest.mark.parametrize("n", [8, 24])
def test_equal_rewards_have_no_advantage(n: int, make_agent: MakeAgent) -> None:
    """Nor has a prompt of which too few rewards are known: the mean in float32 would be a little off."""
    agent = make_agent("DDPO-IS")
    advantages = agent.image_advantages(torch.full((n,), 21.37), ["a rabbit"] * n, torch.arange(n))
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [0.0] * n


@pytest.mark.slow
def test_statistics_are_those_of_the_images_drawn(make_agent: MakeAgent) -> None:
    agent = make_agent("DDPO-IS", statistics_size=3, min_count=1)
    expected: dict[str, list[float]] = {}
    for _ in range(3):
        agent.learn(UPDATE, reset_num_timesteps=False)
        for prompt, reward in zip(agent.rollout_buffer.prompts, agent.rollout_buffer.final_rewards, strict=True):
            expected.setdefault(prompt, []).append(float(reward))
    assert sum(map(len, expected.values())) == 3 * N
    assert agent.latest_rewards == {prompt: rewards[-3:] for prompt, rewards in expected.items()}
    other = make_agent("DDPO-IS", statistics_size=3, min_count=1)
    other.load_state_dict(agent.state_dict())
    assert other.latest_rewards == agent.latest_rewards


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["output", "likelihood"])
@pytest.mark.parametrize("name", ["DDPO-SF", "REINFORCE"])
def test_the_score_function_is_the_gradient_of_the_log_density(
    name: str, weighting: str, make_agent: MakeAgent
) -> None:
    agent = make_agent(name, step_weighting=weighting)
    batch = whole_batch(agent)
    weights = agent.process.table.output_weights() if weighting == "output" else torch.ones(T)
    factor = (weights / weights.mean())[batch.step] / DIMS
    with agent.policy.adapter_enabled():
        log_prob = diffusion.log_prob(batch.actions, *agent.policy.transition(batch.state))
        loss = (-factor * batch.advantages * log_prob).sum()
        parts = torch.autograd.grad(loss, agent.policy.denoiser_parameters())
    expected = torch.cat([part.flatten() for part in parts])
    torch.testing.assert_close(gradient(agent, batch), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_both_estimators_agree_where_the_images_were_drawn(make_agent: MakeAgent) -> None:
    """grad rho = grad log p as long as rho is 1."""
    gradients = []
    for score_function in (False, True):
        agent = make_agent("DDPO-SF", score_function=score_function)
        gradients.append(gradient(agent, whole_batch(agent)))
    scale = float(gradients[0].abs().max())
    assert scale > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("DDPO-SF", {"batch_size": 2}, "leave batch_size None"),
        ("DDPO-SF", {"n_epochs": 2}, "n_epochs 1"),
        ("DDPO-IS", {"min_count": 0}, "min_count must be an integer of at least 1"),
        ("DDPO-IS", {"statistics_size": 8}, "min_count must be at most statistics_size, got 16 and 8"),
        ("DDPO-IS", {"advantage_clip": -1.0}, "advantage_clip must be a number of at least 0"),
    ],
)
def test_bad_arguments(name: str, kwargs: dict[str, Any], message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent(name, **kwargs)


def test_it_has_no_kl(make_agent: MakeAgent) -> None:
    with pytest.raises(TypeError, match="DDPO has no argument 'kl_coef'"):
        make_agent("DDPO-IS", kl_coef=0.1)
