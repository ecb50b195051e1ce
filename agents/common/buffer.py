"""Whole denoising trajectories of a rollout, and batches of their transitions.

Letters used for shapes: N images, T denoising steps, B transitions, C x h x w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from agents.common import distributed
from dpok_gym.models.base import Conditioning
from dpok_gym.samplers import DenoisingStep, State


def even_sizes(n: int, batch_size: int | None) -> list[int]:
    """Returns the sizes of the batches that n elements are split into: near the size asked for, and nearly equal.

    A remainder is spread over all batches, because a batch of a few elements would make an optimiser step as long as
    the others, in a direction that is mostly noise.

    Args:
        n: number of elements.
        batch_size: the size asked for, at least 1; None for all in one.

    Returns:
        n / batch_size sizes, rounded to an integer, at least one; they differ by at most 1.
    """
    count = max((2 * n + batch_size) // (2 * batch_size), 1) if batch_size else 1
    return [n // count + (number < n % count) for number in range(count)]


def split_evenly(elements: Tensor, batch_size: int | None) -> Sequence[Tensor]:
    """Returns elements (n,) as batches of the sizes that :func:`even_sizes` gives; none of no elements."""
    return torch.split(elements, even_sizes(len(elements), batch_size)) if len(elements) else ()


def within(elements: Tensor, own: range) -> Tensor:
    """Returns those of the elements (B,) that lie in a range, numbered from its beginning."""
    return elements[(elements >= own.start) & (elements < own.stop)] - own.start


class Batch:
    """Tensors with a leading axis of B; subclasses are dataclasses of them. Other fields belong to all elements.

    Attributes:
        n_of_all_ranks: elements of the whole batch, if this is the share of one rank; None if it is all of it.
        n_of_largest_share: elements of the rank that has the most of them; None if this is all of the batch.
    """

    n_of_all_ranks: int | None = None
    n_of_largest_share: int | None = None

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def split(self, size: int | None) -> Iterator[Self]:
        """Yields pieces of at most ``size`` elements; one piece if it is None."""
        size = size or max(len(self), 1)
        for first in range(0, len(self), size):
            yield self.take(slice(first, first + size))

    def share(self) -> Self:
        """Returns this rank's share of a batch that all ranks have."""
        own = distributed.share(len(self))
        return self.take(slice(own.start, own.stop)).as_share_of(len(self), -(-len(self) // distributed.count()))

    @property
    def whole_size(self) -> int:
        """Elements of the whole batch, the shares of all ranks together."""
        return self.n_of_all_ranks or len(self)

    def as_share_of(self, n: int, largest: int) -> Self:
        """Notes that this is the share of one rank in a batch of ``n`` elements, and how many the largest share has."""
        self.n_of_all_ranks, self.n_of_largest_share = n, largest
        return self

    def blank(self) -> Self:
        """Returns a batch of one element of zeros, for a rank that must compute as often as the others."""
        return self._with_tensors(lambda values: values.new_zeros(1, *values.shape[1:]))

    def take(self, rows: slice | Tensor) -> Self:
        """Returns some of the elements."""
        return self._with_tensors(lambda values: values[rows])

    def _with_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Returns a batch whose tensors are those of this one after a function."""
        changed = {}
        for field in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, field.name)
            changed[field.name] = function(value) if isinstance(value, Tensor) else value
        return type(self)(**changed)


def select(conditioning: Conditioning, rows: Tensor | slice) -> Conditioning:
    """Returns the conditioning of some images."""
    return {name: values[rows] for name, values in conditioning.items()}


@dataclass
class Transitions(Batch):
    """A batch of transitions.

    Attributes:
        latents: (B, C, h, w) x_t.
        step: (B,) int64, the denoising step.
        image: (B,) int64, row of the image among those of this rank.
        actions: (B, C, h, w) x_{t-1}.
        old_means: (B, C, h, w) of the policy that drew the actions.
        advantages: (B,).
        returns: (B,) targets of the critic.
        weight: (B,) weight that makes the mean over a random share of the rollout estimate the mean over all of it.
        image_conditioning: of the images of this rank.
    """

    latents: Tensor
    step: Tensor
    image: Tensor
    actions: Tensor
    old_means: Tensor
    advantages: Tensor
    returns: Tensor
    weight: Tensor
    image_conditioning: Conditioning

    @property
    def state(self) -> State:
        """The states (z, x_t, t) that the actions were taken in."""
        return State(self.latents, self.step, select(self.image_conditioning, self.image))


class TrajectoryBuffer:
    """The trajectories of one rollout.

    Each latent is stored once: x_{t-1} is an action and also the next state. The means of the policy that drew the
    images are stored in place of its log-probabilities, so that log-ratios have a closed form.

    With several ranks, a rank has the trajectories of its own n images only, and the numbers of all N. In a single
    process n is N.

    Args:
        n_images: N.
        num_inference_steps: T.
        latent_shape: (C, h, w).
        device: where the tensors are.
        group_size: images in a row that stay on one rank.

    Attributes:
        own: rows of this rank's images, among the N.
        latents: (n, T + 1, C, h, w), from x_T to x_0.
        means: (n, T, C, h, w) of each transition.
        conditioning: of the n prompts; encoded once, for the rollout and for its update.
        kl: (N, T) nats, KL of each transition to the reference's, for algorithms that ask for it.
        rewards: (N, T), 0 but at the last step.
        values: (N, T), the critic's values of the states.
        advantages: (N, T).
        returns: (N, T).
        valid: (N,) bool, whether an image has a finite reward and can be learned from.
        prompts: N texts.

    Raises:
        ValueError: if the images cannot be shared equally among the ranks.
    """

    def __init__(
        self,
        n_images: int,
        num_inference_steps: int,
        latent_shape: tuple[int, ...],
        device: torch.device | str,
        group_size: int = 1,
    ) -> None:
        n, t = n_images, num_inference_steps
        self.own = distributed.equal_share(n, group_size)
        self.latents = torch.zeros(len(self.own), t + 1, *latent_shape, device=device)
        self.means = torch.zeros(len(self.own), t, *latent_shape, device=device)
        self.kl, self.rewards, self.values, self.advantages, self.returns = torch.zeros(5, n, t, device=device).unbind()
        self.valid = torch.zeros(n, dtype=torch.bool, device=device)
        self.prompts = [""] * n
        self.conditioning: Conditioning = {}

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_inference_steps(self) -> int:
        """T."""
        return self.means.shape[1]

    @property
    def own_prompts(self) -> list[str]:
        """The prompts of this rank's images."""
        return self.prompts[self.own.start : self.own.stop]

    def begin(self, rows: slice, conditioning: Conditioning) -> None:
        """Starts the trajectories of some images.

        Args:
            rows: which of this rank's images.
            conditioning: of their prompts.
        """
        for name, values in conditioning.items():
            # The shapes are the model's; they are known with the first prompt.
            if name not in self.conditioning:
                self.conditioning[name] = values.new_zeros(len(self.own), *values.shape[1:])
            self.conditioning[name][rows] = values

    def add(self, rows: slice, step: DenoisingStep) -> None:
        """Stores one denoising step of some of this rank's images.

        Raises:
            RuntimeError: if it does not begin at the latents that the step before it led to.
        """
        latents = step.state.latents
        if step.index == 0:
            self.latents[rows, 0] = latents
        elif not torch.allclose(self.latents[rows, step.index], latents, rtol=0, atol=0, equal_nan=True):
            # Nothing could be learned from it: these actions were never taken.
            raise RuntimeError(
                f"the latents of denoising step {step.index} are not the action of the step before it: something "
                "writes into the latents that it is given, such as the predict() of a model of your own; let it write "
                "into a copy"
            )
        self.latents[rows, step.index + 1] = step.next_latents
        self.means[rows, step.index] = step.mean

    def finish(self, rewards: Tensor, valid: Tensor) -> None:
        """Stores the rewards (N,) of all images, and whether each is valid (N,)."""
        self.rewards.zero_()
        self.rewards[:, -1] = rewards.to(self.rewards)
        self.valid[:] = valid.to(self.valid.device)

    def gather(self, values: Tensor) -> Tensor:
        """Returns what all ranks know of their images, (N, ...), from what this one knows of its own, (n, ...)."""
        return distributed.gather(values, len(self))

    @property
    def final_rewards(self) -> Tensor:
        """(N,) the reward of each image."""
        return self.rewards[:, -1]

    def state_at(self, index: int) -> State:
        """Returns the states of this rank's images at a denoising step, in [0, T)."""
        step = torch.full((len(self.own),), index, device=self.latents.device)
        return State(self.latents[:, index], step, self.conditioning)

    def batches(
        self,
        batch_size: int | None,
        rng: np.random.Generator,
        fraction: float = 1.0,
        step_importance: Tensor | None = None,
    ) -> Iterator[Transitions]:
        """Yields random batches of the transitions of valid images, each transition at most once.

        All ranks choose the same batches. Each yields its share of every batch: the transitions of its own images,
        which may be none.

        Args:
            batch_size: transitions in a batch, about, see :func:`even_sizes`; None for all in one.
            rng: decides on order and choice.
            fraction: share of the transitions that is used at all, in (0, 1].
            step_importance: (T,) at least 0; transitions of some steps are chosen more often than those of others, in
                these proportions as far as there are enough of them, and those of importance 0 never. None for all
                alike.
        """
        n_steps, device = self.num_inference_steps, self.means.device
        ones = torch.ones(n_steps, device=device)
        probability = inclusion_probabilities(ones if step_importance is None else step_importance, fraction)
        images = torch.nonzero(self.valid).flatten()
        # Transition number image * T + step.
        transitions = (images[:, None] * n_steps + torch.arange(n_steps, device=device)).flatten()
        transitions = transitions[torch.from_numpy(rng.permutation(len(transitions))).to(device)]
        chosen = systematic_sample(transitions, probability[transitions % n_steps], rng.random())
        for index in split_evenly(chosen, batch_size):
            own = within(index, range(self.own.start * n_steps, self.own.stop * n_steps))
            batch = self._transitions(own, fraction / probability)
            yield batch.as_share_of(len(index), self.largest_share(index // n_steps))

    def largest_share(self, images: Tensor) -> int:
        """Returns how many of some elements the rank has that has the most, from the row of each one's image, (B,)."""
        return int((images // len(self.own)).bincount().max())

    def _transitions(self, numbers: Tensor, weight: Tensor) -> Transitions:
        """Returns transitions of this rank: (B,) image x T + step; and the weight of each step (T,)."""
        image, t = numbers // self.num_inference_steps, numbers % self.num_inference_steps
        return Transitions(
            latents=self.latents[image, t],
            step=t,
            image=image,
            actions=self.latents[image, t + 1],
            old_means=self.means[image, t],
            advantages=self.advantages[image + self.own.start, t],
            returns=self.returns[image + self.own.start, t],
            weight=weight[t],
            image_conditioning=self.conditioning,
        )


def number_groups(keys: Sequence[object]) -> Tensor:
    """Numbers equal keys alike, in the order of their first appearance: (N,) int64."""
    numbers: dict[object, int] = {}
    for key in keys:
        numbers.setdefault(key, len(numbers))
    return torch.tensor([numbers[key] for key in keys], dtype=torch.int64)


def inclusion_probabilities(importance: Tensor, fraction: float) -> Tensor:
    """Probabilities with a mean of ``fraction``, in proportion to the importance where that is not above 1, (T,).

    Args:
        importance: (T,) at least 0. The mean is over those above 0; the others get the probability 0.
        fraction: in (0, 1].
    """
    possible = importance > 0
    if fraction == 1:
        return possible.to(importance)
    certain = torch.zeros_like(possible)
    while True:
        # Steps that would need a probability above 1 get 1; the others share what is left.
        left = fraction * possible.sum() - certain.sum()
        probability = torch.where(certain, 1.0, left * importance / importance[~certain].sum())
        if not (probability > 1 + 1e-6).any():
            return probability.clamp(max=1)
        certain |= probability >= 1


def systematic_sample(entries: Tensor, probability: Tensor, start: float) -> Tensor:
    """Chooses each of (n,) shuffled entries with its probability, and as many as their sum says (+-1).

    Args:
        entries: (n,).
        probability: (n,) in [0, 1].
        start: a random number in [0, 1).

    Source: Madow (1949), On the theory of systematic sampling, II.
    """
    marks = (probability.double().cumsum(0) + start).floor()
    return entries[torch.diff(marks, prepend=marks.new_zeros(1)) > 0]
