"""A trial: a few images and one update of an agent, after which the agent is as it was.

Letters used for shapes: n images of the trial, T denoising steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor

from agents.common.algorithm import DenoisingAlgorithm
from agents.common.buffer import Batch, TrajectoryBuffer
from agents.common.held_out import HeldOutReward
from agents.common.randomness import ImageNoise
from agents.common.rollouts import draw_rollout
from dpok_gym.samplers import DenoisingStep, Transition

#: Optimiser steps of an algorithm that takes a number of them on images drawn before.
_FIT_STEPS = 5


@contextmanager
def restored(agent: DenoisingAlgorithm) -> Iterator[None]:
    """Puts an agent back into the state before the block: its weights, counters, statistics and attributes."""
    attributes, state = dict(vars(agent)), agent.state_dict()
    tensors = {
        group: {name: value.clone() for name, value in named.items()} for group, named in state["tensors"].items()
    }
    try:
        yield
    finally:
        agent.__dict__ = attributes
        recent = agent.ep_info_buffer
        agent.load_state_dict({"tensors": tensors, "state": state["state"]})
        agent.ep_info_buffer = recent
        agent.policy.optimizer.zero_grad()


class Trial:
    """Draws images with an agent and updates it, inside of :func:`restored`.

    Args:
        agent: the agent.
        n_images: n, rounded up to whole groups.
        total_images: images of the whole training, which decide on the learning rate of its first iteration.
    """

    def __init__(self, agent: DenoisingAlgorithm, n_images: int, total_images: int) -> None:
        self.agent, self.process = agent, agent.process
        model = self.process.model
        group = agent.group_size
        self.buffer = TrajectoryBuffer(
            -(-n_images // group) * group, self.process.num_inference_steps, model.latent_shape, model.device, group
        )
        agent.set_logger(Logger(None, []))
        agent.rollout_buffer = self.buffer
        agent._held_out = HeldOutReward(None, agent.denoising_env)
        agent.ep_info_buffer = deque(maxlen=agent._stats_window_size)
        agent.start_time = 0
        if hasattr(agent, "log_every"):
            agent.log_every = min(agent.log_every, _FIT_STEPS)
        self._progress = 1 - min((agent.images_per_iteration or len(self.buffer)) / total_images, 1)

    def draw(self) -> None:
        """Draws the first images of the run, with the rewards that it would learn from."""
        callback = _Silent()
        callback.init_callback(self.agent)
        draw_rollout(self.agent, self.buffer, callback)
        if hasattr(self.agent, "_keep_images"):
            self.agent._keep_images(self.buffer)

    def redraw(self, transition: Transition) -> Tensor:
        """Draws x_0 (n, C, h, w) of the same images, from the same noise, with a transition."""
        latents = torch.zeros(0)
        for step in self._steps(range(len(self.buffer)), transition):
            latents = step.next_latents
        return latents

    @torch.no_grad()
    def _steps(self, rows: range, transition: Transition) -> Iterator[DenoisingStep]:
        agent, process = self.agent, self.process
        images = [agent.images_drawn + row for row in rows]
        starts = agent.initial_noise_of(range(images[0], images[-1] + 1))
        noise = ImageNoise.for_training(
            agent.run_seed, images, process.model.latent_shape, process.model.device, starts
        )
        conditioning = process.encode([self.buffer.prompts[row] for row in rows])
        return process.denoise(noise.initial_latents(), conditioning, noise, transition)

    def first_batch(self) -> Any:
        """Returns the first batch that an update would learn from; no step is taken."""

        def stop(batch: Batch) -> NoReturn:
            raise _FirstBatchError(batch)

        self.agent.backward = stop  # type: ignore[method-assign]
        try:
            self.update()
        except _FirstBatchError as found:
            return found.batch
        finally:
            del self.agent.backward
        raise ValueError("the update takes no optimiser step: no image has a reward to learn from")

    def update(self) -> None:
        """Updates the agent as its first iteration would, once it has drawn these images."""
        with self.logged_update():
            self.agent.train()

    @contextmanager
    def logged_update(self) -> Iterator[None]:
        """Around optimiser steps: sets the learning rate of the run's first iteration."""
        self.agent._current_progress_remaining = self._progress
        with self.agent._logged_update(len(self.buffer)):
            yield

    def step(self, batch: Batch) -> None:
        """Takes one optimiser step on a batch; its gradients, after clipping, stay."""
        with self.logged_update(), self.agent.optimizer_step():
            self.agent.backward(batch)


class _FirstBatchError(Exception):
    """Ends an update at its first batch."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch


class _Silent(BaseCallback):
    def _on_step(self) -> bool:
        return True


def copies(values: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies of tensors, without their gradients."""
    return [value.detach().clone() for value in values]
