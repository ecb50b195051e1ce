"""What images are like, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from agents.common.image_statistics import THUMBNAIL, describe_images, equal_share, summarise_images, variance_within


def images(*colours: tuple[int, int, int], size: int = 32) -> np.ndarray:
    """Returns an image of one colour for each colour."""
    return np.stack([np.full((size, size, 3), colour, np.uint8) for colour in colours])


def test_plain_colours() -> None:
    described = describe_images(images((0, 0, 0), (255, 255, 255), (255, 0, 0), (204, 102, 102)))
    assert described.shape == (4, 3 + 3 * THUMBNAIL**2)
    expected = [[0, 0, 0], [1, 0, 0], [1 / 3, 1, 0], [136 / 255, 0.4, 0]]
    torch.testing.assert_close(described[:, :3], torch.tensor(expected))


def test_contrast_is_that_of_grey_values() -> None:
    half = images((0, 0, 0))
    half[:, :16] = 255
    assert describe_images(half)[0, 2].item() == pytest.approx(0.5)


def test_an_image_of_any_size_has_the_same_thumbnail() -> None:
    for size in (8, 16, 50):
        thumbnail = describe_images(images((51, 102, 204), size=size))[0, 3:].reshape(3, -1)
        torch.testing.assert_close(thumbnail, torch.tensor([[0.2], [0.4], [0.8]]).expand_as(thumbnail))


def test_means_and_diversity() -> None:
    """Two black and white images of one prompt differ by 1 in each pixel; those of other prompts do not count."""
    described = describe_images(images((0, 0, 0), (255, 255, 255), (255, 0, 0)))
    summary = summarise_images(described, ["a", "a", "b"])
    assert summary["diversity"] == pytest.approx(1)
    assert summary["brightness"] == pytest.approx((0 + 1 + 1 / 3) / 3)
    assert summary["saturation"] == pytest.approx(1 / 3)
    assert summarise_images(described, ["a", "b", "c"]).keys() == {"brightness", "saturation", "contrast"}
    assert summarise_images(described[[0, 0, 2]], ["a", "a", "b"])["diversity"] == 0


def test_diversity_is_the_root_of_the_mean_squared_difference_of_all_pairs() -> None:
    described = torch.rand(5, 3 + 12, generator=torch.Generator().manual_seed(0))
    pairs = [(described[i, 3:] - described[j, 3:]).square().mean() for i in range(5) for j in range(i)]
    expected = torch.stack(pairs).mean().sqrt().item()
    assert summarise_images(described, ["a"] * 5)["diversity"] == pytest.approx(expected, rel=1e-6)


def test_variance_within() -> None:
    values = torch.tensor([[1.0], [3.0], [10.0], [10.0], [7.0]])
    variance = variance_within(values, ["a", "a", "b", "b", "c"])
    assert variance is not None
    assert variance.item() == pytest.approx(2 / 2)  # (1 + 1 + 0 + 0 + 0) / (5 images - 3 prompts)
    assert variance_within(values, list("abcde")) is None


def test_equal_share() -> None:
    rewards = torch.tensor([0.5, 0.5 + 1e-9, 1.0, 2.0, 0.0, 0.0, 9.0])
    assert equal_share(rewards, ["a", "a", "b", "b", "c", "c", "d"]) == pytest.approx(4 / 6)
    assert equal_share(rewards[:2], ["a", "b"]) is None
    assert equal_share(torch.tensor([-1.0, -1.0]), ["a", "a"]) == 1
