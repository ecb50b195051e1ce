"""The state of an agent as plain tensors and plain JSON: weights, optimiser, counters. Nothing in it can run code."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpok_gym.samplers import SamplerConfig

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm


def get_state(agent: DenoisingAlgorithm) -> dict[str, Any]:
    """Returns ``{"tensors": {group: {name: tensor}}, "state": JSON-able dict}``.

    The groups are "lora" or "denoiser", "critic" and "old" if there is one, and "optimizer".
    """
    policy = agent.policy
    tensors: dict[str, dict[str, Tensor]] = {}
    if policy.lora is not None:
        # Only what is trained: the pre-trained weights are in the model's own files.
        tensors["lora"] = policy.lora.state_dict()
    else:
        assert policy.denoiser is not None
        tensors["denoiser"] = dict(policy.denoiser.state_dict())
    if policy.critic is not None:
        tensors["critic"] = dict(policy.critic.state_dict())
    if policy.old is not None:
        tensors["old"] = dict(policy.old.state_dict())
    tensors["optimizer"] = flatten_optimizer(policy.optimizer)
    assert agent.sampler_config is not None
    state = {
        "algorithm": type(agent).__name__,
        "sampler": agent.sampler_config.to_dict(),
        "run_seed": agent.run_seed,
        "iteration": agent.iteration,
        "images_drawn": agent.images_drawn,
        "num_timesteps": agent.num_timesteps,
        "n_updates": agent._n_updates,
        "recent_rewards": [episode["r"] for episode in agent.ep_info_buffer or ()],
        "algorithm_state": agent.algorithm_state(),
    }
    return {"tensors": tensors, "state": state}


def set_state(agent: DenoisingAlgorithm, saved: Mapping[str, Any]) -> None:
    """Puts back what :func:`get_state` returned.

    Raises:
        ValueError: if it is of another algorithm, sampler or network.
    """
    tensors, state = saved["tensors"], saved["state"]
    if state["algorithm"] != type(agent).__name__:
        raise ValueError(f"the state is of {state['algorithm']}, and the agent is {type(agent).__name__}")
    assert agent.sampler_config is not None
    SamplerConfig.from_dict(state["sampler"]).check_equal(agent.sampler_config)
    policy = agent.policy
    expected = get_state(agent)["tensors"]
    # An optimiser that has taken no step yet has no tensors.
    missing = sorted((expected.keys() - {"optimizer"}) - tensors.keys())
    if missing:
        raise ValueError(f"the state has no {' and no '.join(missing)}: the agent was made with other settings")
    try:
        if policy.lora is not None:
            policy.lora.load_state_dict(tensors["lora"])
        else:
            assert policy.denoiser is not None
            policy.denoiser.load_state_dict(tensors["denoiser"])
        if policy.critic is not None:
            policy.critic.load_state_dict(tensors["critic"])
        if policy.old is not None:
            policy.old.load_state_dict(tensors["old"])
    except RuntimeError as error:  # torch's, for tensors of other names or shapes
        raise ValueError(f"the state is of a network of another build: {error}") from error
    load_optimizer(policy.optimizer, tensors["optimizer"])
    agent.run_seed = state["run_seed"]
    agent.iteration = state["iteration"]
    agent.images_drawn = state["images_drawn"]
    agent.num_timesteps = state["num_timesteps"]
    agent._n_updates = state["n_updates"]
    # The logged mean reward goes over the latest images, also over those before an interruption.
    episode = {"l": agent.process.num_inference_steps, "t": 0.0}
    recent = [episode | {"r": reward} for reward in state["recent_rewards"]]
    agent.ep_info_buffer = deque(recent, maxlen=agent._stats_window_size)
    agent.ep_success_buffer = deque(maxlen=agent._stats_window_size)  # SB3 makes both or none
    agent.load_algorithm_state(state["algorithm_state"])


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimiser's state as tensors named ``<number of the parameter>.<name>``."""
    flat = {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            flat[f"{number}.{name}"] = torch.as_tensor(value)
    return flat


def load_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`flatten_optimizer` returned.

    Raises:
        ValueError: if it is of other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in flat.items():
        number, _, name = key.partition(".")
        # A moment has the shape of its parameter, a step count none.
        if not number.isdecimal() or int(number) >= len(parameters):
            raise ValueError(f"the optimiser's state is of a parameter {number}, and there are {len(parameters)}")
        if value.dim() and value.shape != parameters[int(number)].shape:
            raise ValueError(f"the optimiser's {name} of parameter {number} has the shape {tuple(value.shape)}")
        state.setdefault(int(number), {})[name] = value.clone()  # or the step of one agent would change the other
    if len({frozenset(values) for values in state.values()}) > 1:
        raise ValueError("the optimiser's state lacks a value of some parameters")
    # Learning rates and the like stay those of the constructor; only moments and step counts come back.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
