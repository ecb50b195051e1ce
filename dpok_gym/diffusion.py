"""The Gaussian of a denoising step: sample, log-probability, log-ratio, KL. No networks, no samplers.

With a std of 0 a step is deterministic: its sample is the mean, and it has no density. Then everything that is computed
from a density is 0, and so is its gradient.

Letters used for shapes: B transitions, D dimensions of one latent, all its axes together.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dpok_gym.utils.validation import check_choice

#: "sum": nats of a whole latent. "mean": nats per dimension, the sum divided by D.
Reduction = Literal["mean", "sum"]


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Returns (B,) values with as many trailing axes as ``like`` (B, ...) has."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Sums or averages (B, ...) over the D dimensions of each latent; returns (B,).

    Raises:
        ValueError: if the reduction is neither "mean" nor "sum".
    """
    check_choice("the reduction over a latent's dimensions", reduction, "mean", "sum")
    flat = values.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def _divisor(std: Tensor, like: Tensor) -> Tensor:
    """The std (B,) with trailing axes; infinite where it is 0, so that what is divided by it becomes 0."""
    return expand(std.masked_fill(std == 0, math.inf), like)


def sample(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Draws x_{t-1} = mean + std * noise.

    Args:
        mean: (B, ...).
        std: (B,).
        noise: (B, ...) standard normal.

    Returns:
        (B, ...).
    """
    return mean + expand(std, mean) * noise


def recover_noise(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Returns the noise (B, ...) that made a sample: the inverse of :func:`sample`; 0 where the std is 0.

    Args:
        sample: (B, ...) x_{t-1}.
        mean: (B, ...).
        std: (B,).
    """
    return (sample - mean) / _divisor(std, mean)


def log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Returns log N(sample; mean, std^2 I) in nats.

    Args:
        sample: (B, ...) x_{t-1}.
        mean: (B, ...).
        std: (B,).

    Returns:
        (B,), 0 where the std is 0.
    """
    each = expand(std.masked_fill(std == 0, 1), sample)
    density = reduce(-0.5 * ((sample - mean) / each).square() - each.log() - 0.5 * math.log(2 * math.pi), "sum")
    return torch.where(std > 0, density, 0)


def log_ratio(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Returns log p(sample) - log p_old(sample) of two Gaussians with the same std, in nats.

    In closed form: (mean - old_mean) . (sample - (mean + old_mean) / 2) / std^2. A log-density over thousands of
    dimensions is a large number; the difference of two of them would lose the digits that matter.

    Args:
        sample: (B, ...) drawn from the old Gaussian.
        mean: (B, ...) of the new Gaussian.
        old_mean: (B, ...) of the old one.
        std: (B,).

    Returns:
        (B,), exactly 0 where the means are equal, or the std is 0.
    """
    return reduce((mean - old_mean) * (sample - 0.5 * (mean + old_mean)) / _divisor(std, sample).square(), "sum")


def kl_divergence(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """Returns KL( N(mean, std^2 I) || N(other_mean, std^2 I) ) = ||mean - other_mean||^2 / (2 std^2), in nats.

    Args:
        mean: (B, ...).
        other_mean: (B, ...).
        std: (B,).

    Returns:
        (B,), exactly 0 where the means are equal, or the std is 0.
    """
    return reduce(0.5 * ((mean - other_mean) / _divisor(std, mean)).square(), "sum")
