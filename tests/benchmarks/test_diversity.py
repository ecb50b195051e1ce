"""How varied images are, and the scenes in them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import entropy

from benchmarks.diversity import GRID, corrected_entropy, pixel_diversity, scene_diversity, traits
from dpok_gym.shapes.scenes import COLOURS, IMAGE_SIZE, SHAPES, Scenes, render, sample_backgrounds

CELLS = GRID**2
NAMES = ("positions", "colours", "shapes", "counts")


def make_scenes(cells: NDArray[np.int64], seed: int = 0) -> Scenes:
    """Makes green squares on different backgrounds, each at a random place near the centre of its cell.

    Args:
        cells: (B, K) in [0, CELLS).
        seed: of the places and the backgrounds.
    """
    generator = torch.Generator().manual_seed(seed)
    cell = torch.from_numpy(cells)
    middle = (torch.stack([cell % GRID, cell // GRID], -1) + 0.5) * IMAGE_SIZE / GRID
    return Scenes(
        count=torch.full((len(cell),), cell.shape[1]),
        shape=torch.full(cell.shape, SHAPES.index("square")),
        colour=torch.full(cell.shape, COLOURS.index("green")),
        centre=middle + 4 * torch.rand(middle.shape, generator=generator) - 2,
        size=torch.full(cell.shape, 7.0),
        background=sample_backgrounds(len(cell), generator),
    )


def draw(scenes: Scenes, noise: float = 0.0) -> NDArray[np.uint8]:
    """Draws scenes as (B, H, W, 3), with independent noise of a standard deviation on the pixels."""
    images = render(scenes)
    images += noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (255 * images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()


def random_cells(n_scenes: int, n_objects: int) -> NDArray[np.int64]:
    """Returns different cells for the objects of each scene, in any order, (n_scenes, n_objects)."""
    return np.random.default_rng(0).permuted(np.tile(np.arange(CELLS), (n_scenes, 1)), axis=1)[:, :n_objects]


def entropies(images: NDArray[np.uint8]) -> list[float]:
    """Returns the entropies of images of one prompt, in the order of ``NAMES``."""
    found = scene_diversity(images, ["a"] * len(images))
    assert list(found) == [f"entropy_of_{name}" for name in NAMES]
    return list(found.values())


def test_pixel_diversity() -> None:
    images = np.zeros((4, 2, 2, 3), np.uint8)
    images[1] = 255
    images[2] = 51
    assert pixel_diversity(images[:3], ["a"] * 3) == pytest.approx(np.mean([1.0, 0.2, 0.8]))
    assert pixel_diversity(images, ["a", "a", "b", "c"]) == pytest.approx(1.0)  # single ones have no distance
    assert pixel_diversity(images[:1], ["a"]) is None


def test_one_layout_has_no_entropy_though_its_pixels_differ() -> None:
    """Noise, backgrounds and small shifts change pixels, and not what the judge sees."""
    scenes = make_scenes(np.tile([0, 5, 6], (12, 1)))
    scenes.colour[:, 0] = COLOURS.index("blue")
    scenes.shape[:, 1] = SHAPES.index("star")
    images = draw(scenes, noise=0.05)
    assert entropies(images) == [0, 0, 0, 0]
    assert (pixel_diversity(images, ["a"] * 12) or 0) > 0.1


def test_noise_on_the_pixels_changes_nothing() -> None:
    scenes = make_scenes(random_cells(16, 2))
    scenes.colour[::2] = COLOURS.index("purple")
    clean, noisy = draw(scenes), draw(scenes, noise=0.05)
    assert entropies(noisy) == entropies(clean)
    assert (pixel_diversity(noisy, ["a"] * 16) or 0) > (pixel_diversity(clean, ["a"] * 16) or 0)


def test_random_layouts_have_the_entropy_of_their_distribution() -> None:
    n_scenes, rng = 600, np.random.default_rng(0)
    scenes = make_scenes(random_cells(n_scenes, 3))
    scenes.colour[:] = torch.from_numpy(rng.integers(len(COLOURS), size=(n_scenes, 1)))
    scenes.shape[:] = torch.from_numpy(rng.integers(len(SHAPES), size=(n_scenes, 1)))
    positions, colours, shapes, counts = entropies(draw(scenes))
    assert positions == pytest.approx(math.log(math.comb(CELLS, 3)), abs=0.03)  # without the correction 0.07 too low
    assert colours == pytest.approx(math.log(len(COLOURS)), abs=0.02)
    assert shapes == pytest.approx(math.log(len(SHAPES)), abs=0.02)
    assert counts == 0


def test_counts_vary() -> None:
    count = torch.tensor([1, 2, 3, 4]).repeat(4)
    scenes = replace(make_scenes(np.tile([0, 2, 6, 8], (16, 1))), count=count)
    with_count = math.log(4) + 3 / 32  # four values in 16 images
    assert entropies(draw(scenes)) == pytest.approx([with_count, 0, 0, with_count])


def test_the_mean_is_over_prompts_with_two_images() -> None:
    images = draw(make_scenes(np.array([[0], [1], [2], [1], [4], [4]])))
    prompts = ["a", "b", "single", "b", "a", "a"]
    assert scene_diversity(images, prompts)["entropy_of_positions"] == pytest.approx(
        np.mean([entropy([1, 2]) + 1 / 6, 0.0])
    )
    assert scene_diversity(images[:3], prompts[:3]) == {}


def test_images_without_objects_agree() -> None:
    empty = replace(make_scenes(np.zeros((3, 1), int)), count=torch.zeros(3, dtype=torch.int64))
    assert entropies(draw(empty)) == [0, 0, 0, 0]
    one = draw(make_scenes(np.array([[3]])))
    assert entropies(np.concatenate([draw(empty), one])) == pytest.approx([entropy([1, 3]) + 1 / 8] * 4)


def test_traits_do_not_depend_on_the_order_and_ignore_empty_slots() -> None:
    scenes = make_scenes(np.array([[0, 5, 8], [5, 0, 1]]))
    scenes.count[:] = 2
    scenes.colour[:] = torch.tensor([[0, 3, 1], [3, 0, 2]])
    scenes.shape[:] = torch.tensor([[-1, 0, 1], [0, -1, 2]])  # one is not recognised
    found = traits(scenes)
    assert [np.flatnonzero(found[name][0]).tolist() for name in NAMES[:3]] == [[0, 5], [0, 3], [0, len(SHAPES)]]
    assert all((found[name][0] == found[name][1]).all() for name in NAMES)
    assert found["counts"].tolist() == [[2], [2]]


@pytest.mark.parametrize("n", [20, 100])
def test_the_correction_takes_most_of_the_bias_away(n: int) -> None:
    rng, expected = np.random.default_rng(0), math.log(10)
    samples = [rng.integers(10, size=(n, 1)) for _ in range(300)]
    uncorrected = np.mean([entropy(np.unique(sample, return_counts=True)[1]) for sample in samples])
    bias = np.mean([corrected_entropy(sample) for sample in samples]) - expected
    assert uncorrected - expected == pytest.approx(-9 / (2 * n), rel=0.2)
    assert abs(bias) < 0.3 * abs(uncorrected - expected)


def test_bounds_of_the_entropy() -> None:
    assert corrected_entropy(np.ones((7, 2), int)) == 0
    assert corrected_entropy(np.arange(8)[:, None]) == pytest.approx(math.log(8) + 7 / 16)
