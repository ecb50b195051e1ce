"""What the algorithms share that learn from a fixed set of the pre-trained model's images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import ForwardProcess
from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import (
    FORWARD_PROCESSES,
    PROMPTS,
    UPDATE,
    Brightness,
    MakeAgent,
    N,
    T,
    change,
    flat_weights,
    is_same,
    listen,
    take_batches,
    weights,
)
from tests.support import assert_same

MakeEnv = Callable[..., DenoisingVectorEnv]


@pytest.mark.slow
def test_images_are_the_reference_models(make_agent: MakeAgent) -> None:
    """Drawn once, with guidance and noise as any images: they do not change with what is learned."""
    agent = make_agent("RWR", n_gradient_steps=1)
    agent.learn(2 * UPDATE)
    assert agent.image_latents.shape == (2 * N, 4, 8, 8)
    assert len(agent.image_prompts) == 2 * N
    assert set(agent.image_prompts) == set(PROMPTS)
    images = agent.process.model.decode(agent.image_latents)
    torch.testing.assert_close(Brightness()(images, agent.image_prompts), agent.image_rewards)
    changed = make_agent("RWR", n_gradient_steps=1)
    change(changed)
    changed.learn(2 * UPDATE)
    assert_same(changed.image_latents, agent.image_latents)
    assert not is_same(weights(changed), weights(agent))


def test_noise_is_that_of_the_forward_process(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """x_t = signal x_0 + noise eps with standard normal eps, at steps that are all equally likely."""
    agent = make_agent("RWR", batch_size=400, n_gradient_steps=2, log_every=2)
    first, second = take_batches(agent)
    table = agent.process.table
    signal, noise = table.signal[first.step][:, None, None, None], table.noise[first.step][:, None, None, None]
    eps = (first.noisy - signal * first.latents) / noise
    assert eps.mean().item() == pytest.approx(0, abs=0.01)
    assert eps.std().item() == pytest.approx(1, abs=0.01)
    assert (first.step.bincount(minlength=T) / 400).tolist() == pytest.approx([1 / T] * T, abs=0.08)
    assert not torch.equal(first.noisy, second.noisy)
    assert not torch.equal(first.step, second.step)


def test_a_batch_has_the_prompts_of_its_images(make_agent: MakeAgent) -> None:
    agent = make_agent("RWR", batch_size=20)
    batch = take_batches(agent)[0]
    conditioning = batch.state.conditioning
    for row in range(20):
        image = int((agent.image_latents == batch.latents[row]).flatten(1).all(1).nonzero())
        expected = agent.process.encode([agent.image_prompts[image]])
        assert_same(
            {name: values[row] for name, values in conditioning.items()}, {k: v[0] for k, v in expected.items()}
        )


def test_without_a_batch_size_each_image_comes_once(make_agent: MakeAgent) -> None:
    agent = make_agent("RWR", batch_size=None, n_gradient_steps=2, log_every=2)
    orders = []
    for batch in take_batches(agent):
        orders.append([int((agent.image_latents == x).flatten(1).all(1).nonzero()) for x in batch.latents])
    assert [sorted(order) for order in orders] == [list(range(N))] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FORWARD_PROCESSES)
def test_learns_without_guidance(name: str, make_env: MakeEnv, make_agent: MakeAgent) -> None:
    """The images are drawn with it, and the loss is the one that diffusion models are trained with."""
    agent = make_agent(name, make_env(guidance_scale=3.0))
    scales = []
    predict = agent.process.predict

    def record(state: Any, guidance_scale: float | None = None, *args: Any) -> Tensor:
        if torch.is_grad_enabled():
            scales.append(guidance_scale)
        return predict(state, guidance_scale, *args)

    agent.process.predict = record
    agent.learn(UPDATE)
    assert scales == [1.0] * agent.n_gradient_steps


@pytest.mark.slow
def test_the_rate_falls_with_each_step_of_a_fit(make_agent: MakeAgent) -> None:
    agent = make_agent("SFT, KL-D", learning_rate=1.0, final_lr_fraction=0.2)  # four steps, logged after three
    taken = []
    take_step = agent.policy.optimizer.step

    def step() -> None:
        taken.append(agent.policy.optimizer.param_groups[0]["lr"])
        take_step()

    agent.policy.optimizer.step = step
    agent.learn(UPDATE)
    assert taken == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.slow
def test_more_images_are_fitted_too(make_agent: MakeAgent) -> None:
    """All images, old and new, for ``n_gradient_steps`` more."""
    agent = make_agent("RWR")
    agent.learn(UPDATE)
    first = agent.image_latents.clone()
    before = weights(agent)
    agent.learn(UPDATE, reset_num_timesteps=False)
    assert len(agent.image_prompts) == len(agent.image_rewards) == 2 * N
    assert_same(agent.image_latents[:N], first)
    assert agent._n_updates == 2 * agent.n_gradient_steps
    assert agent.is_done(2 * UPDATE)
    assert not is_same(weights(agent), before)


@pytest.mark.slow
def test_to_learn_anew_forgets_the_images(make_agent: MakeAgent) -> None:
    agent = make_agent("RWR")
    agent.learn(UPDATE)
    first = agent.image_latents.clone()
    agent.learn(UPDATE)
    assert len(agent.image_prompts) == N
    assert agent._n_updates == agent.n_gradient_steps
    assert not is_same(agent.image_latents, first)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [("BestOfN", "save"), ("SFT, KL-D", "state_dict")])
def test_an_interrupted_fit_goes_on(
    name: str, how: str, make_env: MakeEnv, make_agent: MakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = make_agent(name, n_gradient_steps=9)
    uninterrupted.learn(UPDATE)
    uninterrupted.learn(UPDATE, reset_num_timesteps=False)
    agent = make_agent(name, n_gradient_steps=9)
    agent.learn(UPDATE)  # iteration 1 draws, 2 to 4 take three steps each

    def interrupt(self: Any, iteration: int) -> None:
        if iteration > 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(agent), "dump_logs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            agent.learn(UPDATE, reset_num_timesteps=False)
    assert agent._n_updates == 15
    assert not agent.is_done(2 * UPDATE)
    if how == "save":
        agent.save(tmp_path / "agent")
        loaded = type(agent).load(tmp_path / "agent", make_env(), device="cpu")
    else:
        loaded = make_agent(name, n_gradient_steps=9)
        loaded.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert_same(loaded.image_latents, agent.image_latents)
    assert loaded.image_prompts == agent.image_prompts
    loaded.learn(0, reset_num_timesteps=False)
    assert loaded._n_updates == 18
    assert loaded.num_timesteps == 2 * UPDATE
    assert_same(weights(loaded), weights(uninterrupted))


@pytest.mark.slow
def test_a_state_is_not_changed_by_what_comes_later(make_agent: MakeAgent) -> None:
    """Weights are shared, as with torch's modules; lists and images are not."""
    agent = make_agent("RWR")
    agent.learn(UPDATE)
    state = agent.state_dict()
    agent.learn(UPDATE, reset_num_timesteps=False)
    assert len(state["tensors"]["images"]["latents"]) == N
    assert len(state["state"]["algorithm_state"]["image_prompts"]) == N


def test_images_without_weight_are_left_out(make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent("RWR", batch_size=30)
    monkeypatch.setattr(agent, "image_weights", lambda rewards, prompts: torch.tensor([0.0, 1.0, 0.0, 2.0]))
    learned = set()
    for batch in take_batches(agent):
        for latents, weight in zip(batch.latents, batch.weight.tolist(), strict=True):
            learned.add((int((agent.image_latents == latents).flatten(1).all(1).nonzero()), weight))
    assert learned == {(1, 1.0), (3, 2.0)}


def test_nothing_to_learn_from(make_agent: MakeAgent) -> None:
    agent = make_agent("SFT, KL-D", gamma_kl=0.0)
    agent.image_weights = lambda rewards, prompts: torch.zeros_like(rewards)
    with pytest.raises(ValueError, match="none of the 4 images has a positive weight"):
        agent.learn(UPDATE)


@pytest.mark.slow
def test_a_callback_can_stop_the_drawing(make_agent: MakeAgent) -> None:
    """Then no step is taken; to go on draws what is missing first."""
    agent = make_agent("RWR")
    calls: list[int] = []

    def stop(local: dict[str, Any], other: dict[str, Any]) -> bool:
        calls.append(1)
        return len(calls) < T + 2  # amid the second iteration

    agent.learn(2 * UPDATE, callback=stop)
    assert len(agent.image_prompts) == N
    assert agent.num_timesteps == UPDATE
    assert agent._n_updates == 0
    agent.learn(UPDATE, reset_num_timesteps=False)
    uninterrupted = make_agent("RWR")
    uninterrupted.learn(2 * UPDATE)
    assert_same(agent.image_latents, uninterrupted.image_latents)
    assert_same(weights(agent), weights(uninterrupted))


@pytest.mark.slow
def test_rows_of_the_log(make_agent: MakeAgent) -> None:
    """One for each iteration of drawing, then one for every ``log_every`` steps, and one for the rest."""
    agent = make_agent("RWR", n_gradient_steps=8, log_every=3)
    rows = listen(agent)
    agent.learn(2 * UPDATE)
    assert ["train/denoising_loss" in row for row in rows] == [False, False, True, True, True]
    assert [row["train/n_updates"] for row in rows[2:]] == [3, 6, 8]
    assert all(row["train/denoising_loss"] > 0 for row in rows[2:])


@pytest.mark.slow
def test_the_loss_falls(make_env: MakeEnv) -> None:
    """A fit to one image lowers the error of the output on it."""

    class Plain(ForwardProcess):
        def image_weights(self, rewards: Tensor, prompts: list[str]) -> Tensor:
            return torch.ones_like(rewards)

    agent: Any = Plain(
        env=make_env(1, prompts=PROMPTS[:1]),
        n_gradient_steps=40,
        log_every=5,
        batch_size=8,
        learning_rate=1e-3,
        seed=0,
        device="cpu",
        policy_kwargs={"lora_rank": 0},
    )
    rows = listen(agent)
    before = flat_weights(agent)
    agent.learn(T)
    losses = [row["train/denoising_loss"] for row in rows[1:]]
    assert np.mean(losses[-2:]) < 0.9 * losses[0]
    assert not torch.equal(flat_weights(agent), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORWARD_PROCESSES)
@pytest.mark.parametrize("argument", ["n_gradient_steps", "log_every", "batch_size"])
def test_bad_arguments(name: str, argument: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be an integer of at least 1, got 0"):
        make_agent(name, **{argument: 0})
