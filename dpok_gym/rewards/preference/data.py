"""Choices with their images, to learn a reward from.

Letters used for shapes: N choices, M images, S x S pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dpok_gym.choices.records import read_choices
from dpok_gym.rewards.preference.network import MAX_IMAGE_SIZE, resize
from dpok_gym.utils.reading import read_image
from dpok_gym.utils.validation import check_fraction, check_integer

#: With fewer choices, neither the fit nor its measurement means anything.
LEAST_CHOICES = 20


@dataclass
class Comparisons:
    """Choices with their images.

    Attributes:
        images: (M, 3, S, S) uint8; or (M, D) float32, what :meth:`.LearnedReward.encode` made of them.
        prompts: N texts.
        pairs: (N, 2) int64, rows of ``images``: first the preferred image, then the other; a tie is in any order.
        outcomes: (N,) float32, the share of a win that the first image gets: 1 if it is preferred, 1/2 for a tie.
    """

    images: Tensor
    prompts: list[str]
    pairs: Tensor
    outcomes: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> Comparisons:
        """Returns the choices at ``rows`` (int64), with only the images that they compare."""
        index, pairs = self.pairs[rows].unique(return_inverse=True)
        return Comparisons(self.images[index], [self.prompts[row] for row in rows.tolist()], pairs, self.outcomes[rows])

    def components(self) -> Tensor:
        """Returns the connected component of each choice, (N,) int64.

        The images are the nodes of a graph and the choices its edges. So choices in different components have no image
        in common.
        """
        first, second = self.pairs.T.numpy()
        graph = coo_array((np.ones(len(self)), (first, second)), shape=(len(self.images),) * 2)
        return torch.from_numpy(connected_components(graph, directed=False)[1]).long()[self.pairs[:, 0]]

    def split(self, held_out: float, seed: int) -> tuple[Comparisons, Comparisons]:
        """Holds out random choices, always whole components, so that no image is on both sides.

        A person's repeats of a choice compare the same images, so they are never split either.

        Args:
            held_out: share of the choices to hold out, in (0, 1); whole components meet it only approximately.
            seed: seed of the random order of the components.

        Returns:
            The choices to learn from, and the held-out choices.

        Raises:
            ValueError: if the share is out of range, or all choices are one component.
        """
        check_fraction("the held-out share", held_out, zero=False, one=False)
        component = self.components()
        sizes = component.bincount()
        shuffled = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
        out, n_out = torch.zeros(len(sizes), dtype=torch.bool), 0
        for number in shuffled.tolist():
            if n_out + sizes[number] / 2 < held_out * len(self):  # more than half of the component still fits
                out[number] = True
                n_out += int(sizes[number])
        if len(sizes) > 1 and (out.all() or not out.any()):
            out[sizes.argmin()] ^= True  # neither side is empty
        chosen = out[component]
        if len(sizes) == 1:
            raise ValueError(
                f"the {len(self)} choices cannot be split so that no image is on both sides: all of them share "
                "images with each other; compare each image with few others only"
            )
        return self[(~chosen).nonzero()[:, 0]], self[chosen.nonzero()[:, 0]]


def load_comparisons(
    path: str | os.PathLike[str], size: int, resize: Callable[[Tensor, int], Tensor] = resize
) -> Comparisons:
    """Reads a file of choices, and each of its images once, resized to a square.

    Ties are read, also those of two bad images. Choices that the person skipped are left out.

    Args:
        path: the file.
        size: S, pixels, at most :data:`~dpok_gym.rewards.preference.network.MAX_IMAGE_SIZE`.
        resize: makes squares of S pixels of images (1, 3, H, W); the default squeezes them into one.

    Raises:
        FileNotFoundError: as :func:`~dpok_gym.choices.records.read_choices`.
        ValueError: as there, and if there are too few choices, the size is out of range or an image cannot be read.
    """
    check_integer("the image size", size, maximum=MAX_IMAGE_SIZE)
    choices = [choice for choice in read_choices(path) if choice.outcome is not None]
    n_preferred = sum(choice.preferred is not None for choice in choices)
    if n_preferred < LEAST_CHOICES:
        raise ValueError(
            f"{str(path)!r} has {n_preferred} choices of a preferred image, and a reward needs at least "
            f"{LEAST_CHOICES} to be learned and measured; some hundreds are usual"
        )
    line_of: dict[Path, int] = {}
    for choice in choices:
        for image in choice.images:
            line_of.setdefault(image, choice.line)
    row_of = {image: row for row, image in enumerate(line_of)}
    images = torch.empty(len(row_of), 3, size, size, dtype=torch.uint8)
    for image, row in row_of.items():
        try:
            images[row] = _load_image(image, size, resize)
        except ValueError as error:
            raise ValueError(f"line {line_of[image]} of {str(path)!r}: {error}") from error
    ordered = [choice.images[::-1] if choice.preferred else choice.images for choice in choices]  # the preferred first
    pairs = torch.tensor([[row_of[preferred], row_of[other]] for preferred, other in ordered])
    outcomes = torch.tensor([0.5 if choice.preferred is None else 1.0 for choice in choices])
    return Comparisons(images, [choice.prompt for choice in choices], pairs, outcomes)


def _load_image(path: Path, size: int, resize: Callable[[Tensor, int], Tensor]) -> Tensor:
    pixels = torch.from_numpy(np.array(read_image(path)))  # (H, W, 3)
    resized = resize(pixels.permute(2, 0, 1)[None].float() / 255, size)[0]  # (3, S, S)
    return (255 * resized).round().clamp(0, 255).byte()
