"""The state of an agent as plain tensors and plain JSON: weights, optimiser, counters. Nothing in it can run code."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dpok_gym.samplers import SamplerConfig
from dpok_gym.utils.sharding import load_whole, whole
from dpok_gym.utils.tensors import flatten_optimizer, load_optimizer
from dpok_gym.utils.validation import MAX_SEED, check_choice, check_integer

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm

#: The largest counter of a training: random generators are keyed by them.
_MAX_COUNTER = 2**62


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
        tensors["denoiser"] = {name: whole(values) for name, values in policy.denoiser.state_dict().items()}
    if policy.critic is not None:
        tensors["critic"] = dict(policy.critic.state_dict())
    if policy.old is not None:
        tensors["old"] = dict(policy.old.state_dict())
    tensors["optimizer"] = flatten_optimizer(policy.optimizer)
    assert agent.sampler_config is not None
    state = {
        "algorithm": type(agent).__name__,
        "sampler": agent.sampler_config.to_dict(),
        "precision": policy.precision,
        "run_seed": agent.run_seed,
        "iteration": agent.iteration,
        "images_drawn": agent.images_drawn,
        "num_timesteps": agent.num_timesteps,
        "n_updates": agent._n_updates,
        "recent_rewards": [episode["r"] for episode in agent.ep_info_buffer or ()],
        "algorithm_state": agent.algorithm_state(),
        "monitor": agent.monitor.state_dict(),
    }
    return {"tensors": tensors, "state": state}


def check_algorithm(algorithm: type[DenoisingAlgorithm], state: Mapping[str, Any]) -> None:
    """Checks that a state is of this algorithm.

    Raises:
        ValueError: if it is of another one.
    """
    if state["algorithm"] != algorithm.__name__:
        raise ValueError(f"the state is of {state['algorithm']}, and the agent is {algorithm.__name__}")


def set_state(agent: DenoisingAlgorithm, saved: Mapping[str, Any]) -> None:
    """Puts back what :func:`get_state` returned.

    Raises:
        ValueError: if it is of another algorithm, sampler or network, a counter is no number, or the precision none.
    """
    tensors, state = saved["tensors"], saved["state"]
    check_algorithm(type(agent), state)
    assert agent.sampler_config is not None
    SamplerConfig.from_dict(state["sampler"]).check_equal(agent.sampler_config)
    check_choice("precision", state["precision"], "float32", "bfloat16")
    check_integer("run_seed", state["run_seed"], minimum=0, maximum=MAX_SEED)
    for counter in ("iteration", "images_drawn", "num_timesteps", "n_updates"):
        check_integer(counter, state[counter], minimum=0, maximum=_MAX_COUNTER)
    policy = agent.policy
    expected = get_state(agent)["tensors"]
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(f"the state has no {' and no '.join(missing)}: the agent was made with other settings")
    try:
        if policy.lora is not None:
            policy.lora.load_state_dict(tensors["lora"])
        else:
            assert policy.denoiser is not None
            load_whole(policy.denoiser, tensors["denoiser"])
        if policy.critic is not None:
            policy.critic.load_state_dict(tensors["critic"])
        if policy.old is not None:
            policy.old.load_state_dict(tensors["old"])
    except RuntimeError as error:  # torch's, for tensors of other names or shapes
        raise ValueError(f"the state is of a network of another build: {error}") from error
    load_optimizer(policy.optimizer, tensors["optimizer"])
    if policy.settings["precision"] == "auto":  # as it began: here the other one may be faster
        policy.precision = state["precision"]
    agent.run_seed = state["run_seed"]
    agent.iteration = state["iteration"]
    agent.images_drawn = state["images_drawn"]
    agent.num_timesteps = state["num_timesteps"]
    agent._n_updates = state["n_updates"]
    # The logged mean reward goes over the latest images, also over those before an interruption.
    episode = {"l": agent.process.num_inference_steps, "t": 0.0}
    recent = [episode | {"r": float(reward)} for reward in state["recent_rewards"]]
    agent.ep_info_buffer = deque(recent, maxlen=agent._stats_window_size)
    agent.ep_success_buffer = deque(maxlen=agent._stats_window_size)  # SB3 makes both or none
    agent.load_algorithm_state(state["algorithm_state"])
    agent.monitor.load_state_dict(state["monitor"])
