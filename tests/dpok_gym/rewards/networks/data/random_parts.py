"""Weights and images that anybody can make again, because they are too large to keep in a repository.

They come from NumPy's ``RandomState``, whose numbers NumPy promises not to change.
"""

import zlib
from collections.abc import Iterable

import numpy as np
import torch

Shapes = dict[str, list[int]]


def random_state_dict(shapes: Shapes) -> dict[str, torch.Tensor]:
    """A state dict of the given shapes; every tensor follows from its name alone."""
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: list[int]) -> torch.Tensor:
    if name.endswith("position_ids"):
        return torch.arange(shape[-1])[None]
    if name == "logit_scale":
        return torch.tensor(4.6052)  # ln 100, where CLIP's training ends
    noise = 2 * np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape) - 1
    if len(shape) > 1:
        noise *= (3 / np.prod(shape[1:])) ** 0.5  # keeps the size of what goes through
    else:
        noise = 0.2 * noise + name.endswith("weight")  # norms
    return torch.from_numpy(noise.astype(np.float32))


def random_image(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: blotches, hard edges and grain; a resize that is a little different shows."""
    random = np.random.RandomState(height * 1000 + width)
    blotches = random.randint(40, 216, (height // 16 + 1, width // 16 + 1, 3))
    image = np.kron(blotches, np.ones((16, 16, 1), int))[:height, :width]
    for top, left, tall, wide in random.randint(0, min(height, width) // 2, (12, 4)):
        image[top : top + tall, left : left + wide] = random.randint(0, 256, 3)
    return (image + random.randint(-20, 21, image.shape)).clip(0, 255).astype(np.uint8)


def sample(pixels: Iterable[np.ndarray]) -> list[list[float]]:
    """Returns a few values of each preprocessed image (3, S, S), also from rows and columns at the edges."""
    points = [*np.random.RandomState(0).randint(0, 224, (40, 2)), (0, 5), (5, 0), (223, 7), (7, 223)]
    return [[round(float(image[i % 3, y, x]), 5) for i, (y, x) in enumerate(points)] for image in pixels]
