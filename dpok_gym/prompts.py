"""Prompt sets: what the images are asked to show, in training and, unseen until then, in evaluation.

This module imports no torch. Letters used for shapes: N prompts.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpok_gym.prompt_files import SUFFIXES, read_prompt_file
from dpok_gym.utils.registry import Registry
from dpok_gym.utils.validation import check_entries, check_integer, shorten


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a task.

    Attributes:
        name: the name in logs and error messages.
        train: the prompts to sample in training, at least one. A prompt that stands here twice is sampled twice as
            often.
        held_out: prompts for evaluation that training never shows; may be empty.
        weights: how often each prompt of ``train`` is sampled, up to a common factor; empty for equally often.
        lines: the line of each prompt of ``train`` in its file, for error messages; empty if there is none.

    Raises:
        TypeError: if ``train`` or ``held_out`` is one text instead of a list of texts.
        ValueError: if ``train`` is empty, if an entry is blank or not a text, or if the weights are not one finite,
            non-negative number for each prompt, with a positive sum.
    """

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    lines: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("train", "held_out"):
            # A frozen class can set its own fields in this way only.
            object.__setattr__(self, name, self._check_texts(name))
        if not self.train:
            raise ValueError(f"the prompt set {self.name!r} is empty; it needs at least one prompt")
        if self.weights:
            weights = self._check_weights()
            object.__setattr__(self, "weights", tuple(weights.tolist()))
            # As numpy's choice() does it, which would do it again for each prompt that is drawn.
            cumulative = (weights / weights.sum()).cumsum()
            object.__setattr__(self, "_cumulative", cumulative / cumulative[-1])

    def _check_texts(self, name: str) -> tuple[str, ...]:
        texts = getattr(self, name)
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"the prompts of {self.name!r} ({name}) must be a list of texts, not {texts!r}")
        blank = (
            (index, f"prompt {index} of {self.name!r} ({name}) must be a text that is not blank, not {text!r}")
            for index, text in enumerate(texts)
            if not isinstance(text, str) or not text.strip()
        )
        check_entries(blank, len(texts), self.lines if name == "train" else ())
        return tuple(texts)

    def _check_weights(self) -> NDArray[np.float64]:
        try:
            weights = np.array(self.weights, dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(
                f"the weights of {self.name!r} must be a list of numbers, not {shorten(self.weights)}"
            ) from None
        is_one_each = weights.shape == (len(self.train),)
        if not is_one_each or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise ValueError(
                f"the weights of {self.name!r} must be {len(self.train)} finite numbers, one for each prompt, none "
                "negative and not all 0"
            )
        return weights

    def without(self, train: Collection[int], held_out: Collection[int] = ()) -> PromptSet:
        """Returns the set without some prompts, the others with their weights and lines.

        Args:
            train: indices of prompts of ``train`` to leave out.
            held_out: indices of prompts of ``held_out`` to leave out.

        Raises:
            ValueError: if no prompt of ``train`` is left, or none with a weight.
        """
        kept = [index for index in range(len(self.train)) if index not in train]
        return PromptSet(
            self.name,
            tuple(self.train[index] for index in kept),
            tuple(text for index, text in enumerate(self.held_out) if index not in held_out),
            tuple(self.weights[index] for index in kept) if self.weights else (),
            tuple(self.lines[index] for index in kept) if self.lines else (),
        )

    def sample(self, np_random: np.random.Generator, n: int) -> list[str]:
        """Draws ``n`` prompts from ``train`` with replacement, by their weights."""
        if self.weights:
            cumulative = self._cumulative  # type: ignore[attr-defined]  # a frozen class declares fields only
            return [self.train[index] for index in cumulative.searchsorted(np_random.random(n), side="right")]
        return [self.train[index] for index in np_random.integers(len(self.train), size=n)]


#: Makes a prompt set, when it is first asked for.
PromptFactory = Callable[[], PromptSet]

PROMPT_SETS: Registry[PromptSet | PromptFactory] = Registry("prompt set", "Add one with register_prompts().")


def register_prompts(name: str, prompts: PromptSet | PromptFactory | str) -> None:
    """Gives a prompt set a name that :func:`load_prompts` knows.

    Args:
        name: the name.
        prompts: the set; or a function without arguments that makes it; or where it is defined, as
            ``"module:function"``. The place is imported when the set is first loaded.

    Raises:
        TypeError: if ``prompts`` is none of these.
        ValueError: if the name is blank or already stands for other prompts, or if the text has no colon. A function
            that is defined anew, as a notebook cell does when it runs again, replaces itself.
    """
    if not isinstance(prompts, (PromptSet, str)) and not callable(prompts):
        raise TypeError(f"the prompts {name!r} must be a PromptSet, a function or 'module:function', not {prompts!r}")
    if isinstance(prompts, str) and not all(prompts.partition(":")):
        raise ValueError(f"the place of the prompts {name!r} must be written 'module:function', not {prompts!r}")
    PROMPT_SETS.register(name, prompts)


def list_prompt_sets() -> list[str]:
    """Returns the names of the sets that :func:`load_prompts` knows, sorted.

    Defined here:

    ``dpok-colour``, ``dpok-count``, ``dpok-composition``, ``dpok-location``
        One training prompt each, that of DPOK's experiments (Fan et al. 2023, "DPOK: Reinforcement Learning for
        Fine-tuning Text-to-Image Diffusion Models", section 5), and one held-out counterpart. The counterpart of the
        colour is the paper's; the other three are ours.
    ``dpok``
        All four of DPOK's training prompts, and all four held-out ones.

    The sets of the embedded worlds are described where they are defined, in the module ``prompts`` of each world.
    """
    return PROMPT_SETS.names()


def load_prompts(spec: PromptSet | str | os.PathLike[str] | Sequence[str]) -> PromptSet:
    """Loads a prompt set.

    Args:
        spec: one of

            - a :class:`PromptSet`, returned as it is;
            - the name of a set, see :func:`list_prompt_sets`;
            - the path of a UTF-8 file, see :func:`dpok_gym.prompt_files.read_prompt_file`. Write ``./name`` for a file
              that has the name of a set;
            - a list or tuple of texts;
            - any other text: it is the only prompt of the set.

            A text where no file is counts as a path, and not as a prompt, if it ends like a file of prompts or of a
            table (:data:`dpok_gym.prompt_files.SUFFIXES`), if it is one word with a slash, or if a folder is there, or
            at the part before its last slash. A prompt that looks so can be given as a list. Only named sets hold
            prompts out.

    Raises:
        FileNotFoundError: if there is no file at a path.
        TypeError: if the spec is of another type, or a registered function returns no prompt set.
        ValueError: if there is no prompt, if a prompt is blank or not a text, if a file is not UTF-8 or not of the
            format that its ending says, or if the text is one word that looks like a misspelt name of a set. A prompt
            of that word can be given as a list.
        ImportError: if the place of a registered set cannot be imported.
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
    if isinstance(spec, str) and spec in PROMPT_SETS:
        return _load_named(spec)
    path = os.path.expanduser(spec)
    if os.path.isfile(path):  # Path.is_file() would raise for a text that is too long to be a path
        return _load_file(Path(path))
    if os.path.isdir(path):
        raise FileNotFoundError(
            f"{str(spec)!r} is a folder, and not a file of prompts; give a file (a prompt that is the name of a folder "
            "goes into a file, or in Python into a list)"
        )
    if not isinstance(spec, str) or _looks_like_path(spec):
        raise FileNotFoundError(
            f"there is no file of prompts at {str(spec)!r}; check the path and the working folder (a prompt that looks "
            "like a path goes into a file, or in Python into a list)"
        )
    close = difflib.get_close_matches(spec, PROMPT_SETS.names(), n=1, cutoff=0.8)
    if close and _is_one_word(spec):
        raise ValueError(
            f"there is no prompt set {spec!r}; did you mean {close[0]!r}? The sets are "
            f"{', '.join(list_prompt_sets())}. If it is meant as a prompt, give a list: [{spec!r}]"
        )
    return PromptSet("text", (spec,))


def _looks_like_path(text: str) -> bool:
    if text.lower().rstrip().endswith(SUFFIXES):
        return True
    # "data/prompts" is a path, "a black/white cat" is none, and "data/my prompts" is one where the folder exists.
    folder = os.path.dirname(os.path.expanduser(text))
    has_slash = "/" in text or "\\" in text
    return has_slash and (_is_one_word(text) or (folder.strip("/") != "" and os.path.isdir(folder)))


def _is_one_word(text: str) -> bool:
    return not any(character.isspace() for character in text)


def _load_named(name: str) -> PromptSet:
    prompts = PROMPT_SETS.load(name)
    if not isinstance(prompts, PromptSet):
        prompts = prompts()
    if not isinstance(prompts, PromptSet):
        raise TypeError(f"the function registered for the prompts {name!r} must return a PromptSet, not {prompts!r}")
    return prompts


def _load_file(path: Path) -> PromptSet:
    entries = read_prompt_file(path)
    texts = tuple(text for text, _, _ in entries)
    weights = tuple(weight for _, weight, _ in entries)
    lines = tuple(line for _, _, line in entries if line)
    return PromptSet(str(path), texts, (), () if set(weights) == {1.0} else weights, lines)


def prompt_to_bytes(prompts: Sequence[str], size: int) -> NDArray[np.uint8]:
    """Writes prompts as rows of bytes of the same length: UTF-8, padded with zeros.

    This is the form in which a prompt is observed. It can be undone, and it depends on no model's vocabulary.

    Args:
        prompts: N texts.
        size: bytes of a row, at least 1.

    Returns:
        (N, size) uint8.

    Raises:
        ValueError: if a prompt has more than ``size`` bytes, or characters that the rows cannot keep: a NUL, which is
            the padding, or half of a surrogate pair, which is not UTF-8.
    """
    check_integer("max_prompt_bytes", size)
    check_entries(find_unobservable(prompts, size), len(prompts))
    rows = np.zeros((len(prompts), size), dtype=np.uint8)
    for row, prompt in zip(rows, prompts, strict=True):
        content = prompt.encode("utf-8")
        row[: len(content)] = np.frombuffer(content, dtype=np.uint8)
    return rows


def find_unobservable(prompts: Sequence[str], size: int) -> Iterator[tuple[int, str]]:
    """Yields the index of each prompt that :func:`prompt_to_bytes` cannot write, and a sentence that says why.

    Args:
        prompts: N texts.
        size: bytes of a row, at least 1.
    """
    for index, prompt in enumerate(prompts):
        try:
            content = prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            yield index, f"the prompt {shorten(prompt)} cannot be written as UTF-8: {error}"
            continue
        if b"\0" in content:
            yield index, f"the prompt {shorten(prompt)} has a NUL character, which marks the end of a prompt; remove it"
        elif len(content) > size:
            yield (
                index,
                f"the prompt {shorten(prompt)} has {len(content)} bytes in UTF-8, but max_prompt_bytes is {size}; "
                "raise max_prompt_bytes, or shorten the prompt",
            )


def prompts_from_bytes(array: NDArray[np.uint8]) -> list[str]:
    """Reads the rows that :func:`prompt_to_bytes` wrote.

    Args:
        array: (N, size) uint8.

    Returns:
        N texts.

    Raises:
        ValueError: if the array has another shape or type, or if a row is not UTF-8.
    """
    array = np.asarray(array)
    if array.ndim != 2 or array.dtype != np.uint8:
        raise ValueError(
            f"prompts are read from an array (N, max_prompt_bytes) of uint8, not {array.shape} of {array.dtype}"
        )
    prompts = []
    for index, row in enumerate(array):
        try:
            prompts.append(row.tobytes().rstrip(b"\0").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"row {index} of the observed prompts is not UTF-8 text: {error}") from error
    return prompts


#: For each category, the prompt that DPOK trains on and an unseen counterpart.
_DPOK = {
    "colour": ("A green colored rabbit.", "A green colored cat."),
    "count": ("Four wolves in the park.", "Four birds in the park."),
    "composition": ("A cat and a dog.", "A dog and a rabbit."),
    "location": ("A dog on the moon.", "A cat on the moon."),
}


def _register_dpok() -> None:
    for category, (train, held_out) in _DPOK.items():
        name = f"dpok-{category}"
        register_prompts(name, PromptSet(name, (train,), (held_out,)))
    trained, unseen = zip(*_DPOK.values(), strict=True)
    register_prompts("dpok", PromptSet("dpok", trained, unseen))


_register_dpok()
