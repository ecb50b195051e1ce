"""Rewards standardised by running statistics, so that weights compare rewards of different scales."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dpok_gym.rewards import RewardBatch

#: A standard deviation below this share of the mean is the rounding of a constant in float32, and is not scaled up.
NEGLIGIBLE = 1e-6


class RunningStatistics:
    """Mean and standard deviation of all values seen, in float64, merged batch by batch.

    Source: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".

    Args:
        count: number of values seen.
        mean: of these values.
        squares: sum of (value - mean)^2.
    """

    def __init__(self, count: float = 0, mean: float = 0.0, squares: float = 0.0) -> None:
        self.count, self.mean, self.squares = count, mean, squares

    def update(self, values: Tensor) -> None:
        """Takes in values (B,), all finite; B may be 0."""
        if not len(values):
            return
        values = values.double()
        n, mean = len(values), values.mean().item()
        total, difference = self.count + n, mean - self.mean
        self.squares += (values - mean).square().sum().item() + difference**2 * self.count * n / total
        self.mean += difference * n / total
        self.count = total

    def state(self) -> list[float]:
        """Returns the constructor's arguments, count, mean and sum of squares."""
        return [self.count, self.mean, self.squares]

    @property
    def std(self) -> float:
        """The standard deviation; 1 for as long as the values have not differed."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > NEGLIGIBLE * abs(self.mean) else 1.0


class RewardNormalizer:
    """Weighs rewards after standardising each by the mean and standard deviation of all its values so far.

    The learner does this and not the environment, as with SB3's ``VecNormalize``: an image's raw reward does not depend
    on the images before it. Evaluations and logs show raw rewards.
    """

    def __init__(self) -> None:
        self.statistics: dict[str, RunningStatistics] = {}

    def __call__(self, rewards: RewardBatch) -> Tensor:
        """Learns from the valid rewards of a batch, then returns its normalised total (B,), 0 where not valid."""
        total = torch.zeros(len(rewards.total), dtype=torch.float64)
        for name, values in rewards.components.items():
            statistics = self.statistics.setdefault(name, RunningStatistics())
            statistics.update(values[rewards.valid])
            # A component that has only had one value so far adds 0.
            total += rewards.weights[name] * (values.double() - statistics.mean) / statistics.std
        return total.float().where(rewards.valid, 0.0)

    def state_dict(self) -> dict[str, list[float]]:
        """Returns count, mean and sum of squares of each component."""
        return {name: statistics.state() for name, statistics in self.statistics.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Goes on with the statistics that :meth:`state_dict` returned."""
        self.statistics = {name: RunningStatistics(*saved) for name, saved in state.items()}
