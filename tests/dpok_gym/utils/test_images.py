"""Images as files hold them."""

import numpy as np
import pytest
import torch

from dpok_gym.utils.images import tile, to_uint8


def test_shape_and_values() -> None:
    images = torch.zeros(2, 3, 4, 5)
    images[1, 2, 3, 4] = 1.0
    images[0, 1, 0, 2] = 0.5
    levels = to_uint8(images)
    assert (levels.shape, levels.dtype) == ((2, 4, 5, 3), np.uint8)
    assert levels[1, 3, 4, 2] == 255
    assert levels[0, 0, 2, 1] == 128
    assert levels.sum() == 255 + 128


@pytest.mark.parametrize(
    ("value", "level"),
    [(0.0, 0), (0.4 / 255, 0), (0.6 / 255, 1), (254.4 / 255, 254), (1.0, 255), (-3.0, 0), (7.0, 255)],
)
def test_rounds_and_clamps(value: float, level: int) -> None:
    assert to_uint8(torch.full((1, 3, 1, 1), value)).tolist() == [[[[level] * 3]]]


def test_every_level_comes_back() -> None:
    levels = torch.arange(256.0).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(to_uint8(levels / 255)[0, :, :, 0], np.arange(256).reshape(16, 16))


def test_half_precision() -> None:
    images = torch.rand(1, 3, 8, 8)
    difference = to_uint8(images.bfloat16()).astype(int) - to_uint8(images)
    assert np.abs(difference).max() <= 1  # bfloat16 keeps 8 bits


def test_tiles() -> None:
    images = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 2, 4, 3), np.uint8)
    tiled = tile(images)
    assert (tiled.shape, tiled.dtype) == ((6, 8, 3), np.uint8)
    assert tiled[::2, ::4, 0].tolist() == [[1, 2], [3, 4], [5, 0]]
    assert np.array_equal(tile(images[:1]), images[0])
