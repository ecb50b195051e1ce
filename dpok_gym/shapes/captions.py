"""Captions of scenes: DPOK's four categories of prompts, their grammar, and random scenes that go with them.

======================  ===========================================
category                example
======================  ===========================================
``colour``              a green star
``count``               three green squares
``composition``         a red circle and a blue square
``location``            a red circle above a blue square
======================  ===========================================

Letters used for shapes: B scenes.
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
class ObjectKind:
    """The look of an object: indices into :data:`~dpok_gym.shapes.scenes.COLOURS` and ``SHAPES``."""

    colour: int
    shape: int

    def __str__(self) -> str:
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Request:
    """The meaning of a prompt: the objects that it asks for. Nothing else may be in the image.

    Attributes:
        kinds: the kind of every object, one entry each; the same one three times for "three green squares".
        relation: where the first object is relative to the second, index into :data:`RELATIONS`; None if the prompt
            does not say.
    """

    kinds: tuple[ObjectKind, ...]
    relation: int | None = None

    @property
    def category(self) -> str:
        """The category of :data:`CATEGORIES` that this prompt belongs to."""
        if self.relation is not None:
            return "location"
        if len(self.kinds) == 1:
            return "colour"
        return "count" if len(set(self.kinds)) == 1 else "composition"

    def __str__(self) -> str:
        if self.category == "count":
            return f"{NUMBERS[len(self.kinds) - 1]} {self.kinds[0]}s"
        join = "and" if self.relation is None else RELATIONS[self.relation]
        return f" {join} ".join(_with_article(kind) for kind in self.kinds)


def _with_article(kind: ObjectKind) -> str:
    text = str(kind)
    article = "an" if text[0] in "aeiou" else "a"
    return f"{article} {text}"


def all_requests(category: str) -> list[Request]:
    """Returns every request of a category, in a fixed order.

    There are 24 for colour, 72 for count, 552 for composition and 2,208 for location.

    Raises:
        ValueError: if the category is none of :data:`CATEGORIES`.
    """
    kinds = [ObjectKind(*look) for look in itertools.product(range(len(COLOURS)), range(len(SHAPES)))]
    pairs = list(itertools.permutations(kinds, 2))
    if category == "colour":
        return [Request((kind,)) for kind in kinds]
    if category == "count":
        counts = itertools.product(range(2, MAX_OBJECTS + 1), kinds)
        return [Request((kind,) * n) for n, kind in counts]
    if category == "composition":
        return [Request(pair) for pair in pairs]
    if category == "location":
        related = itertools.product(pairs, range(len(RELATIONS)))
        return [Request(pair, relation) for pair, relation in related]
    raise ValueError(f"unknown category {category!r}; the categories are {', '.join(CATEGORIES)}")


# There are few enough prompts to list them all, so that no grammar is needed to read one.
_ALL_REQUESTS = itertools.chain.from_iterable(map(all_requests, CATEGORIES))
_REQUESTS = {str(request): request for request in _ALL_REQUESTS}

#: Every word of every caption: all that the embedded model can read.
WORDS = tuple(sorted(set(" ".join(_REQUESTS).split())))


def parse_prompt(text: str) -> Request:
    """Reads a prompt. Upper case, further spaces and full stops at the end do not matter.

    Raises:
        ValueError: if the text has none of the forms in this module's table; the message has an example of each.
    """
    try:
        return _REQUESTS[" ".join(text.lower().split()).rstrip(".")]
    except KeyError:
        raise ValueError(
            f"the shapes world cannot judge the prompt {text!r}; write it like 'a green star', 'three green squares', "
            f"'a red circle and a blue square' or 'a red circle above a blue square', with the colours "
            f"{', '.join(COLOURS)}, the shapes {', '.join(SHAPES)}, two to four of a kind, and the relations "
            f"{', '.join(RELATIONS)}"
        ) from None


def relation_of(offset: Tensor) -> Tensor:
    """Returns where the first of two objects is relative to the second. The larger of the two distances decides.

    Args:
        offset: (..., 2) centre of the first minus centre of the second, x to the right and y downwards, in pixels.

    Returns:
        (...) int64, index into :data:`RELATIONS`.
    """
    x, y = offset.unbind(-1)
    vertical = torch.where(y < 0, RELATIONS.index("above"), RELATIONS.index("below"))
    horizontal = torch.where(x < 0, RELATIONS.index("left of"), RELATIONS.index("right of"))
    return torch.where(y.abs() >= x.abs(), vertical, horizontal)


def sample_requested_scenes(
    n_scenes: int, generator: torch.Generator, shares: Sequence[float] = (1, 1, 1, 1)
) -> tuple[Scenes, list[Request]]:
    """Draws scenes, each with a request that is true of it.

    Args:
        n_scenes: number of scenes, B.
        generator: a CPU generator; the same state gives the same scenes.
        shares: how often each of :data:`CATEGORIES` is drawn, up to a common factor.

    Returns:
        The scenes and B requests.
    """

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    category = torch.tensor(shares, dtype=torch.float32).multinomial(n_scenes, replacement=True, generator=generator)
    number = 2 + integers(MAX_OBJECTS - 1, n_scenes)
    count = torch.where(category == 0, 1, torch.where(category == 1, number, 2))
    # Composition and location speak of two different kinds. In the other categories all objects are of the first one.
    n_kinds = len(COLOURS) * len(SHAPES)
    first = integers(n_kinds, n_scenes)
    second = (first + 1 + integers(n_kinds - 1, n_scenes)) % n_kinds
    kind = first[:, None].repeat(1, MAX_OBJECTS)
    kind[:, 1] = torch.where(category >= 2, second, first)
    colour, shape = kind // len(SHAPES), kind % len(SHAPES)
    size, centre = place_objects(count, shape, generator, aligned=category == 3)
    scenes = Scenes(count, shape, colour, centre, size, sample_backgrounds(n_scenes, generator))
    relation = relation_of(centre[:, 0] - centre[:, 1])
    return scenes, _describe(scenes, category, relation)


def _describe(scenes: Scenes, category: Tensor, relation: Tensor) -> list[Request]:
    """Returns the request of a category (B,) that is true of each scene, with a relation (B,) where it has one."""
    columns = (category, scenes.count, scenes.colour, scenes.shape, relation)
    requests = []
    for which, n, colours, shapes, where in zip(*(column.tolist() for column in columns), strict=True):
        kinds = tuple(ObjectKind(*pair) for pair in zip(colours[:n], shapes[:n], strict=True))
        has_relation = CATEGORIES[which] == "location"
        request = Request(kinds, relation=where) if has_relation else Request(kinds)
        requests.append(request)
    return requests


def corrupt(request: Request, generator: torch.Generator) -> Request:
    """Returns the request with one attribute wrong: a colour, a shape, the number of objects or the relation.

    Args:
        request: a request.
        generator: a CPU generator.
    """

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def other(value: int, high: int) -> int:
        return (value + 1 + pick(high - 1)) % high

    n_attributes = 3 if request.category in ("count", "location") else 2
    attribute = pick(n_attributes)  # 0: colour, 1: shape, 2: number or relation
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
    if len(set(kinds)) < len(set(request.kinds)):  # two different objects have become the same one: try again
        return corrupt(request, generator)
    return replace(request, kinds=kinds)
