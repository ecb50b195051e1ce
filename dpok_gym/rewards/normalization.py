"""Standardising a reward before it is weighted, so that weights compare rewards of different scales."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

#: None; ``"running"``, by the mean and standard deviation of all values so far; or by a fixed ``(mean, std)``.
Normalize = Literal["running"] | tuple[float, float] | None

#: A standard deviation below this share of the mean is the rounding of a constant in float32, and not scaled up.
NEGLIGIBLE = 1e-6


def check_normalize(value: Any, name: str) -> Normalize:
    """The setting ``normalize`` of the reward ``name``.

    Raises:
        ValueError: if it is none of the three kinds, or the numbers are not finite or the std not positive.
    """
    if value is None or value == "running":
        return value
    try:
        mean, std = map(float, value)
    except (TypeError, ValueError):
        mean = std = math.nan
    if isinstance(value, str) or not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(
            f"'normalize' of the reward {name!r} must be 'running', a pair [mean, std] of finite numbers with a "
            f"positive std, or None, not {value!r}"
        )
    return mean, std


class RunningStatistics:
    """Mean and standard deviation of all values seen, in float64 and merged batch by batch.

    Source: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """

    def __init__(self, count: float = 0, mean: float = 0.0, squares: float = 0.0) -> None:
        self.count, self.mean, self.squares = count, mean, squares  # squares: the sum of (value - mean)^2

    def update(self, values: Tensor) -> None:
        """Takes in values (B,), all finite; none are allowed too."""
        if not len(values):
            return
        values = values.double()
        n, mean = len(values), values.mean().item()
        total, difference = self.count + n, mean - self.mean
        self.squares += (values - mean).square().sum().item() + difference**2 * self.count * n / total
        self.mean += difference * n / total
        self.count = total

    @property
    def std(self) -> float:
        """The standard deviation; 1 for as long as the values have not differed."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > NEGLIGIBLE * abs(self.mean) else 1.0

    def state(self) -> tuple[float, float, float]:
        """What the constructor takes."""
        return self.count, self.mean, self.squares


def standardize(values: Tensor, mean: float, std: float) -> Tensor:
    """``(values - mean) / std``, float32."""
    return ((values.double() - mean) / std).float()
