"""The policies that fine-tuning of the mixture model should find, computed without learning.

A sampler of T steps is a chain of Gaussians N(m_t(x_t), std_t^2 I) that starts from x_T ~ N(0, I). Fine-tuning changes
the means m_t away from the pre-trained m_t^ref. Its objective (Fan et al. 2023, Eq. 8) is

    max over the means of   E[ r(x_0) - beta sum_t KL_t ],    KL_t = ||m_t(x_t) - m_t^ref(x_t)||^2 / (2 std_t^2).

It is solved here in closed form for Gaussian data and a linear reward, and on a grid in one dimension; everything in
float64.

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

from dpok_gym.mixture.data import GaussianMixture
from dpok_gym.samplers.transition_table import TransitionTable

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GaussianSampler:
    """The exact sampler of Gaussian data. Each of its steps is linear.

    Attributes:
        gains: (T, d, d), the matrices in m_t(x) = gain x + offset.
        offsets: (T, d).
        std: (T,) of each step.
        mean: (d,) of the samples x_0.
        covariance: (d, d) of the samples x_0.
        covariance_given_start: (d, d) of x_0 given x_T.
    """

    gains: Tensor
    offsets: Tensor
    std: Tensor
    mean: Tensor
    covariance: Tensor
    covariance_given_start: Tensor

    @classmethod
    def of(cls, data: GaussianMixture, table: TransitionTable, alphas_cumprod: Tensor) -> GaussianSampler:
        """Computes the sampler of a mixture with one component.

        Args:
            data: the mixture.
            table: T denoising steps of a model that predicts the noise.
            alphas_cumprod: alpha_bar at each training timestep.
        """
        identity = torch.eye(data.means.shape[-1]).double()
        alpha_bar = alphas_cumprod.double()[table.timesteps][:, None, None]
        precision = torch.linalg.inv(alpha_bar * data.covariances + (1 - alpha_bar) * identity)
        # The exact output is sqrt(1 - alpha_bar) precision (x - sqrt(alpha_bar) mean), which is linear in x.
        pull = table.output_coef.double()[:, None, None] * (1 - alpha_bar).sqrt() * precision
        gains = table.sample_coef.double()[:, None, None] * identity + pull
        offsets = -(pull @ (alpha_bar.sqrt() * data.means[:, :, None])).squeeze(-1)
        mean, from_start, covariance = torch.zeros_like(data.means[0]), identity, torch.zeros_like(identity)
        for gain, offset, std in zip(gains, offsets, table.std.double(), strict=True):
            mean, from_start = gain @ mean + offset, gain @ from_start
            covariance = gain @ covariance @ gain.T + std**2 * identity
        return cls(gains, offsets, table.std.double(), mean, from_start @ from_start.T + covariance, covariance)

    def optimal_shift(self, slope: Tensor, beta: float) -> Tensor:
        """Returns how far the best policy moves the mean of x_0 for the reward slope . x_0; the covariance stays.

        Given x_T, the optimum is the sampler's distribution multiplied by exp(r / beta). The value is linear in every
        state, so each step's mean moves by std^2 / beta times the value's gradient, and nothing else changes: a policy
        can reach the optimum at any T. It cannot change x_T, so only the covariance given x_T counts.

        Args:
            slope: (d,).
            beta: weight of the KL, above 0.

        Returns:
            (d,).
        """
        return self.covariance_given_start @ slope / beta


@dataclass(frozen=True)
class GridPolicy:
    """A policy in one dimension, known at the points of a grid.

    Attributes:
        x: (n,) the grid, evenly spaced.
        means: (T, n) m_t(x), the noisiest step first.
        std: (T,) of each step.
    """

    x: Array
    means: Array
    std: Array

    @classmethod
    def of(cls, mean: Callable[[int, Tensor], Tensor], std: Tensor, x: Array) -> GridPolicy:
        """Computes the means of a policy at the points of a grid.

        Args:
            mean: takes the step, 0 for the noisiest one, and latents (n, 1, 1, 1); returns the means in that shape.
            std: (T,) of each step.
            x: (n,) the grid; finer than the smallest std and wide enough for the noise, such as 0.02 from -6 to 6.
        """
        latents = torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 1, 1)
        with torch.no_grad():
            means = [mean(step, latents).flatten().double().cpu().numpy() for step in range(len(std))]
        return cls(x, np.array(means), std.double().cpu().numpy())

    @cached_property
    def densities(self) -> Array:
        """(T + 1, n): the densities of x_T, ..., x_0 on the grid."""
        dx = self.x[1] - self.x[0]
        densities = [_normal(self.x, 0.0, 1.0)]
        for means, std in zip(self.means, self.std, strict=True):
            densities.append(dx * densities[-1] @ _normal(self.x[None], means[:, None], std))
        return np.array(densities)

    def step_kl(self, reference: GridPolicy) -> Array:
        """Returns E[ KL_t ] of each step under this policy, (T,), in nats. The sum is the KL of the trajectories."""
        kl = (self.means - reference.means) ** 2 / (2 * self.std[:, None] ** 2)
        return (self.densities[:-1] * kl).sum(1) * (self.x[1] - self.x[0])

    def final_kl(self, reference: GridPolicy) -> float:
        """Returns the KL of the distributions of x_0, in nats."""
        ours, theirs = self.densities[-1], reference.densities[-1]
        inside = ours > 1e-300  # a smaller density adds nothing, and its logarithm may be -inf
        log_ratio = np.log(ours[inside] / np.maximum(theirs[inside], 1e-300))
        return float((ours[inside] * log_ratio).sum() * (self.x[1] - self.x[0]))

    def expectation(self, function: Callable[[Array], Array]) -> float:
        """Returns the mean of a function of x_0, which takes and returns (n,)."""
        return float((self.densities[-1] * function(self.x)).sum() * (self.x[1] - self.x[0]))


def best_policy(
    reference: GridPolicy, reward: Callable[[Array], Array], beta: float, charge_later_kl: bool = True
) -> GridPolicy:
    """Computes the best means for fixed standard deviations, by dynamic programming from the last step to the first.

        m_t(x) = argmax_m  E[ V_{t-1}(m + std n) ] - beta (m - m^ref)^2 / (2 std^2),    V_0 = r.

    With ``charge_later_kl=False``, V is the expected reward alone, so each step weighs only its own KL. Learning
    settles there if the KL is a term of the loss: its gradient does not charge an action for the KL of the states that
    follow. For many small steps V is then (beta / 2) log E[exp(2 r / beta) | x_t], and each step goes half of the way
    that would be best at beta / 2. For Gaussian data and a linear reward, whose value is linear in x_t, this is also
    the best policy at beta; in general it is not.

    Args:
        reference: the policy to start from.
        reward: a function of x_0, (n,) to (n,).
        beta: weight of the KL, reward per nat, above 0.
        charge_later_kl: True if V subtracts the KL of later steps, as the objective does.
    """
    x, value, means = reference.x, reward(reference.x), np.empty_like(reference.means)
    for t in reversed(range(len(means))):
        std, start = reference.std[t], reference.means[t]
        expected_value = _spline(x, _smoothed(x, value, std))  # E[ V(m + std n) ] as a function of m
        candidates = start[:, None] + std * np.linspace(-6, 6, 121)
        gain = expected_value(candidates) - beta * (candidates - start[:, None]) ** 2 / (2 * std**2)
        nearest = np.take_along_axis(candidates, gain.argmax(1)[:, None], 1)[:, 0]
        means[t] = nearest
        # Newton's method refines the best candidate. It stays between the two candidates beside it, where the gain is
        # concave; the bound on the curvature keeps a step finite where a kink of the spline says otherwise.
        for _ in range(4):
            slope = expected_value(means[t], 1) - beta * (means[t] - start) / std**2
            curvature = np.minimum(expected_value(means[t], 2) - beta / std**2, -1e-3 * beta / std**2)
            means[t] = np.clip(means[t] - slope / curvature, nearest - 0.1 * std, nearest + 0.1 * std)
        value = expected_value(means[t])
        if charge_later_kl:
            value = value - beta * (means[t] - start) ** 2 / (2 * std**2)
    return GridPolicy(x, means, reference.std)


def tilted_density(reference: GridPolicy, reward: Callable[[Array], Array], beta: float) -> Array:
    """Returns the sampler's own density of x_0 multiplied by exp(r / beta) and normalised, (n,)."""
    density = reference.densities[-1] * np.exp(reward(reference.x) / beta)
    return density / (density.sum() * (reference.x[1] - reference.x[0]))


def _smoothed(x: Array, value: Array, std: float) -> Array:
    """Returns E[ value(x + std n) ] with n ~ N(0, 1), as a sum over the grid.

    A quadrature with few nodes would miss a value that changes within one standard deviation of the noise.
    """
    dx, n = x[1] - x[0], len(x)
    return np.convolve(_widened(x, value)[1], dx * _normal(dx * np.arange(1 - n, n), 0.0, std), "valid")


def _spline(x: Array, value: Array) -> CubicSpline:
    return CubicSpline(*_widened(x, value))


def _widened(x: Array, value: Array) -> tuple[Array, Array]:
    """Returns the grid and the values continued on both sides by the grid's width, mirrored in the end points.

    A cubic spline diverges outside of its points.
    """
    wide_x, wide_value = (np.pad(values, len(x) - 1, mode="reflect", reflect_type="odd") for values in (x, value))
    return wide_x, wide_value


def _normal(x: Array, mean: Array | float, std: float) -> Array:
    """Returns the density of N(mean, std^2)."""
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
