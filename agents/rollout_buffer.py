"""Whole denoising trajectories.

Letters used for shapes: n environments, N trajectories, T denoising steps, B transitions, L tokens, C x h x w a latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from agents.losses import generalized_advantages

#: What is done to advantages, see :meth:`TrajectoryBuffer.finish`.
Normalization = bool | Literal["center"]


class Batch:
    """Tensors with a leading axis of B; subclasses are dataclasses of them."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def split(self, size: int | None) -> Iterator[Self]:
        """Pieces of at most ``size`` elements; one piece if it is None."""
        size = size or max(len(self), 1)
        for first in range(0, len(self), size):
            yield self.take(slice(first, first + size))

    def take(self, rows: slice | Tensor) -> Self:
        """The elements ``rows``."""
        return type(self)(*(values[rows] for values in vars(self).values()))


@dataclass
class Transitions(Batch):
    """A batch of transitions."""

    latents: Tensor
    step: Tensor
    prompt: Tensor
    actions: Tensor
    old_means: Tensor
    advantages: Tensor
    returns: Tensor
    #: What a mean over a random share of the rollout weighs each with, to estimate that over the whole; mean 1.
    weight: Tensor

    @property
    def observation(self) -> dict[str, Tensor]:
        """The states, as the policy takes them."""
        return {"latent": self.latents, "step": self.step, "prompt": self.prompt}


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
        self.texts = [""] * n  # the prompts again, as rewards read them

    def add(
        self, rows: slice, t: int, observation: dict[str, Tensor], actions: Tensor, means: Tensor, values: Tensor
    ) -> None:
        """Stores one denoising step of the trajectories ``rows``."""
        self.prompt[rows] = observation["prompt"]
        self.latents[rows, t] = observation["latent"]
        self.latents[rows, t + 1] = actions
        self.means[rows, t] = means
        self.values[rows, t] = values

    def finish(self, gamma: float, gae_lambda: float, normalize: Normalization) -> None:
        """Computes advantages and returns once all rewards are in.

        Args:
            gamma: discount per denoising step.
            gae_lambda: see :func:`agents.losses.generalized_advantages`.
            normalize: True gives the advantages of the rollout mean 0 and standard deviation 1, "center" those of each
                denoising step mean 0; False leaves them.
        """
        self.advantages, self.returns = generalized_advantages(self.rewards, self.values, gamma, gae_lambda)
        if normalize and self.valid.any():
            sound = self.advantages[self.valid]
            if normalize == "center":
                self.advantages = self.advantages - sound.mean(dim=0)
            else:
                self.advantages = (self.advantages - sound.mean()) / (sound.std(correction=0) + 1e-8)

    def get(
        self, batch_size: int | None, fraction: float = 1.0, step_importance: Tensor | None = None
    ) -> Iterator[Transitions]:
        """Random batches of the transitions of valid trajectories, without replacement.

        Args:
            batch_size: transitions per batch; None for all in one.
            fraction: share of the transitions that is used at all, in (0, 1].
            step_importance: (T,) positive; transitions of some steps are chosen more often than those of others, in
                these proportions as far as there are enough of them. None for all alike.
        """
        n_steps = self.means.shape[1]
        rows = torch.nonzero(self.valid).flatten()
        if step_importance is None:
            step_importance = torch.ones(n_steps, device=rows.device)
        probability = inclusion_probabilities(step_importance, fraction)
        transitions = (rows[:, None] * n_steps + torch.arange(n_steps, device=rows.device)).flatten()
        transitions = transitions[torch.randperm(len(transitions)).to(rows.device)]
        chosen = systematic_sample(transitions, probability[transitions % n_steps])
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
                fraction / probability[t],
            )


def inclusion_probabilities(importance: Tensor, fraction: float) -> Tensor:
    """Probabilities with a mean of ``fraction``, in proportion to the importance where that is not above 1, (T,).

    Args:
        importance: (T,) positive.
        fraction: in (0, 1].
    """
    certain = torch.full_like(importance, fraction == 1, dtype=torch.bool)
    while True:
        left = fraction * len(importance) - certain.sum()
        probability = torch.where(certain, 1.0, left * importance / importance[~certain].sum())
        if not (probability > 1 + 1e-6).any():
            return probability.clamp(max=1)
        certain |= probability >= 1


def systematic_sample(entries: Tensor, probability: Tensor) -> Tensor:
    """Those of (n,) shuffled entries that are chosen, each with its probability, and as many as their sum says (+-1).

    Source: Madow (1949), On the theory of systematic sampling, II.
    """
    marks = (probability.double().cumsum(0) + torch.rand(1, dtype=torch.float64).to(probability.device)).floor()
    return entries[torch.diff(marks, prepend=marks.new_zeros(1)) > 0]
