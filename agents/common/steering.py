"""Steering: better images of a model without training it, by choosing among several on their way from noise to image.

Each image is drawn as k particles, which are denoised side by side. At some steps the reward of the image that each
particle seems to become, r(decode(predicted x_0)), is taken as its value. Particles of high value are copied, those of
low value are dropped, and all go on with noise of their own. So no gradient of the reward is needed, and the denoiser
is called exactly as often as for k images.

A method of steering is a frozen :class:`Steering`; :class:`ParticleFilter` carries it out within
:meth:`dpok_gym.samplers.DenoisingProcess.denoise`. The functions are pure.

Letters used for shapes: N images, k particles of each, B = N k particles in all, i values of a particle so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpok_gym.samplers import State
from dpok_gym.utils.validation import check_choice, check_fraction, check_integer, check_non_negative, check_positive

Potential = Literal["difference", "max", "sum"]

#: From states and the means (B, C, h, w) of their next latents to the value (B,) of each state.
ValueFunction = Callable[[State, Tensor], Tensor]


def potential_so_far(values: Tensor, potential: Potential) -> Tensor:
    """Returns the exponent, in units of the reward, of the product of a particle's potentials so far.

    The potentials G_t of Singhal et al. 2025 (section 3.2) are, with v_T, ..., v_t the values so far,

        difference:   G_t = exp((v_t - v_{t+1}) / temperature),     with v_{T+1} = 0
        max:          G_t = exp(max(v_T, ..., v_t) / temperature)
        sum:          G_t = exp((v_T + ... + v_t) / temperature)

    The last one, G_0, is whatever makes the product of all exp(r(x_0) / temperature).

    Args:
        values: (..., i), i at least 1.
        potential: one of the three.

    Returns:
        (...).
    """
    if potential == "difference":
        return values[..., -1]
    if potential == "max":
        return values.cummax(-1).values.sum(-1)
    return values.cumsum(-1).sum(-1)


def normalized_weights(scores: Tensor, temperature: float) -> Tensor:
    """Returns exp(score / temperature), normalised over the particles of each image.

    Args:
        scores: (N, k); -inf for a particle that must not be taken.
        temperature: 0 for all weight on the highest score, inf for equal weights.

    Returns:
        (N, k); equal weights for an image all of whose scores are -inf.
    """
    if temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).to(scores)
    logits = (scores / temperature).masked_fill(scores == -math.inf, -math.inf)  # -inf / inf would be nan
    return logits.softmax(1).nan_to_num(nan=1 / scores.shape[1])


def effective_sample_size(weights: Tensor) -> Tensor:
    """Returns 1 / sum of squared weights: the number of equally weighted particles that are worth as much as these.

    Args:
        weights: (N, k), each row sums to 1.

    Returns:
        (N,) in [1, k].
    """
    return 1 / weights.square().sum(1)


def quantiles(weights: Tensor, points: Tensor) -> Tensor:
    """Returns the particles at some points of the cumulative weights.

    A point that is uniform in [0, 1) gives each particle with the probability of its weight.

    Args:
        weights: (N, k), each row sums to 1.
        points: (N, m) in [0, 1).

    Returns:
        (N, m) int64 in [0, k), never a particle of weight 0.
    """
    cumulative = weights.cumsum(1)
    # The rounded sum may differ from 1; and a point at a particle's very end belongs to the next one.
    return torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True).clamp(max=weights.shape[1] - 1)


def systematic_resampling(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws the parents of k new particles at evenly spaced points of the cumulative weights.

    A particle of weight w gets floor(k w) or ceil(k w) children, k w on average. That is less random than k independent
    draws, and equal weights leave all particles as they are.

    Args:
        weights: (N, k), each row sums to 1.
        uniforms: (N,) in [0, 1), one random number for each image.

    Returns:
        (N, k) int64 in [0, k).
    """
    k = weights.shape[1]
    return quantiles(weights, (uniforms[:, None] + torch.arange(k, device=weights.device)) / k)


@dataclass(frozen=True)
class Steering:
    """A method of steering. The base class looks at its particles only when they are images.

    Attributes:
        n_particles: k, the particles of each image, at least 1.
    """

    n_particles: int = 8

    def __post_init__(self) -> None:
        check_integer("n_particles", self.n_particles, maximum=2**17)

    def is_due(self, step: int) -> bool:
        """Returns whether particles are valued and chosen before a denoising step, 0 for the first one."""
        return False

    def potential_so_far(self, values: Tensor) -> Tensor:
        """Returns the exponent of the product of the potentials so far, (N, k), from values (N, k, i)."""
        return potential_so_far(values, "difference")

    def weights(self, scores: Tensor) -> Tensor:
        """Returns the weights of particles, (N, k), from the exponents of their potentials; here, all on the best."""
        return normalized_weights(scores, 0.0)

    def resample(self, weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses the particles that go on.

        Args:
            weights: (N, k), each row sums to 1.
            uniforms: (N,) random numbers in [0, 1).

        Returns:
            The parent of each particle, (N, k) int64 in [0, k), and whether the particles of an image were resampled,
            (N,) bool: they have equal weights from here. The others keep themselves and their weights.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step at which particles are chosen")

    def choose(self, rewards: Tensor, weights: Tensor, uniforms: Tensor) -> Tensor:
        """Returns the particle that becomes the image, (N,) int64: a draw from the weights.

        Args:
            rewards: (N, k) r(x_0); -inf for an image without a valid one.
            weights: (N, k), each row sums to 1.
            uniforms: (N,) random numbers in [0, 1).
        """
        return quantiles(weights, uniforms[:, None])[:, 0]

    def denoiser_calls(self, num_inference_steps: int) -> int:
        """Returns how often an image costs a call of the denoiser; guidance takes two passes for each."""
        return self.n_particles * num_inference_steps

    def reward_calls(self, num_inference_steps: int) -> int:
        """Returns how many decoded and scored images an image costs."""
        return self.n_particles * (1 + sum(map(self.is_due, range(num_inference_steps))))


@dataclass(frozen=True)
class BestOf(Steering):
    """Draws k images and keeps the one with the highest reward: best-of-n, or rejection sampling.

    The KL of what it draws to the model's own images is at most log k - (k - 1) / k nats (Beirami et al. 2024).

    Attributes:
        n_particles: k, the images that each one is chosen from, at least 1.
    """

    @property
    def kl_bound(self) -> float:
        """The most nats that its images are away from the model's own."""
        return math.log(self.n_particles) - (self.n_particles - 1) / self.n_particles


#: No steering: each image is drawn once.
UNSTEERED = BestOf(1)


@dataclass(frozen=True)
class _Resampling(Steering):
    """The base of the methods that choose on the way.

    Attributes:
        n_particles: k.
        temperature: of the weights.
        resample_every: denoising steps from one choice to the next.
    """

    temperature: float = 0.1
    resample_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("resample_every", self.resample_every)

    def weights(self, scores: Tensor) -> Tensor:
        """See the base class."""
        return normalized_weights(scores, self.temperature)

    def is_due(self, step: int) -> bool:
        """See the base class."""
        return self.n_particles > 1 and step % self.resample_every == 0


@dataclass(frozen=True)
class FKSteering(_Resampling):
    """Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848): sequential Monte Carlo with the reward.

    The final particles with their weights are samples of p(x_0) exp(r(x_0) / temperature) for large k, whatever the
    potentials: that is the distribution with the highest E[r] - temperature KL(. || p). The values only say which
    particles are worth going on with; the better they predict the final reward, the fewer particles it takes.

    Attributes:
        n_particles: k, at least 2 to have an effect. The paper uses 4 to 8; the cost grows with it.
        temperature: above 0, in units of the reward; 1 / lambda in the paper, which has 1/10 for ImageReward. A small
            one follows the reward closely and makes all particles descendants of one. inf prefers none on the way:
            with ``choice`` "draw" nothing changes, with "best" it is best-of-k.
        resample_every: denoising steps from one choice to the next, at least 1. The paper looks every 20 of 100.
            Rarely costs fewer rewards and keeps the particles more different.
        potential: "difference" weighs by how much the value has risen; "max" by the best value so far, each time again,
            which is a much lower temperature on the way; "sum" by the sum of the values so far.
        ess_threshold: in [0, 1]; particles are resampled when their effective sample size is below this share of k.
            1 is always, as in the paper; 0 is never, which is importance sampling.
        choice: the image of the final particles. "best" takes the one with the highest reward, as the paper does;
            "draw" draws from the weights, so that the images are samples of p exp(r / temperature).
    """

    potential: Potential = "difference"
    ess_threshold: float = 1.0
    choice: Literal["best", "draw"] = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)
        check_choice("potential", self.potential, "difference", "max", "sum")
        check_fraction("ess_threshold", self.ess_threshold)
        check_choice("choice", self.choice, "best", "draw")

    def potential_so_far(self, values: Tensor) -> Tensor:
        """See the base class."""
        return potential_so_far(values, self.potential)

    def resample(self, weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        n, k = weights.shape
        resampled = effective_sample_size(weights) < self.ess_threshold * k
        stay = torch.arange(k, device=weights.device).expand(n, k)
        return torch.where(resampled[:, None], systematic_resampling(weights, uniforms), stay), resampled

    def choose(self, rewards: Tensor, weights: Tensor, uniforms: Tensor) -> Tensor:
        """See the base class."""
        return rewards.argmax(1) if self.choice == "best" else super().choose(rewards, weights, uniforms)


@dataclass(frozen=True)
class SVDD(_Resampling):
    """Soft value-based decoding (Li et al. 2024, arXiv 2408.08252), with the reward of the predicted x_0 as the value.

    Each x_{t-1} is drawn k times, and one of the k candidates goes on, drawn with the weights exp(value / temperature).
    So it is Feynman-Kac steering in which one particle is the parent of all: greedier, as nothing but this one is left
    to choose from later. The start x_T is chosen among k candidates too.

    Attributes:
        n_particles: k, the candidates of each step, at least 2 to have an effect; M in the paper, 20 in its code for
            images. The cost grows with it.
        temperature: at least 0, in units of the reward; alpha in the paper. 0 takes the best candidate, inf any.
        resample_every: denoising steps from one choice to the next, at least 1; 1 in the paper.
    """

    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.temperature, float) and self.temperature == math.inf):
            check_non_negative("temperature", self.temperature)

    def resample(self, weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        n, k = weights.shape
        return quantiles(weights, uniforms[:, None].expand(n, k).contiguous()), weights.new_ones(n, dtype=torch.bool)


class ParticleFilter:
    """The particles of N images on their way: the ``select`` of :meth:`dpok_gym.samplers.DenoisingProcess.denoise`.

    The k particles of an image are neighbours in a batch. Their weights are

        w  ~  exp((U_now - U_then) / temperature),

    where U is :meth:`Steering.potential_so_far`, now and when they were last resampled. At the end U is r(x_0): so the
    weights of a whole path multiply to exp(r(x_0) / temperature). All numbers are float64, on the CPU.

    Args:
        steering: the method.
        n_images: N.
        value: gives the value (B,) of each state; one that is not finite counts as the lowest of its image.
        uniforms: gives N random numbers in [0, 1) for a denoising step, and for step T.

    Attributes:
        weights: (N, k), each row sums to 1; those of the last choice.
    """

    def __init__(
        self, steering: Steering, n_images: int, value: ValueFunction, uniforms: Callable[[int], Tensor]
    ) -> None:
        self.steering, self._value, self._uniforms = steering, value, uniforms
        shape = (n_images, steering.n_particles)
        self._values = torch.zeros(*shape, 0, dtype=torch.float64)
        self._potential = torch.zeros(shape, dtype=torch.float64)  # U now
        self._scores = torch.zeros(shape, dtype=torch.float64)  # U now - U then
        self.weights = steering.weights(self._scores)

    def __call__(self, state: State, mean: Tensor) -> Tensor | None:
        """Returns the rows (B,) of the particles that go on; None for each of them.

        Args:
            state: B states, all at the same denoising step.
            mean: (B, C, h, w) of their next latents.
        """
        step = int(state.step[0])
        if not self.steering.is_due(step):
            return None
        values = _replace_invalid(self._by_image(self._value(state, mean)))
        self._values = torch.cat([self._values, values[..., None]], dim=2)
        self._weigh(self.steering.potential_so_far(self._values))
        parents, resampled = self.steering.resample(self.weights, self._uniforms(step))
        self._values = self._values.gather(1, parents[..., None].expand_as(self._values))
        self._potential = self._potential.gather(1, parents)
        self._scores = self._scores.masked_fill(resampled[:, None], 0.0)
        return self._rows(parents).to(state.latents.device)

    def finish(self, rewards: Tensor, num_inference_steps: int) -> Tensor:
        """Chooses the image among the finished particles.

        Args:
            rewards: (B,) r(x_0); not finite for an image without a valid one, which loses.
            num_inference_steps: T.

        Returns:
            (N,) rows in [0, B).
        """
        final = self._by_image(rewards)
        final = final.masked_fill(~final.isfinite(), -math.inf)
        self._weigh(final)
        return self._rows(self.steering.choose(final, self.weights, self._uniforms(num_inference_steps))[:, None])

    def _weigh(self, potential: Tensor) -> None:
        self._scores = self._scores + potential - self._potential
        self._potential = potential
        self.weights = self.steering.weights(self._scores)

    def _by_image(self, numbers: Tensor) -> Tensor:
        return numbers.detach().double().cpu().reshape(self._scores.shape)

    def _rows(self, particles: Tensor) -> Tensor:
        """Returns the rows in a batch of particles (N, m) in [0, k)."""
        n, k = self._scores.shape
        return (k * torch.arange(n)[:, None] + particles).flatten()


def _replace_invalid(values: Tensor) -> Tensor:
    """Replaces values (N, k) that are not finite by the lowest finite one of their image, or 0 if it has none."""
    lowest = values.masked_fill(~values.isfinite(), math.inf).amin(1, keepdim=True)
    return torch.where(values.isfinite(), values, lowest.nan_to_num(posinf=0.0))
