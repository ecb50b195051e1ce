"""Gaussian mixtures under the diffusion, and the mixture that each prompt stands for.

Letters used for shapes: B points, K components, d dimensions; a mixture may have leading axes (...), one mixture each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """The density sum_k w_k N(mean_k, axes_k diag(variances_k) axes_k^T).

    Attributes:
        log_weights: (..., K) logarithms of the weights w_k; -inf for a component that is not there.
        means: (..., K, d).
        axes: (..., K, d, d) orthogonal, with the principal axes of each component as columns.
        variances: (..., K, d) along these axes, above 0.
    """

    log_weights: Tensor
    means: Tensor
    axes: Tensor
    variances: Tensor

    @classmethod
    def of(cls, weights: Sequence[float], means: Sequence[Sequence[float]], covariances: Tensor) -> GaussianMixture:
        """Makes a mixture of ordinary covariances, in float64.

        Args:
            weights: K weights that sum to 1.
            means: K points of d coordinates.
            covariances: (K, d, d).
        """
        variances, axes = torch.linalg.eigh(covariances.double())
        return cls(torch.tensor(weights).double().log(), torch.tensor(means).double(), axes, variances)

    @classmethod
    def stack(cls, mixtures: Sequence[GaussianMixture]) -> GaussianMixture:
        """Stacks mixtures along a new leading axis.

        Mixtures with fewer components than the largest one get further components of weight 0.
        """
        size = max(len(mixture.log_weights) for mixture in mixtures)
        padded = [mixture._padded(size) for mixture in mixtures]
        columns = []
        for field in fields(cls):
            columns.append(torch.stack([getattr(mixture, field.name) for mixture in padded]))
        return cls(*columns)

    def _padded(self, size: int) -> GaussianMixture:
        index = torch.arange(size).clamp(max=len(self.log_weights) - 1)
        chosen = self[index]
        missing = torch.arange(size) >= len(self.log_weights)
        return GaussianMixture(
            chosen.log_weights.masked_fill(missing, -math.inf), chosen.means, chosen.axes, chosen.variances
        )

    def __getitem__(self, index: Tensor) -> GaussianMixture:
        return GaussianMixture(*(getattr(self, field.name)[index] for field in fields(self)))

    def noised(self, alpha_bar: Tensor) -> GaussianMixture:
        """Returns the density of x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.

        Args:
            alpha_bar: (...) in [0, 1].
        """
        alpha_bar = alpha_bar[..., None, None]
        return GaussianMixture(
            self.log_weights, alpha_bar.sqrt() * self.means, self.axes, alpha_bar * self.variances + 1 - alpha_bar
        )

    def tilted(self, slope: Tensor) -> GaussianMixture:
        """Returns this density times exp(slope . x), normalised: a mixture with the same covariances.

        Args:
            slope: (d,).
        """
        moves = self.covariances @ slope
        log_weights = self.log_weights + self.means @ slope + 0.5 * moves @ slope
        return GaussianMixture(log_weights.log_softmax(-1), self.means + moves, self.axes, self.variances)

    def posterior(self, x: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the distribution of x_0 given x_t.

        Args:
            x: (..., d) x_t.
            alpha_bar: (...) in [0, 1].

        Returns:
            Its mean (..., d) and covariance (..., d, d).
        """
        noised = self.noised(alpha_bar)
        along = noised._along_axes(x)
        weights = noised._log_densities(along).softmax(-1)[..., None]
        # Within a component, x_0 and x_t are Gaussian, so the posterior mean is linear in x_t (as in a Kalman filter).
        gain = alpha_bar[..., None, None].sqrt() * self.variances / noised.variances
        component_means = self.means + (self.axes * (gain * along)[..., None, :]).sum(-1)
        mean = (weights * component_means).sum(-2)
        within = GaussianMixture(
            self.log_weights,
            self.means,
            self.axes,
            (1 - alpha_bar)[..., None, None] * self.variances / noised.variances,
        ).covariances
        # Law of total variance: the covariance within the components plus that between them.
        apart = component_means - mean[..., None, :]
        between = apart[..., :, None] * apart[..., None, :]
        return mean, (weights[..., None] * (within + between)).sum(-3)

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density (...) of points (..., d), in nats."""
        return self._log_densities(self._along_axes(x)).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Returns the probability of each component given a point (..., d), (..., K)."""
        return self._log_densities(self._along_axes(x)).softmax(-1)

    def _along_axes(self, x: Tensor) -> Tensor:
        """Returns x - mean_k along the axes of each component, (..., K, d)."""
        return ((x[..., None, :] - self.means)[..., None] * self.axes).sum(-2)

    def _log_densities(self, along: Tensor) -> Tensor:
        """Returns log(w_k N_k(x)), (..., K)."""
        square = along.square() / self.variances + self.variances.log() + math.log(2 * math.pi)
        return self.log_weights - 0.5 * square.sum(-1)

    @property
    def covariances(self) -> Tensor:
        """(..., K, d, d): the covariance of each component."""
        scaled = self.axes * self.variances[..., None, :]
        return (scaled[..., :, None, :] * self.axes[..., None, :, :]).sum(-1)


def _round(means: Sequence[Sequence[float]], std: float) -> GaussianMixture:
    """Returns a mixture of round components of the same weight and standard deviation."""
    n, d = len(means), len(means[0])
    return GaussianMixture.of([1 / n] * n, means, std**2 * torch.eye(d).expand(n, d, d))


def _ring(n: int, radius: float) -> list[list[float]]:
    """Returns n points at equal distances on a circle around 0."""
    angles = [2 * math.pi * k / n for k in range(n)]
    return [[radius * math.cos(angle), radius * math.sin(angle)] for angle in angles]


#: The mixture that each prompt stands for, by the number of dimensions.
MIXTURES: dict[int, dict[str, GaussianMixture]] = {
    1: {
        "one gaussian": _round([[0.0]], 0.5),
        "two modes": _round([[-1.0], [1.0]], 0.25),
    },
    2: {
        "one gaussian": GaussianMixture.of([1.0], [[0.0, 0.0]], torch.tensor([[[0.25, 0.12], [0.12, 0.16]]])),
        "two modes": _round([[-1.0, 0.0], [1.0, 0.0]], 0.25),
        "three modes": _round(_ring(3, 1.0), 0.25),
        "ring of six": _round(_ring(6, 1.25), 0.2),
    },
}
