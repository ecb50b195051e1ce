"""GRPO: groups of images, and the KL."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpok_gym import DenoisingVectorEnv, diffusion
from tests.agents.algorithms.support import (
    DIMS,
    PROMPTS,
    MakeAgent,
    N,
    change,
    collect,
    expected_loss,
    whole_batch,
)

MakeEnv = Callable[..., DenoisingVectorEnv]
tensor = torch.tensor


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["joint", "per-dimension"])
@torch.no_grad()
def test_pays_for_the_kl(ratio: str, make_agent: MakeAgent) -> None:
    agent = make_agent("GRPO", kl_coef=0.5, ratio=ratio)
    batch = whole_batch(agent)
    change(agent)
    mean, std = agent.policy.transition(batch.state)
    reference, _ = agent.policy.transition(batch.state, reference=True)
    kl = diffusion.kl_divergence(mean, reference, std)
    assert kl.min() > 1e-3
    torch.testing.assert_close(agent.loss(batch)[0].double(), expected_loss(agent, batch), rtol=1e-3, atol=1e-3)
    batch.advantages = torch.zeros_like(batch.advantages)
    torch.testing.assert_close(agent.loss(batch)[0], 0.5 * kl / DIMS)
    agent.kl_coef = 0.0
    loss, metrics = agent.loss(batch)
    assert not loss.any()
    assert "kl_to_reference" not in metrics


def test_compares_within_the_group(make_agent: MakeAgent) -> None:
    agent = make_agent("GRPO")
    rewards, images = tensor([1.0, 3.0, 5.0, 5.0, 9.0]), tensor([0, 1, 2, 3, 7])  # a group and a half were masked
    advantages = agent.image_advantages(rewards, ["a rabbit"] * 5, images)
    torch.testing.assert_close(advantages, tensor([-1.0, 1.0, 0.0, 0.0, 0.0]), rtol=1e-4, atol=1e-4)


def test_groups_are_standardised_by_hand(make_agent: MakeAgent) -> None:
    """Groups of the same prompt are compared within themselves only."""
    agent = make_agent("GRPO", group_size=4)
    rewards = tensor([1.0, 2.0, 3.0, 6.0, 10.0, 10.0, 20.0, 20.0])
    advantages = agent.image_advantages(rewards, ["a rabbit"] * 8, torch.arange(8))
    expected = torch.cat([(tensor([1.0, 2.0, 3.0, 6.0]) - 3) / 3.5**0.5, tensor([-1.0, -1.0, 1.0, 1.0])])
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)


def test_the_spread_may_be_that_of_the_iteration(make_agent: MakeAgent) -> None:
    agent = make_agent("GRPO", group_size=4, std_over="iteration")
    rewards = tensor([1.0, 2.0, 3.0, 6.0, 10.0, 10.0, 20.0, 20.0])
    advantages = agent.image_advantages(rewards, ["a rabbit"] * 8, torch.arange(8))
    # The mean of all is 9, and the mean square 150 - 81 is not that within the groups.
    deviations = tensor([-8.0, -7.0, -6.0, -3.0, 1.0, 1.0, 11.0, 11.0])
    std = (deviations.square().sum() / 8) ** 0.5
    expected = tensor([-2.0, -1.0, 0.0, 3.0, -5.0, -5.0, 5.0, 5.0]) / std
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)


def test_advantages_are_clipped(make_agent: MakeAgent) -> None:
    agent = make_agent("GRPO", group_size=4, advantage_clip=1.5)
    rewards = tensor([1.0, 2.0, 3.0, 6.0])
    advantages = agent.image_advantages(rewards, ["a rabbit"] * 4, torch.arange(4))
    expected = tensor([-2 / 3.5**0.5, -1 / 3.5**0.5, 0.0, 1.5])  # and not 3 / 3.5^(1/2) = 1.6
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("same_noise", ["none", "group", "iteration"])
def test_draws_groups(same_noise: str, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """Images of a group have one prompt; which share their x_T is an argument. Their later noise always differs."""
    # Three side by side: what is shared goes on from one call to the next.
    agent = make_agent("GRPO", make_env(3), same_noise=same_noise, images_per_iteration=2 * N)
    starts, prompts = [], []
    for _ in range(2):
        buffer = collect(agent, 2 * N)
        agent.images_drawn += 2 * N
        for group in range(N):
            first, second = 2 * group, 2 * group + 1
            assert buffer.prompts[first] == buffer.prompts[second]
            assert torch.equal(buffer.latents[first, 0], buffer.latents[second, 0]) == (same_noise != "none")
            assert not torch.equal(buffer.latents[first, 1], buffer.latents[second, 1])
            starts.append(buffer.latents[first, 0].clone())
            prompts.append(buffer.prompts[first])
    iteration = 2 * N // 2
    for one, other in itertools.combinations(range(len(starts)), 2):
        shared = same_noise == "iteration" and one // iteration == other // iteration
        assert torch.equal(starts[one], starts[other]) == shared
    assert set(prompts) == set(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_size": 1}, "group_size .* must be an integer of at least 2, got 1"),
        ({"group_size": 3}, "the 4 images of an iteration cannot be split into groups of 3"),
        ({"group_size": 4, "images_per_iteration": 6}, "the 6 images of an iteration cannot be split"),
        ({"kl_coef": -1.0}, "kl_coef must be a number of at least 0"),
        ({"same_noise": True}, "same_noise must be one of 'none', 'group', 'iteration', got True"),
        ({"std_over": "prompt"}, "std_over must be one of 'group', 'iteration', got 'prompt'"),
        ({"advantage_clip": 0.0}, "advantage_clip must be a number above 0, got 0"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent("GRPO", **kwargs)


def test_images_of_another_group_size_cannot_go_on(make_agent: MakeAgent) -> None:
    """The prompts follow the numbers of the images, so groups that begin in the middle of one would mix prompts."""
    agent = make_agent("GRPO", group_size=2, images_per_iteration=2)
    agent.images_drawn = 2
    agent.group_size = 4
    with pytest.raises(ValueError, match="the 2 images drawn so far are no whole groups of 4"):
        agent.learn(1)
