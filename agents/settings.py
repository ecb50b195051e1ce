"""Arguments of our classes, as signatures have them and as ``--set NAME=VALUE`` writes them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

#: What a setting can be, and how messages call it.
_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a word",
    list: "a list such as [a, b]",
    dict: "a mapping such as {name: value}",
    NoneType: "null",
}
_CONTAINERS = {Sequence: list, Mapping: dict}


def read_settings(texts: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """``name=value`` texts as a dict; values are read as in a YAML file, and must be of a kind that the hint allows."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, written = text.partition("=")
        if not (name and equals):
            raise ValueError(f"a setting is written NAME=VALUE, not {text!r}")
        try:
            value = yaml.safe_load(written)
        except yaml.YAMLError:
            raise ValueError(
                f"the value of {text!r} cannot be read: write a number, true, false, null or a word"
            ) from None
        with contextlib.suppress(TypeError, ValueError):
            value = float(value) if isinstance(value, str) else value  # 1e-3, a text to YAML
        kinds = _kinds(hints.get(name, Any))
        if kinds and type(value) not in kinds and not (type(value) is int and float in kinds):
            raise ValueError(f"{name} must be {' or '.join(_KINDS[kind] for kind in kinds)}, not {value!r}")
        settings[name] = value
    return settings


def _kinds(hint: Any) -> list[type]:
    """Those of :data:`_KINDS` that a type hint allows; none if it says nothing of them."""
    if get_origin(hint) in _CONTAINERS:
        return [_CONTAINERS[get_origin(hint)]]
    if get_origin(hint) is Literal:
        return list(dict.fromkeys(map(type, get_args(hint))))
    if get_origin(hint) in (Union, UnionType):
        return list(dict.fromkeys(kind for part in get_args(hint) for kind in _kinds(part)))
    return [hint] if hint in _KINDS else []


def hints_of(kind: type) -> dict[str, Any]:
    """The type hint of each argument of one of our classes, those that it hands on to its base class included."""
    ours = [base for base in reversed(kind.__mro__) if base.__module__.startswith(("agents.", "dpok_gym."))]
    makers = [vars(base)["__init__"] for base in ours if "__init__" in vars(base)]
    return {name: hint for maker in makers for name, hint in get_type_hints(maker).items()}


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The default of each argument, those that a class hands on to its base class included."""
    parameters = inspect.signature(function).parameters.values()
    inherited = {}
    if isinstance(function, type) and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        inherited = defaults_of(function.__mro__[1])
    named = {it.name: it.default for it in parameters if it.name[0] != "_" and it.kind is not it.VAR_KEYWORD}
    return inherited | named
