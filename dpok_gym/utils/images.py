"""Images as files and screens have them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Rounds images to the 256 levels that a file has.

    Args:
        images: (B, 3, H, W) in [0, 1], on any device; values outside are clamped.

    Returns:
        (B, H, W, 3) uint8.
    """
    levels: Any = (255 * images.float()).round().clamp(0, 255).to("cpu", torch.uint8)
    return levels.permute(0, 2, 3, 1).numpy()


def tile(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Puts images (B, H, W, 3) side by side, in about as many rows as columns; places without one are black.

    Returns:
        (rows * H, columns * W, 3) uint8.
    """
    n, height, width, channels = images.shape
    rows = max(round(math.sqrt(n * width / height)), 1)
    columns = math.ceil(n / rows)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:n] = images
    cells = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, channels)
