"""The picture of a point: a soft round dot on a sheet with lines, from which its position can be read exactly.

The dot is a Gaussian bump on the grid of pixels. Its centre of mass is the point, up to exp(-2 pi^2 s^2) of a pixel for
a bump of s pixels (Poisson summation: 5e-20 at s = 1.5), so what limits the reading is the precision of the picture.

Letters used for shapes: B pictures, d dimensions of a point (1 or 2), H x W a picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 64  # pixels of a side
PIXELS_PER_UNIT = 8
DOT_PIXELS = 1.5  # standard deviation of the dot
REACH = 3.0  # points further out are drawn here: a unit or five deviations of the dot before the sheet ends

#: How much of each channel (red, green, blue) the dot, and the axes and the frame, take away from white. Positions are
#: read in red, which the lines leave alone.
_DOT, _LINES = (1.0, 0.55, 0.3), (0.0, 0.12, 0.12)


def _coordinates() -> Tensor:
    """Position of each pixel's centre along a side, (64,)."""
    return (torch.arange(SIZE) + 0.5 - SIZE / 2) / PIXELS_PER_UNIT


def draw_dots(points: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1] of points (B, d); the first coordinate goes right, the second one up.

    Coordinates are cut off at +-:data:`REACH`. Points of one dimension lie on the middle line.
    """
    points = torch.nn.functional.pad(points.float().clamp(-REACH, REACH), (0, 2 - points.shape[1]))
    side = _coordinates().to(points.device)
    bumps = (-0.5 * ((side - points[..., None]) * PIXELS_PER_UNIT / DOT_PIXELS).square()).exp()
    dot = bumps[:, 1].flip(1)[:, :, None] * bumps[:, 0][:, None, :]
    is_line = (side.abs() < side[-1] - side[-2]) | (side.abs() == side[-1])
    lines = (is_line[:, None] | is_line).float()
    dot_colour, line_colour = (torch.tensor(colour, device=points.device)[:, None, None] for colour in (_DOT, _LINES))
    return (1 - dot_colour * dot[:, None]) * (1 - line_colour * lines)


def read_dots(images: Tensor) -> Tensor:
    """The points (B, 2) of pictures (B, 3, 64, 64) in [0, 1]; differentiable.

    Raises:
        ValueError: if the pictures are of another size.
    """
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(
            f"a dot is read from pictures of shape (B, 3, {SIZE}, {SIZE}), as the mixture model draws them, got "
            f"{tuple(images.shape)}"
        )
    ink = 1 - images[:, 0].double()
    side = _coordinates().to(ink)
    mass = ink.sum((1, 2))
    return torch.stack([(ink.sum(1) * side).sum(1), (ink.sum(2) * side.flip(0)).sum(1)], dim=1) / mass[:, None]
