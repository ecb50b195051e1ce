"""Scenes of the shapes world: one to four coloured shapes on a soft background.

A scene is a description: which objects, where, how large, on what background. :func:`render` draws it as an image.
Both are batched torch code, and everything is deterministic given the generator.

Letters used for shapes: B scenes, K object slots (4 in random scenes), N objects, H = W = 64 pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 64  # pixels of a side
MAX_OBJECTS = 4

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")

#: RGB in [0, 1] of each colour. They are far apart from one another and from every background, which is close to grey.
PALETTE = torch.tensor(
    [
        [0.86, 0.12, 0.14],  # red
        [0.10, 0.62, 0.22],  # green
        [0.13, 0.30, 0.86],  # blue
        [0.98, 0.86, 0.12],  # yellow
        [0.56, 0.16, 0.70],  # purple
        [0.98, 0.52, 0.08],  # orange
    ]
)

#: Number of corners of each shape (0 for the circle), and its outer and inner radius in units of the object's size.
#: With these outer radii the four shapes look about equally large. The inner radius is that of the points of the
#: outline half-way between two corners.
_CORNERS = torch.tensor([0, 4, 3, 5])
_OUTER = torch.tensor([0.86, 1.05, 1.10, 1.12])
_INNER = _OUTER * torch.tensor([1.0, math.cos(math.pi / 4), math.cos(math.pi / 3), 0.45])

#: Range of the objects' size in pixels, by the number of objects in the scene (index 0 is unused).
_SIZE_RANGE = torch.tensor([[0.0, 0.0], [10.0, 15.0], [9.0, 13.0], [8.5, 11.0], [8.0, 10.0]])

#: Least distance in pixels between the circumscribed circles of two objects; to the border it is half of that.
_GAP = 2.0


@dataclass
class Scenes:
    """Descriptions of a batch of scenes. Slots at and after ``count`` are empty and ignored.

    Attributes:
        count: (B,) int64, number of objects, 1 to 4 in random scenes.
        shape: (B, K) int64, index into :data:`SHAPES`.
        colour: (B, K) int64, index into :data:`COLOURS`.
        centre: (B, K, 2) float32, x (to the right) and y (downwards) in pixels.
        size: (B, K) float32, nominal radius in pixels.
        background: (B, 3, 3, 3) float32 in [0, 1], RGB on a coarse 3x3 grid, which is interpolated
            smoothly.
    """

    count: Tensor
    shape: Tensor
    colour: Tensor
    centre: Tensor
    size: Tensor
    background: Tensor

    def __len__(self) -> int:
        return self.count.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        """Returns some of the scenes; ``index`` is a slice, a mask or an index tensor: the leading axis stays."""
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def present(self) -> Tensor:
        """(B, K) bool: True for the slots that hold an object."""
        return torch.arange(self.shape.shape[1], device=self.count.device) < self.count[:, None]


def place_objects(
    count: Tensor, shape: Tensor, generator: torch.Generator, aligned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws sizes and centres so that no two objects touch and all are wholly inside the image.

    By rejection sampling: each round proposes 64 placements for every scene that has none yet, and takes the first
    valid one.

    Args:
        count: (B,) int64, number of objects.
        shape: (B, K) int64, index into :data:`SHAPES`.
        generator: a CPU generator.
        aligned: (B,) bool; where True, the first two objects are placed clearly beside or above one another.

    Returns:
        Sizes (B, K) and centres (B, K, 2), float32, in pixels.
    """
    n_scenes, candidates = count.shape[0], 64
    sizes = torch.zeros(n_scenes, MAX_OBJECTS)
    centres = torch.zeros(n_scenes, MAX_OBJECTS, 2)
    pairs = list(combinations(range(MAX_OBJECTS), 2))
    todo = torch.arange(n_scenes)
    while len(todo):
        low, high = _SIZE_RANGE[count[todo]].unbind(-1)
        size = low[:, None] + (high - low)[:, None] * torch.rand(len(todo), MAX_OBJECTS, generator=generator)
        radius = size * _OUTER[shape[todo]] + _GAP / 2
        room = IMAGE_SIZE - 2 * radius[:, None, :, None]
        uniform = torch.rand(len(todo), candidates, MAX_OBJECTS, 2, generator=generator)
        centre = radius[:, None, :, None] + room * uniform
        valid = torch.ones(len(todo), candidates, dtype=torch.bool)
        for i, j in pairs:
            distance = (centre[:, :, i] - centre[:, :, j]).norm(dim=-1)
            needed = (radius[:, i] + radius[:, j])[:, None]
            valid &= (distance >= needed) | (count[todo] <= max(i, j))[:, None]
        if aligned is not None:
            offset = (centre[:, :, 0] - centre[:, :, 1]).abs()
            valid &= (offset.amin(-1) <= 0.5 * offset.amax(-1)) | ~aligned[todo, None]
        is_placed, first = valid.max(dim=1)
        rows = torch.nonzero(is_placed).flatten()
        sizes[todo[rows]] = size[rows]
        centres[todo[rows]] = centre[rows, first[rows]]
        todo = todo[~is_placed]
    return sizes, centres


def sample_backgrounds(n_scenes: int, generator: torch.Generator) -> Tensor:
    """Draws soft backgrounds, (B, 3, 3, 3) in [0, 1]: nearly grey, of middle to high brightness, varying smoothly."""
    level = 0.55 + 0.35 * torch.rand(n_scenes, 1, 1, 1, generator=generator)
    tint = 0.05 * (2 * torch.rand(n_scenes, 3, 1, 1, generator=generator) - 1)
    shade = 0.06 * (2 * torch.rand(n_scenes, 1, 3, 3, generator=generator) - 1)
    return (level + tint + shade).clamp(0, 1)


def draw_backgrounds(backgrounds: Tensor) -> Tensor:
    """Interpolates the coarse grids (B, 3, 3, 3) to images (B, 3, H, W)."""
    return F.interpolate(backgrounds, size=IMAGE_SIZE, mode="bilinear", align_corners=True)


def coverage(shape: Tensor, centre: Tensor, size: Tensor) -> Tensor:
    """Returns the share of each pixel that an object covers: an anti-aliased mask.

    The share is 1/2 minus the distance of the pixel from the outline (negative inside), cut off at 0 and 1. All shapes
    but the circle are folded by their rotational symmetry onto half of an edge. There the outline is one straight line,
    from a corner at the radius ``outer`` to the point half-way to the next corner, at the radius ``inner``.

    Args:
        shape: (N,) int64, index into :data:`SHAPES`.
        centre: (N, 2) float32 in pixels.
        size: (N,) float32 in pixels.

    Returns:
        (N, H, W) float32 in [0, 1].
    """
    pixel = torch.arange(IMAGE_SIZE, device=centre.device) + 0.5
    x = pixel[None, None, :] - centre[:, 0, None, None]
    y = pixel[None, :, None] - centre[:, 1, None, None]
    corners, outer, inner = (table.to(size.device)[shape][:, None, None] for table in (_CORNERS, _OUTER, _INNER))
    outer, inner = outer * size[:, None, None], inner * size[:, None, None]

    distance = (x.square() + y.square()).sqrt() - outer  # of circles; replaced below for all other shapes
    polygon = corners.flatten() > 0
    if polygon.any():
        x, y = torch.broadcast_tensors(x[polygon], y[polygon])
        corners, outer, inner = corners[polygon], outer[polygon], inner[polygon]
        half = math.pi / corners
        # The angle is measured from the top, where each polygon has a corner; but a square stands on one of its sides.
        angle = torch.atan2(x, -y) + torch.where(corners == 4, half, 0.0)
        angle = (torch.remainder(angle + half, 2 * half) - half).abs()
        radius = (x.square() + y.square()).sqrt()
        along, across = radius * angle.cos(), radius * angle.sin()
        edge_x, edge_y = inner * half.cos() - outer, inner * half.sin()
        length = (edge_x.square() + edge_y.square()).sqrt()
        distance[polygon] = ((along - outer) * edge_y - across * edge_x) / length
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Scenes) -> Tensor:
    """Draws scenes as images (B, 3, H, W), float32 in [0, 1]."""
    images = draw_backgrounds(scenes.background)
    scene, slot = torch.nonzero(scenes.present, as_tuple=True)
    masks = coverage(scenes.shape[scene, slot], scenes.centre[scene, slot], scenes.size[scene, slot])
    colours = PALETTE.to(masks.device)[scenes.colour[scene, slot]]
    # Objects never overlap, so their masks and colours simply add up.
    total = torch.zeros_like(images[:, 0]).index_add_(0, scene, masks)
    paint = torch.zeros_like(images).index_add_(0, scene, masks[:, None] * colours[:, :, None, None])
    return (images * (1 - total.clamp(max=1))[:, None] + paint).clamp(0, 1)


def sample_scenes(n_scenes: int, generator: torch.Generator) -> Scenes:
    """Draws scenes of one to four objects, every shape and colour equally likely and independent.

    Args:
        n_scenes: number of scenes, B.
        generator: a CPU generator; the same state gives the same scenes.
    """
    count = torch.randint(1, MAX_OBJECTS + 1, (n_scenes,), generator=generator)
    shape = torch.randint(len(SHAPES), (n_scenes, MAX_OBJECTS), generator=generator)
    colour = torch.randint(len(COLOURS), (n_scenes, MAX_OBJECTS), generator=generator)
    size, centre = place_objects(count, shape, generator)
    return Scenes(count, shape, colour, centre, size, sample_backgrounds(n_scenes, generator))
