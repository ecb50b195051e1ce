"""Types of constructors' arguments, as a command line can express them."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tyro.constructors import PrimitiveConstructorSpec

from dpok_gym.utils.reading import parse_yaml

#: Types that a command line can express as they are.
_SIMPLE = (bool, int, float, str, types.NoneType)


def expressible_type(annotation: Any) -> Any:
    """Returns the part of a type hint that a command line can express.

    For example, ``float | Callable`` becomes ``float``.

    Args:
        annotation: the type hint of a constructor's argument.

    Returns:
        The type for tyro, perhaps with a reader of its own; None if nothing of the hint can be expressed.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in _SIMPLE or origin is Literal:
        return annotation
    if annotation is None:  # how a type hint writes NoneType
        return types.NoneType
    if origin is tuple and not _is_of_any_length(annotation):
        return annotation
    if origin in (Union, types.UnionType):
        return _expressible_union(parts)
    if _is_subclass(origin or annotation, Mapping):
        return Annotated[dict, _mapping_spec(False)]
    if _is_subclass(origin or annotation, Collection):
        return Annotated[tuple, _words_spec(annotation, False)]
    return None


def _expressible_union(parts: Sequence[Any]) -> Any:
    """Returns the expressible part of ``A | B | ...``."""
    kinds = [part for part in parts if part is not types.NoneType]
    optional = len(kinds) < len(parts)
    # tyro cannot choose between a sequence or a mapping and other types, so one reader reads the whole union.
    for kind in kinds:
        outer = get_origin(kind) or kind
        if _is_subclass(outer, Mapping):
            return Annotated[dict | None, _mapping_spec(optional)]
        if _is_subclass(outer, Collection) and outer is not str and _is_of_any_length(kind):
            return Annotated[tuple | str | None, _words_spec(kind, optional, kinds)]
        if kind is bool and len(kinds) > 1:
            return Annotated[bool | str, _switch_spec([word for other in kinds for word in get_args(other)])]
    expressible = [kind for kind in map(expressible_type, kinds) if kind is not None]
    if not expressible:
        return None
    if optional:
        expressible.append(types.NoneType)
    return Union[tuple(expressible)]  # noqa: UP007  (the types are known only now)


def _is_subclass(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def _is_of_any_length(annotation: Any) -> bool:
    """Returns whether a sequence type is not a tuple of a fixed number of entries."""
    return get_origin(annotation) is not tuple or Ellipsis in get_args(annotation)


def _words_spec(sequence: Any, optional: bool, union: Sequence[Any] = ()) -> PrimitiveConstructorSpec[Any]:
    """Reads one or several words.

    Args:
        sequence: the type of the sequence, such as ``tuple[int, ...]``, with the type of its entries.
        optional: True if "None" stands for None.
        union: all types of the argument. If the type of an entry is among them, a single word is read as an entry and
            not as a sequence of one: ``--target-modules all`` names a set of layers.
    """
    parts = get_args(sequence)
    convert: Callable[[str], Any] = parts[0] if parts and parts[0] in (int, float) else str

    def read(words: list[str]) -> Any:
        if optional and words == ["None"]:
            return None
        if any("," in word for word in words):
            separate = " ".join(" ".join(words).replace(",", " ").split())
            raise ValueError(f"write {separate!r}, with spaces and without commas")
        values = tuple(convert(word) for word in words)
        return values[0] if len(values) == 1 and convert in union else values

    def write(value: Any) -> list[str]:
        if isinstance(value, (list, tuple)):
            return [str(entry) for entry in value]
        return [str(value)]

    metavar = "NAME [NAME ...]" if convert is str else f"{convert.__name__.upper()} ..."
    return PrimitiveConstructorSpec(
        nargs="*", metavar=metavar, instance_from_str=read, is_instance=lambda value: True, str_from_instance=write
    )


#: ``--x 0 2``, or ``--x None``.
IntegersOrNone = Annotated[tuple[int, ...] | None, _words_spec(Sequence[int], True)]


def _switch_spec(words: Sequence[str]) -> PrimitiveConstructorSpec[Any]:
    """Reads a switch that may also have a value: ``--x`` or ``--x True``, ``--x False``, ``--x auto``.

    Args:
        words: the values beside True and False.
    """
    values: dict[str, Any] = {"True": True, "False": False} | {word: word for word in words}

    def read(given: list[str]) -> Any:
        if not given:
            return True
        if given[0] not in values:
            raise ValueError(f"it takes {', '.join(values)}, not {given[0]!r}")
        return values[given[0]]

    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{'|'.join(values)}]",
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _mapping_spec(optional: bool) -> PrimitiveConstructorSpec[Any]:
    """Reads a mapping; see :func:`parse_mapping`.

    Args:
        optional: True if "None" stands for None.
    """

    def read(words: list[str]) -> dict[str, Any] | None:
        return None if optional and words == ["None"] else parse_mapping(words)

    def write(value: Any) -> list[str]:
        if not value:
            return [str(value)]
        return [f"{name}={entry}" for name, entry in value.items()]

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE ...",
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=write,
    )


#: ``--x a=1 b=2``, or ``--x None``.
MappingOrNone = Annotated[dict[str, Any] | None, _mapping_spec(True)]


def parse_mapping(words: Sequence[str]) -> dict[str, Any]:
    """Reads ``NAME=VALUE`` words, or one YAML or JSON mapping; a value is read as in a YAML file.

    Raises:
        ValueError: if a word cannot be read.
    """
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        values = _read_yaml(words[0])
        if isinstance(values, dict):
            return values
    mapping: dict[str, Any] = {}
    for word in words:
        name, equals, written = word.partition("=")
        if not (name and equals):
            raise ValueError(f"write NAME=VALUE, not {word!r}")
        mapping[name] = _read_yaml(written)
    return mapping


def _read_yaml(text: str) -> Any:
    try:
        value = parse_yaml(text, "it")
    except ValueError:
        raise ValueError(f"{text!r} cannot be read: write a number, true, false, null or a word") from None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML takes 1e-3 as a text, because it has no decimal point
    return value
