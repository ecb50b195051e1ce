"""What the policy gradients share: ratio and clipping, the weights of the steps, the choice of steps, advantages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import PolicyGradient
from agents.common.buffer import TrajectoryBuffer
from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import (
    DIMS,
    POLICY_GRADIENTS,
    PROMPTS,
    UPDATE,
    Brightness,
    EveryOtherFails,
    MakeAgent,
    N,
    T,
    change,
    collect,
    expected_loss,
    gradient,
    take_batches,
    whole_batch,
)

MakeEnv = Callable[..., DenoisingVectorEnv]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPOK", "DDPO-IS", "GRPO"])
@torch.no_grad()
def test_loss_by_hand(name: str, make_agent: MakeAgent) -> None:
    """With every combination of clipping, reduction and weights of the steps."""
    agent = make_agent(name, clip_range=0.05)
    batch = whole_batch(agent)
    change(agent, 0.03)
    losses = []
    for clip_type, reduction, weighting in itertools.product(
        ("ppo", "clamp"), ("mean", "sum"), ("likelihood", "output")
    ):
        agent.clip_type, agent.log_prob_reduction, agent.step_weighting = clip_type, reduction, weighting
        batch.step_weight = agent.step_weights()[batch.step]
        loss, metrics = agent.loss(batch)
        assert 0 < metrics["clip_fraction"].mean() < 1
        torch.testing.assert_close(loss.double(), expected_loss(agent, batch), rtol=1e-3, atol=1e-3)
        losses.append(loss)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(losses, 2))


@pytest.mark.slow
@torch.no_grad()
def test_clip_range_is_in_nats_of_the_whole_latent(make_agent: MakeAgent) -> None:
    """The same transitions are clipped, whether the ratio is of the whole latent or of one dimension."""
    agent = make_agent("DDPO-IS", step_weighting="likelihood", clip_range=0.05)
    batch = whole_batch(agent)
    change(agent, 0.03)
    losses, metrics = {}, {}
    for reduction in ("mean", "sum"):
        agent.log_prob_reduction = reduction
        losses[reduction], metrics[reduction] = agent.loss(batch)
    ratio, whole = (metrics[reduction]["mean_ratio"] for reduction in ("mean", "sum"))
    torch.testing.assert_close(ratio.double().log() * DIMS, whole.double().log(), rtol=1e-2, atol=1e-4)
    clipped = metrics["mean"]["clip_fraction"]
    assert torch.equal(clipped, (whole.log().abs() > 0.05).float())
    assert torch.equal(clipped, metrics["sum"]["clip_fraction"])
    assert 0 < clipped.mean() < 1
    bound = math.exp(0.05)
    expected = -torch.minimum(batch.advantages * whole, batch.advantages * whole.clamp(1 / bound, bound))
    torch.testing.assert_close(losses["sum"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_clip_types(make_agent: MakeAgent) -> None:
    """PPO's loss is a bound on the clamped one; the two differ where the ratio is clipped only."""
    agent = make_agent("DDPO-IS", clip_range=0.05, log_prob_reduction="sum")
    batch = whole_batch(agent)
    change(agent, 0.03)
    ppo, metrics = agent.loss(batch)
    agent.clip_type = "clamp"
    clamped, _ = agent.loss(batch)
    inside = metrics["clip_fraction"] == 0
    assert torch.equal(ppo[inside], clamped[inside])
    assert (ppo >= clamped).all()
    assert (ppo > clamped).any()


@pytest.mark.slow
def test_a_clamped_ratio_has_no_gradient(make_agent: MakeAgent) -> None:
    agent = make_agent("DDPO-IS", clip_range=1e-6, clip_type="clamp", log_prob_reduction="sum")
    batch = whole_batch(agent)
    change(agent, 0.03)
    with torch.no_grad():
        assert agent.loss(batch)[1]["clip_fraction"].tolist() == [1.0] * UPDATE
    assert not gradient(agent, batch).any()
    agent.clip_type = "ppo"
    assert gradient(agent, batch).any()  # which brings back what has moved too far


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "sizes"),
    [
        ({"batch_size": None}, [12]),
        ({"batch_size": 3}, [3, 3, 3, 3]),
        ({"batch_size": 5, "n_epochs": 2}, [5, 5, 2, 5, 5, 2]),
        ({"batch_size": None, "timestep_fraction": 0.5}, [6]),
        ({"batch_size": 4, "timestep_fraction": 0.5, "n_epochs": 2}, [4, 2, 4, 2]),
    ],
    ids=str,
)
def test_batches_of_an_update(kwargs: dict[str, Any], sizes: list[int], make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", **kwargs)
    batches = take_batches(agent)
    assert [len(batch) for batch in batches] == sizes
    assert agent._n_updates == len(sizes)
    per_epoch = len(batches) // agent.n_epochs
    epochs = []
    for epoch in range(agent.n_epochs):
        mine = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        transitions = [(int(image), int(t)) for batch in mine for image, t in zip(batch.image, batch.step, strict=True)]
        assert len(set(transitions)) == len(transitions)  # each one at most once in an epoch
        epochs.append(transitions)
    assert len({tuple(transitions) for transitions in epochs}) == agent.n_epochs  # in another order each time


def test_batches_differ_between_iterations(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK")
    first, second = (whole_batch(agent) for _ in range(2))
    assert not torch.equal(first.image * T + first.step, second.image * T + second.step)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_steps_are_chosen_by_their_weights(name: str, make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a KL beside the policy gradient half of the choice is for that, which has no weights."""
    asked: dict[str, Any] = {}
    for weighting in ("output", "likelihood"):
        agent = make_agent(name, step_weighting=weighting, timestep_fraction=0.5)
        batches = agent.rollout_buffer.batches

        def record(*args: Any, batches: Any = batches, weighting: str = weighting) -> Any:
            asked.setdefault(weighting, args[2:])  # the critic asks later, for everything
            return batches(*args)

        monkeypatch.setattr(agent.rollout_buffer, "batches", record)
        agent.learn(UPDATE)
    table = agent.process.table
    weights = table.std / table.output_coef.abs()
    weights = weights / weights.mean()
    fraction, importance, step_weights = asked["output"]
    assert fraction == 0.5
    has_kl = "DPOK" in name or name == "GRPO"
    torch.testing.assert_close(importance, (weights + 1) / 2 if has_kl else weights)
    torch.testing.assert_close(step_weights, weights)
    fraction, importance, step_weights = asked["likelihood"]
    assert importance is None
    assert step_weights.tolist() == [1.0] * T


def test_without_a_kl_grpo_chooses_for_the_reward_alone(make_agent: MakeAgent) -> None:
    agent = make_agent("GRPO", kl_coef=0.0)
    weights = torch.tensor([0.5, 1.0, 1.5])
    assert torch.equal(agent.step_importance(weights), weights)


def test_weights_of_the_steps_are_in_the_batch(make_agent: MakeAgent) -> None:
    agent = make_agent("DDPO-IS")
    batch = whole_batch(agent)
    weights = agent.process.table.output_weights()
    assert torch.equal(batch.step_weight, weights[batch.step])
    assert len(weights.unique()) == T


@pytest.mark.slow
def test_a_share_of_the_steps_estimates_the_whole(make_agent: MakeAgent) -> None:
    """The mean over many choices of the weighted batches is the gradient of all transitions."""
    agent = make_agent("DDPO-IS", timestep_fraction=0.5, batch_size=None)
    collect(agent)
    buffer, n = agent.rollout_buffer, 2000
    step_weights = agent.step_weights()
    total = torch.zeros(N, T)
    rng = np.random.default_rng(0)
    for _ in range(n):
        (batch,) = buffer.batches(None, rng, 0.5, agent.step_importance(step_weights), step_weights)
        total[batch.image, batch.step] += batch.weight / (0.5 * UPDATE) / n
    # The mean over the batch counts each transition, on average, as the mean over all does.
    torch.testing.assert_close(total, torch.full((N, T), 1 / UPDATE), rtol=0.3, atol=0)


# --- Advantages


def test_without_more_the_advantage_is_the_reward(make_env: MakeEnv) -> None:
    """The base class is an algorithm of its own; images without a reward have none."""
    env = make_env(reward=EveryOtherFails(), non_finite="mask", decode_batch_size=N)
    agent: Any = PolicyGradient(env=env, seed=0, device="cpu", policy_kwargs={"lora_rank": 2})
    buffer = collect(agent)
    images = agent.process.model.decode(buffer.latents[:, -1])
    expected = Brightness()(images, buffer.prompts) * torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert expected.any()
    torch.testing.assert_close(agent.advantages(buffer), expected[:, None].expand(N, T))
    agent.learn(UPDATE)
    assert agent._n_updates == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDPO-IS", "DDPO-SF", "GRPO", "REINFORCE"])
def test_all_steps_of_an_image_share_its_advantage(name: str, make_agent: MakeAgent) -> None:
    agent = make_agent(name)
    buffer = collect(agent)
    advantages = agent.advantages(buffer)
    expected = agent.image_advantages(buffer.final_rewards, buffer.prompts, torch.arange(N))
    assert expected.abs().max() > 0
    torch.testing.assert_close(advantages, expected[:, None].expand(N, T))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDPO-IS", "GRPO", "REINFORCE"])
def test_images_without_a_reward_are_no_part_of_the_baseline(
    name: str, make_env: MakeEnv, make_agent: MakeAgent
) -> None:
    env = make_env(8, prompts=PROMPTS[:1], reward=EveryOtherFails(), non_finite="mask", decode_batch_size=8)
    kwargs = {"group_size": 8} if name == "GRPO" else {}
    agent = make_agent(name, env, **kwargs)
    buffer = collect(agent)
    valid = buffer.final_rewards[::2]
    others = (valid.sum() - valid) / 3
    expected = valid - others if name == "REINFORCE" else (valid - valid.mean()) / valid.std(correction=0)
    assert expected.abs().max() > 0
    torch.testing.assert_close(agent.advantages(buffer)[::2, 0], expected, rtol=1e-2, atol=1e-5)


def test_a_subclass_writes_its_advantages(make_env: MakeEnv) -> None:
    class Signs(PolicyGradient):
        def advantages(self, buffer: TrajectoryBuffer) -> Tensor:
            return buffer.final_rewards.sign()[:, None] * torch.arange(T)

    agent = Signs(env=make_env(), seed=0, device="cpu", policy_kwargs={"lora_rank": 2})
    batch = whole_batch(agent)
    assert torch.equal(batch.advantages, batch.step.float())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_epochs": 0}, "n_epochs must be an integer of at least 1, got 0"),
        ({"n_epochs": 1.5}, "n_epochs must be an integer of at least 1, got 1.5"),
        ({"timestep_fraction": 0.0}, r"timestep_fraction must lie in \(0, 1\], got 0"),
        ({"timestep_fraction": 1.5}, r"timestep_fraction must lie in \(0, 1\], got 1.5"),
        ({"clip_type": "soft"}, "clip_type must be one of 'ppo', 'clamp', got 'soft'"),
        ({"clip_range": 0.0}, "clip_range must be a number above 0, got 0"),
        ({"log_prob_reduction": "median"}, "log_prob_reduction must be one of 'mean', 'sum', got 'median'"),
        ({"step_weighting": "late"}, "step_weighting must be one of 'likelihood', 'output', got 'late'"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent("DDPO-IS", **kwargs)
