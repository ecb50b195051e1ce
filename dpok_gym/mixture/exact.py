"""What fine-tuning of the mixture model should find, without learning.

A sampler of T steps is a chain of Gaussians N(m_t(x_t), std_t^2 I) from x_T ~ N(0, I). Fine-tuning may change the
means; the objective (Fan et al. 2023, Eq. 8) is

    max over the means of   E[ r(x_0) - beta sum_t KL_t ],    KL_t = ||m_t(x_t) - m_t^pre(x_t)||^2 / (2 std_t^2),

solved here in closed form for Gaussian data and a linear reward, and on a grid in one dimension. Everything in float64.

Letters used for shapes: T denoising steps, n grid points, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from torch import Tensor

from dpok_gym.diffusion import Schedule
from dpok_gym.mixture.data import GaussianMixture

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GaussianSampler:
    """The exact sampler of Gaussian data, every step of which is linear.

    Attributes:
        gains, offsets: (T, d, d) and (T, d): m_t(x) = gain x + offset.
        std: (T,).
        mean, covariance: (d,) and (d, d) of the samples x_0.
        covariance_given_start: (d, d) of x_0 given x_T.
    """

    gains: Tensor
    offsets: Tensor
    std: Tensor
    mean: Tensor
    covariance: Tensor
    covariance_given_start: Tensor

    @classmethod
    def of(cls, data: GaussianMixture, schedule: Schedule, alphas_cumprod: Tensor) -> GaussianSampler:
        """The sampler of a mixture of one component."""
        identity = torch.eye(data.means.shape[-1]).double()
        alpha_bar = alphas_cumprod.double()[schedule.timesteps][:, None, None]
        precision = torch.linalg.inv(alpha_bar * data.covariances + (1 - alpha_bar) * identity)
        # The output is sqrt(1 - alpha_bar) precision (x - sqrt(alpha_bar) mean).
        pull = schedule.output_coef.double()[:, None, None] * (1 - alpha_bar).sqrt() * precision
        gains = schedule.sample_coef.double()[:, None, None] * identity + pull
        offsets = -(pull @ (alpha_bar.sqrt() * data.means[:, :, None])).squeeze(-1)
        mean, from_start, covariance = torch.zeros_like(data.means[0]), identity, torch.zeros_like(identity)
        for gain, offset, std in zip(gains, offsets, schedule.std.double(), strict=True):
            mean, from_start = gain @ mean + offset, gain @ from_start
            covariance = gain @ covariance @ gain.T + std**2 * identity
        return cls(gains, offsets, schedule.std.double(), mean, from_start @ from_start.T + covariance, covariance)

    def optimal_shift(self, slope: Tensor, beta: float) -> Tensor:
        """How far the best policy moves the mean of x_0 for the reward slope . x_0, (d,); the covariance stays.

        Given x_T, the optimum is the sampler's distribution tilted by exp(r / beta). The value is linear in every
        state, so the tilt only moves each step's mean, by std^2 / beta times the value's gradient: the optimum is in
        reach of the policy at any T. As x_T itself is given, its share of the covariance cannot be used.
        """
        return self.covariance_given_start @ slope / beta


@dataclass(frozen=True)
class GridPolicy:
    """A policy of one dimension, known at the points of a grid.

    Attributes:
        x: (n,) the grid, evenly spaced.
        means: (T, n) m_t(x).
        std: (T,).
    """

    x: Array
    means: Array
    std: Array

    @classmethod
    def of(cls, mean: Callable[[int, Tensor], Tensor], std: Tensor, x: Array) -> GridPolicy:
        """Asks for the means.

        Args:
            mean: from t, 0 for the noisiest step, and latents (n, 1, 1, 1) to the means, of the same shape.
            std: (T,).
            x: (n,) the grid, finer than the smallest std and wide enough for the noise: 0.02 from -6 to 6, for example.
        """
        latents = torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 1, 1)
        with torch.no_grad():
            means = [mean(t, latents).flatten().double().cpu().numpy() for t in range(len(std))]
        return cls(x, np.array(means), std.double().cpu().numpy())

    @cached_property
    def densities(self) -> Array:
        """Of x_T, ..., x_0 on the grid, (T + 1, n)."""
        dx = self.x[1] - self.x[0]
        found = [_normal(self.x, 0.0, 1.0)]
        for means, std in zip(self.means, self.std, strict=True):
            found.append(dx * found[-1] @ _normal(self.x[None], means[:, None], std))
        return np.array(found)

    def step_kl(self, pretrained: GridPolicy) -> Array:
        """E[ KL_t ] for each step under this policy, (T,), in nats: they sum to the KL of the trajectories."""
        kl = (self.means - pretrained.means) ** 2 / (2 * self.std[:, None] ** 2)
        return (self.densities[:-1] * kl).sum(1) * (self.x[1] - self.x[0])

    def final_kl(self, pretrained: GridPolicy) -> float:
        """KL of the distributions of x_0, in nats."""
        ours, theirs = self.densities[-1], pretrained.densities[-1]
        inside = ours > 1e-300  # below, a density adds nothing, and its logarithm cannot be had
        log_ratio = np.log(ours[inside] / np.maximum(theirs[inside], 1e-300))
        return float((ours[inside] * log_ratio).sum() * (self.x[1] - self.x[0]))

    def expectation(self, function: Callable[[Array], Array]) -> float:
        """Mean of a function of x_0."""
        return float((self.densities[-1] * function(self.x)).sum() * (self.x[1] - self.x[0]))


def best_policy(
    pretrained: GridPolicy, reward: Callable[[Array], Array], beta: float, charge_later_kl: bool = True
) -> GridPolicy:
    """The best means for fixed standard deviations, by dynamic programming.

        m_t(x) = argmax_m  E[ V_{t-1}(m + std n) ] - beta (m - m^pre)^2 / (2 std^2),    V_0 = r.

    With ``charge_later_kl=False``, V is the expected reward alone. Then each step weighs its own KL only: where
    learning settles if the KL is a term of the loss, whose gradient does not charge an action for the KL of the states
    that it leads to. For many small steps V is then (beta / 2) log E[exp(2 r / beta) | x_t], and each step goes half of
    the way that would be best at beta / 2. With Gaussian data and a linear reward, whose value is linear in x_t, this
    is also the best at beta; otherwise it is not.

    Args:
        pretrained: the policy to start from.
        reward: of x_0, (n,) to (n,).
        beta: per nat.
        charge_later_kl: whether V counts the KL of later steps.
    """
    x, value, means = pretrained.x, reward(pretrained.x), np.empty_like(pretrained.means)
    for t in reversed(range(len(means))):
        std, start = pretrained.std[t], pretrained.means[t]
        hoped = _spline(x, _smoothed(x, value, std))  # E[ V(m + std n) ]
        candidates = start[:, None] + std * np.linspace(-6, 6, 121)
        gain = hoped(candidates) - beta * (candidates - start[:, None]) ** 2 / (2 * std**2)
        nearest = np.take_along_axis(candidates, gain.argmax(1)[:, None], 1)[:, 0]
        means[t] = nearest
        for _ in range(4):  # Newton's method between the candidates beside the best one, where the gain is concave
            slope = hoped(means[t], 1) - beta * (means[t] - start) / std**2
            curvature = np.minimum(hoped(means[t], 2) - beta / std**2, -1e-3 * beta / std**2)
            means[t] = np.clip(means[t] - slope / curvature, nearest - 0.1 * std, nearest + 0.1 * std)
        value = hoped(means[t])
        if charge_later_kl:
            value = value - beta * (means[t] - start) ** 2 / (2 * std**2)
    return GridPolicy(x, means, pretrained.std)


def tilted_density(pretrained: GridPolicy, reward: Callable[[Array], Array], beta: float) -> Array:
    """The sampler's own density of x_0 tilted by exp(r / beta), (n,)."""
    density = pretrained.densities[-1] * np.exp(reward(pretrained.x) / beta)
    return density / (density.sum() * (pretrained.x[1] - pretrained.x[0]))


def _smoothed(x: Array, value: Array, std: float) -> Array:
    """E[ value(x + std n) ] with n ~ N(0, 1), summed over the grid: a value may be steeper than the noise is wide."""
    dx, n = x[1] - x[0], len(x)
    return np.convolve(_widened(x, value)[1], dx * _normal(dx * np.arange(1 - n, n), 0.0, std), "valid")


def _spline(x: Array, value: Array) -> CubicSpline:
    return CubicSpline(*_widened(x, value))


def _widened(x: Array, value: Array) -> tuple[Array, Array]:
    """Grid and values as far again on both sides, mirrored in the ends: a cubic would run off there."""
    wide_x, wide_value = (np.pad(values, len(x) - 1, mode="reflect", reflect_type="odd") for values in (x, value))
    return wide_x, wide_value


def _normal(x: Array, mean: Array | float, std: float) -> Array:
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
