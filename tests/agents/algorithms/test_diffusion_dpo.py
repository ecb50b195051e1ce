"""Diffusion-DPO: its loss, its safeguard, and both places that its pairs come from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from agents import DiffusionDPO, evaluate
from agents.common import losses
from agents.common.pairs import Pairs
from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import (
    DIFFUSIONS,
    PROMPTS,
    UPDATE,
    MakeAgent,
    change,
    flat_weights,
    gradient,
    is_same,
    listen,
    take_batches,
    use_sgd,
    weights,
)
from tests.support import assert_same, write_choices

MakeEnv = Callable[..., DenoisingVectorEnv]

NAME = "DiffusionDPO"
both_diffusions = pytest.mark.parametrize("model_folder", DIFFUSIONS, indirect=True)


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    return write_choices(tmp_path / "choices", PROMPTS, 6)


# --- The loss


@pytest.mark.slow
@both_diffusions
def test_loss_is_that_of_diffusers_script(make_agent: MakeAgent, choices: Path) -> None:
    """Winners first, then losers, as in its batches; its beta is half of ours. On the same outputs."""
    agent = make_agent(NAME, choices=choices, beta=30.0)
    batch = take_batches(agent)[0]
    change(agent, 0.05)
    with torch.no_grad():
        loss, metrics = agent.loss(batch)
        output = agent.policy.predict_output(batch.state, guidance_scale=1.0)
        reference = agent.policy.predict_output(batch.state, reference=True, guidance_scale=1.0)

    def winners_then_losers(values: Tensor) -> Tensor:
        return torch.cat(values.unflatten(0, (-1, 2)).unbind(1))

    target = winners_then_losers(batch.target.flatten(0, 1))
    errors = F.mse_loss(winners_then_losers(output), target, reduction="none").mean((1, 2, 3))
    reference_errors = F.mse_loss(winners_then_losers(reference), target, reduction="none").mean((1, 2, 3))
    winner, loser = errors.chunk(2)
    reference_winner, reference_loser = reference_errors.chunk(2)
    logits = (reference_winner - reference_loser) - (winner - loser)
    torch.testing.assert_close(loss, -F.logsigmoid(15.0 * logits))
    torch.testing.assert_close(metrics["winner_reward"], 15 * (reference_winner - winner), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["loser_reward"], 15 * (reference_loser - loser), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["reward_margin"], 15 * logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["winner_error"], winner)
    torch.testing.assert_close(metrics["loser_error"], loser)
    assert_same(metrics["implicit_accuracy"], (logits > 0).float())


@pytest.mark.slow
@both_diffusions
def test_both_images_of_a_pair_have_the_same_noise(make_agent: MakeAgent, choices: Path) -> None:
    agent = make_agent(NAME, choices=choices)
    batch, table = take_batches(agent)[0], agent.process.table
    signal, noise = (values[batch.step][:, None, None, None, None] for values in (table.signal, table.noise))
    eps = (batch.noisy - signal * batch.latents) / noise
    torch.testing.assert_close(eps[:, 0], eps[:, 1], rtol=1e-3, atol=1e-3)
    assert (eps[0] != eps[1]).any()
    assert not torch.equal(batch.latents[:, 0], batch.latents[:, 1])


@pytest.mark.slow
@pytest.mark.parametrize("policy_kwargs", [{}, {"lora_rank": 0}], ids=["LoRA", "whole denoiser"])
def test_a_step_tells_winners_from_losers(policy_kwargs: dict[str, Any], make_agent: MakeAgent, choices: Path) -> None:
    agent = make_agent(NAME, choices=choices, batch_size=32, policy_kwargs=policy_kwargs, beta=100.0)
    use_sgd(agent)
    batch = take_batches(agent)[0]
    loss, before = agent.loss(batch)
    assert before["reward_margin"].tolist() == [0.0] * 32
    assert before["implicit_accuracy"].tolist() == [0.5] * 32  # as good as a coin
    assert loss.tolist() == pytest.approx([np.log(2)] * 32)
    with agent.policy.adapter_enabled():
        loss.mean().backward()
    with torch.no_grad():
        for value in agent.policy.denoiser_parameters():
            value -= 1e-3 * value.grad
        _, after = agent.loss(batch)
    assert after["reward_margin"].mean() > 0
    assert after["implicit_accuracy"].mean() > 0.5


# --- The safeguard


def test_scale_of_the_losers_gradient_by_hand() -> None:
    winner = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    loser = torch.tensor([[1.0, 5.0], [4.0, 3.0], [-2.0, 1.0], [1.0, 1.0]])
    # 9 / 3 is more than 1; 1 / 4; gradients that point away from each other need no limit; nor does a winner without.
    assert losses.safe_loser_scale(winner, loser).tolist() == [1.0, 0.25, 1.0, 1.0]
    assert losses.safe_loser_scale(winner, loser, 0.8).tolist() == pytest.approx([0.6, 0.05, 1.0, 1.0])
    assert losses.safe_loser_scale(winner[:3], loser[:3], 1.0).tolist() == [0.0, 0.0, 1.0]


def test_a_scaled_gradient_leaves_the_value() -> None:
    values = torch.tensor([2.0, 3.0], requires_grad=True)
    scaled = losses.scale_gradient(values, torch.tensor([0.5, 0.0]))
    assert scaled.tolist() == [2.0, 3.0]
    scaled.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0]


@contextmanager
def outputs_are(agent: Any, output: Tensor, reference: Tensor) -> Iterator[None]:
    """Within the block the denoiser gives these outputs."""
    predict = agent.policy.predict_output
    agent.policy.predict_output = lambda *args, **kwargs: reference if kwargs.get("reference") else output
    try:
        yield
    finally:
        agent.policy.predict_output = predict


@pytest.mark.slow
def test_a_small_step_does_not_raise_the_winners_error(make_agent: MakeAgent, choices: Path) -> None:
    """For weights that change both outputs alike, which is what the rule assumes; plain DPO raises it."""
    raised = {}
    for sdpo in (False, True):
        agent = make_agent(NAME, choices=choices, sdpo=sdpo, beta=100.0, batch_size=1)
        batch = take_batches(agent)[0]
        target = batch.target[0]
        raised[sdpo] = 0
        for seed in range(20):
            noise = torch.randn(3, 2, *target.shape[1:], generator=torch.Generator().manual_seed(seed))
            # Both outputs are wrong in the same direction, the loser's by more: so its gradient wins.
            common = noise[0, :1]
            start = target + 0.2 * noise[1] + common * torch.tensor([0.5, 2.0])[:, None, None, None]
            shift = torch.zeros_like(target[0], requires_grad=True)
            with outputs_are(agent, start + shift, start):
                loss, metrics = agent.loss(batch)
            (slope,) = torch.autograd.grad(loss.sum(), shift)
            with torch.no_grad(), outputs_are(agent, start - 1e-3 * slope, start):
                _, after = agent.loss(batch)
            raised[sdpo] += int(after["winner_error"] > metrics["winner_error"] * (1 + 1e-6))
            assert after["reward_margin"] > (0 if not sdpo else -1e-4)
    assert raised == {False: 20, True: 0}


@pytest.mark.slow
def test_the_safeguard_changes_the_gradient_only(make_agent: MakeAgent, choices: Path) -> None:
    plain, guarded = make_agent(NAME, choices=choices), make_agent(NAME, choices=choices, sdpo=True, sdpo_mu=0.9)
    batch = take_batches(plain)[0]
    for agent in (plain, guarded):
        change(agent, 0.05)
    with torch.no_grad():
        loss, metrics = guarded.loss(batch)
        expected, of_plain = plain.loss(batch)
    assert_same(loss, expected)
    scale = metrics.pop("loser_scale")
    assert_same(metrics, of_plain)
    assert (scale < 1).all()
    assert (scale > 0).all()
    assert not torch.allclose(gradient(guarded, batch), gradient(plain, batch))


# --- Pairs of fresh images


def test_pairs_are_the_best_and_the_worst_of_each_group(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """A group of equal rewards has no pair, nor has one with a single valid image."""
    env = make_env(2, non_finite="mask")
    agent = make_agent(NAME, env, images_per_iteration=12, group_size=3, batch_size=None)
    agent.learn(0)  # sets the agent up
    buffer = agent.rollout_buffer
    buffer.latents[:, -1] = torch.arange(12.0)[:, None, None, None]
    buffer.prompts = [f"prompt {number // 3}" for number in range(12)]
    rewards = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 9.0, 0.0, 4.0, 7.0, 8.0, 6.0])
    valid = torch.tensor([True] * 6 + [True, False, True] + [False, True, False])
    buffer.finish(rewards, valid)
    pairs = agent.pairs()
    assert pairs.rows.tolist() == [[1, 0], [6, 8]]
    assert pairs.prompts == ["prompt 0", "prompt 2"]
    buffer.finish(rewards, torch.zeros(12, dtype=torch.bool))
    assert len(agent.pairs()) == 0
    before = flat_weights(agent)
    agent.train()
    assert torch.equal(flat_weights(agent), before)


@pytest.mark.slow
def test_a_pair_has_the_prompt_of_its_images(make_agent: MakeAgent) -> None:
    agent = make_agent(NAME, images_per_iteration=8)
    agent.batch_size = None
    batch = take_batches(agent, 8)[0]
    buffer = agent.rollout_buffer
    conditioning = batch.state.conditioning
    for row, (winner, loser) in enumerate(batch.latents):
        best, worst = (int((buffer.latents[:, -1] == each).flatten(1).all(1).nonzero()) for each in (winner, loser))
        assert best // 2 == worst // 2  # of one group
        assert buffer.final_rewards[best] > buffer.final_rewards[worst]
        expected = agent.process.encode([buffer.prompts[best]])
        for name, values in conditioning.items():
            assert_same(values[2 * row], expected[name][0])
            assert_same(values[2 * row + 1], expected[name][0])


# --- Choices from a file


@pytest.mark.slow
@both_diffusions
def test_the_files_pairs(make_agent: MakeAgent, tmp_path: Path) -> None:
    """The preferred image is the winner; an image in two choices is encoded once; ties are left out."""
    file = write_choices(tmp_path, PROMPTS, 3)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1] |= {"images": [lines[0]["images"][1], lines[1]["images"][1]], "preferred": 1}
    lines[2] |= {"preferred": None, "reason": "tie"}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    agent = make_agent(NAME, choices=file)
    pairs = agent.pairs()
    assert lines[0]["preferred"] == 0
    assert pairs.rows.tolist() == [[0, 1], [2, 1]]
    assert pairs.prompts == [line["prompt"] for line in lines[:2]]
    assert len(pairs.latents) == 3
    assert agent.prepare() == "2 choices between 3 images, for 2 prompts; no image is drawn in training"


def test_without_a_batch_size_each_pair_comes_once(make_agent: MakeAgent, choices: Path) -> None:
    agent = make_agent(NAME, choices=choices, batch_size=None)
    batch, pairs = take_batches(agent)[0], agent.pairs()
    winners = pairs.latents[pairs.rows[:, 0]]
    order = [int((winners == each).flatten(1).all(1).nonzero()) for each in batch.latents[:, 0]]
    assert sorted(order) == list(range(len(pairs)))


def test_images_of_another_size_are_fitted(make_agent: MakeAgent, tmp_path: Path) -> None:
    small = write_choices(tmp_path / "small", PROMPTS, 1, size=(16, 16))
    wide = write_choices(tmp_path / "wide", PROMPTS, 1, size=(64, 32), flat=True)
    square = write_choices(tmp_path / "square", PROMPTS, 1, size=(16, 16), flat=True)
    assert make_agent(NAME, choices=small).pairs().latents.shape == (2, 4, 8, 8)
    assert_same(make_agent(NAME, choices=wide).pairs().latents, make_agent(NAME, choices=square).pairs().latents)


@pytest.mark.slow
@both_diffusions
def test_learns_without_drawing(make_env: MakeEnv, make_agent: MakeAgent, choices: Path) -> None:
    agent = make_agent(NAME, choices=choices, n_gradient_steps=5, steps_per_iteration=2, batch_size=4)
    rows = listen(agent)
    before = weights(agent)
    agent.learn(100 * UPDATE)  # it does not matter
    assert not is_same(weights(agent), before)
    assert (agent.num_timesteps, agent.images_drawn, agent.iteration) == (0, 0, 3)
    assert [row["train/n_updates"] for row in rows] == [2, 4, 5]
    names = "preference_loss winner_reward loser_reward reward_margin implicit_accuracy winner_error loser_error"
    for row in rows:
        assert {f"train/{name}" for name in names.split()} <= row.keys()
        assert not any(name.startswith("rollout/") for name in row)
        assert all(np.isfinite(value) for value in row.values())
    assert agent.is_done(10**6)
    evaluated = evaluate(agent.policy, make_env(2), PROMPTS, 0)
    assert evaluated.kl.min() > 0


@pytest.mark.slow
def test_the_rate_falls_with_each_step(make_agent: MakeAgent, choices: Path) -> None:
    agent = make_agent(NAME, choices=choices, learning_rate=1.0, final_lr_fraction=0.2)
    taken = []
    take_step = agent.policy.optimizer.step

    def step() -> None:
        taken.append(agent.policy.optimizer.param_groups[0]["lr"])
        take_step()

    agent.policy.optimizer.step = step
    agent.learn(0)
    assert taken == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.slow
@both_diffusions
@pytest.mark.parametrize("how", ["save", "state_dict"])
def test_an_interrupted_fit_goes_on(
    how: str, make_env: MakeEnv, make_agent: MakeAgent, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"choices": choices, "n_gradient_steps": 7, "steps_per_iteration": 3, "batch_size": 4}
    whole = make_agent(NAME, **settings)
    whole.learn(0)
    agent = make_agent(NAME, **settings)

    def interrupt(self: Any, iteration: int) -> None:
        if iteration > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(agent), "dump_logs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            agent.learn(0)
    assert agent._n_updates == 6
    if how == "save":
        agent.save(tmp_path / "agent")
        loaded = DiffusionDPO.load(tmp_path / "agent", make_env(), device="cpu")
    else:
        loaded = make_agent(NAME, **settings, seed=77)  # the state has the seed too
        loaded.load_state_dict(copy.deepcopy(agent.state_dict()))
    loaded.learn(0, reset_num_timesteps=False)
    assert loaded._n_updates == 7
    assert_same(weights(loaded), weights(whole))
    assert_same(loaded.state_dict(), whole.state_dict())


@pytest.mark.slow
def test_micro_batches_change_nothing(make_agent: MakeAgent, choices: Path) -> None:
    learned = []
    for size in (None, 1, "auto"):
        agent = make_agent(NAME, choices=choices, micro_batch_size=size, learning_rate=1.0, max_grad_norm=1e9)
        use_sgd(agent)
        agent.n_gradient_steps = 1
        before = flat_weights(agent)
        agent.learn(0)
        learned.append(flat_weights(agent) - before)
    for moved in learned[1:]:
        assert (moved - learned[0]).abs().max() < 1e-3 * learned[0].abs().max()


@pytest.mark.slow
def test_other_choices_than_before_are_refused(make_agent: MakeAgent, choices: Path) -> None:
    agent = make_agent(NAME, choices=choices, n_gradient_steps=2)
    agent.learn(0)
    state = copy.deepcopy(agent.state_dict())
    lines = choices.read_text().splitlines(keepends=True)
    skipped = json.dumps(json.loads(lines[0]) | {"preferred": None, "reason": "skip"}) + "\n"

    def go_on() -> None:
        other = make_agent(NAME, choices=choices, n_gradient_steps=4)
        other.load_state_dict(state)
        other.learn(0, reset_num_timesteps=False)

    choices.write_text("".join([*lines, skipped]))  # nothing is learned from it
    go_on()
    for changed in (lines[:-1], [*lines[1:], lines[0]], [lines[0].replace(PROMPTS[0], "a dog"), *lines[1:]]):
        choices.write_text("".join(changed))
        with pytest.raises(ValueError, match=r"the choices in '.*choices.jsonl' are not those .* began with: bring"):
            go_on()
    choices.write_text("".join(lines))
    image = choices.parent / json.loads(lines[0])["images"][0]
    image.write_bytes((choices.parent / json.loads(lines[0])["images"][1]).read_bytes())
    with pytest.raises(ValueError, match="are not those that this training began with"):
        go_on()
    anew = make_agent(NAME, choices=choices, n_gradient_steps=4)
    anew.load_state_dict(state)
    anew.learn(0)  # a new training may have others
    assert anew._n_updates == 4


def test_a_trained_agent_needs_no_file(make_env: MakeEnv, make_agent: MakeAgent, choices: Path, tmp_path: Path) -> None:
    agent = make_agent(NAME, choices=choices, n_gradient_steps=1)
    agent.learn(0)
    agent.save(tmp_path / "agent")
    choices.unlink()
    loaded = DiffusionDPO.load(tmp_path / "agent", make_env(), device="cpu")
    assert_same(weights(loaded), weights(agent))
    with pytest.raises(FileNotFoundError, match="there is no file of choices at"):
        loaded.learn(0, reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("change_line", "error", "message"),
    [
        ({"preferred": 2}, ValueError, "line 1 of .*: 'preferred' must be 0 for the first image"),
        ({"images": ["none.png", "0-1.png"]}, FileNotFoundError, "line 1 of .*: there is no image"),
        ({"images": ["choices.jsonl", "0-1.png"]}, ValueError, "line 1 of .*: the image .* cannot be read"),
        ({"preferred": None, "reason": "tie"}, ValueError, "no choice in .* prefers an image"),
    ],
    ids=str,
)
def test_bad_files(
    change_line: dict[str, Any], error: type[Exception], message: str, make_agent: MakeAgent, tmp_path: Path
) -> None:
    file = write_choices(tmp_path, PROMPTS, 1)
    file.write_text(json.dumps(json.loads(file.read_text()) | change_line) + "\n")
    with pytest.raises(error, match=message):
        make_agent(NAME, choices=file).learn(0)


def test_bad_arguments(make_agent: MakeAgent) -> None:
    for kwargs, message in (
        ({"beta": 0.0}, "beta must be a number above 0"),
        ({"sdpo_mu": 1.5}, r"sdpo_mu must lie in \[0, 1\]"),
        ({"sdpo_mu": 0.9}, "sdpo_mu=0.9 has no effect without the safeguard: set sdpo=True"),
        ({"group_size": 1}, "group_size must be an integer of at least 2"),
        ({"n_gradient_steps": 0}, "n_gradient_steps must be an integer of at least 1"),
        ({"steps_per_iteration": 0}, "steps_per_iteration must be an integer of at least 1"),
        ({"choices": " "}, "the file of choices must be a path that is not blank"),
        ({"group_size": 3}, "the 4 images of an iteration cannot be split into groups of 3; choose a group_size that"),
    ):
        with pytest.raises(ValueError, match=message):
            make_agent(NAME, **kwargs)


def test_choices_need_no_whole_groups(make_agent: MakeAgent, choices: Path) -> None:
    assert make_agent(NAME, choices=choices, group_size=3).images_per_iteration % 3


# --- Where it goes


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_the_optimum_of_gaussian_data() -> None:
    """With x_0 ~ N(0, 1) and choices by sigmoid(x_w - x_l), a shift of the output explains them exactly.

    The errors of both images have the same variance, so a shift d of eps makes the margin
    -beta d (s / n) n^2 (x_w - x_l) for x_t = s x_0 + n eps. It is x_w - x_l at d = -1 / (beta s n).
    """
    env = gymnasium.make_vec(
        "DPOK-Mixture-v0",
        num_envs=8,
        model="mixture-1d",
        prompts=["one gaussian"],
        reward="mixture-linear",
        num_inference_steps=5,
        device="cpu",
    )
    beta, n_pairs = 10.0, 50_000
    agent: Any = DiffusionDPO(
        env=env,
        choices="none.jsonl",
        beta=beta,
        batch_size=2048,
        n_gradient_steps=400,
        learning_rate=1e-2,
        final_lr_fraction=0.02,
        micro_batch_size=None,
        policy_kwargs={"max_batch_size": None},
        seed=0,
        device="cpu",
    )
    mixture = agent.process.model.mixtures["one gaussian"]
    mean, variance = mixture.means.item(), mixture.variances.item()
    rng = np.random.default_rng(0)
    latents = rng.normal(mean, variance**0.5, (n_pairs, 2))
    prefers_first = rng.random(n_pairs) < 1 / (1 + np.exp(latents[:, 1] - latents[:, 0]))
    rows = np.arange(2 * n_pairs).reshape(-1, 2)
    rows[~prefers_first] = rows[~prefers_first, ::-1]
    flat = torch.from_numpy(latents.reshape(-1, *agent.process.model.latent_shape)).float()
    agent._pairs = Pairs(flat, torch.from_numpy(rows), ["one gaussian"] * n_pairs)
    agent.learn(0)
    table = agent.process.table
    for t in (1, 2, 3):  # at the first step the signal is 0.07, at the last one the noise is hardly there
        signal, noise = table.signal[t].item(), table.noise[t].item()
        clean = torch.from_numpy(rng.normal(mean, variance**0.5, (500, 1, 1, 1))).float()
        state = agent.process.state(
            signal * clean + noise * torch.randn_like(clean), t, agent.process.encode(["one gaussian"] * 500)
        )
        with torch.no_grad():
            moved = agent.policy.predict_output(state) - agent.policy.predict_output(state, reference=True)
        expected = -(signal**2 * variance + noise**2) / (beta * signal * noise)
        assert moved.mean().item() == pytest.approx(expected, rel=0.15), t


@pytest.mark.slow
def test_pairs_of_its_own_images_raise_the_reward(fresh_models: Callable[[], None]) -> None:
    """Three iterations of 64 images; a larger beta stays nearer to the pre-trained model."""
    found = {}
    for beta in (20.0, 200.0):
        fresh_models()
        env = gymnasium.make_vec(
            "DPOK-Mixture-v0",
            num_envs=64,
            model="mixture-1d",
            prompts=["one gaussian"],
            reward="mixture-linear",
            num_inference_steps=5,
            device="cpu",
        )
        agent: Any = DiffusionDPO(
            env=env,
            beta=beta,
            group_size=4,
            steps_per_iteration=10,
            learning_rate=3e-3,
            micro_batch_size=None,
            policy_kwargs={"max_batch_size": None},
            seed=0,
            device="cpu",
        )
        before = evaluate(agent.policy, env, ["one gaussian"] * 256, 0)
        agent.learn(3 * 64 * 5)
        after = evaluate(agent.policy, env, ["one gaussian"] * 256, 0)
        found[beta] = after.mean_reward - before.mean_reward, after.kl.mean()
    assert found[20.0][0] > found[200.0][0] > 0.3
    assert found[20.0][1] > found[200.0][1]
