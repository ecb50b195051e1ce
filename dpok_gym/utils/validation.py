"""Checks of arguments. Each returns the value, or raises an error that says what the value must be."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

#: Bad entries of a list whose places an error message has.
MAX_PLACES = 5


def check_integer(name: str, value: int, minimum: int = 1) -> int:
    """Checks a count, which may be a NumPy integer.

    Raises:
        ValueError: if the value is no integer, or is below the minimum.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
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
        first = [index, *(other for other, _ in itertools.islice(bad, MAX_PLACES - 1))]
        n_more = sum(1 for _ in bad)
        places = ", ".join(str(lines[index] if lines else index) for index in first) + (", ..." if n_more else "")
        where = "in line" if lines else "with index"
        raise ValueError(f"{message} ({len(first) + n_more} of {total} are wrong, {where} {places})")


def suggest(name: str, known: Collection[str]) -> str:
    """Returns the end of an error message: the nearest known name, then all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    names = ", ".join(sorted(known))
    return f"did you mean {close[0]!r}? There are: {names}" if close else f"there are: {names}"
