"""Learning from the stochastic steps alone, on a UNet and on a flow-matching model.

Deterministic steps have no density: they are part of drawing an image, but nothing is learned from them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents import DPOK, GRPO
from agents.common.evaluation import evaluate
from dpok_gym import DenoisingVectorEnv, diffusion
from tests.agents.algorithms.support import (
    ALGORITHMS,
    POLICY_GRADIENTS,
    SCORE_FUNCTIONS,
    Brightness,
    collect,
    flat_weights,
    gradient,
    take_batches,
)
from tests.flow_model import FlowModel

#: Five steps, of which the second and the third are stochastic.
STEPS, WINDOW = 5, (1, 2)
INSIDE = [False, True, True, False, False]
#: The samplers of a flow-matching model, whole and in a window; with whether each of the steps is stochastic.
SAMPLERS: list[tuple[dict[str, Any], list[bool]]] = [
    ({"sampler": "ddim", "sde_steps": WINDOW}, INSIDE),
    ({"sampler": "flow-sde", "sde_steps": WINDOW}, INSIDE),
    ({"sampler": "cps"}, [True] * 4 + [False]),
    ({"sampler": "dance-sde"}, [True] * 5),
]


def flow_env(n: int = 4, **arguments: Any) -> DenoisingVectorEnv:
    settings: dict[str, Any] = {"prompts": ["dark", "bright"], "num_inference_steps": STEPS, "reward": Brightness()}
    return DenoisingVectorEnv(n, model=FlowModel(), **settings | arguments)


def unet_env(n: int = 4, **arguments: Any) -> DenoisingVectorEnv:
    settings = {"num_inference_steps": STEPS, "sde_steps": WINDOW, "prompts": ["a red circle", "a blue square"]}
    return DenoisingVectorEnv(n, device="cpu", **settings | arguments)


def make(name: str, env: Any, **changes: Any) -> Any:
    cls, kwargs = ALGORITHMS[name]
    common = {"learning_rate": 1e-2, "seed": 0, "device": "cpu", "policy_kwargs": {"critic_hidden": 8}}
    return cls(env=env, **common | kwargs | changes)


def check_first_update(agent: Any, stochastic: list[bool]) -> None:
    """Only stochastic steps are learned from; at the first update the ratio is 1, and the gradient is finite."""
    table = agent.process.table
    assert table.stochastic.tolist() == stochastic
    buffer = collect(agent)
    for index in range(STEPS):
        actions, means = buffer.latents[:, index + 1], buffer.means[:, index]
        assert torch.equal(actions, means) != stochastic[index]
        with torch.no_grad():
            mean, std = agent.policy.transition(buffer.state_at(index))
        assert torch.equal(mean, means)
        assert diffusion.log_ratio(actions, mean, means, std).exp().tolist() == [1.0] * len(actions)
    batches = take_batches(agent)
    assert not torch.cat([table.std[batch.step] == 0 for batch in batches]).any()
    for batch in batches:
        loss, metrics = agent.loss(batch)
        assert loss.isfinite().all()
        assert all(value.isfinite().all() for value in metrics.values())
        if "mean_ratio" in metrics:
            torch.testing.assert_close(metrics["mean_ratio"], torch.ones_like(metrics["mean_ratio"]), rtol=0, atol=1e-6)
        if agent.kl_coef:
            assert metrics["kl_to_reference"].abs().max() < 1e-6
        found = gradient(agent, batch)
        assert found.isfinite().all()
        assert found.any()


@pytest.mark.parametrize(("sampler", "stochastic"), SAMPLERS)
@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_first_update_on_a_flow_model(name: str, sampler: dict[str, Any], stochastic: list[bool]) -> None:
    changes = {} if name in SCORE_FUNCTIONS else {"batch_size": 5}
    check_first_update(make(name, flow_env(**sampler), **changes), stochastic)


@pytest.mark.parametrize("step_weighting", ["likelihood", "output"])
@pytest.mark.parametrize(("cls", "arguments"), [(DPOK, {}), (GRPO, {"group_size": 2, "timestep_fraction": 0.5})])
def test_first_update_on_the_embedded_unet(cls: Any, arguments: dict[str, Any], step_weighting: str) -> None:
    # One state in each call of the network, as its last bits depend on how many there are.
    policy_kwargs = {"max_batch_size": 1}
    agent = cls(
        env=unet_env(),
        step_weighting=step_weighting,
        batch_size=4,
        policy_kwargs=policy_kwargs,
        seed=0,
        device="cpu",
        **arguments,
    )
    check_first_update(agent, INSIDE)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns_on_a_flow_model(name: str) -> None:
    agent = make(name, flow_env(8, sde_steps=WINDOW))
    before = flat_weights(agent)
    agent.learn(2 * 8 * STEPS)
    after = flat_weights(agent)
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in POLICY_GRADIENTS])
def test_algorithms_that_learn_from_images_need_no_noise(name: str) -> None:
    agent = make(name, flow_env(8, sampler="ode"))
    before = flat_weights(agent)
    agent.learn(2 * 8 * STEPS)
    assert not torch.equal(before, flat_weights(agent))
    assert flat_weights(agent).isfinite().all()


@pytest.mark.parametrize("sampler", [{"sampler": "ddim", "sde_steps": (0, 2)}, {"sampler": "flow-sde"}])
def test_the_reward_rises_on_a_flow_model(sampler: dict[str, Any]) -> None:
    env = flow_env(64, **sampler)
    agent = DPOK(env=env, learning_rate=3e-2, kl_coef=1e-3, batch_size=64, use_critic=False, seed=0, device="cpu")
    before = evaluate(agent.policy, env, ["dark", "bright"] * 32, seed=0).reward.mean()
    agent.learn(10 * 64 * STEPS)
    after = evaluate(agent.policy, env, ["dark", "bright"] * 32, seed=0)
    assert after.reward.mean() > before + 0.1
    # The KL counts the steps that explore; what happened at the others is in the drift of the outputs.
    assert np.isfinite(after.step_kl).all()
    assert (after.step_kl.sum(axis=0) > 0).tolist() == env.process.table.stochastic.tolist()
    assert after.late_drift > 0


def test_the_kl_counts_the_stochastic_steps() -> None:
    """The logged KL is the sum over an image's steps, though only two of five are trained on."""
    agent = make("DPOK, late steps held", flow_env(sde_steps=WINDOW))
    agent.batch_size = None
    (batch,) = take_batches(agent, 4)
    with torch.no_grad():
        for values in agent.policy.denoiser_parameters():
            values.add_(0.1)
        mean, std = agent.policy.transition(batch.state)
        reference, _ = agent.policy.reference_transition(batch.state)
        kl = diffusion.kl_divergence(mean, reference, std)
        metrics = agent.kl_metrics(batch, mean, reference, std)
    assert len(batch) == 8  # two steps of four images
    per_image = kl.sum() / 4
    torch.testing.assert_close(metrics["kl_to_reference"].mean(), per_image)


def test_weights_of_the_steps() -> None:
    agent = make("DPOK", flow_env(sde_steps=WINDOW), skip_last_steps="auto", target_kl=None)
    assert (agent.step_weights > 0).tolist() == INSIDE
    assert agent.step_weights.sum().item() == pytest.approx(2)
    assert (agent.kl_step_weights > 0).tolist() == INSIDE
    assert (agent.step_importance() > 0).tolist() == INSIDE
    # The last step is clean and the one before it hardly explores, so the KL holds the latter.
    agent = make("DPOK", flow_env(), skip_last_steps="auto", target_kl=None)
    assert agent.process.table.exploring.tolist() == [True] * 3 + [False] * 2
    assert (agent.step_weights > 0).tolist() == [True] * 3 + [False] * 2
    assert (agent.kl_step_weights > 0).tolist() == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("sampler", "arguments", "message"),
    [
        ({"sampler": "ode"}, {}, "no denoising step adds noise \\(sampler='ode', eta=0.0\\), so none has a density"),
        ({"eta": 0.0}, {}, "no denoising step adds noise \\(sampler='ddim', eta=0.0\\), so none has a density"),
        ({"sde_steps": (2, 2)}, {"skip_last_steps": 3}, "leaves out all stochastic steps, the last of which is step 3"),
    ],
)
def test_nothing_to_learn_from(sampler: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("GRPO", flow_env(**sampler), **arguments)


@torch.no_grad()
def test_the_policy_as_others_see_it() -> None:
    """At a deterministic step, actions have no log-probability and no entropy."""
    env = flow_env(2, sde_steps=WINDOW)
    agent = make("DPOK", env, use_critic=False)
    observation, _ = env.reset(seed=0)
    for index in range(STEPS):
        obs = {name: torch.as_tensor(values) for name, values in observation.items()}
        actions, _, log_prob = agent.policy(obs)
        _, again, entropy = agent.policy.evaluate_actions(obs, actions)
        assert log_prob.any() == entropy.any() == INSIDE[index]
        torch.testing.assert_close(again, log_prob)
        observation, *_ = env.step(actions.numpy())
