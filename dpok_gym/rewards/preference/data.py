"""The files that people's choices are collected in: JSONL, with one comparison of two images on each line.

    {"prompt": "a red star", "images": ["a.png", "b.png"], "preferred": 0, "who": "ada", "when": "2026-01-31T12:00"}

``images`` are paths relative to the file, and ``preferred`` is 0 for the first and 1 for the second. ``who`` chose and
``when`` (ISO 8601) are not used for learning and may be left out. A line may have further fields.

Letters used for shapes: N choices, M images, S x S pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dpok_gym.rewards.preference.network import MAX_IMAGE_SIZE, resize
from dpok_gym.utils.reading import parse_json, read_image
from dpok_gym.utils.validation import check_fraction, check_integer

#: With fewer choices, neither the fit nor its measurement means anything.
LEAST_CHOICES = 20
#: A longer line is cut off, and then no JSON.
_MAX_LINE_BYTES = 2**20


@dataclass(frozen=True)
class Choice:
    """One comparison.

    Attributes:
        prompt: the images were compared for this text.
        preferred: path of the preferred image.
        other: path of the other image.
        who: name of the person who chose; None if unknown.
        when: time of the choice, ISO 8601; None if unknown.
        line: number of the line in the file, from 1.
    """

    prompt: str
    preferred: Path
    other: Path
    who: str | None
    when: str | None
    line: int


@dataclass
class Comparisons:
    """Choices with their images.

    Attributes:
        images: (M, 3, S, S) uint8.
        prompts: N texts.
        pairs: (N, 2) int64, rows of ``images``: first the preferred image, then the other.
    """

    images: Tensor
    prompts: list[str]
    pairs: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> Comparisons:
        """Returns the choices at ``rows`` (int64), with only the images that they compare."""
        index, pairs = self.pairs[rows].unique(return_inverse=True)
        return Comparisons(self.images[index], [self.prompts[row] for row in rows.tolist()], pairs)

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


def read_choices(path: str | os.PathLike[str]) -> list[Choice]:
    """Reads a file of choices. It checks that the images exist, but does not open them.

    Raises:
        FileNotFoundError: if the file or an image does not exist; the message has the number of the line.
        ValueError: if there are too few choices, or a line is malformed; the message has its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of choices at {str(path)!r}; give a JSONL file with one on a line")
    choices: list[Choice] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, _MAX_LINE_BYTES), b""), 1):
            if not line.strip():
                continue
            where = f"line {number} of {str(path)!r}"
            try:
                choices.append(_choice(parse_json(line.decode("utf-8-sig"), "it"), path.parent, number))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{where}: {error}") from None
            except ValueError as error:  # json's and Unicode's errors are ValueErrors
                raise ValueError(f"{where}: {error}") from None
    if len(choices) < LEAST_CHOICES:
        raise ValueError(
            f"{str(path)!r} has {len(choices)} choices, and a reward needs at least {LEAST_CHOICES} to be learned and "
            "measured; some thousands are usual"
        )
    return choices


def load_comparisons(path: str | os.PathLike[str], size: int) -> Comparisons:
    """Reads a file of choices, and each of its images once, resized to a square.

    Args:
        path: the file.
        size: S, pixels, at most :data:`~dpok_gym.rewards.preference.network.MAX_IMAGE_SIZE`.

    Raises:
        FileNotFoundError: as :func:`read_choices`.
        ValueError: as :func:`read_choices`, and if the size is out of range or an image cannot be read.
    """
    check_integer("the image size", size, maximum=MAX_IMAGE_SIZE)
    choices = read_choices(path)
    line_of: dict[Path, int] = {}
    for choice in choices:
        line_of.setdefault(choice.preferred, choice.line)
        line_of.setdefault(choice.other, choice.line)
    row_of = {image: row for row, image in enumerate(line_of)}
    images = torch.empty(len(row_of), 3, size, size, dtype=torch.uint8)
    for image, row in row_of.items():
        try:
            images[row] = _load_image(image, size)
        except ValueError as error:
            raise ValueError(f"line {line_of[image]} of {str(path)!r}: {error}") from error
    pairs = torch.tensor([[row_of[choice.preferred], row_of[choice.other]] for choice in choices])
    return Comparisons(images, [choice.prompt for choice in choices], pairs)


def _choice(fields: Any, folder: Path, line: int) -> Choice:
    if not isinstance(fields, dict):
        raise ValueError(f'a choice is an object such as {{"prompt": ..., "images": ...}}, not {fields!r}')
    missing = [name for name in ("prompt", "images", "preferred") if name not in fields]
    if missing:
        raise ValueError(f"the field {missing[0]!r} is missing; a choice has prompt, images and preferred")
    prompt, names, preferred = fields["prompt"], fields["images"], fields["preferred"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"'prompt' must be a text that is not blank, not {prompt!r}")
    if not _is_pair(names):
        raise ValueError(f"'images' must be two different paths, not {names!r}")
    if isinstance(preferred, bool) or preferred not in (0, 1):
        raise ValueError(f"'preferred' must be 0 for the first image or 1 for the second, not {preferred!r}")
    who, when = fields.get("who"), fields.get("when")
    if not isinstance(who, str | None):
        raise ValueError(f"'who' must be a text, not {who!r}")
    if when is not None:
        try:
            datetime.fromisoformat(when)
        except (TypeError, ValueError):
            raise ValueError(f"'when' must be a time in ISO 8601, such as 2026-01-31T12:00:00, not {when!r}") from None
    paths = [folder / name for name in names]
    for image in paths:
        if not image.is_file():
            raise FileNotFoundError(f"there is no image {str(image)!r}; paths are relative to the file of choices")
    return Choice(prompt, paths[int(preferred)], paths[1 - int(preferred)], who, when, line)


def _is_pair(names: Any) -> bool:
    is_list = isinstance(names, Sequence) and not isinstance(names, str)
    return is_list and len(names) == 2 and all(isinstance(name, str) for name in names) and names[0] != names[1]


def _load_image(path: Path, size: int) -> Tensor:
    pixels = torch.from_numpy(np.array(read_image(path)))  # (H, W, 3)
    resized = resize(pixels.permute(2, 0, 1)[None].float() / 255, size)[0]  # (3, S, S)
    return (255 * resized).round().clamp(0, 255).byte()
