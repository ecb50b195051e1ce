"""Reward-weighted SFT: its weights and its two regularisations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import DIMS, UPDATE, MakeAgent, change, listen, take_batches, whole_batch

MakeEnv = Callable[..., DenoisingVectorEnv]

REWARDS, TEXTS = torch.tensor([-2.0, 0.5, 1.0, 3.0]), ["a", "a", "b", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"regularization": "KL-D", "gamma_kl": 0.5}, [0.0, 1.0, 1.5, 3.5]),
        ({"regularization": "KL-O", "gamma_kl": 0.5}, [0.0, 0.5, 1.0, 3.0]),
        ({"regularization": "none", "gamma_kl": 0.5}, [0.0, 0.5, 1.0, 3.0]),
        # The means of the prompts are -0.75 and 2.
        ({"regularization": "KL-D", "gamma_kl": 0.5, "center_rewards": True}, [0.0, 1.75, 0.0, 1.5]),
        ({"regularization": "none", "center_rewards": True}, [0.0, 1.25, 0.0, 1.0]),
    ],
    ids=str,
)
def test_weights_by_hand(kwargs: dict[str, Any], expected: list[float], make_agent: MakeAgent) -> None:
    agent = make_agent("SFT, KL-D", **kwargs)
    assert agent.image_weights(REWARDS, TEXTS).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize(("regularization", "expected"), [("KL-D", {1, 3}), ("none", {1, 3}), ("KL-O", {0, 1, 2, 3})])
def test_which_images_are_learned_from(
    regularization: str, expected: set[int], make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL-O holds the model to the pre-trained one on those without a reward, too."""
    agent = make_agent("SFT, KL-D", regularization=regularization, gamma_kl=0.0, batch_size=30)
    monkeypatch.setattr(agent, "image_weights", lambda rewards, prompts: torch.tensor([0.0, 1.0, 0.0, 2.0]))
    learned = set()
    for batch in take_batches(agent):
        for latents, weight in zip(batch.latents, batch.weight.tolist(), strict=True):
            learned.add((int((agent.image_latents == latents).flatten(1).all(1).nonzero()), weight))
    assert learned == {(row, [0.0, 1.0, 0.0, 2.0][row]) for row in expected}


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
@torch.no_grad()
def test_the_loss_is_the_weighted_error_of_the_output(
    prediction: str, make_env: MakeEnv, make_agent: MakeAgent, tiny_v_folder: Path
) -> None:
    env = make_env() if prediction == "noise" else make_env(model=str(tiny_v_folder))
    agent = make_agent("SFT, KL-O", env, gamma_kl=2.0)
    batch = whole_batch(agent)
    batch.weight = torch.tensor([1.0, 0.0, 2.0, 3.0])
    change(agent)
    table = agent.process.table
    signal, noise = table.signal[batch.step][:, None, None, None], table.noise[batch.step][:, None, None, None]
    eps = (batch.noisy - signal * batch.latents) / noise
    target = eps if prediction == "noise" else signal * eps - noise * batch.latents
    output = agent.policy.predict_output(batch.state, guidance_scale=1.0)
    reference = agent.policy.predict_output(batch.state, reference=True, guidance_scale=1.0)
    assert not torch.allclose(output, reference, atol=1e-3)
    mse = (output - target).square().sum((1, 2, 3)) / DIMS
    pull = (output - reference).square().sum((1, 2, 3)) / DIMS
    loss, metrics = agent.loss(batch)
    torch.testing.assert_close(loss, batch.weight * mse + 2 * pull, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(metrics["denoising_loss"], mse, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_kl_o_keeps_the_model_nearer(make_agent: MakeAgent) -> None:
    distances = []
    for gamma in (0.0, 30.0):
        agent = make_agent("SFT, KL-O", gamma_kl=gamma, n_gradient_steps=12)
        agent.learn(UPDATE)
        batch = take_batches(agent)[0]
        with torch.no_grad():
            output = agent.policy.predict_output(batch.state, guidance_scale=1.0)
            reference = agent.policy.predict_output(batch.state, reference=True, guidance_scale=1.0)
        distances.append(float((output - reference).square().mean()))
    assert distances[0] > 0
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.slow
def test_only_kl_o_asks_the_reference(make_agent: MakeAgent) -> None:
    passes = {}
    for regularization in ("KL-D", "KL-O", "none"):
        agent = make_agent("SFT, KL-D", regularization=regularization)
        listen(agent)
        before = agent.process.num_function_evaluations
        agent.learn(UPDATE)
        passes[regularization] = agent.process.num_function_evaluations - before
    assert passes == {"KL-D": UPDATE + 12, "none": UPDATE + 12, "KL-O": UPDATE + 24}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"regularization": "KL"}, "regularization must be one of 'KL-D', 'KL-O', 'none'"),
        ({"gamma_kl": float("nan")}, "gamma_kl must be a number of at least 0"),
        ({"gamma_kl": -1.0}, "gamma_kl must be a number of at least 0"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent("SFT, KL-D", **kwargs)
