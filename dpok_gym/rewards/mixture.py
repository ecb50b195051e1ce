"""Rewards of the mixture model: where the dot is, read from the picture."""

from __future__ import annotations

from torch import Tensor

from dpok_gym.mixture.picture import read_dots


class MixtureLinear:
    """How far right the dot is, in units of the data: r(x) = x_1."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) for ``images`` (B, 3, 64, 64), whatever the prompts."""
        return read_dots(images)[:, 0]


class MixtureQuadratic:
    """Minus the squared distance of the dot from (1, 0): r(x) = -||x - (1, 0)||^2."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) for ``images`` (B, 3, 64, 64), whatever the prompts."""
        point = read_dots(images)
        return -(point - point.new_tensor([1.0, 0.0])).square().sum(1)
