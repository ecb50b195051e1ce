"""What is said about scenes: DPOK's four categories of prompts, their grammar, and scenes to go with them.

======================  ===========================================
category                example
======================  ===========================================
``colour``              a green star
``count``               three green squares
``composition``         a red circle and a blue square
``location``            a red circle above a blue square
======================  ===========================================
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpok_gym.shapes.scenes import COLOURS, MAX_OBJECTS, SHAPES, Scenes, place_objects, sample_backgrounds

CATEGORIES = ("colour", "count", "composition", "location")
RELATIONS = ("above", "below", "left of", "right of")
NUMBERS = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Kind:
    """What an object looks like: indices into :data:`~dpok_gym.shapes.scenes.COLOURS` and ``SHAPES``."""

    colour: int
    shape: int

    def __str__(self) -> str:
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Request:
    """What a prompt asks for, all of it and nothing else.

    Attributes:
        kinds: the kind of every object, one entry each; repeated for "three green squares".
        relation: where the first object is relative to the second, index into :data:`RELATIONS`; None if not said.
    """

    kinds: tuple[Kind, ...]
    relation: int | None = None

    @property
    def category(self) -> str:
        """The category of DPOK's that this prompt belongs to."""
        if self.relation is not None:
            return "location"
        if len(self.kinds) == 1:
            return "colour"
        return "count" if len(set(self.kinds)) == 1 else "composition"

    def __str__(self) -> str:
        if self.category == "count":
            return f"{NUMBERS[len(self.kinds) - 1]} {self.kinds[0]}s"
        join = "and" if self.relation is None else RELATIONS[self.relation]
        return f" {join} ".join(f"{'an' if str(kind)[0] in 'aeiou' else 'a'} {kind}" for kind in self.kinds)


def all_requests(category: str) -> list[Request]:
    """Every request of a category, in a fixed order: 24 colours, 72 counts, 552 compositions, 2,208 locations."""
    kinds = [Kind(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES))]
    pairs = list(itertools.permutations(kinds, 2))
    if category == "colour":
        return [Request((kind,)) for kind in kinds]
    if category == "count":
        return [Request((kind,) * n) for n in range(2, MAX_OBJECTS + 1) for kind in kinds]
    if category == "composition":
        return [Request(pair) for pair in pairs]
    if category == "location":
        return [Request(pair, relation) for pair in pairs for relation in range(len(RELATIONS))]
    raise ValueError(f"unknown category {category!r}; the categories are {', '.join(CATEGORIES)}")


_READABLE = {str(request): request for category in CATEGORIES for request in all_requests(category)}

#: Every word of every caption: all that the embedded model can read.
WORDS = tuple(sorted({word for text in _READABLE for word in text.split()}))


def parse_prompt(text: str) -> Request:
    """Reads a prompt.

    Raises:
        ValueError: if the text is not of the forms in this module's table, with examples of those that are.
    """
    try:
        return _READABLE[" ".join(text.lower().split()).rstrip(".")]
    except KeyError:
        raise ValueError(
            f"the shapes world cannot judge the prompt {text!r}; write it like 'a green star', 'three green squares', "
            f"'a red circle and a blue square' or 'a red circle above a blue square', with the colours "
            f"{', '.join(COLOURS)}, the shapes {', '.join(SHAPES)}, two to four of a kind, and the relations "
            f"{', '.join(RELATIONS)}"
        ) from None


def relation_of(offset: Tensor) -> Tensor:
    """How the first of two objects lies to the second, judged by the larger of the two distances.

    Args:
        offset: (..., 2) centre of the first minus centre of the second, x to the right and y downwards, in pixels.

    Returns:
        (...) int64, index into :data:`RELATIONS`.
    """
    x, y = offset.unbind(-1)
    return torch.where(y.abs() >= x.abs(), torch.where(y < 0, 0, 1), torch.where(x < 0, 2, 3))


def sample_requested_scenes(
    n_scenes: int, generator: torch.Generator, shares: Sequence[float] = (1, 1, 1, 1)
) -> tuple[Scenes, list[Request]]:
    """Draws scenes and what is true of them.

    Args:
        n_scenes: how many, B.
        generator: a CPU generator; the same state gives the same scenes.
        shares: how often each of :data:`CATEGORIES` is drawn, up to a common factor.
    """

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    category = torch.tensor(shares, dtype=torch.float32).multinomial(n_scenes, replacement=True, generator=generator)
    number = 2 + integers(MAX_OBJECTS - 1, n_scenes)
    count = torch.where(category == 0, 1, torch.where(category == 1, number, 2))
    # Two different kinds, and the first one everywhere where the caption speaks of one kind only.
    n_kinds = len(COLOURS) * len(SHAPES)
    first = integers(n_kinds, n_scenes)
    second = (first + 1 + integers(n_kinds - 1, n_scenes)) % n_kinds
    kind = first[:, None].repeat(1, MAX_OBJECTS)
    kind[:, 1] = torch.where(category >= 2, second, first)
    colour, shape = kind // len(SHAPES), kind % len(SHAPES)
    size, centre = place_objects(count, shape, generator, aligned=category == 3)
    scenes = Scenes(count, shape, colour, centre, size, sample_backgrounds(n_scenes, generator))

    relation = relation_of(centre[:, 0] - centre[:, 1]).tolist()
    rows = zip(category.tolist(), count.tolist(), colour.tolist(), shape.tolist(), relation, strict=True)
    requests = [
        Request(tuple(Kind(c, s) for c, s in zip(colours[:n], shapes[:n], strict=True)), r if which == 3 else None)
        for which, n, colours, shapes, r in rows
    ]
    return scenes, requests


def spoil(request: Request, generator: torch.Generator) -> Request:
    """Gets one attribute wrong: a colour, a shape, the number of objects or the relation."""

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def other(value: int, high: int) -> int:
        return (value + 1 + pick(high - 1)) % high

    attribute = pick(2 if request.category in ("colour", "composition") else 3)
    if attribute == 2 and request.relation is not None:
        return replace(request, relation=other(request.relation, len(RELATIONS)))
    if attribute == 2:
        number = 2 + other(len(request.kinds) - 2, MAX_OBJECTS - 1)
        return Request(request.kinds[:1] * number)
    target = request.kinds[pick(len(request.kinds))]
    if attribute == 0:
        wrong = replace(target, colour=other(target.colour, len(COLOURS)))
    else:
        wrong = replace(target, shape=other(target.shape, len(SHAPES)))
    kinds = tuple(wrong if kind == target else kind for kind in request.kinds)
    if len(set(kinds)) < len(set(request.kinds)):  # two different objects must not become the same
        return spoil(request, generator)
    return replace(request, kinds=kinds)
