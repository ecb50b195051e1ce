"""The image of a point: a soft round dot on a sheet with lines. The position can be read from the image exactly.

The dot is a Gaussian bump, sampled on the grid of pixels. For a bump with a standard deviation of s pixels, its centre
of mass differs from the point by about exp(-2 pi^2 s^2) of a pixel (Poisson summation): 5e-20 at s = 1.5. So only the
image's own precision limits the reading.

Letters used for shapes: B images, d dimensions of a point (1 or 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE_SIZE = 64  # pixels of a side
PIXELS_PER_UNIT = 8
DOT_PIXELS = 1.5  # standard deviation of the dot
REACH = 3.0  # a larger coordinate is drawn here, where the whole dot still fits on the sheet, which ends at 4

#: Colours of the dot and of the lines (the axes and the frame), as the red, green and blue that they take away from
#: white. The lines take away no red, so positions are read from the red channel.
_DOT, _LINES = (1.0, 0.55, 0.3), (0.0, 0.12, 0.12)


def _coordinates() -> Tensor:
    """Returns the coordinate of each pixel's centre along a side, (64,)."""
    return (torch.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2) / PIXELS_PER_UNIT


def draw_dots(points: Tensor) -> Tensor:
    """Draws points; the first coordinate goes to the right, the second one up.

    Args:
        points: (B, d); coordinates are cut off at +-:data:`REACH`. Points of one dimension lie on the middle line.

    Returns:
        (B, 3, 64, 64) float32 in [0, 1].
    """
    points = torch.nn.functional.pad(points.float().clamp(-REACH, REACH), (0, 2 - points.shape[1]))
    side = _coordinates().to(points.device)
    bumps = (-0.5 * ((side - points[..., None]) * PIXELS_PER_UNIT / DOT_PIXELS).square()).exp()
    dot = bumps[:, 1].flip(1)[:, :, None] * bumps[:, 0][:, None, :]
    is_line = (side.abs() < side[-1] - side[-2]) | (side.abs() == side[-1])
    lines = (is_line[:, None] | is_line).float()
    dot_colour = torch.tensor(_DOT, device=points.device)[:, None, None]
    line_colour = torch.tensor(_LINES, device=points.device)[:, None, None]
    return (1 - dot_colour * dot[:, None]) * (1 - line_colour * lines)


def read_dots(images: Tensor) -> Tensor:
    """Reads the position of the dot in images that :func:`draw_dots` drew. It is differentiable.

    Args:
        images: (B, 3, 64, 64) in [0, 1].

    Returns:
        (B, 2) float64.

    Raises:
        ValueError: if the images are of another size.
    """
    if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"a dot is read from images of shape (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), as the mixture model draws them, "
            f"got {tuple(images.shape)}"
        )
    ink = 1 - images[:, 0].double()
    side = _coordinates().to(ink)
    mass = ink.sum((1, 2))
    return torch.stack([(ink.sum(1) * side).sum(1), (ink.sum(2) * side.flip(0)).sum(1)], dim=1) / mass[:, None]
