"""Prompts of the shapes world to train on, and three kinds of prompts that the training never shows.

===============  ============================================================================================
``training``     120 prompts of three categories: all colours and numbers that are not held out, and 43 pairs
``objects``      40 prompts of the same categories, about combinations that :mod:`dpok_gym.shapes.prompts` holds out
``category``     40 prompts of the fourth category, such as "a red circle above a blue square"
``paraphrases``  the 43 pairs of the training in the other order
===============  ============================================================================================

Nothing is chosen by how well a model draws it: the choices are random ones, with a fixed seed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from dpok_gym.prompts import PromptSet
from dpok_gym.shapes.prompts import colour, composition, count, location

_N_TRAINING, _N_UNSEEN = 120, 40


@functools.cache
def prompt_splits() -> dict[str, tuple[str, ...]]:
    """Returns the prompts by the name of their kind."""
    np_random = np.random.default_rng(0)

    def choose(texts: Sequence[str], n: int) -> tuple[str, ...]:
        return tuple(texts[index] for index in np.sort(np_random.choice(len(texts), n, replace=False)))

    singles, counts, pairs = colour(), count(), composition()
    # One order of each pair: the other one is its paraphrase.
    ordered = [text for text in pairs.train if text < paraphrase(text)]
    shown_pairs = choose(ordered, _N_TRAINING - len(singles.train) - len(counts.train))
    n_held_out_pairs = _N_UNSEEN - len(singles.held_out) - len(counts.held_out)
    return {
        "training": (*singles.train, *counts.train, *shown_pairs),
        "objects": (*singles.held_out, *counts.held_out, *choose(pairs.held_out, n_held_out_pairs)),
        "category": choose(location().held_out, _N_UNSEEN),
        "paraphrases": tuple(paraphrase(text) for text in shown_pairs),
    }


def paraphrase(text: str) -> str:
    """Returns the prompt for a pair of objects, "a red star and a blue square", in the other order."""
    return " and ".join(reversed(text.split(" and ")))


def prompts_of(name: str) -> PromptSet:
    """Returns the prompts of a kind as a set without held-out prompts."""
    return PromptSet(name, prompt_splits()[name])
