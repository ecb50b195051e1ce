"""The rewards of the mixture world: functions of the position of the dot, which is read from the image."""

from __future__ import annotations

from torch import Tensor

from dpok_gym.mixture.image import read_dots


class MixtureLinear:
    """The first coordinate of the dot, in units of the data: r(x) = x_1.

    Without KL its optimum is the cap: all points at the largest coordinate that an image can show.
    """

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) float64 for ``images`` (B, 3, 64, 64); the prompts do not matter."""
        return read_dots(images)[:, 0]


class MixtureQuadratic:
    """Minus the squared distance of the dot from (1, 0): r(x) = -||x - (1, 0)||^2."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) float64 for ``images`` (B, 3, 64, 64); the prompts do not matter."""
        point = read_dots(images)
        return -(point - point.new_tensor([1.0, 0.0])).square().sum(1)


class MixtureBump:
    """A smooth bump around (1, 0): r(x) = exp(-||x - (1, 0)||^2 / 2), in (0, 1].

    Its largest value lies inside the sheet, so there is an optimum without KL too, and no edge is part of it.
    """

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) float64 for ``images`` (B, 3, 64, 64); the prompts do not matter."""
        point = read_dots(images)
        return (-0.5 * (point - point.new_tensor([1.0, 0.0])).square().sum(1)).exp()
