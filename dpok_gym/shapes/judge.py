"""Reads pictures of the shapes world back into scenes and says how well they follow their prompts.

Plain image analysis, no network: the background is fitted, every pixel is explained as background shining through
some coverage of one palette colour, connected pixels are objects, and each object gets the shape whose drawing
overlaps it best. Deterministic, and a picture's verdict does not depend on the others in its batch: long sums are
taken in float64, so the float32 results do not show the order of summation. Everything runs on the CPU.

Letters used for shapes: B pictures, N objects in all of them, C = 6 colours, S = 4 shapes, H = W = 64 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from dpok_gym.shapes.captions import Request, parse_prompt, relation_of
from dpok_gym.shapes.scenes import COLOURS, IMAGE_SIZE, PALETTE, SHAPES, Scenes, coverage, draw_backgrounds, render

CHUNK = 64  # pictures read at a time; bounds the memory and keeps the work in the processor's cache

#: A pixel is a candidate for background where its largest and smallest channel differ less than this. Backgrounds
#: reach 0.1, the palette starts at 0.52; the rest is for anti-aliased edges and the autoencoder's errors.
GREY = 0.2
#: A pixel belongs to an object where at least this share of it is covered by a palette colour ...
COVERED = 0.5
#: ... and where its RGB distance to the blend of background and that colour is at most this. What is half-way between
#: neighbouring hues is within 0.24 of both; yellow and orange, the closest, are 0.28 from each other's blends.
COLOUR_TOLERANCE = 0.27
#: Smaller groups of pixels are specks, not objects: they cost quality only. The smallest object sampled has about 100.
SPECK = 24
#: The shape is recognised where its drawing and the object share at least this part of their union. Clean objects
#: reach 0.98, reconstructions about 0.9; two squares side by side reach 0.6.
RECOGNISED = 0.75
#: Quality is exp(-SHARPNESS * error).
SHARPNESS = 8.0

#: Area of each shape of size 1, in square pixels; the order is that of ``SHAPES``.
_UNIT_AREA = torch.tensor(
    [
        math.pi * 0.86**2,
        2 * 1.05**2,
        3 * math.sqrt(3) / 4 * 1.10**2,
        5 * math.sin(math.pi / 5) * 0.45 * 1.12**2,
    ]
)


@dataclass
class Judgement:
    """What the judge says about a batch of pictures.

    Attributes:
        alignment: (B,) float32 in [0, 1], see :func:`align`.
        quality: (B,) float32 in [0, 1], see :func:`quality`.
        scenes: what was read, see :func:`read`.
    """

    alignment: Tensor
    quality: Tensor
    scenes: Scenes


def judge(pictures: Tensor, prompts: Sequence[str]) -> Judgement:
    """Reads pictures and compares them with their prompts.

    Args:
        pictures: (B, 3, H, W) floating point in [0, 1].
        prompts: B texts of the forms in :mod:`~dpok_gym.shapes.captions`.

    Raises:
        ValueError: if the pictures are not as above, or a prompt cannot be parsed, or the numbers differ.
    """
    requests = [parse_prompt(prompt) for prompt in prompts]
    scenes = read(pictures)
    return Judgement(align(scenes, requests), quality(pictures, scenes), scenes)


def read(pictures: Tensor) -> Scenes:
    """Reads pictures back into their objects and backgrounds.

    Args:
        pictures: (B, 3, H, W) floating point in [0, 1].

    Returns:
        The scenes, on the CPU. There are as many slots as the fullest picture has objects, at least one; ``count``
        may be 0. An object whose outline fits none of the shapes has shape -1 (its size is that of a circle of the
        same area), and comes after all the picture's recognised ones.

    Raises:
        ValueError: if the pictures are of another shape, type or range.
    """
    pictures = _checked(pictures)
    backgrounds, found = [], []
    for first, chunk in zip(range(0, len(pictures), CHUNK), pictures.split(CHUNK), strict=True):
        background = fit_backgrounds(chunk)
        scene, *objects = _find_objects(chunk, draw_backgrounds(background))
        backgrounds.append(background)
        found.append((scene + first, *objects))
    return _pack(torch.cat(backgrounds), *(torch.cat(parts) for parts in zip(*found, strict=True)))


def align(scenes: Scenes, requests: Sequence[Request]) -> Tensor:
    """How much of what was requested a scene holds; 1 exactly when all of it and nothing else is there.

    With n objects requested and m there, an assignment pi of the ones to the others, and the relation, if one is
    requested, counted as one more requirement::

        alignment = (max_pi sum_i credit(i, pi(i)) + relation) / (max(n, m) + [a relation is requested])

    where ``credit`` is 1/2 for the same colour plus 1/2 for the same shape, and ``relation`` is 1 where two objects of
    the two requested kinds lie to each other as requested, else 0. An unrecognisable shape is never the same.

    Args:
        scenes: B scenes, from :func:`read` or from a sampler.
        requests: B requests.

    Returns:
        (B,) float32 in [0, 1].

    Raises:
        ValueError: if the numbers of scenes and requests differ.
    """
    if len(scenes) != len(requests):
        raise ValueError(f"there are {len(scenes)} scenes but {len(requests)} requests; give one request for each")
    rows = zip(scenes.count.tolist(), scenes.colour.tolist(), scenes.shape.tolist(), scenes.centre, strict=True)
    return torch.tensor(
        [
            _align_one(colours[:n], shapes[:n], centres[:n], request)
            for (n, colours, shapes, centres), request in zip(rows, requests, strict=True)
        ],
        dtype=torch.float32,
    )


def quality(pictures: Tensor, scenes: Scenes) -> Tensor:
    """How close pictures are to clean drawings of what was read in them.

    With p the picture, d the drawing (:func:`~dpok_gym.shapes.scenes.render`), b the drawing's background, |.| the
    absolute value averaged over the three channels, and means over the pixels::

        quality = exp(-8 * error)
        error = 1/2 mean(|p - d|) + 1/2 mean(w |p - d|) / mean(w)    with w = max(|p - b|, |d - b|)

    so the objects, in the picture or in the drawing, weigh as much as the whole. Objects of unrecognisable shape are
    not drawn, so they cost quality as specks do. A picture without any recognised object has quality 0.

    Args:
        pictures: (B, 3, H, W) floating point in [0, 1].
        scenes: B scenes as :func:`read` returns them.

    Returns:
        (B,) float32 in [0, 1], on the CPU.

    Raises:
        ValueError: if the pictures are of another shape, type or range, or not as many as the scenes.
    """
    pictures = _checked(pictures)
    if len(pictures) != len(scenes):
        raise ValueError(f"there are {len(pictures)} pictures but {len(scenes)} scenes; give one scene for each")
    chunks = zip(range(0, len(pictures), CHUNK), pictures.split(CHUNK), strict=True)
    return torch.cat([_quality_of_chunk(chunk, scenes[first : first + CHUNK]) for first, chunk in chunks])


def fit_backgrounds(pictures: Tensor) -> Tensor:
    """Least-squares fit of the coarse background grid to the pixels that are nearly grey, edges of objects left out.

    Args:
        pictures: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, 3, 3) in [0, 1].
    """
    smooth = F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)  # noise hides the grey
    coloured = (smooth.amax(1, keepdim=True) - smooth.amin(1, keepdim=True) >= GREY).float()
    edge = F.max_pool2d(coloured, 5, stride=1, padding=2)
    # The small rest weight defines the fit where no grey pixel is left.
    weight = (1 - edge.flatten(1)).double().clamp(min=1e-4)  # (B, H * W)
    # Grid points' pictures: 3 channels of 3 pictures make 9.
    basis = draw_backgrounds(torch.eye(9).double().reshape(3, 3, 3, 3)).reshape(9, -1)
    pair = (basis[:, None] * basis[None]).flatten(0, 1)  # (81, H * W)
    matrix = (weight @ pair.T).unflatten(1, (9, 9))
    target = basis @ (weight[:, None] * pictures.flatten(2)).transpose(1, 2)  # (B, 9, 3)
    return torch.linalg.solve(matrix, target).transpose(1, 2).unflatten(2, (3, 3)).clamp(0, 1).float()


def _checked(pictures: Tensor) -> Tensor:
    """The pictures as float32 on the CPU; a ValueError if they are not pictures of this world."""
    wanted = f"(B, 3, {IMAGE_SIZE}, {IMAGE_SIZE})"
    if pictures.ndim != 4 or pictures.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"the shapes world's pictures are {wanted}, not {tuple(pictures.shape)}; resize or permute them"
        )
    if not pictures.is_floating_point():
        raise ValueError(f"pictures must be floating point in [0, 1], not {pictures.dtype}; divide bytes by 255")
    if not len(pictures):
        raise ValueError("there is no picture; give at least one")
    low, high = (value.item() for value in pictures.aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails
        raise ValueError(f"pictures must be in [0, 1], but range from {low} to {high}; map [-1, 1] by (x + 1) / 2")
    return pictures.detach().float().cpu()


def _find_objects(pictures: Tensor, backgrounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Finds all objects: their picture's index, shape, colour, centre (N, 2) and size, ordered by picture."""
    share, error = _explain_pixels(pictures, backgrounds)
    explained = error <= COLOUR_TOLERANCE**2  # (B, C, H, W)
    core = (explained & (share >= COVERED)).any(1)  # (B, H, W)
    # Connected within a picture, through edges but not corners; never from one picture to the next.
    structure = np.zeros((3, 3, 3), int)
    structure[1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(core.numpy(), structure)
    kept = np.bincount(labels.ravel()) >= SPECK
    kept[0] = False
    number = np.cumsum(kept)  # 1 to N for the objects
    label = torch.from_numpy(np.where(kept, number, 0)[labels])  # (B, H, W), 0: not an object
    n_objects = int(number[-1])

    # One colour per object, that of most of its pixels.
    inside = label > 0
    index = label[inside] - 1  # of the object, for every pixel of any
    nearest = error.movedim(1, 3)[inside].argmin(1)
    votes = torch.bincount(index * len(COLOURS) + nearest, minlength=n_objects * len(COLOURS))
    colour = votes.reshape(n_objects, len(COLOURS)).argmax(1)
    scene = torch.zeros(n_objects, dtype=torch.int64)
    scene[index] = torch.nonzero(inside)[:, 0]

    # The mask has soft edges: the coverage by the object's colour, in the object and the two pixels around it.
    # Pixels clearly of another colour are holes in it: what is red on the left and green on the right is no circle.
    grown = F.max_pool2d(label[:, None].float(), 5, stride=1, padding=2)[:, 0]
    grown = torch.where(inside, label.float(), grown)
    own = grown[scene] == torch.arange(1, n_objects + 1)[:, None, None]
    hole = core[scene] & ~explained[scene, colour]
    mask = share[scene, colour] * (own & ~hole)
    return (scene, *_fit_shape(mask, colour))


def _explain_pixels(pictures: Tensor, backgrounds: Tensor) -> tuple[Tensor, Tensor]:
    """Explains every pixel p as a blend ``(1 - a) b + a c`` of its background b and one palette colour c.

    Args:
        pictures: (B, 3, H, W) in [0, 1].
        backgrounds: (B, 3, H, W) in [0, 1].

    Returns:
        share: (B, C, H, W), for each colour the a in [0, 1] that leaves the least error.
        error: (B, C, H, W), that error: the squared RGB distance to the blend.
    """
    offset = pictures - backgrounds
    # |p - b - a (c - b)|^2 with the squares multiplied out, which saves arrays of all colours' three channels.
    projection = torch.einsum("kc,bchw->bkhw", PALETTE, offset) - (offset * backgrounds).sum(1, keepdim=True)
    length = PALETTE.square().sum(1)[:, None, None] + backgrounds.square().sum(1, keepdim=True)
    length = length - 2 * torch.einsum("kc,bchw->bkhw", PALETTE, backgrounds)
    share = (projection / length).clamp(0, 1)
    error = offset.square().sum(1, keepdim=True) + share * (share * length - 2 * projection)
    return share, error


def _fit_shape(mask: Tensor, colour: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Finds which shape's drawing overlaps each soft mask (N, H, W) best.

    All shapes are regular, so the mask's centroid is their centre and its area gives their size.
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
    """Puts a list of N objects, ordered by picture, into the slots of scenes; recognised ones first."""
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


def _quality_of_chunk(pictures: Tensor, scenes: Scenes) -> Tensor:
    """The quality of a few pictures; see :func:`quality`."""
    # Unrecognised objects come last, so counting the others is enough to leave them out.
    recognised = (scenes.present & (scenes.shape >= 0)).sum(1)
    drawings = render(replace(scenes, count=recognised))
    backgrounds = draw_backgrounds(scenes.background)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(1).flatten(1).double()  # (B, H * W)

    difference = distance(pictures, drawings)
    weight = torch.maximum(distance(pictures, backgrounds), distance(drawings, backgrounds))
    weighted = (weight * difference).sum(1) / weight.sum(1).clamp(min=1e-6)
    error = (difference.mean(1) + weighted) / 2
    return torch.where(recognised > 0, (-SHARPNESS * error).exp(), 0.0).float()


def _align_one(colours: list[int], shapes: list[int], centres: Tensor, request: Request) -> float:
    """The alignment of one scene; see :func:`align`."""
    objects = list(zip(colours, shapes, strict=True))
    credit = np.array([[(kind.colour == c) / 2 + (kind.shape == s) / 2 for c, s in objects] for kind in request.kinds])
    total = float(credit[linear_sum_assignment(credit, maximize=True)].sum())
    required = max(credit.shape)
    if request.relation is not None:
        first, second = (np.flatnonzero(row == 1).tolist() for row in credit)
        total += any(relation_of(centres[i] - centres[j]) == request.relation for i, j in product(first, second))
        required += 1
    return total / required
