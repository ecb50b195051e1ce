"""File size as a reward: it needs no model and no prompt, and every image has one. Good for a first try.

Source: Black et al. 2023, "Training Diffusion Models with Reinforcement Learning" (DDPO), section 5.1.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from dpok_gym.utils.images import to_uint8

QUALITY = 95  # as in DDPO; Pillow's default of 75 would flatten the differences


def jpeg_sizes(images: Tensor) -> Tensor:
    """Returns the size of each image as a JPEG file of quality 95.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B,) float32, kilobytes of 1000 bytes.
    """
    sizes = []
    for pixels in to_uint8(images):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


class JpegIncompressibility:
    """The size of the image as a JPEG file, kilobytes. Images with more detail have larger files."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) float32, positive."""
        return jpeg_sizes(images)


class JpegCompressibility:
    """Minus the size of the image as a JPEG file, kilobytes. It is higher for smoother images."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) float32, negative."""
        return -jpeg_sizes(images)
