"""DRaFT: the gradient of the reward through the last denoising steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agents import TrainingWarning
from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import (
    UPDATE,
    EveryOtherFails,
    MakeAgent,
    N,
    T,
    change,
    collect,
    flat_weights,
    gradient,
    listen,
    take_batches,
    use_sgd,
    whole_batch,
)

MakeEnv = Callable[..., DenoisingVectorEnv]


@pytest.mark.slow
@pytest.mark.parametrize("n_last_steps", [1, 2, 3])
def test_draws_the_same_images_again(n_last_steps: int, make_agent: MakeAgent) -> None:
    agent = make_agent("DRaFT", n_last_steps=n_last_steps)
    batch = whole_batch(agent)
    assert batch.noise.shape == (N, n_last_steps, 4, 8, 8)
    buffer = agent.rollout_buffer
    assert torch.equal(batch.latents, buffer.latents[batch.image, T - n_last_steps])
    with torch.no_grad():
        loss, metrics = agent.loss(batch)
    torch.testing.assert_close(-loss, buffer.final_rewards[batch.image], rtol=1e-4, atol=1e-5)
    assert torch.equal(metrics["reward"], -loss)


@pytest.mark.slow
def test_more_steps_have_another_gradient(make_agent: MakeAgent) -> None:
    gradients = []
    for n_last_steps in (1, 2, 3):
        agent = make_agent("DRaFT", n_last_steps=n_last_steps)
        gradients.append(gradient(agent, whole_batch(agent)))
    for one, other in ((0, 1), (1, 2)):
        assert (gradients[one] - gradients[other]).norm() > 1e-3 * gradients[other].norm()


@pytest.mark.slow
def test_follows_the_reward(make_agent: MakeAgent) -> None:
    """A small step along its gradient raises the mean reward by as much as the gradient says."""
    agent = make_agent("DRaFT", learning_rate=300.0, batch_size=None, max_grad_norm=1e9)
    use_sgd(agent)
    change(agent)
    rows = listen(agent)
    collect(agent)
    # Twice in the same trajectories: the second pass starts from where the first step has led.
    for _ in range(2):
        with agent._logged_update(N):
            agent.train()
        agent.dump_logs(0)
    gain = rows[1]["train/reward"] - rows[0]["train/reward"]
    assert gain > 0
    assert gain == pytest.approx(300 * rows[0]["train/grad_norm"] ** 2, rel=0.05)


def test_each_image_is_learned_from_once(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    env = make_env(8, reward=EveryOtherFails(), non_finite="mask", decode_batch_size=8)
    agent = make_agent("DRaFT", env)
    batches = take_batches(agent, 8)
    assert [len(batch) for batch in batches] == [2, 2]
    assert sorted(int(image) for batch in batches for image in batch.image) == [0, 2, 4, 6]


@pytest.mark.slow
def test_a_whole_batch_may_be_missing(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    env = make_env(2, reward=EveryOtherFails(), non_finite="mask", decode_batch_size=2)
    agent = make_agent("DRaFT", env)
    agent.learn(UPDATE)
    assert agent._n_updates == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_last_steps", "message"),
    [
        (0, "an integer of at least 1, got 0"),
        (4, "from 1 to the 3 denoising steps, got 4"),
        (1.5, "an integer of at least 1, got 1.5"),
    ],
)
def test_bad_arguments(n_last_steps: Any, message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=f"n_last_steps must be {message}$"):
        make_agent("DRaFT", n_last_steps=n_last_steps)


@pytest.mark.slow
def test_needs_a_gradient(make_env: MakeEnv, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match="'jpeg-compressibility' has no gradient"):
        make_agent("DRaFT", make_env(reward="jpeg-compressibility"))


def test_running_normalisation_is_refused(make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match="leave normalize_rewards False"):
        make_agent("DRaFT", normalize_rewards=True)


@pytest.mark.slow
def test_ends_when_the_kl_is_spent(make_agent: MakeAgent) -> None:
    """With the latest weights whose images were near enough; it says so, and can go on from the state."""
    free = make_agent("DRaFT", max_kl=1e6)
    rows = listen(free)
    known = [flat_weights(free)]
    for _ in range(5):
        free.learn(UPDATE, reset_num_timesteps=False)
        known.append(flat_weights(free))
    measured = [row["train/kl_to_reference"] for row in rows]
    assert measured[0] == pytest.approx(0, abs=1e-6)
    assert sorted(measured) == measured
    budget = (measured[2] + measured[3]) / 2
    agent = make_agent("DRaFT", max_kl=budget)
    with pytest.warns(TrainingWarning, match=f"above max_kl={budget:.3g}: training ends here"):
        agent.learn(100 * UPDATE)
    assert agent.num_timesteps == 4 * UPDATE
    assert agent.is_done(100 * UPDATE)
    assert torch.equal(flat_weights(agent), known[2])
    other = make_agent("DRaFT", max_kl=budget)
    other.load_state_dict(agent.state_dict())
    other.learn(UPDATE, reset_num_timesteps=False)
    assert other.num_timesteps == 4 * UPDATE
    assert torch.equal(flat_weights(other), known[2])


@pytest.mark.slow
def test_the_measured_kl_is_that_of_the_steps_that_explore(make_agent: MakeAgent) -> None:
    agent = make_agent("DRaFT", max_kl=1e6)
    change(agent)
    rows = listen(agent)
    agent.learn(UPDATE)
    table, buffer = agent.process.table, agent.rollout_buffer
    expected = 0.0
    for t in range(T):
        if table.std[t] < 0.1 * table.std.max():
            continue
        reference, std = agent.policy.reference_transition(buffer.state_at(t))
        distance = (buffer.means[:, t] - reference).square().flatten(1).sum(1)
        expected += (distance / (2 * std**2)).mean().item()
    assert expected > 0
    assert rows[0]["train/kl_to_reference"] == pytest.approx(expected, rel=1e-4)
    assert not table.exploring.all()


@pytest.mark.slow
def test_a_kl_in_the_loss_holds_the_policy(make_agent: MakeAgent) -> None:
    kl = []
    for kl_coef in (0.0, 1.0):
        agent = make_agent("DRaFT", kl_coef=kl_coef, max_kl=1e6, learning_rate=3e-3)
        rows = listen(agent)
        agent.learn(6 * UPDATE)
        kl.append(rows[-1]["train/kl_to_reference"])
    assert kl[1] < 0.7 * kl[0]


@pytest.mark.slow
def test_a_kl_beside_gradient_checkpointing_is_refused(make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing cannot give beside a LoRA"):
        make_agent("DRaFT", kl_coef=0.1, policy_kwargs={"gradient_checkpointing": True})
    make_agent("DRaFT", kl_coef=0.1, policy_kwargs={"gradient_checkpointing": True, "lora_rank": 0})


@pytest.mark.parametrize("argument", [{"kl_coef": -1.0}, {"max_kl": 0.0}])
def test_bad_kl(argument: dict[str, float], make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(argument))} must be a number"):
        make_agent("DRaFT", **argument)
