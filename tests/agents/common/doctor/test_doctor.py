"""The check-up: a sound training passes, and each kind of broken one fails where it is broken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import PolicyGradient, diagnose
from agents.common.doctor import Finding
from agents.common.doctor.learning import _check_direction, check_reward_change
from tests.agents.algorithms.support import ALGORITHMS, Brightness
from tests.agents.common.support import snapshot
from tests.support import always_nan, assert_same, redness

MakeAgent = Callable[..., Any]


def check_up(agent: Any, **kwargs: Any) -> dict[str, Finding]:
    """Returns the findings of a small check-up by name."""
    return {finding.name: finding for finding in diagnose(agent, **{"n_images": 4} | kwargs)}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.status == "failed"}


def test_a_sound_training(make_agent: MakeAgent) -> None:
    findings = check_up(make_agent(learning_rate=1e-3), total_images=400, eval_images=8)
    assert failed(findings) == set()
    for name in ("reward: finite", "reward: repeatable", "images equal the pipeline's", "first ratio", "first KL"):
        assert findings[name].status == "ok"
    for name in ("first ratio in bfloat16", "first KL in bfloat16", "gradient", "direction of a step"):
        assert findings[name].status == "ok"
    assert "for 400 images" in findings["throughput"].measured
    assert all(finding.measured and finding.normal for finding in findings.values())


def test_the_agent_stays_as_it_was(make_agent: MakeAgent) -> None:
    """Weights, optimiser, counters and statistics; so a training after a check-up is that without one."""
    agent, other = (make_agent(normalize_rewards=True) for _ in range(2))
    for each in (agent, other):
        each.learn(12)
    before, attributes, numbers = snapshot(agent), set(vars(agent)), torch.get_rng_state()
    state = agent.state_dict()["state"]
    assert "first KL" not in check_up(agent)  # something is learned already
    assert_same(snapshot(agent), before)
    assert_same(agent.state_dict()["state"], state)
    assert set(vars(agent)) == attributes
    assert torch.equal(torch.get_rng_state(), numbers)
    for each in (agent, other):
        each.learn(12, reset_num_timesteps=False)
    assert_same(snapshot(agent), snapshot(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm(name: str, make_env: Callable[..., Any], make_agent: MakeAgent) -> None:
    algorithm, kwargs = ALGORITHMS[name]
    agent = make_agent(make_env(reward=Brightness()), algorithm, **{"learning_rate": 1e-3} | kwargs)
    findings = check_up(agent)
    assert failed(findings) == set()
    assert ("first ratio" in findings) == isinstance(agent, PolicyGradient)
    assert {"first KL", "gradient", "direction of a step", "throughput"} <= findings.keys()


def constant(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.ones(len(images))


def random(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.rand(len(images))


def writing(images: Tensor, prompts: list[str]) -> Tensor:
    rewards = redness(images, prompts)
    images.zero_()
    return rewards


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (constant, "reward: varies within a prompt"),
        (random, "reward: repeatable"),
        (writing, "reward: leaves its images alone"),
        (always_nan, "reward: finite"),
    ],
)
def test_a_broken_reward(reward: Any, name: str, make_env: Callable[..., Any], make_agent: MakeAgent) -> None:
    findings = check_up(make_agent(make_env(reward=reward)))
    assert name in failed(findings)
    assert findings[name].advice
    if reward is always_nan:
        assert findings["learning"].status == "not checked"
    if reward is writing:
        assert failed(findings) == {name}


@pytest.mark.parametrize("name", ["DiffusionDPO", "SFT, KL-D"])
def test_an_algorithm_that_learns_from_none_of_the_rewards(
    name: str, make_env: Callable[..., Any], make_agent: MakeAgent
) -> None:
    """No pair of a winner and a loser; weights below 0."""
    algorithm, kwargs = ALGORITHMS[name]
    reward = constant if name == "DiffusionDPO" else lambda images, prompts: -torch.ones(len(images))
    findings = check_up(make_agent(make_env(reward=reward), algorithm, **kwargs))
    assert "learning" in failed(findings)
    assert findings["learning"].advice


def test_a_frozen_adapter(make_agent: MakeAgent) -> None:
    agent = make_agent()
    name, values = next(iter(agent.policy._named_denoiser_parameters().items()))
    values.requires_grad_(False)
    found = check_up(agent)["gradient"]
    assert found.status == "failed"
    assert name in found.measured


def test_a_step_uphill(make_agent: MakeAgent) -> None:
    """As a wrong sign of the learning rate would take."""
    agent = make_agent(policy_kwargs={"optimizer_kwargs": {"maximize": True}})
    assert "direction of a step" in failed(check_up(agent))


@pytest.mark.parametrize(
    ("gains", "is_half", "status"),
    [
        ([0.1, 0.3], False, "ok"),
        ([-0.5, 0.4], False, "failed"),
        ([-0.5, 0.4], True, "ok"),  # rounding explains it
        ([-0.5, -0.4], True, "failed"),
        ([-0.5], True, "ok"),  # one gain does not tell the rounding
    ],
)
def test_what_rounding_hides_of_a_step(gains: list[float], is_half: bool, status: str) -> None:
    gradients, moved = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([-1.0, -1.0])}
    found = _check_direction(gradients, moved, torch.tensor(gains, dtype=torch.float64), is_half)
    assert found.status == status
    assert ("half precision" in found.measured) == is_half


@pytest.mark.parametrize("learning_rate", [0.0, 30.0])
def test_a_learning_rate_of_another_size(learning_rate: float, make_agent: MakeAgent) -> None:
    assert "length of an update" in failed(check_up(make_agent(learning_rate=learning_rate)))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (0.0, "not checked"),  # no reward has changed
        (0.02, "not checked"),  # the noise hides it
        (-0.02, "not checked"),
        (0.3, "ok"),
        (-0.5, "warning"),  # surely a fall, but within the spread of the images
        (-1.5, "failed"),
        (None, "failed"),  # images are nan
    ],
)
def test_the_change_of_the_reward(change: float | None, status: str) -> None:
    before, noise = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).double()
    before = (before - before.mean()) / before.std()
    after = None if change is None else before + change + 0.3 * noise * bool(change)
    assert check_reward_change(before, after).status == status


def test_another_sampler_than_the_pipeline(make_env: Callable[..., Any], make_agent: MakeAgent) -> None:
    agent = make_agent(make_env())
    model = agent.process.model
    model.scheduler_config = {**model.scheduler_config, "prediction_type": "v_prediction"}
    assert failed(check_up(agent)) == {"images equal the pipeline's"}


def test_a_network_that_is_not_in_evaluation_mode(make_agent: MakeAgent) -> None:
    """Dropout, for example: the update does not see the policy that drew."""
    agent = make_agent()
    agent.process.model.denoiser.mid_block.register_forward_hook(
        lambda module, inputs, output: output * (1 + 0.1 * torch.rand(()))
    )
    assert {"first ratio", "first KL"} <= failed(check_up(agent))


def test_arguments(make_agent: MakeAgent) -> None:
    agent = make_agent()
    with pytest.raises(ValueError, match="n_images"):
        diagnose(agent, n_images=1)
    agent.env = None
    with pytest.raises(ValueError, match="no environment"):
        diagnose(agent)
