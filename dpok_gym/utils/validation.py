"""Checks of arguments. Each returns the value, or raises an error that says what the value must be."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80  # characters

#: The largest count of anything, unless a smaller one makes sense. No training yet drew or repeated so much.
MAX_COUNT = 10**9
#: The largest coefficient or limit: its square is still a number in float32.
MAX_NUMBER = 1e18
#: The largest seed that all random number generators take.
MAX_SEED = 2**32 - 1
#: Bad entries of a list whose places an error message has.
MAX_PLACES = 5


def check_integer(name: str, value: int, minimum: int = 1, maximum: int = MAX_COUNT) -> int:
    """Checks a count, which may be a NumPy integer.

    Raises:
        ValueError: if the value is no integer, or is below the minimum or above the maximum.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {shorten(value)}")
    if value > maximum:
        raise ValueError(f"{name} must be an integer of at most {maximum:,}, got {shorten(value)}")
    return int(value)


def check_non_negative(name: str, value: float) -> float:
    """Checks a coefficient: at least 0, finite, and not so large that sums of float32 overflow.

    Raises:
        ValueError: if it is not.
    """
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least 0, got {shorten(value)}")
    return _check_size(name, value)


def check_positive(name: str, value: float) -> float:
    """Checks a limit: above 0, and perhaps infinite. A finite one must not be so large that sums of float32 overflow.

    Raises:
        ValueError: if it is not.
    """
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{name} must be a number above 0, got {shorten(value)}")
    return value if value == math.inf else _check_size(name, value)


def check_finite(name: str, value: float) -> float:
    """Checks a number of any sign: finite, and not so large that sums of float32 overflow.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not finite, or too large.
    """
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, not {shorten(value)}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, not {value!r}")
    return _check_size(name, value)


def check_fraction(name: str, value: float, *, zero: bool = True, one: bool = True) -> float:
    """Checks a share or a discount, in [0, 1].

    Args:
        name: what it is.
        value: the share.
        zero: whether it may be 0.
        one: whether it may be 1.

    Raises:
        ValueError: if it is outside.
    """
    if not _is_number(value) or not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1{']' if one else ')'}, got {shorten(value)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_size(name: str, value: float) -> float:
    if abs(value) > MAX_NUMBER:
        raise ValueError(
            f"{name} must be at most {MAX_NUMBER:g}, for which float32 is large enough, got {shorten(value)}"
        )
    return value


def check_bool(name: str, value: bool) -> bool:
    """Checks a switch. A text such as "false" would count as true.

    Raises:
        TypeError: if the value is neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shorten(value)}")
    return value


def check_choice(name: str, value: Any, *allowed: str | bool) -> Any:
    """Checks that a value is one of the allowed ones.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, (str, bool)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shorten(value)}")
    return value


def check_path(name: str, path: str | os.PathLike[str]) -> Path:
    """Checks the path of a file or a folder.

    Raises:
        TypeError: if it is neither a text nor a path.
        ValueError: if it is blank, or has a NUL.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {shorten(path)}")
    text = str(path)
    if not text.strip() or "\0" in text:
        raise ValueError(f"{name} must be a path that is not blank, got {text!r}")
    return Path(path)


def check_mapping(name: str, value: Any) -> Mapping[str, Any]:
    """Checks a mapping of names to values.

    Raises:
        TypeError: if the value is no mapping, or a key is no text.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a mapping of names to values, got {shorten(value)}")
    return value


def check_names(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Checks that every name is known.

    Args:
        what: what the names stand for, such as "argument of DPOK".
        names: the names to check.
        known: the names that exist.

    Raises:
        ValueError: for the first unknown name; the message has the nearest known one.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {shorten(name)}; {suggest(str(name), known)}")


def check_entries(problems: Iterable[tuple[int, str]], total: int, lines: Sequence[int] = ()) -> None:
    """Makes sure that no entry of a list has a problem.

    Args:
        problems: index of each bad entry, in ascending order, and a sentence that says what is wrong.
        total: number of entries.
        lines: the line of each entry in its file; empty for none.

    Raises:
        ValueError: if there is a problem: the first one, and the number and the first places of all.
    """
    bad = iter(problems)
    for index, message in bad:
        if total == 1:
            raise ValueError(message)
        wrong = [index, *(other for other, _ in bad)]
        raise ValueError(f"{message} ({len(wrong)} of {total} are wrong, {name_places(wrong, lines)})")


def name_places(indices: Sequence[int], lines: Sequence[int] = ()) -> str:
    """Returns where entries of a list are, for a message: the first few of them.

    Args:
        indices: of the entries, at least one.
        lines: the line of each entry of the list in its file; empty for none.
    """
    places = ", ".join(str(lines[index] if lines else index) for index in indices[:MAX_PLACES])
    return f"{'in line' if lines else 'with index'} {places}{', ...' if len(indices) > MAX_PLACES else ''}"


def suggest(name: str, known: Collection[str]) -> str:
    """Returns the end of an error message: the nearest known name, then all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    names = ", ".join(sorted(known))
    return f"did you mean {close[0]!r}? There are: {names}" if close else f"there are: {names}"


def shorten(value: Any) -> str:
    """Returns what a value looks like, for an error message; long ones lose their middle."""
    return _SHORT.repr(value)
