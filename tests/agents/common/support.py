"""Helpers of these tests: agents to read and to change."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents.common.algorithm import DenoisingAlgorithm
from agents.common.buffer import TrajectoryBuffer
from agents.common.policy import DenoisingPolicy
from dpok_gym.samplers import DenoisingProcess, State

#: Prompts that the tiny models can read.
PROMPTS = ("a rabbit", "a green dog", "the moon")


def perturb(policy: DenoisingPolicy, scale: float = 0.1) -> DenoisingPolicy:
    """Changes the denoiser as training does, only more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in policy.denoiser_parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))
    return policy


def snapshot(agent: DenoisingAlgorithm) -> dict[str, Tensor]:
    """Returns a copy of all that is trained, and of the optimiser's state."""
    copied = {}
    for group, tensors in agent.state_dict()["tensors"].items():
        for name, value in tensors.items():
            copied[f"{group}.{name}"] = value.clone()
    return copied


def collect(agent: DenoisingAlgorithm, callback: Any = None) -> TrajectoryBuffer:
    """Draws the images of an iteration, without the update."""
    _, callback = agent._setup_learn(1, callback)
    assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
    return agent.rollout_buffer


def observed_states(process: DenoisingProcess, n: int, seed: int = 0) -> State:
    """Returns noise as n states at different steps of different prompts."""
    latents = torch.randn(n, *process.model.latent_shape, generator=torch.Generator().manual_seed(seed))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
    return State(latents, torch.arange(n) % process.num_inference_steps, process.encode(prompts))


class Watch(BaseCallback):
    """Calls a function after each denoising step; stops the training where it returns False."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self._function = function

    def _on_step(self) -> bool:
        return self._function(self) is not False
