"""DPOK: its KL and where it is charged, its critic, its advantages, its options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import DPOK, evaluate
from agents.common.buffer import TrajectoryBuffer
from dpok_gym import DenoisingVectorEnv, diffusion
from dpok_gym.models import load_model
from tests.agents.algorithms.support import (
    DIMS,
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
    is_same,
    listen,
    weights,
    whole_batch,
)
from tests.support import redness

MakeEnv = Callable[..., DenoisingVectorEnv]


def reference_kl(agent: DPOK, buffer: TrajectoryBuffer) -> Tensor:
    """KL of each transition to the reference's, (N, T)."""
    columns = []
    for t in range(buffer.num_inference_steps):
        reference, std = agent.policy.transition(buffer.state_at(t), reference=True)
        columns.append(diffusion.kl_divergence(buffer.means[:, t], reference, std))
    return torch.stack(columns, dim=1).detach()


# --- The KL


@pytest.mark.slow
@pytest.mark.parametrize("normalize_loss", [True, False])
@pytest.mark.parametrize("estimator", ["exact", "output-mse"])
@torch.no_grad()
def test_the_kl_alone(estimator: str, normalize_loss: bool, make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", reward_weight=0.0, kl_coef=1.0, normalize_loss=normalize_loss, kl_estimator=estimator)
    batch = whole_batch(agent)
    change(agent)
    mean, std = agent.policy.transition(batch.state)
    reference, _ = agent.policy.transition(batch.state, reference=True)
    kl = (mean - reference).square().sum((1, 2, 3)) / (2 * std**2)
    output, reference_output = (agent.policy.predict_output(batch.state, reference=each) for each in (False, True))
    mse = (output - reference_output).square().sum((1, 2, 3))
    assert kl.min() > 1e-3
    scale = agent.rollout_buffer.advantages.std(correction=0) if normalize_loss else 1
    expected = (kl if estimator == "exact" else mse) / (DIMS * scale)
    loss, metrics = agent.loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss.double(), expected_loss(agent, batch), rtol=1e-3, atol=1e-6)
    # The log is in nats of a whole image, over the steps that explore: the first one of three.
    early = batch.step == 0
    torch.testing.assert_close(metrics["kl_to_reference"], torch.where(early, kl * T, 0.0), rtol=1e-4, atol=1e-6)
    # The drift of the others is the mean squared difference of the outputs.
    torch.testing.assert_close(metrics["late_output_mse"], mse[~early] / DIMS, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_folder", "changes", "deterministic"),
    [("vp", {"sde_steps": (0, 1)}, [1, 2]), ("flow", {}, [2]), ("vp", {}, [])],
    indirect=["model_folder"],
)
@torch.no_grad()
def test_drift_of_deterministic_steps(
    changes: dict[str, Any], deterministic: list[int], make_env: MakeEnv, make_agent: MakeAgent
) -> None:
    """No batch has these steps, so what nobody holds there would be seen nowhere."""
    agent = make_agent("DPOK", make_env(**changes))
    change(agent)
    whole_batch(agent)
    buffer, found = agent.rollout_buffer, agent.deterministic_output_mse()
    logged = agent.latest_metrics.get(
        "late_output_mse"
    )  # of the deterministic steps alone: nothing learned from batches
    if not deterministic:
        assert not len(found)
        assert logged is None
        return
    columns = []
    for step in deterministic:
        state = buffer.state_at(step)
        output, reference = (agent.policy.predict_output(state, reference=each) for each in (False, True))
        columns.append((output - reference).square().mean((1, 2, 3)))
    expected = torch.stack(columns, dim=1)  # of each image at each such step
    assert expected.min() > 1e-6
    assert len(found) == len(buffer)
    nearest = (found[:, None] / expected - 1).abs().amin(dim=1)
    assert nearest.max() < 1e-2
    assert logged is not None
    assert 0.99 * expected.min() <= logged <= 1.01 * expected.max()


@pytest.mark.slow
@torch.no_grad()
def test_both_terms_have_their_weights(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", reward_weight=2.0, kl_coef=3.0, normalize_loss=False, clip_range=100.0)
    batch = whole_batch(agent)
    change(agent, 0.05)
    parts = []
    for reward_weight, kl_coef in ((2.0, 3.0), (1.0, 0.0), (0.0, 1.0)):
        agent.reward_weight, agent.kl_coef = reward_weight, kl_coef
        parts.append(agent.loss(batch)[0])
    both, reward, kl = parts
    assert reward.abs().min() > 0
    assert kl.abs().min() > 0
    torch.testing.assert_close(both, 2 * reward + 3 * kl, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_logged_policy_gradient_is_the_first_term(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", reward_weight=2.0, kl_coef=0.0, target_kl=None)
    batch = whole_batch(agent)
    change(agent, 0.05)
    loss, metrics = agent.loss(batch)
    torch.testing.assert_close(metrics["policy_gradient_loss"], loss)


@pytest.mark.slow
def test_without_a_kl_the_reference_is_not_asked(make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent("DPOK", kl_coef=0.0, target_kl=None)

    def refuse(state: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(agent.policy, "reference_transition", refuse)
    rows = listen(agent)
    agent.learn(UPDATE)
    assert "train/kl_to_reference" not in rows[0]


@pytest.mark.slow
def test_kl_in_the_reward_charges_later_kls_to_earlier_actions(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """Each action pays for the KL of the states it leads to; no action is charged for the KL at x_T."""
    agent = make_agent(
        "DPOK",
        make_env(reward=redness, num_inference_steps=5),
        kl_placement="reward",
        kl_coef=0.5,
        reward_weight=4.0,
        center_advantage=False,
        vf_learning_rate=0.1,
        target_kl=None,
    )
    agent.learn(N * 5)  # so that the critic is not 0 any more
    change(agent)
    buffer = collect(agent)
    kl = reference_kl(agent, buffer)
    assert kl[:, :3].min() > 1e-3
    torch.testing.assert_close(buffer.kl, kl, rtol=1e-3, atol=1e-5)
    final = redness(agent.process.model.decode(buffer.latents[:, -1]), buffer.prompts)
    # beta / alpha: the loss multiplies the advantage by alpha. The last two of five steps do not explore.
    charged = [final - 0.5 / 4 * kl[:, t + 1 : 3].sum(dim=1) for t in range(5)]
    returns = torch.stack(charged, dim=1)
    with torch.no_grad():
        values = torch.stack([agent.policy.values(buffer.state_at(t)) for t in range(5)], dim=1)
    assert values.abs().min() > 0
    advantages = agent.advantages(buffer)
    torch.testing.assert_close(advantages, returns - values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(buffer.returns, returns, rtol=1e-3, atol=1e-4)
    # In the buffer, the reward is that of the environment.
    torch.testing.assert_close(buffer.final_rewards, final, rtol=1e-4, atol=1e-5)


def test_kl_in_the_loss_is_not_charged_to_actions(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", kl_coef=0.5, center_advantage=False)
    change(agent)
    buffer = collect(agent)
    assert not buffer.kl.any()
    with torch.no_grad():
        values = torch.stack([agent.policy.values(buffer.state_at(t)) for t in range(T)], dim=1)
    torch.testing.assert_close(agent.advantages(buffer), buffer.final_rewards[:, None] - values)


@pytest.mark.slow
def test_larger_kl_coef_keeps_the_model_nearer(make_agent: MakeAgent) -> None:
    kls = []
    for kl_coef in (0.0, 3.0):
        agent = make_agent("DPOK", kl_coef=kl_coef, learning_rate=3e-3, target_kl=None)
        agent.learn(5 * UPDATE)
        kls.append(float(reference_kl(agent, collect(agent)).sum(dim=1).mean()))
    assert kls[0] > 0
    assert kls[1] < 0.5 * kls[0]


def test_target_kl_adapts_the_coefficient(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", kl_coef=0.1, target_kl=2.0)
    rows = listen(agent)
    agent.learn(1)  # the first update sees a KL of 0
    assert agent.kl_coef == pytest.approx(0.1 * 0.9)
    assert rows[0]["train/kl_coef"] == agent.kl_coef
    # The square root of the KL in targets, between 0.9 and 4 / 3.
    for kl, factor in {8.0: 4 / 3, 2.88: 1.2, 2.42: 1.1, 1.805: 0.95, 1.0: 0.9}.items():
        agent.kl_coef = 0.1
        agent._metrics = {"kl_to_reference": [torch.tensor([kl - 0.5]), torch.tensor([kl + 0.5])]}
        agent._adapt_kl_coef(2.0)
        assert agent.kl_coef == pytest.approx(0.1 * factor)


def test_a_target_that_is_never_reached_leaves_the_coefficient_in_bounds(make_agent: MakeAgent) -> None:
    """Or the steps that are held would weigh infinitely, and the way back would be as long as the way there."""
    agent = make_agent("DPOK", kl_coef=0.1, target_kl=2.0)
    listen(agent)
    for kl, bound in ((0.0, 1e-5), (1e9, 1e3)):
        agent._metrics = {"kl_to_reference": [torch.tensor([kl])]}
        for _ in range(1000):
            agent._adapt_kl_coef(2.0)
        assert agent.kl_coef == pytest.approx(bound)
        assert agent.kl_coef * agent.held_coef == pytest.approx(0.1)


@pytest.mark.slow
def test_a_state_keeps_the_adapted_coefficient(make_agent: MakeAgent) -> None:
    """An agent without a target takes its own coefficient instead."""
    agent = make_agent("DPOK", kl_coef=0.1, target_kl=2.0)
    agent.learn(UPDATE)
    for target, expected in ((2.0, agent.kl_coef), (None, 0.3)):
        other = make_agent("DPOK", kl_coef=0.3, target_kl=target)
        other.load_state_dict(agent.state_dict())
        assert other.kl_coef == expected
    assert agent.kl_coef != 0.1


# --- Advantages and the critic


@pytest.mark.slow
def test_without_critic(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", use_critic=False, center_advantage=False)
    assert agent.policy.critic is None
    before = weights(agent)
    buffer = collect(agent)
    assert torch.equal(agent.advantages(buffer), buffer.final_rewards[:, None].expand(N, T))
    rows = listen(agent)
    agent.learn(UPDATE)
    after = weights(agent)
    assert {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])} == {"adapter"}
    assert not {"train/value_loss", "train/explained_variance", "train/vf_learning_rate"} & rows[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("center", [True, False])
def test_centred_advantages(center: bool, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """Over the images that have a reward; the others have no say."""
    env = make_env(8, reward=EveryOtherFails(), non_finite="mask", decode_batch_size=8)
    agent = make_agent("DPOK", env, center_advantage=center)
    agent.learn(8 * T)
    buffer = collect(agent)
    advantages = agent.advantages(buffer)[::2].double()
    with torch.no_grad():
        values = torch.stack([agent.policy.values(buffer.state_at(t)) for t in range(T)], dim=1)
    plain = (buffer.final_rewards[:, None] - values)[::2].double()
    assert plain.mean(dim=0).abs().min() > 0.1
    expected = plain - plain.mean(dim=0) if center else plain
    torch.testing.assert_close(advantages, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_loss_is_scaled_by_the_advantages_so_far(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """By their standard deviation over all iterations; images without a reward have no say."""
    env = make_env(8, reward=EveryOtherFails(), non_finite="mask", decode_batch_size=8)
    agent = make_agent("DPOK", env, reward_weight=3.0)
    rows = listen(agent)
    advantages: list[Tensor] = []
    for _ in range(2):
        agent.learn(8 * T, reset_num_timesteps=False)
        advantages.append(agent.rollout_buffer.advantages[::2].double())
    scales = [3 * DIMS * torch.cat(advantages[: n + 1]).std(correction=0).item() for n in range(2)]
    assert scales[0] != pytest.approx(scales[1], rel=1e-3)
    assert [row["train/loss_scale"] for row in rows] == pytest.approx(scales)
    assert make_agent("DPOK", normalize_loss=False, reward_weight=3.0).loss_scale == DIMS


@pytest.mark.slow
def test_gamma_and_lambda_by_hand(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", gamma=0.9, gae_lambda=0.8, center_advantage=False)
    agent.learn(UPDATE)
    buffer = collect(agent)
    advantages = agent.advantages(buffer)
    with torch.no_grad():
        v0, v1, v2 = (agent.policy.values(buffer.state_at(t)) for t in range(T))
    last = buffer.final_rewards - v2
    middle = 0.9 * v2 - v1 + 0.9 * 0.8 * last
    first = 0.9 * v1 - v0 + 0.9 * 0.8 * middle
    torch.testing.assert_close(advantages, torch.stack([first, middle, last], dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(buffer.returns, advantages + torch.stack([v0, v1, v2], dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_critic_learns_the_returns(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", learning_rate=0.0, vf_epochs=100, vf_batch_size=4)
    before = weights(agent)
    agent.learn(UPDATE)
    buffer = agent.rollout_buffer
    with torch.no_grad():
        values = torch.stack([agent.policy.values(buffer.state_at(t)) for t in range(T)], dim=1)
    assert (values - buffer.returns).square().mean() < 0.5 * (buffer.values - buffer.returns).square().mean()
    assert all(torch.equal(value, before[name]) for name, value in weights(agent).items() if "adapter" in name)


def test_the_critic_does_not_learn_from_masked_images(
    make_env: MakeEnv, make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env(reward=EveryOtherFails(), non_finite="mask", decode_batch_size=N)
    agent = make_agent("DPOK", env, vf_batch_size=None)
    asked: list[int] = []
    values = agent.policy.values

    def record(state: Any) -> Tensor:
        if torch.is_grad_enabled():
            asked.append(len(state.latents))
        return values(state)

    monkeypatch.setattr(agent.policy, "values", record)
    agent.learn(UPDATE)
    assert asked == [UPDATE // 2]


@pytest.mark.slow
def test_no_order_of_batches_comes_twice(make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the epochs of the denoiser nor in those of the critic."""
    agent = make_agent("DPOK", n_epochs=2, vf_epochs=2, batch_size=None, vf_batch_size=None)
    orders = []
    batches = agent.rollout_buffer.batches

    def record(*args: Any) -> Any:
        for batch in batches(*args):
            orders.append(tuple((batch.image * T + batch.step).tolist()))
            yield batch

    monkeypatch.setattr(agent.rollout_buffer, "batches", record)
    agent.learn(2 * UPDATE)
    assert len(set(orders)) == len(orders) == 2 * 4


@pytest.mark.slow
def test_learning_rates_of_denoiser_and_critic(make_agent: MakeAgent) -> None:
    agent = make_agent("DPOK", learning_rate=lambda remaining: 1e-2 * remaining, vf_learning_rate=0.5)
    assert agent.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)
    rows = listen(agent)
    agent.learn(4 * UPDATE)
    assert [group["lr"] for group in agent.policy.optimizer.param_groups] == [0.0, 0.5]
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0.0])
    assert rows[-1]["train/vf_learning_rate"] == 0.5


# --- Options


@pytest.fixture(scope="module")
def learned_before() -> dict[str, Tensor]:
    """The weights that options lead to: most options are compared with the same ones."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "base"),
    [
        ({"images_per_iteration": 2 * N}, {}),
        ({"gamma": 0.9}, {}),
        ({"gae_lambda": 0.9}, {}),
        ({"kl_coef": 1.0}, {}),
        ({"kl_placement": "reward"}, {"kl_coef": 1.0}),
        ({"kl_estimator": "output-mse"}, {"kl_coef": 1.0}),
        ({"target_kl": 1e-3}, {"kl_coef": 1.0}),
        ({"ratio": "joint"}, {}),
        ({"ratio": "per-dimension"}, {}),
        ({"clip_range": 1e-3}, {}),
        ({"clip_type": "ppo"}, {"clip_range": 1e-3}),
        ({"clip_type": "clamp"}, {"clip_range": 1e-3}),
        ({"center_advantage": False}, {}),
        ({"normalize_loss": False}, {}),
        ({"normalize_rewards": True}, {}),
        ({"use_critic": False}, {}),
        ({"vf_epochs": 2}, {}),
        ({"vf_batch_size": 2}, {}),
        ({"vf_learning_rate": 0.1}, {}),
        ({"reward_weight": 0.1}, {}),
        ({"step_weighting": "output"}, {}),
        ({"skip_last_steps": 1}, {}),
        ({"critic_kind": "reward"}, {}),
        ({"timestep_fraction": 0.5}, {}),
        ({"n_epochs": 2}, {}),
        ({"max_grad_norm": 1e-9}, {}),
        ({"final_lr_fraction": 0.5}, {}),
        ({"warmup_fraction": 0.9}, {}),
        ({"policy_kwargs": {"precision": "bfloat16"}}, {}),
        ({"policy_kwargs": {"target_modules": "all"}}, {}),
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs)) or "default",
)
def test_every_option_matters(
    make_env: MakeEnv,
    make_agent: MakeAgent,
    kwargs: dict[str, Any],
    base: dict[str, Any],
    learned_before: dict[str, Tensor],
) -> None:
    learned = []
    for options in (base, base | kwargs):
        if str(options) in learned_before:
            learned.append(learned_before[str(options)])
            continue
        env = make_env(num_inference_steps=4)  # the first two explore, so the KL of the second can be charged
        agent = make_agent("DPOK", env, **{"batch_size": 4, "target_kl": None, "vf_learning_rate": 1e-2} | options)
        agent.learn(2 * len(agent.rollout_buffer) * 4)
        learned.append(flat_weights(agent))
        learned_before[str(options)] = learned[-1]
    assert all(bool(values.isfinite().all()) for values in learned)
    assert not torch.equal(*learned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kl_estimator": "k3"}, "kl_estimator must be one of 'exact', 'output-mse', got 'k3'"),
        ({"kl_placement": "both"}, "kl_placement must be one of 'loss', 'reward', got 'both'"),
        ({"critic_kind": "rewards"}, "critic_kind must be one of 'network', 'reward', got 'rewards'"),
        ({"kl_coef": -0.1}, "kl_coef must be a number of at least 0, got -0.1"),
        ({"kl_coef": math.nan}, "kl_coef must be a number of at least 0, got nan"),
        ({"reward_weight": math.inf}, "reward_weight must be a number of at least 0"),
        ({"target_kl": 0.0}, "target_kl, in nats, must be a number above 0"),
        ({"target_kl": 1.0, "kl_coef": 0.0}, "needs a kl_coef above 0"),
        ({"kl_placement": "reward", "reward_weight": 0.0}, "reward_weight must be above 0"),
        ({"gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
        ({"gae_lambda": -0.1}, r"gae_lambda must lie in \[0, 1\]"),
        ({"vf_learning_rate": -1.0}, "vf_learning_rate must be a number of at least 0"),
        ({"vf_epochs": 0}, "vf_epochs must be an integer of at least 1, got 0"),
        ({"vf_epochs": True}, "vf_epochs must be an integer of at least 1, got True"),
        ({"vf_batch_size": -1}, "vf_batch_size must be an integer of at least 1"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent("DPOK", **kwargs)


# --- Learning

#: Two steps that add as much noise as they can, so that few images tell a lot about the policy.
NOISY = {
    "num_train_timesteps": 4,
    "beta_start": 0.3,
    "beta_end": 0.3,
    "beta_schedule": "linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_learns_what_is_rewarded(
    sign: int, make_env: MakeEnv, make_agent: MakeAgent, tiny_sd_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More redness, or less. An untrained decoder would show little of the latents, so here they are the colours."""

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return 10 * sign * redness(images, prompts)

    model = load_model(tiny_sd_folder, "cpu")
    monkeypatch.setattr(model, "scheduler_config", NOISY)
    monkeypatch.setattr(model, "decode", lambda latents: latents[:, :3].sigmoid())
    env = make_env(32, reward=reward, num_inference_steps=2)
    assert env.model is model
    last_layer = {"lora_rank": 4, "target_modules": ["conv_out"]}
    agent = make_agent("DPOK", env, kl_coef=0.0, target_kl=None, policy_kwargs=last_layer)
    prompts = ["a rabbit"] * 64
    before = evaluate(agent.policy, env, prompts, 1000).reward
    agent.learn(24 * 32 * 2)
    after = evaluate(agent.policy, env, prompts, 1000).reward
    error = np.sqrt((before.var() + after.var()) / 64)
    assert after.mean() - before.mean() > 20 * error


@pytest.mark.slow
def test_two_agents_of_one_model_learn_alone(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """Their LoRAs are in the same network; each learns as if it were the only one."""
    env = make_env(reward=Brightness())
    alone = make_agent("DPOK", env)
    alone.learn(2 * UPDATE)
    first, second = make_agent("DPOK", env), make_agent("DPOK", env, seed=1)
    for _ in range(2):
        first.learn(UPDATE, reset_num_timesteps=False)
        second.learn(UPDATE, reset_num_timesteps=False)
    assert is_same(weights(first), weights(alone))
    assert not is_same(weights(second), weights(alone))
