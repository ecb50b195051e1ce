"""The variety of the images of one prompt: their pixels, and the scenes that the judge of the shapes world sees.

The pixels of a hundred drawings of one layout differ, because each has another noise and background. Their scenes do
not. So a model that has come to draw a single layout is found by its scenes.

Letters used for shapes: N images, H = W = 64 pixels, B scenes, K object slots, V values that an object can have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from scipy.stats import entropy
from torch import Tensor

from dpok_gym.shapes.detection import detect_objects
from dpok_gym.shapes.scenes import COLOURS, IMAGE_SIZE, SHAPES, Scenes

#: Cells of a side of the grid of positions. A cell of 21 pixels is about as large as an object, so it seldom has two
#: centres. Three objects have 84 layouts of different cells. In 4x4 cells they have 560, too many for a hundred images.
GRID = 3


def pixel_diversity(images: NDArray[np.uint8], prompts: Sequence[str]) -> float | None:
    """Computes the mean distance of two images of the same prompt.

    The distance is the root mean square over pixels in [0, 1].

    Args:
        images: (N, H, W, 3), of any size.
        prompts: N; prompts with only one image do not count.

    Returns:
        The mean over prompts, in [0, 1]; None if no prompt has two images.
    """
    means = []
    for of_prompt in _of_repeated_prompts(images, prompts):
        pixels = of_prompt.reshape(len(of_prompt), -1) / 255
        means.append(pdist(pixels).mean() / np.sqrt(pixels.shape[1]))
    return float(np.mean(means)) if means else None


def scene_diversity(images: NDArray[np.uint8], prompts: Sequence[str]) -> dict[str, float]:
    """Computes entropies of what the judge sees in images of the same prompt, see :func:`traits`.

    Each is 0 if all images of a prompt agree. With n images of a prompt, it is below ln n + 1/2 nats, whatever the
    model, and it grows with n on average (:func:`corrected_entropy`). So compare only numbers from the same n. For
    example, three squares at random places have positions of 3.4, 3.8 and 4.0 nats with 32, 64 and 128 images, and of
    4.1 with many.

    Where a prompt names all colours, shapes and counts, these three fall to 0 as a model learns to follow it. Then only
    the positions tell whether the images vary. They too fall a little when the count no longer varies. A centre at the
    border of two cells may change its cell by noise alone.

    256 images take 0.6 s on one core; the model draws them in about 10 s, with 10 denoising steps.

    Args:
        images: (N, H, W, 3).
        prompts: N; prompts with only one image do not count.

    Returns:
        The means over prompts, in nats, of ``entropy_of_positions`` (at most 9 ln 2 = 6.2 and a correction below 1/2),
        ``entropy_of_colours`` (6 ln 2 = 4.2), ``entropy_of_shapes`` (5 ln 2 = 3.5) and ``entropy_of_counts``. Empty if
        no prompt has two images.

    Raises:
        ValueError: if the images are of another size.
    """
    parts = _of_repeated_prompts(images, prompts)
    if not parts:
        return {}
    scenes = detect_objects(torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2) / 255)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    means = {}
    for name, values in traits(scenes).items():
        entropies = [corrected_entropy(of_prompt) for of_prompt in np.split(values, ends)]
        means[f"entropy_of_{name}"] = float(np.mean(entropies))
    return means


def traits(scenes: Scenes) -> dict[str, NDArray[np.int64]]:
    """Describes scenes by what can be compared exactly, whatever the order of the objects.

    Args:
        scenes: B scenes as :func:`~dpok_gym.shapes.detection.detect_objects` returns them.

    Returns:
        ``positions``, (B, 9): 1 for the cells of a 3x3 grid that hold an object's centre, else 0. So positions vary
        too where the count does. ``colours``, (B, 6), and ``shapes``, (B, 5): 1 for those that occur, the last shape
        being the unrecognised one. ``counts``, (B, 1): the number of objects.
    """
    column, row = (scenes.centre * GRID / IMAGE_SIZE).long().clamp(0, GRID - 1).unbind(-1)
    present = scenes.present
    found = {
        "positions": _occurring(GRID * row + column, present, GRID**2),
        "colours": _occurring(scenes.colour, present, len(COLOURS)),
        "shapes": _occurring(scenes.shape % (len(SHAPES) + 1), present, len(SHAPES) + 1),
        "counts": scenes.count[:, None],
    }
    return {name: values.numpy() for name, values in found.items()}


def corrected_entropy(rows: NDArray[np.int64]) -> float:
    """Estimates the entropy of the distribution that rows were drawn from.

    The entropy of the shares of the distinct rows is too low on average, by about (m - 1) / 2n for n rows with m
    possible values: few rows cannot show all of them. Miller (1955) adds this with the number of values that were seen.
    With many more values than rows it remains too low: 128 rows of 560 equally likely values get 5.1 nats, not 6.3.

    Args:
        rows: (n, anything).

    Returns:
        Nats in [0, ln n + 1/2); 0 exactly if all rows are the same.
    """
    numbers = np.unique(rows, axis=0, return_counts=True)[1]
    return float(entropy(numbers) + (len(numbers) - 1) / (2 * len(rows)))


def _of_repeated_prompts(images: NDArray[np.uint8], prompts: Sequence[str]) -> list[NDArray[np.uint8]]:
    """Returns the images of each prompt that has two or more."""
    names = np.array(prompts)
    parts = [images[names == name] for name in dict.fromkeys(prompts)]
    return [part for part in parts if len(part) > 1]


def _occurring(values: Tensor, present: Tensor, n_values: int) -> Tensor:
    """Marks the values that the objects of each scene have.

    Args:
        values: (B, K) int64 in [0, V).
        present: (B, K) bool, the slots that hold an object.
        n_values: V.

    Returns:
        (B, V) int64, 0 or 1.
    """
    return torch.zeros(len(values), n_values, dtype=torch.int64).scatter_reduce_(1, values, present.long(), "amax")
