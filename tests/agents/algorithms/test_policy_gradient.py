"""What the policy gradients share: ratio and clipping, the weights of the steps, the choice of steps, advantages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from agents import PolicyGradient
from agents.common.buffer import TrajectoryBuffer
from agents.common.losses import importance_ratio
from agents.common.normalization import RunningStatistics
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
    flat_weights,
    gradient,
    take_batches,
    whole_batch,
)

MakeEnv = Callable[..., DenoisingVectorEnv]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPOK", "DDPO-IS", "GRPO"])
@torch.no_grad()
def test_loss_by_hand(name: str, make_agent: MakeAgent) -> None:
    """With every combination of clipping, ratio and weights of the steps."""
    agent = make_agent(name, clip_range=0.05)
    batch = whole_batch(agent)
    change(agent, 0.03)
    losses = []
    for clip_type, ratio, weighting in itertools.product(
        ("ppo", "clamp", "kl"), ("joint", "per-dimension", "centred"), ("likelihood", "output")
    ):
        agent.clip_type, agent.ratio, agent.step_weighting = clip_type, ratio, weighting
        agent.step_weights = agent._make_step_weights()
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
    for form in ("per-dimension", "joint"):
        agent.ratio = form
        losses[form], metrics[form] = agent.loss(batch)
    ratio, whole = (metrics[form]["mean_ratio"] for form in ("per-dimension", "joint"))
    torch.testing.assert_close(ratio.double().log() * DIMS, whole.double().log(), rtol=1e-2, atol=1e-4)
    clipped = metrics["per-dimension"]["clip_fraction"]
    assert torch.equal(clipped, (whole.log().abs() > 0.05).float())
    assert torch.equal(clipped, metrics["joint"]["clip_fraction"])
    assert 0 < clipped.mean() < 1
    bound = math.exp(0.05)
    expected = -torch.minimum(batch.advantages * whole, batch.advantages * whole.clamp(1 / bound, bound))
    torch.testing.assert_close(losses["joint"] * DIMS, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_log_has_the_ratios_of_trained_steps_only(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK, late steps held")  # the last two of three
    batch = whole_batch(agent)
    change(agent, 0.03)
    _, metrics = agent.loss(batch)
    mean, std = agent.policy.transition(batch.state)
    log_ratio, _ = importance_ratio(batch.actions, mean, batch.old_means, std, agent.ratio)
    torch.testing.assert_close(metrics["mean_ratio"], log_ratio[batch.step == 0].exp())
    assert len(metrics["clip_fraction"]) == N


def test_a_step_that_is_left_out_may_have_an_infinite_ratio(make_agent: MakeAgent) -> None:
    """As a step with hardly any noise has, whose mean has moved towards the action."""
    agent = make_agent("DPOK, late steps held")  # the last two of three
    agent.ratio = "joint"
    batch = whole_batch(agent)
    left_out = batch.step > 0
    mean, std = (values.detach() for values in agent.policy.transition(batch.state))
    mean[left_out] = batch.actions[left_out]
    batch.old_means[left_out] -= 9
    batch.advantages[left_out] = -1
    loss, _ = agent.policy_gradient_loss(batch, mean.requires_grad_(), std)
    loss.sum().backward()
    assert mean.grad is not None
    assert loss[left_out].eq(0).all()
    assert loss.isfinite().all()
    assert mean.grad.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_clip_types(make_agent: MakeAgent) -> None:
    """PPO's loss is a bound on the clamped one; the two differ where the ratio is clipped only."""
    agent = make_agent("DDPO-IS", clip_range=0.05, ratio="joint")
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
    agent = make_agent("DDPO-IS", clip_range=1e-6, clip_type="clamp", ratio="joint")
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
        ({"batch_size": 5, "n_epochs": 2}, [6, 6, 6, 6]),
        ({"batch_size": None, "timestep_fraction": 0.5}, [6]),
        ({"batch_size": 4, "timestep_fraction": 0.5, "n_epochs": 2}, [3, 3, 3, 3]),
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


# --- The steps


@pytest.mark.parametrize(
    ("weighting", "skipped", "trained"),
    [("likelihood", 0, 3), ("likelihood", 1, 2), ("output", 1, 2), ("output", 0, 3)],
)
def test_weights_of_the_steps(weighting: str, skipped: int, trained: int, make_agent: MakeAgent) -> None:
    """Their mean is 1 over the steps that are trained on; the others have none."""
    agent = make_agent("DDPO-IS", step_weighting=weighting, skip_last_steps=skipped)
    table = agent.process.table
    weights = (table.std / table.output_coef.abs() if weighting == "output" else torch.ones(T))[:trained]
    expected = torch.cat([weights / weights.mean(), torch.zeros(T - trained)])
    torch.testing.assert_close(agent.step_weights, expected)
    assert len(expected.unique()) == (3 if weighting == "output" else 2 if skipped else 1)


def test_auto_leaves_out_the_steps_that_explore_nothing(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """The last two of Stable Diffusion's; a step that explores is never left out."""
    agent = make_agent("DDPO-IS", make_env(num_inference_steps=5), skip_last_steps="auto")
    assert agent.step_weights.tolist() == [1, 1, 1, 0, 0]
    alike = make_agent("DDPO-IS", make_env(num_inference_steps=1), skip_last_steps="auto")
    assert alike.step_weights.tolist() == [1]


@torch.no_grad()
def test_skipped_steps_are_held_by_the_first_kl_coef(make_agent: MakeAgent) -> None:
    """They have no advantage, and the KL's weight of the beginning, whatever ``target_kl`` made of it."""
    agent = make_agent(
        "DPOK", kl_coef=0.3, skip_last_steps="auto", normalize_loss=False, step_weighting="output", clip_range=100.0
    )
    batch = whole_batch(agent)
    change(agent, 0.05)
    agent.kl_coef = 0.7
    mean, std = agent.policy.transition(batch.state)
    reference, _ = agent.policy.transition(batch.state, reference=True)
    kl = (mean - reference).square().sum((1, 2, 3)) / (2 * std**2)
    skipped = batch.step > 0
    assert kl.min() > 1e-4
    expected = torch.where(skipped, 0.3, 0.7) * kl
    batch.advantages = torch.zeros(UPDATE)
    torch.testing.assert_close(agent.loss(batch)[0] * DIMS, expected, rtol=1e-3, atol=1e-5)
    batch.advantages = torch.ones(UPDATE)
    difference = (agent.loss(batch)[0] * DIMS - expected).abs()
    assert difference[skipped].max() < 1e-4
    assert difference[~skipped].min() > 0.5


def test_a_held_step_with_hardly_any_noise_does_not_drown_the_others(make_agent: MakeAgent) -> None:
    def weights_of(env_id: str) -> tuple[Tensor, list[float]]:
        env = gymnasium.make_vec(env_id, num_envs=2, num_inference_steps=10, device="cpu")
        agent = make_agent("DPOK", env, skip_last_steps="auto")
        assert agent.step_weights.tolist() == [1.0] * 8 + [0.0] * 2
        return agent.process.table.std, agent.kl_step_weights.tolist()

    std, weights = weights_of("DPOK-Shapes-v0")
    assert std.max() / 38 < std[9] < std.max() / 36
    assert weights == [1.0] * 10
    std, weights = weights_of("DPOK-ShapesFlow-v0")
    assert 0 < std[8] < std.max() / 500
    assert std[9] == 0
    assert weights == pytest.approx([1.0] * 8 + [float(40 * std[8] / std.max()) ** 2, 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_steps_are_chosen_by_their_weights(name: str, make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a KL beside the policy gradient, half of the choice is for that."""
    for weighting in ("output", "likelihood"):
        agent = make_agent(name, step_weighting=weighting, timestep_fraction=0.5)
        asked: list[Any] = []
        batches = agent.rollout_buffer.batches

        def record(*args: Any, batches: Any = batches, asked: list[Any] = asked) -> Any:
            asked.append(args[2:])  # the critic asks later, for everything
            return batches(*args)

        monkeypatch.setattr(agent.rollout_buffer, "batches", record)
        agent.learn(UPDATE)
        table, trained = agent.process.table, 1 if agent.skip_last_steps == "auto" else T
        weights = (table.std / table.output_coef.abs() if weighting == "output" else torch.ones(T))[:trained]
        expected = torch.zeros(T)
        expected[:trained] = weights / weights.mean()
        if agent.kl_coef:  # half of the choice is for the KL, which also holds the other steps
            expected[trained:] = agent.kl_step_weights[trained:] / 2
        fraction, importance = asked[0]
        assert fraction == 0.5
        torch.testing.assert_close(importance, expected)


@pytest.mark.parametrize(("kl_coef", "importance"), [(0.0, [1.0, 1.0, 0.0]), (0.1, [1.0, 1.0, 0.5])])
def test_a_step_is_chosen_for_what_it_is_trained_on(
    kl_coef: float, importance: list[float], make_agent: MakeAgent
) -> None:
    agent = make_agent("GRPO", kl_coef=kl_coef, skip_last_steps=1)
    assert agent.step_importance().tolist() == importance
    steps = {int(step) for batch in take_batches(agent) for step in batch.step}
    assert steps == {step for step in range(T) if importance[step]}


@pytest.mark.slow
@pytest.mark.parametrize("skipped", [0, 1])
def test_a_share_of_the_steps_estimates_the_whole(skipped: int, make_agent: MakeAgent) -> None:
    """The mean over many choices of the weighted batches is the gradient of all transitions that are trained on."""
    agent = make_agent(
        "DDPO-IS", timestep_fraction=0.5, batch_size=None, step_weighting="output", skip_last_steps=skipped
    )
    collect(agent)
    buffer, n, trained = agent.rollout_buffer, 2000, T - skipped
    total = torch.zeros(N, T)
    rng = np.random.default_rng(0)
    for _ in range(n):
        (batch,) = buffer.batches(None, rng, 0.5, agent.step_importance())
        total[batch.image, batch.step] += batch.weight / (0.5 * N * trained) / n
    # The mean over the batch counts each transition, on average, as the mean over all does.
    torch.testing.assert_close(total[:, :trained], torch.full((N, trained), 1 / (N * trained)), rtol=0.3, atol=0)
    assert not total[:, trained:].any()


# --- Scales


@pytest.mark.slow
@pytest.mark.parametrize("scaled", ["weights", "reward"])
@pytest.mark.parametrize("critic", [{"use_critic": False}, {"critic_kind": "reward"}], ids=["no critic", "critic"])
def test_units_do_not_matter(
    scaled: str, critic: dict[str, Any], make_env: MakeEnv, make_agent: MakeAgent, fresh_models: Callable[[], None]
) -> None:
    """Both weights times 1000, or the reward and the KL's weight: the same update, with the default optimiser."""

    def thousandfold(images: Tensor, prompts: list[str]) -> Tensor:
        return 1000 * Brightness()(images, prompts)

    changes: dict[str, Any] = {"kl_coef": 10.0} | ({"reward_weight": 1000.0} if scaled == "weights" else {})
    learned = []
    for reward, weights in ((Brightness(), {"kl_coef": 0.01}), (thousandfold, changes)):
        fresh_models()
        env = make_env(reward=reward if scaled == "reward" else Brightness())
        agent = make_agent("DPOK", env, target_kl=None, batch_size=4, **critic | weights)
        start = flat_weights(agent)
        agent.learn(2 * UPDATE)
        learned.append(flat_weights(agent) - start)
    assert learned[0].norm() > 0.1
    assert (learned[1] - learned[0]).norm() < 5e-5 * learned[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["likelihood", "output"])
def test_kl_coef_means_the_same_whatever_else_is_chosen(weighting: str, make_agent: MakeAgent) -> None:
    """Where the images were drawn, all gradients point the same way: the two terms have the same balance."""
    agent = make_agent("DPOK", reward_weight=2.0, kl_coef=2.0, step_weighting=weighting)
    change(agent)  # so that there is a KL
    batch = whole_batch(agent)
    # The same for all: centring changes the advantages, and the scale of the loss with them.
    batch.advantages = torch.linspace(-1, 2, UPDATE)
    directions, scales = [], set()
    for ratio, clip_type, normalize_loss, center in itertools.product(
        ("joint", "per-dimension", "centred"), ("ppo", "kl"), (True, False), (True, False)
    ):
        agent.ratio, agent.clip_type, agent.normalize_loss = ratio, clip_type, normalize_loss
        agent.center_advantage, agent.advantage_statistics = center, RunningStatistics()
        agent.advantages(agent.rollout_buffer)
        slope = gradient(agent, batch)
        directions.append(slope / slope.norm())
        scales.add(agent.loss_scale)
    assert len(scales) == 3
    for direction in directions[1:]:
        torch.testing.assert_close(direction, directions[0], rtol=0, atol=1e-4)
    for reward_weight, kl_coef in ((2.0, 0.0), (0.0, 2.0)):  # none of the terms decides alone
        agent.reward_weight, agent.kl_coef = reward_weight, kl_coef
        alone = gradient(agent, batch)
        assert directions[0] @ (alone / alone.norm()) < 0.99


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
        ({"clip_type": "soft"}, "clip_type must be one of 'ppo', 'clamp', 'kl', got 'soft'"),
        ({"clip_range": 0.0}, "clip_range must be a number above 0, got 0"),
        ({"ratio": "mean"}, "ratio must be one of 'joint', 'per-dimension', 'centred', got 'mean'"),
        ({"skip_last_steps": -1}, r"skip_last_steps \(or 'auto'\) must be an integer of at least 0, got -1"),
        ({"skip_last_steps": T}, f"skip_last_steps must be below the {T} denoising steps, .* got {T}"),
        ({"skip_last_steps": "late"}, r"skip_last_steps \(or 'auto'\) must be an integer of at least 0, got 'late'"),
        ({"step_weighting": "late"}, "step_weighting must be one of 'likelihood', 'output', got 'late'"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent("DDPO-IS", **kwargs)
