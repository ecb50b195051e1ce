"""The state of an agent: plain tensors and JSON, from which another agent goes on to the same bits."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import DDPO, DPOK, GRPO, DiffusionNFT, RewardWeightedSFT
from tests.agents.common.support import snapshot
from tests.support import assert_same

N, T = 4, 3
UPDATE = N * T

#: Agents with every kind of state.
AGENTS: dict[str, dict[str, Any]] = {
    "critic and controller": {"algorithm": DPOK, "target_kl": 0.1, "normalize_rewards": True},
    "network critic": {"algorithm": DPOK, "critic_kind": "network"},
    "whole denoiser": {"algorithm": GRPO, "group_size": 2, "policy_kwargs": {"lora_rank": 0}},
    "statistics by prompt": {"algorithm": DDPO, "batch_size": 5, "min_count": 2},
    "other optimiser": {
        "algorithm": DDPO,
        "policy_kwargs": {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
    },
    "old policy": {"algorithm": DiffusionNFT, "group_size": 2, "batch_size": 5},
    "images": {"algorithm": RewardWeightedSFT, "n_gradient_steps": 2, "batch_size": 3},
}


def saved_state(agent: Any) -> dict[str, Any]:
    """Returns a copy of the state as files keep it."""
    state = copy.deepcopy(agent.state_dict())
    return {"tensors": state["tensors"], "state": json.loads(json.dumps(state["state"]))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", AGENTS)
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "new"])
def test_the_state_is_tensors_and_json(make_agent: Callable[..., Any], kind: str, is_trained: bool) -> None:
    agent = make_agent(seed=np.int64(3), **AGENTS[kind])
    if is_trained:
        agent.learn(UPDATE)
    saved = agent.state_dict()
    assert saved.keys() == {"tensors", "state"}
    assert json.loads(json.dumps(saved["state"], allow_nan=False)) == saved["state"]
    groups = {"denoiser" if kind == "whole denoiser" else "lora", "optimizer"}
    groups |= {"critic"} if "critic" in kind else set()
    groups |= {"images"} if kind == "images" else set()
    groups |= {"old"} if kind == "old policy" else set()
    assert saved["tensors"].keys() == groups
    for tensors in saved["tensors"].values():
        for name, value in tensors.items():
            assert isinstance(name, str)
            assert isinstance(value, Tensor)
            assert not value.requires_grad
    assert bool(saved["tensors"]["optimizer"]) == is_trained
    expected = {"iteration": 0, "images_drawn": 0, "num_timesteps": 0, "n_updates": 0, "run_seed": 3}
    if is_trained:
        n_updates = agent._n_updates
        assert n_updates >= 1
        iteration = 2 if kind == "images" else 1
        expected |= {"iteration": iteration, "images_drawn": N, "num_timesteps": UPDATE, "n_updates": n_updates}
    assert expected.items() <= saved["state"].items()


@pytest.mark.slow
@pytest.mark.parametrize("kind", AGENTS)
def test_another_agent_goes_on_to_the_same_bits(make_agent: Callable[..., Any], kind: str) -> None:
    first = make_agent(**AGENTS[kind])
    first.learn(UPDATE)
    saved = saved_state(first)
    second = make_agent(**AGENTS[kind] | {"seed": 17})
    second.learn(UPDATE)  # of which nothing is left
    second.load_state_dict(saved)
    assert_same(second.state_dict(), saved)
    agents = [first, second]
    for agent in agents:
        agent.learn(UPDATE, reset_num_timesteps=False)
    assert_same(snapshot(second), snapshot(first))
    assert_same(second.state_dict()["state"], first.state_dict()["state"])
    assert any(
        not torch.equal(value, saved["tensors"]["optimizer"][name]) for name, value in optimizer_of(first).items()
    )


def optimizer_of(agent: Any) -> dict[str, Tensor]:
    return agent.state_dict()["tensors"]["optimizer"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["critic and controller", "network critic", "whole denoiser", "images"])
def test_agents_of_one_state_do_not_share_it(make_agent: Callable[..., Any], kind: str) -> None:
    first, second = make_agent(**AGENTS[kind]), make_agent(**AGENTS[kind])
    first.learn(UPDATE)
    second.load_state_dict(first.state_dict())
    expected = snapshot(second)
    first.learn(UPDATE)
    assert_same(snapshot(second), expected)


@pytest.mark.slow
def test_the_logged_mean_reward_goes_on(make_agent: Callable[..., Any]) -> None:
    first, second = (make_agent(stats_window_size=6) for _ in range(2))
    first.learn(2 * UPDATE)
    second.load_state_dict(saved_state(first))
    windows: list[list[list[float]]] = [[], []]
    for agent, window in zip((first, second), windows, strict=True):
        window.append([episode["r"] for episode in agent.ep_info_buffer])
        agent.learn(UPDATE, reset_num_timesteps=False)
        window.append([episode["r"] for episode in agent.ep_info_buffer])
    assert windows[0] == windows[1]
    assert len(windows[0][0]) == len(windows[0][-1]) == 6
    assert windows[0][0] != windows[0][-1]


# --- States that do not fit


def test_a_state_of_another_algorithm_is_refused(make_agent: Callable[..., Any]) -> None:
    state = make_agent(algorithm=DDPO).state_dict()
    agent = make_agent(use_critic=False)
    with pytest.raises(ValueError, match="the state is of DDPO, and the agent is DPOK"):
        agent.load_state_dict(state)


@pytest.mark.parametrize("counter", ["run_seed", "iteration", "images_drawn", "num_timesteps", "n_updates"])
@pytest.mark.parametrize("value", [-1, "x", None, 1e300, 10**30], ids=str)
def test_a_state_with_a_damaged_counter_is_refused(make_agent: Callable[..., Any], counter: str, value: Any) -> None:
    agent = make_agent()
    state = agent.state_dict()
    state["state"][counter] = value
    with pytest.raises(ValueError, match=f"{counter} must be an integer"):
        agent.load_state_dict(state)


@pytest.mark.slow
def test_a_state_of_another_sampler_is_refused(make_env: Callable[..., Any], make_agent: Callable[..., Any]) -> None:
    state = make_agent().state_dict()
    with pytest.raises(ValueError, match=r"guidance_scale 1\.0 there, 3\.0 here"):
        make_agent(make_env(guidance_scale=3.0)).load_state_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"lora_rank": 3}, {}, "with rank 3, and not the same layers and sizes as here, .* with rank 2"),
        ({"target_modules": "all"}, {}, "the LoRA is of another model: it changes"),
        ({"critic_hidden": 8}, {}, "the state is of a network of another build: .* for ValueNetwork"),
        ({"lora_rank": 0}, {}, "the state has no lora: the agent was made with other settings"),
        ({}, {"lora_rank": 0}, "the state has no denoiser: the agent was made with other settings"),
    ],
    ids=str,
)
def test_a_state_of_another_network_is_refused(
    make_agent: Callable[..., Any], theirs: dict[str, Any], ours: dict[str, Any], message: str
) -> None:
    state = make_agent(policy_kwargs=theirs, critic_kind="network").state_dict()
    with pytest.raises(ValueError, match=message):
        make_agent(policy_kwargs=ours, critic_kind="network").load_state_dict(state)


@pytest.mark.slow
def test_a_state_without_a_critic_is_refused(make_agent: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="the state has no critic"):
        make_agent().load_state_dict(make_agent(use_critic=False).state_dict())


@pytest.mark.slow
def test_the_learning_rate_is_the_new_agents(make_agent: Callable[..., Any]) -> None:
    first = make_agent(learning_rate=1e-2)
    first.learn(UPDATE)
    second = make_agent(learning_rate=1e-3)
    second.load_state_dict(first.state_dict())
    assert second.policy.optimizer.param_groups[0]["lr"] == 1e-3
