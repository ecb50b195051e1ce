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
from dpok_gym.samplers import State

#: Optimiser steps of an algorithm that takes a number of them on images drawn before.
_FIT_STEPS = 5


@contextmanager
def restored(agent: DenoisingAlgorithm) -> Iterator[None]:
    """Puts an agent back into the state before the block: its weights, counters, statistics and attributes."""
    attributes, state = dict(vars(agent)), agent.state_dict()
    tensors = {}
    for group, named in state["tensors"].items():
        tensors[group] = {name: value.detach().to("cpu", copy=True) for name, value in named.items()}
    try:
        yield
    finally:
        agent.__dict__ = attributes
        recent = agent.ep_info_buffer, agent.ep_success_buffer
        agent.load_state_dict({"tensors": tensors, "state": state["state"]})
        agent.ep_info_buffer, agent.ep_success_buffer = recent
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
        agent.ep_success_buffer = deque(maxlen=agent._stats_window_size)
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

    def draw_for(self, prompts: Sequence[str]) -> Tensor:
        """Draws x_0 (B, C, h, w) for B prompts with the policy, from noise that no training has."""
        process, seeds = self.process, range(len(prompts))
        noise = ImageNoise.for_evaluation(seeds, process.model.latent_shape, process.model.device)
        return self._draw(noise, prompts)

    def redraw(self) -> Tensor:
        """Draws x_0 (n, C, h, w) of the same images, from the same noise, with the policy as it is now."""
        return self._draw(self._noise(range(len(self.buffer))), self.buffer.prompts)

    def drawn_by_policy(self) -> Tensor:
        """Returns x_0 (n, C, h, w) of the images, drawn by the policy; some algorithms learn from another model's."""
        agent = self.agent
        return self.buffer.latents[:, -1] if agent.drawing_transition == agent.policy.transition else self.redraw()

    @torch.no_grad()
    def draw_side_by_side(self) -> None:
        """Takes one denoising step of as many images as the training draws side by side, for its memory."""
        n = min(self.agent.n_envs, self.agent.images_per_iteration or self.agent.n_envs)
        prompts = [self.buffer.prompts[row % len(self.buffer)] for row in range(n)]
        noise = torch.zeros(n, *self.process.model.latent_shape, device=self.process.model.device)
        self.agent.drawing_transition(self.process.state(noise, 0, self.process.encode(prompts)))

    @torch.no_grad()
    def _draw(self, noise: ImageNoise, prompts: Sequence[str]) -> Tensor:
        latents = noise.initial_latents()
        for step in self.process.denoise(latents, self.process.encode(prompts), noise, self.agent.policy.transition):
            latents = step.next_latents
        return latents

    def _noise(self, rows: range) -> ImageNoise:
        """Returns the noise of some images of the run."""
        agent, model = self.agent, self.process.model
        images = range(agent.images_drawn + rows.start, agent.images_drawn + rows.stop)
        starts = agent.initial_noise_of(images)
        return ImageNoise.for_training(agent.run_seed, images, model.latent_shape, model.device, starts)

    @property
    def is_fresh(self) -> bool:
        """True if the policy is still the pre-trained model."""
        lora = self.agent.policy.lora
        if lora is None:
            return self.agent._n_updates == 0
        return not any(values.any() for name, values in lora.parameters.items() if "lora_B" in name)

    @property
    def is_half(self) -> bool:
        """True if the denoiser runs in half precision."""
        policy = self.agent.policy
        denoiser = policy.denoiser or self.process.model.denoiser
        return policy.precision == "bfloat16" or next(denoiser.parameters()).dtype != torch.float32

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Returns the images (n, 3, H, W) of latents x_0 (n, C, h, w)."""
        return torch.cat([self.process.model.decode(row[None]) for row in latents])

    def transitions(self, n_images: int) -> tuple[State, Tensor, Tensor]:
        """Draws some of the images with the policy as it is now.

        Returns:
            The states of all T steps of the images, one after the other (B of them); x_{t-1} and its mean, both
            (B, C, h, w).
        """
        rows = range(min(n_images, len(self.buffer)))
        noise, told = self._noise(rows), self.process.encode([self.buffer.prompts[row] for row in rows])
        with torch.no_grad():
            steps = list(self.process.denoise(noise.initial_latents(), told, noise, self.agent.policy.transition))
        conditioning = {
            name: torch.cat([step.state.conditioning[name] for step in steps]) for name in steps[0].state.conditioning
        }
        state = State(
            torch.cat([step.state.latents for step in steps]),
            torch.cat([step.state.step for step in steps]),
            conditioning,
        )
        return state, torch.cat([step.next_latents for step in steps]), torch.cat([step.mean for step in steps])

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
        raise ValueError("the update takes no optimiser step: no image or pair teaches anything")

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
