"""Checks of arguments: each returns the value, or says what it must be."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any


def integer(name: str, value: int, least: int = 1) -> int:
    """Checks a number of things, which may be one of NumPy's."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def not_negative(name: str, value: float) -> float:
    """Checks a coefficient."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    return value


def positive(name: str, value: float) -> float:
    """Checks a limit, which may be infinite."""
    if not value > 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return value


def fraction(name: str, value: float) -> float:
    """Checks a share or a discount."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return value


def one_of(name: str, value: Any, *allowed: str | bool) -> Any:
    """Checks a choice."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value
