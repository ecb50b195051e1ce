"""The prompt sets of the shapes world, and the prompts that training on a set never shows.

``colour``, ``count``, ``composition`` and ``location`` hold everything that can be asked for in that category, see
:mod:`dpok_gym.shapes.captions`. A fixed fifth is held out, chosen by a shuffle with a fixed seed.

A combination of objects is held out with all its wordings: "a blue square and a red circle" is on the same side of the
split as "a red circle and a blue square", and ``composition`` and ``location`` hold out the same pairs. Every colour,
shape, number and relation occurs in training.

``shapes`` has 24 prompts of each category, chosen with a fixed seed: 19 for training and 5 held out.
"""

from __future__ import annotations

import numpy as np

from dpok_gym.prompts import PromptSet
from dpok_gym.shapes.captions import CATEGORIES, ObjectKind, Request, all_requests, parse_prompt

HELD_OUT_FRACTION = 0.2
#: Part of the definition of the sets: another seed holds out other prompts, and results would not compare.
_SPLIT_SEED = 0
#: Prompts of each category in the set "shapes": as many as the smallest category has, so that all four weigh the same.
_PER_CATEGORY = 24


def colour() -> PromptSet:
    """Returns all prompts such as "a green star": 19 for training, 5 held out."""
    return _split_category("colour")


def count() -> PromptSet:
    """Returns all prompts such as "three green squares": 58 for training, 14 held out."""
    return _split_category("count")


def composition() -> PromptSet:
    """Returns all prompts such as "a red circle and a blue square": 442 for training, 110 held out."""
    return _split_category("composition")


def location() -> PromptSet:
    """Returns all prompts such as "a red circle above a blue square": 1,768 for training, 440 held out."""
    return _split_category("location")


def shapes() -> PromptSet:
    """Returns 24 prompts of each category: 19 for training, 5 held out."""
    np_random = np.random.default_rng(_SPLIT_SEED)
    n_held_out = round(HELD_OUT_FRACTION * _PER_CATEGORY)

    def choose(texts: tuple[str, ...], n: int) -> list[str]:
        return [texts[index] for index in np.sort(np_random.choice(len(texts), n, replace=False))]

    train: list[str] = []
    held_out: list[str] = []
    for category in CATEGORIES:
        prompts = _split_category(category)
        train += choose(prompts.train, _PER_CATEGORY - n_held_out)
        held_out += choose(prompts.held_out, n_held_out)
    return PromptSet("shapes", tuple(train), tuple(held_out))


def unseen_prompts(prompts: PromptSet) -> tuple[str, ...]:
    """Returns prompts that training on a set never shows: its own held-out ones, or else those of its categories.

    Args:
        prompts: prompts that the shapes world can read.

    Returns:
        Prompts none of which asks for the same objects as one of ``prompts.train``.

    Raises:
        ValueError: if the set has no held-out prompts and the shapes world cannot read one of its training prompts.
    """
    if prompts.held_out:
        return prompts.held_out
    requests = [parse_prompt(text) for text in prompts.train]
    shown = {_objects(request) for request in requests}
    unseen = []
    for category in dict.fromkeys(request.category for request in requests):
        held_out = _split_category(category).held_out
        unseen += [text for text in held_out if _objects(parse_prompt(text)) not in shown]
    return tuple(unseen)


def _objects(request: Request) -> tuple[frozenset[ObjectKind], int]:
    """Returns the objects without order and relation, so that all wordings of the same objects give the same value."""
    return frozenset(request.kinds), len(request.kinds)


def _split_category(category: str) -> PromptSet:
    requests = all_requests(category)
    distinct = list(dict.fromkeys(_objects(request) for request in requests))
    shuffled = np.random.default_rng(_SPLIT_SEED).permutation(len(distinct))
    n_held_out = round(HELD_OUT_FRACTION * len(distinct))
    held_out = {distinct[index] for index in shuffled[:n_held_out]}
    train_texts = [str(request) for request in requests if _objects(request) not in held_out]
    held_out_texts = [str(request) for request in requests if _objects(request) in held_out]
    return PromptSet(category, tuple(train_texts), tuple(held_out_texts))
