"""Finds the objects in images of the shapes world, by plain image analysis without a network.

1. The background is fitted.
2. Every pixel is explained as a blend of the background and one colour of the palette.
3. Connected pixels are an object.
4. Each object gets the shape whose drawing overlaps it best.

Letters used for shapes: B images, N objects in all of them, C = 6 colours, S = 4 shapes, H = W = 64 pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from dpok_gym.shapes.scenes import COLOURS, IMAGE_SIZE, PALETTE, SHAPES, Scenes, coverage, draw_backgrounds

#: Images that are analysed together; this bounds the memory and keeps the work in the processor's cache.
CHUNK = 64

#: A pixel may be background if its largest and smallest channel differ by less than this. They differ by at most 0.1 in
#: backgrounds and by at least 0.52 in the palette. Between these lie anti-aliased edges and the autoencoder's errors.
GREY = 0.2
#: A pixel belongs to an object if a colour of the palette covers at least this share of it ...
COVERED = 0.5
#: ... and if its RGB distance to the blend of background and that colour is at most this. A colour half-way between two
#: neighbouring hues is within 0.24 of both. Yellow and orange, the closest hues, are 0.28 from each other's blends.
COLOUR_TOLERANCE = 0.27
#: Groups of fewer pixels are specks, not objects: they cost quality only. The smallest object sampled has about 100.
SPECK = 24
#: A shape is recognised if its drawing and the object overlap by at least this part of their union. Clean objects reach
#: 0.98, reconstructions by the autoencoder about 0.9, two squares side by side 0.6.
RECOGNISED = 0.75

#: Area of each shape of size 1, in square pixels, in the order of ``SHAPES``.
_UNIT_AREA = torch.tensor(
    [
        math.pi * 0.86**2,
        2 * 1.05**2,
        3 * math.sqrt(3) / 4 * 1.10**2,
        5 * math.sin(math.pi / 5) * 0.45 * 1.12**2,
    ]
)


def detect_objects(images: Tensor) -> Scenes:
    """Finds the objects and the backgrounds of images.

    Args:
        images: (B, 3, H, W) floating point in [0, 1].

    Returns:
        The scenes, on the CPU. They have as many slots as the fullest image has objects, at least one; ``count`` may
        be 0. An object whose outline fits none of the shapes has shape -1 and the size of a circle of the same area.
        It comes after all recognised objects of its image.

    Raises:
        ValueError: if the images are of another shape, type or range.
    """
    images = check_images(images)
    backgrounds, objects = [], []
    for first, chunk in zip(range(0, len(images), CHUNK), images.split(CHUNK), strict=True):
        background = fit_backgrounds(chunk)
        scene, *attributes = _find_objects(chunk, draw_backgrounds(background))
        backgrounds.append(background)
        objects.append((scene + first, *attributes))
    columns = [torch.cat(parts) for parts in zip(*objects, strict=True)]
    return _pack(torch.cat(backgrounds), *columns)


def check_images(images: Tensor) -> Tensor:
    """Checks images of this world; returns them as (B, 3, H, W) float32 on the CPU.

    Raises:
        ValueError: if they are of another shape, type or range, or there is none.
    """
    wanted = f"(B, 3, {IMAGE_SIZE}, {IMAGE_SIZE})"
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"the shapes world's images are {wanted}, not {tuple(images.shape)}; resize or permute them")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], not {images.dtype}; divide bytes by 255")
    if not len(images):
        raise ValueError("there is no image; give at least one")
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails
        raise ValueError(f"images must be in [0, 1], but range from {low} to {high}; map [-1, 1] by (x + 1) / 2")
    return images.detach().float().cpu()


def fit_backgrounds(images: Tensor) -> Tensor:
    """Fits the coarse background grid by least squares to the pixels that are nearly grey, without edges of objects.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, 3, 3) in [0, 1].
    """
    smooth = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)  # noise would hide the grey
    coloured = (smooth.amax(1, keepdim=True) - smooth.amin(1, keepdim=True) >= GREY).float()
    edge = F.max_pool2d(coloured, 5, stride=1, padding=2)
    # The small weight of all other pixels defines the fit of an image that has no grey pixel.
    weight = (1 - edge.flatten(1)).double().clamp(min=1e-4)  # (B, H * W)
    # The drawing is linear in the grid. Three grids of three channels have room for the images of all nine grid points.
    basis = draw_backgrounds(torch.eye(9).double().reshape(3, 3, 3, 3)).reshape(9, -1)
    pair = (basis[:, None] * basis[None]).flatten(0, 1)  # (81, H * W)
    matrix = (weight @ pair.T).unflatten(1, (9, 9))
    target = basis @ (weight[:, None] * images.flatten(2)).transpose(1, 2)  # (B, 9, 3)
    return torch.linalg.solve(matrix, target).transpose(1, 2).unflatten(2, (3, 3)).clamp(0, 1).float()


def _find_objects(images: Tensor, backgrounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Finds all objects, ordered by image.

    Returns:
        The index of each object's image (N,), its shape (N,), colour (N,), centre (N, 2) and size (N,).
    """
    share, error = _explain_pixels(images, backgrounds)
    explained = error <= COLOUR_TOLERANCE**2  # (B, C, H, W)
    core = (explained & (share >= COVERED)).any(1)  # (B, H, W)
    # Pixels are connected through their edges, not through corners, and never from one image to the next.
    structure = np.zeros((3, 3, 3), int)
    structure[1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(core.numpy(), structure)
    kept = np.bincount(labels.ravel()) >= SPECK
    kept[0] = False
    number = np.cumsum(kept)  # renumbers the objects from 1 to N
    label = torch.from_numpy(np.where(kept, number, 0)[labels])  # (B, H, W), 0 where there is no object
    n_objects = int(number[-1])

    # An object has one colour, that of most of its pixels.
    inside = label > 0
    index = label[inside] - 1  # of the object that each inner pixel belongs to
    nearest = error.movedim(1, 3)[inside].argmin(1)
    votes = torch.bincount(index * len(COLOURS) + nearest, minlength=n_objects * len(COLOURS))
    colour = votes.reshape(n_objects, len(COLOURS)).argmax(1)
    scene = torch.zeros(n_objects, dtype=torch.int64)
    scene[index] = torch.nonzero(inside)[:, 0]

    # The mask has soft edges: it is the coverage by the object's colour, in the object and the two pixels around it.
    # Pixels clearly of another colour are holes in it: a disc that is half red and half green is no circle.
    grown = F.max_pool2d(label[:, None].float(), 5, stride=1, padding=2)[:, 0]
    grown = torch.where(inside, label.float(), grown)
    own = grown[scene] == torch.arange(1, n_objects + 1)[:, None, None]
    hole = core[scene] & ~explained[scene, colour]
    mask = share[scene, colour] * (own & ~hole)
    return (scene, *_fit_shape(mask, colour))


def _explain_pixels(images: Tensor, backgrounds: Tensor) -> tuple[Tensor, Tensor]:
    """Explains every pixel p as a blend ``(1 - a) b + a c`` of its background b and one palette colour c.

    Args:
        images: (B, 3, H, W) in [0, 1].
        backgrounds: (B, 3, H, W) in [0, 1].

    Returns:
        share: (B, C, H, W), for each colour the a in [0, 1] with the least error.
        error: (B, C, H, W), that error: the squared RGB distance to the blend.
    """
    offset = images - backgrounds
    # |p - b - a (c - b)|^2 with the squares multiplied out, which saves arrays with three channels for every colour.
    projection = torch.einsum("kc,bchw->bkhw", PALETTE, offset) - (offset * backgrounds).sum(1, keepdim=True)
    length = PALETTE.square().sum(1)[:, None, None] + backgrounds.square().sum(1, keepdim=True)
    length = length - 2 * torch.einsum("kc,bchw->bkhw", PALETTE, backgrounds)
    share = (projection / length).clamp(0, 1)
    error = offset.square().sum(1, keepdim=True) + share * (share * length - 2 * projection)
    return share, error


def _fit_shape(mask: Tensor, colour: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Finds the shape whose drawing overlaps each soft mask best.

    All shapes are regular, so the centroid of a mask is the centre of its shape, and the area gives the size.

    Args:
        mask: (N, H, W) in [0, 1].
        colour: (N,), passed on.

    Returns:
        The shape (N,), -1 where none is recognised, the colour (N,), centre (N, 2) and size (N,).
    """
    pixel = torch.arange(IMAGE_SIZE).double() + 0.5
    column, row = mask.sum(1, dtype=torch.float64), mask.sum(2, dtype=torch.float64)  # (N, W), (N, H)
    area = row.sum(1).clamp(min=1e-6)
    centre = (torch.stack([column @ pixel, row @ pixel], 1) / area[:, None]).float()
    area = area.float()
    size = (area[:, None] / _UNIT_AREA).sqrt()  # (N, S)
    n_objects, n_shapes = size.shape
    shape = torch.arange(n_shapes).repeat(n_objects)
    drawn = coverage(shape, centre.repeat_interleave(n_shapes, 0), size.flatten()).unflatten(0, (-1, n_shapes))
    shared = torch.minimum(drawn, mask[:, None]).sum((2, 3))
    overlap, shape = (shared / (drawn.sum((2, 3)) + area[:, None] - shared)).max(1)
    size = size.gather(1, shape[:, None])[:, 0]
    recognised = overlap >= RECOGNISED
    size = torch.where(recognised, size, (area / _UNIT_AREA[SHAPES.index("circle")]).sqrt())
    return torch.where(recognised, shape, -1), colour, centre, size


def _pack(background: Tensor, scene: Tensor, shape: Tensor, colour: Tensor, centre: Tensor, size: Tensor) -> Scenes:
    """Puts N objects, ordered by image, into the slots of scenes; recognised objects come first."""
    order = (2 * scene + (shape < 0)).argsort(stable=True)
    scene = scene[order]
    count = torch.bincount(scene, minlength=len(background))
    slot = torch.arange(len(scene)) - (count.cumsum(0) - count)[scene]
    n_slots = max(1, int(count.max()))

    def packed(values: Tensor) -> Tensor:
        slots = values.new_zeros(len(background), n_slots, *values.shape[1:])
        slots[scene, slot] = values[order]
        return slots

    return Scenes(count, packed(shape), packed(colour), packed(centre), packed(size), background)
