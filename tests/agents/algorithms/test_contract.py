"""What every algorithm promises."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import DiffusionDPO, PolicyGradient, evaluate
from agents.algorithms.forward_process import ForwardProcess
from agents.algorithms.online_forward_process import OnlineForwardProcess
from agents.algorithms.registry import load_algorithm
from agents.common.metrics import METRICS
from dpok_gym import DenoisingVectorEnv, diffusion
from tests.agents.algorithms.support import (
    ALGORITHMS,
    BUILT_IN,
    DIFFUSIONS,
    FORWARD_PROCESSES,
    POLICY_GRADIENTS,
    PROMPTS,
    SCORE_FUNCTIONS,
    UPDATE,
    AlwaysFails,
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
    is_same,
    listen,
    take_batches,
    use_sgd,
    weights,
    whole_batch,
)
from tests.support import assert_same, colours

MakeEnv = Callable[..., DenoisingVectorEnv]

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
#: For tests that train for longer: those of each base class are enough for a first look.
FIRST = ("DPOK", "GRPO", "SFT, KL-O", "DiffusionNFT", "DRaFT")
every_algorithm_in_turn = pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
)
every_policy_gradient = pytest.mark.parametrize("name", POLICY_GRADIENTS)


both_diffusions = pytest.mark.parametrize("model_folder", DIFFUSIONS, indirect=True)
#: For what is saved and how batches are split, which does not depend on the kind of diffusion.
a_diffusion_in_turn = pytest.mark.parametrize(
    ("name", "model_folder"),
    [
        pytest.param(name, diffusion, marks=[] if name in FIRST else pytest.mark.slow)
        for name, diffusion in zip(ALGORITHMS, cycle(DIFFUSIONS), strict=False)
    ],
    indirect=["model_folder"],
)


def test_every_built_in_algorithm_is_tested_here() -> None:
    assert {load_algorithm(name) for name in BUILT_IN} == {cls for cls, _ in ALGORITHMS.values()}


# --- Before the first update


@pytest.mark.slow
@pytest.mark.parametrize(
    # Those that draw with a policy of their own: the trained one, the pre-trained one, and one that follows.
    ("name", "guidance_scale"),
    [("DPOK", 1.0), ("DPOK", 3.0), ("RWR", 3.0), ("DiffusionNFT", 1.0)],
)
@both_diffusions
def test_begins_as_the_reference(name: str, guidance_scale: float, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """The ratio is exactly 1 and the KL exactly 0, of each transition."""
    agent = make_agent(name, make_env(guidance_scale=guidance_scale))
    buffer = collect(agent)
    for t in range(T):
        mean, std = agent.policy.transition(buffer.state_at(t))
        reference, _ = agent.policy.transition(buffer.state_at(t), reference=True)
        log_ratio = diffusion.log_ratio(buffer.latents[:, t + 1], mean, buffer.means[:, t], std)
        assert log_ratio.exp().tolist() == [1.0] * N
        assert diffusion.kl_divergence(mean, reference, std).tolist() == [0.0] * N


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy_kwargs"),
    [(name, {}) for name in POLICY_GRADIENTS]
    + [("DPOK", {"lora_rank": 0}), ("DPOK", {"precision": "bfloat16"}), ("GRPO", {"gradient_checkpointing": True})],
    ids=str,
)
@both_diffusions
def test_first_update_finds_no_ratio_and_no_kl(name: str, policy_kwargs: dict[str, Any], make_agent: MakeAgent) -> None:
    """One state in each call of the network, in the rollout as in the update: then the ratio is 1 to the last bit."""
    agent = make_agent(name, policy_kwargs={"max_batch_size": 1, **policy_kwargs}, micro_batch_size=1, batch_size=None)
    metrics: dict[str, list[float]] = {}
    log = agent.log_metrics

    def keep(values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            metrics.setdefault(key, []).extend(value.reshape(-1).tolist())
        log(values)

    agent.log_metrics = keep
    agent.learn(UPDATE)
    n_states = N * int(agent.process.table.stochastic.sum())  # nothing is learned from the others
    if name not in SCORE_FUNCTIONS:
        n_trained = N * int((agent.step_weights[agent.process.table.stochastic] > 0).sum())
        assert metrics["mean_ratio"] == [1.0] * n_trained
        assert metrics["clip_fraction"] == [0.0] * n_trained
    if agent.kl_coef:
        assert metrics["kl_to_reference"] == [0.0] * n_states
    assert np.isfinite(metrics["grad_norm"]).all()


# --- The loss


@pytest.mark.slow
@every_algorithm
@both_diffusions
def test_loss_is_one_number_for_each_element(name: str, make_agent: MakeAgent) -> None:
    """No element's loss depends on the others, so it does not matter how a batch is split."""
    agent = make_agent(name)
    batch = whole_batch(agent)
    change(agent)
    with torch.no_grad():
        loss, metrics = agent.loss(batch)
        parts = [agent.loss(part) for part in batch.split(len(batch) // 2)]
    assert loss.shape == (len(batch),)
    assert len(batch) > 1
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), loss, rtol=1e-3, atol=1e-5)
    numbers = {}
    if isinstance(agent, PolicyGradient):
        # The drift of late steps is of these alone, the last two of three; the ratio is that of trained steps.
        numbers["late_output_mse"] = int((batch.step > 0).sum())
        numbers["mean_ratio"] = numbers["clip_fraction"] = int((agent.step_weights[batch.step] > 0).sum())
    for key, values in metrics.items():
        assert len(values) == numbers.get(key, len(batch))
        assert not values.requires_grad
        torch.testing.assert_close(torch.cat([each[key] for _, each in parts]), values, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@every_algorithm
@both_diffusions
def test_loss_is_that_of_the_paper(name: str, make_agent: MakeAgent) -> None:
    agent = make_agent(name)
    batch = whole_batch(agent)
    change(agent, 0.05)
    with torch.no_grad():
        loss, _ = agent.loss(batch)
    if name in SCORE_FUNCTIONS:  # only its gradient counts, see the next test
        assert loss.tolist() == [0.0] * len(batch)
        return
    assert loss.abs().max() > 1e-3
    torch.testing.assert_close(loss.double(), expected_loss(agent, batch), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@every_algorithm
@both_diffusions
def test_gradient_equals_finite_differences(name: str, make_agent: MakeAgent) -> None:
    """Of the loss written by hand, along the gradient and along a direction that is partly random."""
    # Where a clip begins to hold, there is no gradient; tests of the losses are about that.
    no_clip = {"clip_range": 1e3} if name in POLICY_GRADIENTS else {}
    agent = make_agent(name, **no_clip)
    batch = whole_batch(agent)
    change(agent, 0.05)
    slope = gradient(agent, batch)
    assert slope.norm() > 1e-4
    start = flat_weights(agent)
    noise = torch.randn(len(start), generator=torch.Generator().manual_seed(3))
    for direction in (slope / slope.norm(), slope / slope.norm() + noise / noise.norm()):
        size = 0.05 if name == "DRaFT" else 0.01  # its loss hardly depends on the weights
        values = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(start + sign * size * direction, agent.policy.denoiser_parameters())
            values.append(expected_loss(agent, batch).sum())
        difference = (values[0] - values[1]) / (2 * size)
        assert float(slope @ direction) == pytest.approx(float(difference), rel=3e-3)


@pytest.mark.slow
@every_policy_gradient
def test_elements_count_by_their_weights(name: str, make_agent: MakeAgent) -> None:
    agent = make_agent(name)
    batch = whole_batch(agent)
    change(agent, 0.05)
    expected = gradient(agent, batch)
    assert expected.abs().max() > 0
    weighted = gradient(agent, replace(batch, weight=3 * batch.weight))
    torch.testing.assert_close(weighted, 3 * expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


# --- The update


@pytest.mark.slow
@every_algorithm_in_turn
@both_diffusions
def test_learns(name: str, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """Weights move; the reference stays where it was."""
    agent = make_agent(name)
    state = copy.deepcopy(collect(agent).state_at(0))
    reference, _ = agent.policy.reference_transition(state)
    before = weights(agent)
    agent.learn(2 * UPDATE)
    assert agent.is_done(2 * UPDATE)
    assert not agent.is_done(2 * UPDATE + 1)
    assert agent.num_timesteps == 2 * UPDATE
    after = weights(agent)
    assert not is_same(after, before)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert_same(agent.policy.reference_transition(state)[0], reference)
    env = make_env(2)
    assert evaluate(agent.policy, env, PROMPTS, 0).kl.min() > 0
    assert not evaluate(agent.policy, env, PROMPTS, 0, reference=True).kl.any()


@pytest.mark.slow
@a_diffusion_in_turn
def test_micro_batches_change_nothing(name: str, make_agent: MakeAgent) -> None:
    learned = {}
    for size in (None, 2, "auto"):
        agent = make_agent(name, micro_batch_size=size, learning_rate=1.0, max_grad_norm=1e9)
        use_sgd(agent)
        before = flat_weights(agent)
        agent.learn(UPDATE)
        learned[size] = flat_weights(agent) - before
    expected = learned.pop(None)
    assert expected.abs().max() > 0
    for size, moved in learned.items():
        assert (moved - expected).abs().max() < 1e-3 * expected.abs().max(), f"micro_batch_size={size}"


@pytest.mark.slow
@every_algorithm_in_turn
def test_n_envs_changes_nothing(name: str, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """The same prompts, noise, batches and weights, however many images are drawn side by side."""
    latents, learned = [], []
    for n in (N, 3):
        # One state at a time, as the bits of a network's output depend on the size of its batch.
        agent = make_agent(name, make_env(n), images_per_iteration=N, policy_kwargs={"max_batch_size": 1})
        agent.learn(2 * UPDATE)
        latents.append(agent.rollout_buffer.latents.clone())
        learned.append(weights(agent))
        assert agent.images_drawn == 2 * N
        assert agent.num_timesteps == 2 * UPDATE
    assert_same(latents[1], latents[0])
    assert_same(learned[1], learned[0])


@pytest.mark.slow
@every_algorithm_in_turn
def test_gradient_is_clipped_to_its_norm(name: str, make_agent: MakeAgent) -> None:
    """The critic has steps of its own."""
    one_step = {"n_gradient_steps": 1} if name in FORWARD_PROCESSES else {}
    if name == "DiffusionDPO":
        one_step = {"steps_per_iteration": 1}
    agent = make_agent(name, learning_rate=1.0, max_grad_norm=1e-6, batch_size=None, **one_step)
    use_sgd(agent)
    before = flat_weights(agent)
    agent.learn(UPDATE)
    assert (flat_weights(agent) - before).norm().item() == pytest.approx(1e-6, rel=0.05)


@pytest.mark.slow
@every_algorithm_in_turn
def test_seeds(name: str, make_agent: MakeAgent) -> None:
    """A seed decides everything; runs of different seeds share no noise."""
    learned, starts = [], []
    for seed in (1, 1, 2):
        agent = make_agent(name, seed=seed)
        agent.learn(UPDATE)
        starts.append(agent.rollout_buffer.latents[:, 0].clone())
        learned.append(weights(agent))
    assert_same(learned[1], learned[0])
    assert_same(starts[1], starts[0])
    assert not is_same(learned[2], learned[0])
    assert not (starts[0][:, None] == starts[2][None]).flatten(2).all(dim=2).any()


# --- Going on


def go_on(agent: Any, reset: bool = False) -> dict[str, Tensor]:
    agent.learn(UPDATE, reset_num_timesteps=reset)
    return weights(agent)


@pytest.mark.slow
@a_diffusion_in_turn
def test_goes_on_from_a_state_to_the_same_weights(name: str, make_agent: MakeAgent) -> None:
    agent = make_agent(name)
    agent.learn(2 * UPDATE)
    saved = agent.state_dict()
    saved["state"] = json.loads(json.dumps(saved["state"]))
    assert all(isinstance(value, Tensor) for group in saved["tensors"].values() for value in group.values())
    saved = copy.deepcopy(saved)
    expected = go_on(agent)
    other = make_agent(name, seed=77)  # the state has the seed too
    other.load_state_dict(saved)
    assert not is_same(weights(other), expected)
    assert_same(go_on(other), expected)
    assert_same(other.state_dict(), agent.state_dict())
    assert other.num_timesteps == 3 * UPDATE


@a_diffusion_in_turn
@pytest.mark.parametrize("reset", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["on", "anew"])
def test_goes_on_after_loading(
    name: str, reset: bool, make_env: MakeEnv, make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent = make_agent(name)
    agent.learn(2 * UPDATE)
    agent.save(tmp_path / "agent")
    saved = weights(agent)
    expected = go_on(agent, reset)
    loaded = type(agent).load(tmp_path / "agent", make_env(), device="cpu")
    assert_same(weights(loaded), saved)
    assert_same(go_on(loaded, reset), expected)
    assert not is_same(expected, saved)
    assert loaded.num_timesteps == (1 if reset else 3) * UPDATE


# --- Rewards that are not finite


@pytest.mark.slow
@every_algorithm_in_turn
@both_diffusions
def test_masked_images_are_not_learned_from(name: str, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    # All images are decoded and scored in one call, so that the reward fails for the same ones each time.
    env = make_env(8, reward=EveryOtherFails(), non_finite="mask", decode_batch_size=8)
    # Every second image of a pair fails, if its group is no larger.
    larger = {"group_size": 4} if name == "DiffusionDPO" else {}
    agent = make_agent(name, env, **larger)
    batches = take_batches(agent, 8)
    buffer = agent.rollout_buffer
    assert buffer.valid.tolist() == [True, False] * 4
    if isinstance(agent, ForwardProcess):
        assert_same(agent.image_latents, buffer.latents[::2, -1])
        assert agent.image_prompts == buffer.prompts[::2]
        known = {tuple(latents.flatten().tolist()) for latents in agent.image_latents}
        assert all(tuple(latents.flatten().tolist()) in known for batch in batches for latents in batch.latents)
    elif isinstance(agent, DiffusionDPO):
        known = {tuple(latents.flatten().tolist()) for latents in buffer.latents[::2, -1]}
        assert all(tuple(each.flatten().tolist()) in known for batch in batches for each in batch.latents.flatten(0, 1))
    elif isinstance(agent, OnlineForwardProcess):
        known = {tuple(latents.flatten().tolist()) for latents in buffer.latents[::2, -1]}
        assert {tuple(latents.flatten().tolist()) for batch in batches for latents in batch.latents} == known
    else:
        assert {int(image) for batch in batches for image in batch.image} == {0, 2, 4, 6}
    agent = make_agent(name, env, **larger, **({"batch_size": None} if "DRaFT" in name else {}))
    rows = listen(agent)
    agent.learn(2 * 8 * T)
    assert all(bool(value.isfinite().all()) for value in weights(agent).values())
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["rollout/valid_share"] == 0.5


@pytest.mark.slow
@every_algorithm
def test_nothing_is_learned_from_nothing(name: str, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    agent = make_agent(name, make_env(reward=AlwaysFails(), non_finite="mask"))
    rows = listen(agent)
    before = weights(agent)
    if isinstance(agent, ForwardProcess):
        with pytest.raises(ValueError, match="no image got a reward"):
            agent.learn(2 * UPDATE)
    else:
        agent.learn(2 * UPDATE)
    assert_same(weights(agent), before)
    assert agent._n_updates == 0
    assert rows[0]["rollout/valid_share"] == 0
    assert all(np.isfinite(value) for row in rows for value in row.values())


def test_unmasked_rewards_are_errors(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    def never(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.full((len(images),), torch.nan)

    with pytest.raises(ValueError, match=r"the reward 'never' for the prompt .* is not finite"):
        make_agent("DPOK", make_env(reward=never)).learn(UPDATE)


# --- The log

_WITH_KL = "policy_gradient_loss mean_ratio clip_fraction kl_to_reference late_output_mse"
UPDATE_COLUMNS = {
    "DPOK": f"{_WITH_KL} loss_scale kl_coef value_loss explained_variance vf_learning_rate",
    "DPOK, critic on rewards": f"{_WITH_KL} loss_scale explained_variance",
    "DPOK, late steps held": f"{_WITH_KL} loss_scale",
    "DPOK, KL in the reward": f"{_WITH_KL} loss_scale",
    "DDPO-IS": "policy_gradient_loss mean_ratio clip_fraction",
    "DDPO-SF": "",
    "GRPO": _WITH_KL,
    "REINFORCE": "",
    "SFT, KL-D": "denoising_loss",
    "SFT, KL-O": "denoising_loss",
    "RWR": "denoising_loss",
    "BestOfN": "denoising_loss",
    "DiffusionNFT": "matching_loss distance_to_old distance_to_reference",
    "AWM": "policy_gradient_loss mean_ratio clip_fraction distance_to_old distance_to_reference",
    "DiffusionDPO": (
        "preference_loss winner_reward loser_reward reward_margin implicit_accuracy winner_error loser_error"
    ),
    "DRaFT": "reward",
    "DRaFT, KL": "reward kl_of_last_steps kl_to_reference",
}


@pytest.mark.slow
@every_algorithm_in_turn
@both_diffusions
def test_log(name: str, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """Each row holds what an iteration drew and what its own update did."""
    env = make_env() if "DRaFT" in name else make_env(reward={colours: 2.0})
    agent = make_agent(name, env, **({"log_every": 2} if name in FORWARD_PROCESSES else {}))
    rows = listen(agent)
    agent.learn(2 * UPDATE)
    components = {"Brightness"} if "DRaFT" in name else {"red", "blue"}
    rollout = {f"rollout/{column}" for column in {"ep_rew_mean", "ep_len_mean", "images", "valid_share"} | components}
    rollout |= {"time/rollout_images_per_second", "time/fps", "time/total_timesteps"}
    columns = {*UPDATE_COLUMNS[name].split(), "grad_norm", "learning_rate", "n_updates"}
    update = {f"train/{column}" for column in columns} | {"time/update_images_per_second"}
    assert len(rows) == (4 if name in FORWARD_PROCESSES else 2)
    explained = METRICS.keys() | {f"rollout/{component}" for component in components}
    for row in rows:
        assert row.keys() <= explained, "a new column needs an entry in agents/common/metrics.py"
        assert all(len(column) <= 36 and np.isfinite(value) for column, value in row.items())
    drawn, updated = (rows[:2], rows[2:]) if name in FORWARD_PROCESSES else (rows, rows)
    assert [row["rollout/images"] for row in drawn] == [N, 2 * N]
    assert all(rollout <= row.keys() for row in drawn)
    for row in updated:
        assert {column for column in row if column.startswith("train/")} == update - {"time/update_images_per_second"}
        assert update <= row.keys()
        assert row["time/update_images_per_second"] > 0
    assert drawn[0]["rollout/ep_len_mean"] == T
    if "DRaFT" not in name:
        total = 2 * (drawn[0]["rollout/red"] + drawn[0]["rollout/blue"])
        assert drawn[0]["rollout/ep_rew_mean"] == pytest.approx(total, rel=1e-4)
    n_updates = [row["train/n_updates"] for row in updated]
    assert n_updates == sorted(n_updates)
    assert n_updates[0] > 0
    assert n_updates[-1] == agent._n_updates
    if "train/kl_to_reference" in update:
        assert updated[0]["train/kl_to_reference"] == pytest.approx(0, abs=1e-6)
        assert updated[1]["train/kl_to_reference"] > 0


# --- The learning rate


@pytest.mark.slow
def test_falling_learning_rate(make_agent: MakeAgent, tmp_path: Path) -> None:
    """Linear in the progress, from the whole of it to the fraction that was asked for, and after loading too."""
    agent = make_agent("DPOK", learning_rate=0.5, final_lr_fraction=0.2)
    agent.save(tmp_path / "agent")
    for each in (agent, type(agent).load(tmp_path / "agent")):
        assert [each.lr_schedule(progress) for progress in (1, 0.5, 0)] == pytest.approx([0.5, 0.3, 0.1])
    rows = listen(agent)
    agent.learn(4 * UPDATE)
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert make_agent("DPOK", learning_rate=0.5).lr_schedule(0) == 0.5


@pytest.mark.slow
def test_warmup_by_hand(make_agent: MakeAgent) -> None:
    """The rate rises until half of the training is done, beside what it is without."""
    agent = make_agent("DPOK", learning_rate=0.5, final_lr_fraction=0.2, warmup_fraction=0.5)
    assert agent.lr_schedule(1) == 0
    rows = listen(agent)
    agent.learn(8 * UPDATE)
    rising = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    falling = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    expected = [0.5 * one * other for one, other in zip(rising, falling, strict=True)]
    assert [row["train/learning_rate"] for row in rows] == pytest.approx(expected)


@pytest.mark.slow
def test_learning_rate_is_never_below_zero(make_agent: MakeAgent) -> None:
    """A last iteration that goes beyond the total does not turn the gradient around."""
    agent = make_agent("DPOK", learning_rate=0.5, final_lr_fraction=0.0)
    rows = listen(agent)
    agent.learn(UPDATE + 1)
    assert agent.num_timesteps == 2 * UPDATE
    assert rows[-1]["train/learning_rate"] == 0


# --- Options of the policy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy_kwargs", "guidance_scale"),
    [({"guidance_gradient": "conditional"}, 3.0), ({"precision": "bfloat16"}, 1.0), ({"lora_rank": 0}, 1.0)],
    ids=str,
)
@both_diffusions
def test_options_of_the_policy_reach_the_update(
    policy_kwargs: dict[str, Any], guidance_scale: float, make_env: MakeEnv, make_agent: MakeAgent
) -> None:
    norms = []
    for kwargs in ({}, policy_kwargs):
        agent = make_agent("DPOK", make_env(guidance_scale=guidance_scale), policy_kwargs=kwargs)
        rows = listen(agent)
        before = flat_weights(agent)
        agent.learn(UPDATE)
        assert not torch.equal(flat_weights(agent), before)
        assert rows[0]["train/kl_to_reference"] == 0
        norms.append(rows[0]["train/grad_norm"])
    assert norms[0] != norms[1]
    assert np.isfinite(norms).all()


@pytest.mark.slow
def test_a_whole_denoiser_is_compiled_if_the_model_is(
    make_env: MakeEnv, make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kwargs: compiled.append(module))
    env = make_env(model_kwargs={"compile": True})
    agent = make_agent("DPOK", env, policy_kwargs={"lora_rank": 0})
    assert agent.policy.denoiser in compiled
    assert env.model.denoiser in compiled
    agent.learn(UPDATE)


# --- Arguments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": -5}, "batch_size must be an integer of at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size .* must be an integer of at least 1"),
        ({"images_per_iteration": 0}, "images_per_iteration must be an integer of at least 1, got 0"),
        ({"final_lr_fraction": -0.1}, r"final_lr_fraction must lie in \[0, 1\], got -0.1"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction must lie in \[0, 1\), got 1.0"),
        ({"warmup_fraction": -0.1}, r"warmup_fraction must lie in \[0, 1\), got -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number above 0"),
        ({"anchor_coef": -1.0}, "anchor_coef must be a number of at least 0"),
        ({"anchor_images": 0}, "anchor_images must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"policy_kwargs": {"lora_rank": -1}}, "lora_rank must be an integer of at least 0"),
        ({"policy_kwargs": {"target_modules": ["to_x"]}}, "no layer of the denoiser ends in"),
        ({"policy_kwargs": {"max_batch_size": 0}}, "max_batch_size .* must be an integer of at least 1"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent("DPOK", **kwargs)


# --- Learning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("DPOK", {"target_kl": None, "batch_size": 36}),
        ("DDPO-IS", {"batch_size": 36}),
        ("GRPO", {"group_size": 24, "batch_size": 36, "same_noise": "none"}),
        ("REINFORCE", {"learning_rate": 6e-3}),
        ("SFT, KL-D", {"gamma_kl": 0.0}),
        ("RWR", {"temperature": 0.02}),
        ("BestOfN", {"n": 8}),
        ("DiffusionNFT", {"group_size": 24, "batch_size": 24, "normalize_errors": True}),
        ("AWM", {"group_size": 24, "batch_size": 24}),
        ("DiffusionDPO", {"group_size": 4, "steps_per_iteration": 10, "batch_size": 12, "beta": 100.0}),
        ("DRaFT", {"batch_size": 12}),
    ],
)
def test_reward_improves_on_the_embedded_world(name: str, kwargs: dict[str, Any]) -> None:
    """Three iterations of 24 make the images brighter."""

    def shifted(images: Tensor, prompts: list[str]) -> Tensor:
        return 20 * (images.mean((1, 2, 3)) - 0.7)

    cls, own = ALGORITHMS[name]
    prompt, n, steps = "three green squares", 24, 5
    reward = shifted if "SFT" in name else Brightness()
    env = DenoisingVectorEnv(
        n, prompts=prompt, reward=reward, num_inference_steps=steps, decode_batch_size=n, device="cpu"
    )
    common = {"policy_kwargs": {"lora_rank": 8, "target_modules": "all"}, "learning_rate": 3e-3, "seed": 0}
    if issubclass(cls, ForwardProcess):
        own = own | {"n_gradient_steps": 40, "batch_size": 24}
    if issubclass(cls, PolicyGradient):
        own = own | {"skip_last_steps": "auto"}
    agent: Any = cls(env=env, device="cpu", **(common | own | kwargs))
    before = evaluate(agent.policy, env, [prompt] * 48, 1000)
    agent.learn(3 * n * steps)
    after = evaluate(agent.policy, env, [prompt] * 48, 1000)
    gain = (after.reward - before.reward).mean() / before.reward.std()
    error = (after.reward - before.reward).std() / before.reward.std() / np.sqrt(48)
    assert gain > 3 * error, f"{gain:.2f} +- {error:.2f} standard deviations"
