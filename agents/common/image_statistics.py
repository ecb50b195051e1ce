"""Statistics of the images of an iteration: brightness, saturation, contrast, and how much they differ.

Letters used for shapes: N images of H x W pixels, P numbers of a thumbnail, D numbers of any kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from agents.common.buffer import number_groups
from agents.common.normalization import NEGLIGIBLE

#: What :func:`describe_images` measures in each image, in this order; a thumbnail follows.
MEASURED = ("brightness", "saturation", "contrast")
#: Rows and columns of a thumbnail: enough to tell two images apart, and little to exchange between ranks.
THUMBNAIL = 16


def describe_images(images: NDArray[np.uint8]) -> Tensor:
    """Measures images.

    Brightness is the mean of all pixels. Saturation is the mean, over the pixels, of the largest channel less the
    smallest one. Contrast is the standard deviation of the pixels' grey values.

    Args:
        images: (N, H, W, 3) uint8.

    Returns:
        (N, 3 + P) float32: the three numbers of :data:`MEASURED`, each in [0, 1], and a thumbnail in [0, 1].
    """
    rows = []
    for image in images:  # one by one: in floating point, a large batch of large images would need gigabytes
        levels = torch.from_numpy(image).permute(2, 0, 1).contiguous()  # channel after channel is faster
        chroma = (levels.amax(dim=0) - levels.amin(dim=0)).float()
        levels = levels.float()
        measured = torch.stack([levels.mean(), chroma.mean(), levels.mean(dim=0).std(correction=0)])
        thumbnail = functional.adaptive_avg_pool2d(levels, THUMBNAIL)
        rows.append(torch.cat([measured, thumbnail.flatten()]) / 255)
    return torch.stack(rows)


def summarise_images(described: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Returns the means of what :func:`describe_images` measured, and the diversity within a prompt.

    The diversity is the root mean square difference of two images of the same prompt, pixel by pixel of their
    thumbnails, in [0, 1]. There is none if no prompt has two images.

    Args:
        described: (N, 3 + P).
        prompts: N texts.
    """
    n = len(MEASURED)
    means = dict(zip(MEASURED, described[:, :n].double().mean(dim=0).tolist(), strict=True))
    variance = variance_within(described[:, n:], prompts)
    # The squared difference of two independent images is twice the variance.
    return means if variance is None else means | {"diversity": (2 * variance.mean()).sqrt().item()}


def variance_within(values: Tensor, prompts: Sequence[str]) -> Tensor | None:
    """Returns the variance within a prompt, pooled over the prompts, (D,) float64; None if no prompt has two entries.

    Args:
        values: (N, D).
        prompts: N texts.
    """
    groups = number_groups(prompts)
    counts = groups.bincount()
    degrees = len(groups) - len(counts)  # of freedom
    if not degrees:
        return None
    values = values.double().cpu()
    means = torch.zeros(len(counts), values.shape[1], dtype=torch.float64).index_add_(0, groups, values)
    deviations = values - (means / counts[:, None])[groups]
    return deviations.square().sum(dim=0) / degrees


def equal_share(rewards: Tensor, prompts: Sequence[str]) -> float | None:
    """Returns the share of the images whose prompt gives the same reward to all of its images, in [0, 1].

    Such images teach nothing to an algorithm that compares images of the same prompt. Prompts with a single image do
    not count; None if there are no others.

    Args:
        rewards: (N,).
        prompts: N texts.
    """
    groups, values = number_groups(prompts).numpy(), rewards.double().cpu().numpy()
    counts = np.bincount(groups)
    highest, lowest = np.full(len(counts), -np.inf), np.full(len(counts), np.inf)
    np.maximum.at(highest, groups, values)
    np.minimum.at(lowest, groups, values)
    compared = counts > 1
    if not compared.any():
        return None
    # A difference in the last digits of float32 is rounding.
    is_equal = highest - lowest <= NEGLIGIBLE * np.maximum(abs(highest), abs(lowest))
    return float(counts[compared & is_equal].sum() / counts[compared].sum())
