"""What the algorithms share that learn from noise added to their own images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agents import OnlineForwardProcess
from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import (
    ONLINE_FORWARD_PROCESSES,
    UPDATE,
    MakeAgent,
    N,
    T,
    change,
    collect,
    flat_weights,
    take_batches,
)

MakeEnv = Callable[..., DenoisingVectorEnv]

every_one = pytest.mark.parametrize("name", ONLINE_FORWARD_PROCESSES)


def old_weights(agent: Any) -> torch.Tensor:
    return torch.cat([value.flatten() for value in agent.policy.old.buffers()])


@every_one
def test_each_image_comes_once_with_each_noise_level(name: str, make_agent: MakeAgent) -> None:
    agent = make_agent(name, batch_size=5, n_epochs=2)
    batches = take_batches(agent)
    assert [len(batch) for batch in batches] == [6, 6, 6, 6]
    first, second = batches[:2], batches[2:]
    clean = agent.rollout_buffer.latents[:, -1]
    for epoch in (first, second):
        seen = [
            (int((clean == latents).flatten(1).all(1).nonzero()), int(step))
            for batch in epoch
            for latents, step in zip(batch.latents, batch.step, strict=True)
        ]
        assert sorted(seen) == [(image, step) for image in range(N) for step in range(T)]
    noisy = [torch.cat([batch.noisy for batch in epoch]).flatten(1) for epoch in (first, second)]
    assert not torch.equal(noisy[0], noisy[1])  # another order,
    assert torch.equal(noisy[0].sum(1).sort()[0], noisy[1].sum(1).sort()[0])  # the same noise


@every_one
def test_fewer_noise_levels(name: str, make_agent: MakeAgent) -> None:
    agent = make_agent(name, batch_size=None, steps_per_image=2)
    (batch,) = take_batches(agent)
    assert len(batch) == 2 * N


@every_one
def test_more_noise_levels_than_steps(name: str, make_agent: MakeAgent) -> None:
    """The published model's preset has 6; a user may draw in fewer steps."""
    (batch,) = take_batches(make_agent(name, batch_size=None, steps_per_image=T + 1))
    assert len(batch) == T * N


def test_advantages_by_hand(make_agent: MakeAgent) -> None:
    agent = make_agent("DiffusionNFT", advantage_clip=0.5)
    rewards = torch.tensor([1.0, 3.0, 9.5, 10.5])  # of means 2 and 10
    scale = 0.5 * ((25 + 9 + 3.5**2 + 4.5**2) / 4) ** 0.5  # of all, whose mean is 6
    expected = [-1 / scale, 1 / scale, -0.5 / scale, 0.5 / scale]
    assert max(expected) < 1
    assert agent.advantages(rewards, ["a", "a", "b", "b"]).tolist() == pytest.approx(expected)
    agent.advantage_clip = 0.1
    assert agent.advantages(rewards, ["a", "a", "b", "b"]).tolist() == [-1.0, 1.0, -1.0, 1.0]
    assert agent.advantages(rewards, ["a", "b", "c", "d"]).tolist() == [0.0] * 4  # each alone
    assert agent.advantages(torch.full((24,), 21.37), ["a"] * 24).tolist() == [0.0] * 24


def test_a_group_has_one_prompt(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    agent = make_agent("AWM", make_env(8), group_size=4)
    prompts = collect(agent, 8).prompts
    assert len(set(prompts[:4])) == len(set(prompts[4:])) == 1


@pytest.mark.slow
@every_one
def test_the_old_policy_follows(name: str, make_agent: MakeAgent) -> None:
    """theta_old <- eta theta_old + (1 - eta) theta, with eta from 0 up to its limit."""
    agent = make_agent(name, old_decay=0.5, old_decay_rate=0.4)
    expected = old_weights(agent)
    assert torch.equal(expected, flat_weights(agent))
    for eta in (0.0, 0.4, 0.5, 0.5):
        agent.learn(UPDATE, reset_num_timesteps=False)
        expected = eta * expected + (1 - eta) * flat_weights(agent)
        torch.testing.assert_close(old_weights(agent), expected)
    assert not torch.equal(old_weights(agent), flat_weights(agent))


@every_one
def test_who_draws(name: str, make_agent: MakeAgent) -> None:
    """DiffusionNFT draws with the old policy, AWM with the current one."""
    unchanged = collect(make_agent(name)).latents.clone()
    agent = make_agent(name)
    change(agent)
    assert torch.equal(collect(agent).latents, unchanged) == (name == "DiffusionNFT")


@pytest.mark.slow
@every_one
def test_learns_without_guidance(name: str, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    agent = make_agent(name, make_env(guidance_scale=3.0), batch_size=None)
    batch = take_batches(agent)[0]
    change(agent)
    with torch.no_grad():
        guided = agent.loss(batch)[0]
        agent.process.config = make_env(guidance_scale=1.0).process.config
        assert torch.equal(agent.loss(batch)[0], guided)


@pytest.mark.slow
@every_one
def test_without_a_kl_the_reference_is_not_asked(name: str, make_agent: MakeAgent) -> None:
    passes = []
    for kl_coef in (0.0, 0.1):
        agent = make_agent(name, kl_coef=kl_coef)
        agent.learn(UPDATE)
        passes.append(agent.process.num_function_evaluations)
    assert passes[1] - passes[0] == UPDATE  # one for each noisy image


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_size": 0}, "group_size must be an integer of at least 1"),
        ({"advantage_clip": 0.0}, "advantage_clip must be a number above 0"),
        ({"steps_per_image": 0}, "steps_per_image must be an integer of at least 1"),
        ({"n_epochs": 0}, "n_epochs must be an integer of at least 1"),
        ({"old_decay": 1.5}, r"old_decay must lie in \[0, 1\]"),
        ({"old_decay_rate": -1.0}, "old_decay_rate must be a number of at least 0"),
        ({"kl_coef": -1.0}, "kl_coef must be a number of at least 0"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent("DiffusionNFT", **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [2, 0])
def test_a_loss_of_ones_own(lora_rank: int, make_env: MakeEnv) -> None:
    class Weighted(OnlineForwardProcess):
        """Learns from the better images only."""

        def loss(self, batch: Any) -> Any:
            output = self.policy.predict_output(batch.state, guidance_scale=1.0)
            return batch.weight.clamp(min=0) * (output - batch.target).square().mean((1, 2, 3)), {}

    agent: Any = Weighted(
        env=make_env(), group_size=2, seed=0, device="cpu", policy_kwargs={"lora_rank": lora_rank}, learning_rate=1e-2
    )
    before = flat_weights(agent)
    agent.learn(UPDATE)
    assert not torch.equal(flat_weights(agent), before)
