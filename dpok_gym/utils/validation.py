"""Checks of arguments. Each returns the value, or raises an error that says what the value must be."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any


#: The largest count of anything, unless a smaller one makes sense: what takes longer or more than this is a mistake.
MAX_COUNT = 10**9


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
    """Checks a coefficient: finite and at least 0.

    Raises:
        ValueError: if it is not.
    """
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    return value


def check_positive(name: str, value: float) -> float:
    """Checks a limit: above 0, and perhaps infinite.

    Raises:
        ValueError: if it is not.
    """
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return value


def check_fraction(name: str, value: float) -> float:
    """Checks a share or a discount, in [0, 1].

    Raises:
        ValueError: if it is outside.
    """
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_choice(name: str, value: Any, *allowed: str | bool) -> Any:
    """Checks that a value is one of the allowed ones.

    Raises:
        ValueError: if it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


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
            raise ValueError(f"unknown {what} {name!r}; {suggest(name, known)}")


def suggest(name: str, known: Collection[str]) -> str:
    """Returns the end of an error message: the nearest known name, then all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    names = ", ".join(sorted(known))
    return f"did you mean {close[0]!r}? There are: {names}" if close else f"there are: {names}"


def shorten(value: Any) -> str:
    """Returns what a value looks like, for an error message, at most 80 characters of it."""
    return reprlib.repr(value)
