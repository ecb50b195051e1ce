"""Preprocessing of images and prompts for the networks.

Each reward has its authors' own rounding, resizing and cropping. A score equals the authors' score only if these are
the same. Letters used for shapes: B images, H x W pixels, S the side of the square that a network takes.
"""

from __future__ import annotations

import html
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dpok_gym.utils.images import to_uint8

# Mean and standard deviation of the channels of CLIP's training images. BLIP and all networks made from CLIP use them.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Crop = Literal["torchvision", "transformers"]

# The replacements by ftfy, which CLIP's own tokenizer calls, of characters that people do write in prompts.
_PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "ʼ": "'"}
    | {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st", "Ĳ": "IJ", "ĳ": "ij"}
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width
    | {"\u3000": " "}
)


def resize_with_pillow(images: Tensor, side: int, crop: Crop = "torchvision") -> Tensor:
    """Resizes images, bicubic, and cuts out the central square, as torchvision and transformers do with PIL images.

    Pillow does it on the CPU, in a few milliseconds per image. torch's bicubic filter with antialiasing would differ in
    one pixel of five to ten, at hard edges by up to 16 of 255 levels, because Pillow rounds and clips in between.

    Args:
        images: (B, 3, H, W) in [0, 1].
        side: S, to which the shorter side is resized.
        crop: the library whose rounding of the centre to use; they differ by one pixel when an odd number is cut off.

    Returns:
        (B, 3, S, S) float32, multiples of 1/255 in [0, 1], on the device of the images.
    """
    height, width = images.shape[-2:]
    size = _resized(height, width, side)
    top, left = (_offset(length, side, crop) for length in size)
    box = left, top, left + side, top + side
    squares = []
    for pixels in to_uint8(images):  # (H, W, 3)
        image = Image.fromarray(pixels)
        if size != (height, width):
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        squares.append(np.asarray(image.crop(box)))
    return torch.from_numpy(np.stack(squares)).to(images.device).permute(0, 3, 1, 2).float() / 255


def resize_with_torch(images: Tensor, side: int) -> Tensor:
    """Resizes images, bicubic with antialiasing, and cuts out the central square, as torchvision >= 0.17 with tensors.

    Args:
        images: (B, 3, H, W) in [0, 1]; they are rounded to 256 levels first, because the authors read files.
        side: S, to which the shorter side is resized.

    Returns:
        (B, 3, S, S) float32, on the device of the images. Bicubic filters overshoot, so values leave [0, 1] a little.
    """
    return resize_and_crop((255 * images.float()).round().clamp(0, 255) / 255, side)


def resize_and_crop(images: Tensor, side: int) -> Tensor:
    """Resizes (B, 3, H, W) as :func:`resize_with_torch`, without rounding. It is differentiable."""
    height, width = images.shape[-2:]
    size = _resized(height, width, side)
    if size != (height, width):
        images = functional.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
    top, left = (_offset(length, side, "torchvision") for length in size)
    return images[..., top : top + side, left : left + side]


def normalize(images: Tensor) -> Tensor:
    """Standardises (B, 3, S, S) in [0, 1] with the mean and standard deviation of CLIP's training images."""
    mean, std = images.new_tensor(MEAN), images.new_tensor(STD)
    return (images - mean[:, None, None]) / std[:, None, None]


def clean_prompt(prompt: str) -> str:
    """Cleans a prompt as CLIP's own tokenizer does: HTML entities, typographic quotes, ligatures, outer white space.

    Source: ``basic_clean`` in OpenAI's CLIP and in open_clip, which calls ftfy. ftfy also repairs texts that were
    decoded with the wrong encoding; that is not done here.
    """
    return html.unescape(html.unescape(prompt.translate(_PLAIN))).strip()


def _resized(height: int, width: int, side: int) -> tuple[int, int]:
    """Returns the height and width with the shorter side S and the same proportions, rounded down."""
    shorter = min(height, width)
    return side * height // shorter, side * width // shorter


def _offset(length: int, side: int, crop: Crop) -> int:
    return round((length - side) / 2) if crop == "torchvision" else (length - side) // 2
