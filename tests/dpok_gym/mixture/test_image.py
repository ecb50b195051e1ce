"""The image of a point: where the dot is, and how exactly its position can be read."""

import pytest
import torch

from dpok_gym.mixture.image import PIXELS_PER_UNIT, REACH, draw_dots, read_dots


def test_a_position_can_be_read_from_its_image() -> None:
    points = 2 * REACH * torch.rand(500, 2) - REACH
    images = draw_dots(points)
    assert images.min() >= 0
    assert images.max() <= 1
    assert (read_dots(images) - points).abs().max() < 5e-6  # float32: seventh digit of a coordinate up to 3


def test_where_the_dot_is() -> None:
    (image,) = draw_dots(torch.tensor([[1.0, 2.0]]))
    row, column = divmod(image[0].argmin().item(), 64)
    assert column + 0.5 == pytest.approx(32 + PIXELS_PER_UNIT, abs=1)
    assert row + 0.5 == pytest.approx(32 - 2 * PIXELS_PER_UNIT, abs=1)
    on_the_line = read_dots(draw_dots(torch.tensor([[-1.5], [9.0]])))
    torch.testing.assert_close(on_the_line, torch.tensor([[-1.5, 0], [REACH, 0]]).double(), atol=5e-6, rtol=0)


def test_reading_is_differentiable() -> None:
    images = draw_dots(torch.tensor([[0.5, -0.25]])).requires_grad_(True)
    read_dots(images)[0, 0].backward()
    gradient = images.grad
    assert gradient is not None
    assert gradient[:, 1:].abs().max() == 0  # positions are read in red
    assert gradient[0, 0, :, 0].min() > 0  # more red on the far left is less ink there: the dot moves to the right
    assert gradient[0, 0, :, -1].max() < 0


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a dot is read from images of shape \(B, 3, 64, 64\).*got \(2, 3, 32, 32\)"):
        read_dots(torch.zeros(2, 3, 32, 32))
