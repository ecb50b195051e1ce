"""Prompt sets: what the pictures are asked to show, in training and, unseen until then, in evaluation."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SHAPES_CATEGORIES = ("colour", "count", "composition", "location")
HELD_OUT_FRACTION = 0.2
_SPLIT_SEED = 0  # part of the definition of the named sets: another seed holds out other prompts
_PER_CATEGORY = 24  # of the set "shapes": as many as the smallest category has, so that all four weigh the same


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a task.

    Attributes:
        name: for logs and error messages.
        train: the prompts to sample in training, at least one; one that is there twice is sampled twice as often.
        held_out: prompts to evaluate on that training never shows; may be empty.
        weights: how often each of ``train`` is sampled, up to a common factor; empty for equally often.

    Raises:
        TypeError: if ``train`` or ``held_out`` is a text and not a sequence of them.
        ValueError: if ``train`` is empty, an entry is not a text or is blank, or the weights are not one for each
            prompt, finite and not negative, with a positive sum.
    """

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in ("train", "held_out"):
            object.__setattr__(self, field, self._checked(field))
        if not self.train:
            raise ValueError(f"the prompt set {self.name!r} is empty; it needs at least one prompt")
        if self.weights:
            values = np.array(self.weights, dtype=np.float64)
            if (
                values.shape != (len(self.train),)
                or not (np.isfinite(values) & (values >= 0)).all()
                or not values.any()
            ):
                raise ValueError(
                    f"the weights of {self.name!r} must be {len(self.train)} finite numbers, one for each prompt, none "
                    "negative and not all 0"
                )
            object.__setattr__(self, "weights", tuple(values.tolist()))
            object.__setattr__(self, "_shares", values / values.sum())

    def _checked(self, field: str) -> tuple[str, ...]:
        texts = getattr(self, field)
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"the prompts of {self.name!r} ({field}) must be a list of texts, not {texts!r}")
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"prompt {index} of {self.name!r} ({field}) must be a text that is not blank, not {text!r}"
                )
        return tuple(texts)

    def sample(self, np_random: np.random.Generator, n: int) -> list[str]:
        """Draws ``n`` prompts from ``train`` with replacement, by their weights."""
        if self.weights:
            shares = self._shares  # type: ignore[attr-defined]  # which a frozen class cannot declare without a field
            return [self.train[index] for index in np_random.choice(len(self.train), n, p=shares)]
        return [self.train[index] for index in np_random.integers(len(self.train), size=n)]


def load_prompts(spec: PromptSet | str | os.PathLike[str] | Sequence[str]) -> PromptSet:
    """Gets a prompt set.

    Args:
        spec: one of

            - a :class:`PromptSet`, returned as it is;
            - the name of a set, see :func:`list_prompt_sets`;
            - the path of a UTF-8 file, reached as ``./name`` if it has the name of a set. By its ending:

              - ``.json``: ``{prompt: {"category": ...}}`` as DrawBench's is published, or a list of prompts;
              - ``.jsonl``: an object on each line, with the prompt under ``prompt``, ``text`` or ``caption``;
              - ``.csv``, ``.tsv``: a header, and the prompt in a column of one of these names, in any case;
              - anything else: a prompt on each line; blank lines and lines that start with ``#`` are skipped.

              Where an entry can have further fields, ``weight`` is how often its prompt is sampled, and 1 if it has
              none;
            - a list or tuple of texts;
            - any other text: the one prompt of the set.

            Only named sets hold prompts out.

    Raises:
        FileNotFoundError: if a path, or a text that ends as a file of prompts does, leads to no file.
        TypeError: if the spec is of another kind.
        ValueError: if there is no prompt in it, a prompt is blank or not a text, a file is not UTF-8 or not of the
            format that its ending says, or the text is one word that looks like a misspelt name of a set (a prompt of
            that word can be given as a list of one).
    """
    if isinstance(spec, PromptSet):
        return spec
    if isinstance(spec, (list, tuple)):
        return PromptSet("list", tuple(spec))
    if not isinstance(spec, (str, os.PathLike)):
        raise TypeError(
            f"prompts must be the name of a set ({', '.join(list_prompt_sets())}), a file, a list of texts or a text, "
            f"not {spec!r}"
        )
    if isinstance(spec, str) and spec in _NAMED_SETS:
        return _NAMED_SETS[spec]()
    if os.path.isfile(spec):  # not Path.is_file(), which raises for a text too long to be a path
        return _read_file(Path(spec))
    if not isinstance(spec, str) or spec.lower().endswith((".txt", *_READERS)):
        raise FileNotFoundError(f"there is no file of prompts at {str(spec)!r}")
    close = difflib.get_close_matches(spec, _NAMED_SETS, n=1, cutoff=0.8)
    if close and not any(character.isspace() for character in spec):
        raise ValueError(
            f"there is no prompt set {spec!r}; did you mean {close[0]!r}? The sets are "
            f"{', '.join(list_prompt_sets())}. If it is meant as a prompt, give a list: [{spec!r}]"
        )
    return PromptSet("text", (spec,))


def list_prompt_sets() -> list[str]:
    """The names of the sets that :func:`load_prompts` knows.

    ``colour``, ``count``, ``composition``, ``location``
        Everything that can be asked for in that category of the embedded world of shapes, see
        :mod:`dpok_gym.shapes.captions`. A fixed fifth is held out, chosen by a shuffle with a fixed seed. What is
        held out is a combination of objects with all its wordings: the mirrored "a blue square and a red circle" is
        on the same side as "a red circle and a blue square", and ``composition`` and ``location`` hold out the same
        pairs. Every colour, shape, number and relation occurs in training.
    ``shapes``
        24 prompts of each of these categories, chosen with a fixed seed: 19 for training and 5 held out.
    ``mixture``
        Three of the Gaussian mixtures of the mixture model, see :data:`dpok_gym.mixture.data.MIXTURES`; the fourth is
        held out.
    ``dpok-colour``, ``dpok-count``, ``dpok-composition``, ``dpok-location``
        The training prompts of DPOK's experiments, one each (Fan et al. 2023, "DPOK: Reinforcement Learning for
        Fine-tuning Text-to-Image Diffusion Models", section 5). One counterpart each is held out: that of the colour
        is the paper's, the other three are ours.
    ``dpok``
        All four of DPOK's prompts, and all four held out.
    """
    return list(_NAMED_SETS)


def unseen_prompts(prompts: PromptSet) -> tuple[str, ...]:
    """Prompts of the embedded world that training on a set never shows: its own held-out ones, or its categories'.

    Args:
        prompts: that the embedded world can read.

    Returns:
        Prompts none of which asks for the same objects as one of ``prompts.train``.

    Raises:
        ValueError: if the set has no held-out prompts, and a training prompt is none of the embedded world.
    """
    from dpok_gym.shapes.captions import parse_prompt

    if prompts.held_out:
        return prompts.held_out
    requests = [parse_prompt(text) for text in prompts.train]
    shown = {(frozenset(request.kinds), len(request.kinds)) for request in requests}
    categories = dict.fromkeys(request.category for request in requests)
    texts = [text for category in categories for text in load_prompts(category).held_out]
    unseen = {text: parse_prompt(text) for text in texts}
    return tuple(text for text, it in unseen.items() if (frozenset(it.kinds), len(it.kinds)) not in shown)


def _read_file(path: Path) -> PromptSet:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file of prompts {str(path)!r} is not UTF-8 text: {error}") from error
    suffix = path.suffix.lower()
    try:
        entries = _READERS.get(suffix, _read_lines)(content)
    except (ValueError, TypeError, csv.Error) as error:  # json's errors are ValueErrors
        raise ValueError(
            f"the file of prompts {str(path)!r} cannot be read as {suffix[1:].upper()}: {error}"
        ) from error
    if not entries:
        advice = "write one on each line, without a leading #" if suffix not in _READERS else "add one"
        raise ValueError(f"there is no prompt in the file {str(path)!r}; {advice}")
    weights = tuple(weight for _, weight in entries)
    return PromptSet(str(path), tuple(text for text, _ in entries), (), () if set(weights) == {1.0} else weights)


#: Prompts of a file, with their weights.
_Entries = list[tuple[str, float]]

_COLUMNS = ("prompt", "text", "caption")


def _read_lines(content: str) -> _Entries:
    lines = (line.strip() for line in content.split("\n"))
    return [(line, 1.0) for line in lines if line and not line.startswith("#")]


def _read_json(content: str) -> _Entries:
    found = json.loads(content)
    if isinstance(found, dict):
        for text, fields in found.items():
            if not isinstance(fields, dict):
                raise ValueError(f"the prompt {text!r} must have an object of fields, such as {{}}, not {fields!r}")
        return [(text, _weight(fields, text)) for text, fields in found.items()]
    if isinstance(found, list):
        return [_entry(entry) if isinstance(entry, dict) else (entry, 1.0) for entry in found]
    raise ValueError("it is neither an object with the prompts as its keys nor a list of prompts")


def _read_json_lines(content: str) -> _Entries:
    rows = [json.loads(line) for line in content.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError('each line must be an object, such as {"prompt": "a green star"}')
    return [_entry(row) for row in rows]


def _read_table(content: str, delimiter: str) -> _Entries:
    return [_entry(row) for row in csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)]


def _entry(fields: dict[Any, Any]) -> tuple[str, float]:
    lower = {key.lower().strip(): value for key, value in fields.items() if isinstance(key, str)}
    for column in _COLUMNS:
        if column in lower:
            return lower[column], _weight(lower, lower[column])
    raise ValueError(f"none of the fields {', '.join(map(repr, lower))} is named {', '.join(map(repr, _COLUMNS))}")


def _weight(fields: Mapping[str, Any], text: Any) -> float:
    weight = fields.get("weight")
    try:
        return 1.0 if weight is None or not str(weight).strip() else float(weight)
    except (TypeError, ValueError):
        raise ValueError(f"the weight of the prompt {text!r} must be a number, not {weight!r}") from None


_READERS: dict[str, Callable[[str], _Entries]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
}


def _shapes_category(category: str) -> PromptSet:
    from dpok_gym.shapes.captions import all_requests

    requests = all_requests(category)
    # The objects, whatever their order and relation: what is seen in one wording is not unseen in another.
    objects = [(frozenset(request.kinds), len(request.kinds)) for request in requests]
    distinct = list(dict.fromkeys(objects))
    shuffled = np.random.default_rng(_SPLIT_SEED).permutation(len(distinct))
    held_out = {distinct[index] for index in shuffled[: round(HELD_OUT_FRACTION * len(distinct))]}

    def texts(held: bool) -> tuple[str, ...]:
        return tuple(str(request) for request, key in zip(requests, objects, strict=True) if (key in held_out) == held)

    return PromptSet(category, texts(held=False), texts(held=True))


def _shapes() -> PromptSet:
    np_random = np.random.default_rng(_SPLIT_SEED)
    n_held_out = round(HELD_OUT_FRACTION * _PER_CATEGORY)

    def choose(texts: tuple[str, ...], n: int) -> list[str]:
        return [texts[index] for index in np.sort(np_random.choice(len(texts), n, replace=False))]

    train: list[str] = []
    held_out: list[str] = []
    for category in map(_shapes_category, SHAPES_CATEGORIES):
        train += choose(category.train, _PER_CATEGORY - n_held_out)
        held_out += choose(category.held_out, n_held_out)
    return PromptSet("shapes", tuple(train), tuple(held_out))


#: Of each category: the prompt that DPOK trains on, and an unseen counterpart.
_DPOK = {
    "colour": ("A green colored rabbit.", "A green colored cat."),
    "count": ("Four wolves in the park.", "Four birds in the park."),
    "composition": ("A cat and a dog.", "A dog and a rabbit."),
    "location": ("A dog on the moon.", "A cat on the moon."),
}


def _dpok(name: str, categories: Sequence[str]) -> PromptSet:
    train, held_out = zip(*(_DPOK[category] for category in categories), strict=True)
    return PromptSet(name, train, held_out)


_NAMED_SETS: dict[str, Callable[[], PromptSet]] = {
    **{category: partial(_shapes_category, category) for category in SHAPES_CATEGORIES},
    "shapes": _shapes,
    "mixture": partial(PromptSet, "mixture", ("one gaussian", "two modes", "ring of six"), ("three modes",)),
    **{f"dpok-{category}": partial(_dpok, f"dpok-{category}", [category]) for category in _DPOK},
    "dpok": partial(_dpok, "dpok", list(_DPOK)),
}
