"""Whole denoising trajectories.

Letters used for shapes: n environments, N trajectories, T denoising steps, B transitions, L tokens, C x h x w a latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from agents.losses import generalized_advantages


@dataclass
class Transitions:
    """A batch of transitions; every tensor has a leading axis of B."""

    latents: Tensor
    step: Tensor
    prompt: Tensor
    actions: Tensor
    old_means: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.step)

    @property
    def observation(self) -> dict[str, Tensor]:
        """The states, as the policy takes them."""
        return {"latent": self.latents, "step": self.step, "prompt": self.prompt}

    def split(self, size: int | None) -> Iterator[Transitions]:
        """Pieces of at most ``size`` transitions; one piece if it is None."""
        for first in range(0, len(self), size or len(self)):
            part = slice(first, first + (size or len(self)))
            yield Transitions(*(getattr(self, field.name)[part] for field in fields(self)))


class TrajectoryBuffer:
    """Stores each latent once: x_{t-1} is both an action and the next state.

    With the behaviour policy's means rather than its log-probabilities, the log-ratio has a closed form.

    Args:
        n_trajectories: N, of one rollout.
        num_inference_steps: T.
        latent_shape: (C, h, w).
        max_tokens: L.
        device: where the tensors are kept.
    """

    def __init__(
        self,
        n_trajectories: int,
        num_inference_steps: int,
        latent_shape: tuple[int, ...],
        max_tokens: int,
        device: torch.device | str,
    ) -> None:
        n, t = n_trajectories, num_inference_steps
        self.latents = torch.zeros(n, t + 1, *latent_shape, device=device)
        self.means = torch.zeros(n, t, *latent_shape, device=device)
        self.prompt = torch.zeros(n, max_tokens, dtype=torch.int64, device=device)
        self.rewards, self.values, self.advantages, self.returns = torch.zeros(4, n, t, device=device).unbind()
        self.valid = torch.ones(n, dtype=torch.bool, device=device)

    def add(
        self, rows: slice, t: int, observation: dict[str, Tensor], actions: Tensor, means: Tensor, values: Tensor
    ) -> None:
        """Stores one denoising step of the trajectories ``rows``."""
        self.prompt[rows] = observation["prompt"]
        self.latents[rows, t] = observation["latent"]
        self.latents[rows, t + 1] = actions
        self.means[rows, t] = means
        self.values[rows, t] = values

    def finish(self, gamma: float, gae_lambda: float, normalize: bool) -> None:
        """Computes advantages and returns once all rewards are in.

        Args:
            gamma: discount per denoising step.
            gae_lambda: see :func:`agents.losses.generalized_advantages`.
            normalize: whether the advantages of the rollout get mean 0 and standard deviation 1.
        """
        self.advantages, self.returns = generalized_advantages(self.rewards, self.values, gamma, gae_lambda)
        if normalize and self.valid.any():
            sound = self.advantages[self.valid]
            self.advantages = (self.advantages - sound.mean()) / (sound.std(correction=0) + 1e-8)

    def get(self, batch_size: int | None, fraction: float = 1.0) -> Iterator[Transitions]:
        """Random batches of the transitions of valid trajectories, without replacement.

        Args:
            batch_size: transitions per batch; None for all in one.
            fraction: share of the transitions that is used at all.
        """
        n_steps = self.means.shape[1]
        usable = torch.nonzero(self.valid.repeat_interleave(n_steps)).flatten()
        chosen = usable[torch.randperm(len(usable))[: round(fraction * len(usable))].to(usable.device)]
        if not len(chosen):
            return  # the split of nothing would be a batch of nothing
        for index in chosen.split(batch_size or len(chosen)):
            row, t = index // n_steps, index % n_steps
            yield Transitions(
                self.latents[row, t],
                t,
                self.prompt[row],
                self.latents[row, t + 1],
                self.means[row, t],
                self.advantages[row, t],
                self.returns[row, t],
            )
