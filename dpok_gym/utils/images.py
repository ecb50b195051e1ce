"""Images as files and screens have them."""

from __future__ import annotations

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
