"""Checks of arguments: each returns the value, or says what it must be."""

from __future__ import annotations

import math
from typing import Any


def at_least_one(name: str, value: int) -> int:
    """Checks a number of things."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


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
