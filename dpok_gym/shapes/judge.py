"""The judge of the shapes world: it says how well images follow their prompts and how clean they are.

It finds the objects in an image (:mod:`dpok_gym.shapes.detection`) and compares them with the prompt. It uses no
network, is deterministic, and its verdict on an image does not depend on the others in the batch: long sums are taken
in float64, so the float32 results do not show the order of summation. Everything runs on the CPU.

Letters used for shapes: B images, H = W = 64 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dpok_gym.shapes.captions import Request, parse_prompt, relation_of
from dpok_gym.shapes.detection import CHUNK, check_images, detect_objects
from dpok_gym.shapes.scenes import Scenes, draw_backgrounds, render

#: Quality is exp(-SHARPNESS * error).
SHARPNESS = 8.0


@dataclass
class Judgement:
    """The verdicts on a batch of images.

    Attributes:
        alignment: (B,) float32 in [0, 1], see :func:`alignment`.
        quality: (B,) float32 in [0, 1], see :func:`quality`.
        scenes: the detected objects, see :func:`detect_objects`.
    """

    alignment: Tensor
    quality: Tensor
    scenes: Scenes


def judge(images: Tensor, prompts: Sequence[str]) -> Judgement:
    """Finds the objects in images and compares them with the prompts.

    Args:
        images: (B, 3, H, W) floating point in [0, 1].
        prompts: B texts of the forms in :mod:`~dpok_gym.shapes.captions`.

    Raises:
        ValueError: if the images are not as above, if a prompt cannot be parsed, or if the numbers differ.
    """
    requests = [parse_prompt(prompt) for prompt in prompts]
    scenes = detect_objects(images)
    return Judgement(alignment(scenes, requests), quality(images, scenes), scenes)


def alignment(scenes: Scenes, requests: Sequence[Request]) -> Tensor:
    """Returns the share of its request that a scene fulfils.

    It is 1 exactly if all requested objects are there and nothing else. With n requested objects, m objects in the
    scene, and an assignment pi of the first to the second::

        alignment = (max_pi sum_i credit(i, pi(i)) + relation) / (max(n, m) + [a relation is requested])

    where ``credit`` is 1/2 for the same colour plus 1/2 for the same shape. ``relation`` is 1 if two objects of the two
    requested kinds are in the requested relation, else 0. An unrecognised shape is never the same.

    Args:
        scenes: B scenes, from :func:`detect_objects` or random ones.
        requests: B requests.

    Returns:
        (B,) float32 in [0, 1].

    Raises:
        ValueError: if the numbers of scenes and requests differ.
    """
    if len(scenes) != len(requests):
        raise ValueError(f"there are {len(scenes)} scenes but {len(requests)} requests; give one request for each")
    columns = (scenes.count.tolist(), scenes.colour.tolist(), scenes.shape.tolist(), scenes.centre, requests)
    values = [
        _alignment_of_one(colours[:n], shapes[:n], centres[:n], request)
        for n, colours, shapes, centres, request in zip(*columns, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float32)


def quality(images: Tensor, scenes: Scenes) -> Tensor:
    """Returns how close images are to clean drawings of the objects detected in them.

    With the image p, the drawing d (:func:`~dpok_gym.shapes.scenes.render`), the drawing's background b, the absolute
    value |.| averaged over the three channels, and means over the pixels::

        quality = exp(-8 * error)
        error = 1/2 mean(|p - d|) + 1/2 mean(w |p - d|) / mean(w)    with w = max(|p - b|, |d - b|)

    so the objects, in the image or in the drawing, count as much as the whole image. Objects of unrecognised shape are
    not drawn, so they cost quality as specks do. An image without any recognised object has quality 0.

    Args:
        images: (B, 3, H, W) floating point in [0, 1].
        scenes: B scenes as :func:`detect_objects` returns them.

    Returns:
        (B,) float32 in [0, 1], on the CPU.

    Raises:
        ValueError: if the images are of another shape, type or range, or not as many as the scenes.
    """
    images = check_images(images)
    if len(images) != len(scenes):
        raise ValueError(f"there are {len(images)} images but {len(scenes)} scenes; give one scene for each")
    chunks = zip(range(0, len(images), CHUNK), images.split(CHUNK), strict=True)
    return torch.cat([_quality_of_chunk(chunk, scenes[first : first + CHUNK]) for first, chunk in chunks])


def _quality_of_chunk(images: Tensor, scenes: Scenes) -> Tensor:
    """Returns the quality of a few images; see :func:`quality`."""
    # Unrecognised objects come last, so a lower count leaves them out.
    recognised = (scenes.present & (scenes.shape >= 0)).sum(1)
    drawings = render(replace(scenes, count=recognised))
    backgrounds = draw_backgrounds(scenes.background)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(1).flatten(1).double()  # (B, H * W)

    difference = distance(images, drawings)
    weight = torch.maximum(distance(images, backgrounds), distance(drawings, backgrounds))
    weighted = (weight * difference).sum(1) / weight.sum(1).clamp(min=1e-6)
    error = (difference.mean(1) + weighted) / 2
    return torch.where(recognised > 0, (-SHARPNESS * error).exp(), 0.0).float()


def _alignment_of_one(colours: list[int], shapes: list[int], centres: Tensor, request: Request) -> float:
    """Returns the alignment of one scene; see :func:`alignment`."""
    wanted_colours = np.array([kind.colour for kind in request.kinds])
    wanted_shapes = np.array([kind.shape for kind in request.kinds])
    same_colour = wanted_colours[:, None] == np.array(colours, dtype=int)
    same_shape = wanted_shapes[:, None] == np.array(shapes, dtype=int)
    credit = same_colour / 2 + same_shape / 2  # (requested objects, objects in the scene)
    total = float(credit[linear_sum_assignment(credit, maximize=True)].sum())
    required = max(credit.shape)
    if request.relation is not None:
        first, second = (np.flatnonzero(row == 1).tolist() for row in credit)
        relations = [relation_of(centres[i] - centres[j]).item() for i, j in product(first, second)]
        total += request.relation in relations
        required += 1
    return total / required
