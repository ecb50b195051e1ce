"""Options of a command: parsing, error messages, and the options that are made from constructors' arguments.

Nothing that takes long to import is imported here, so that help and errors come at once.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
import yaml
from tyro.constructors import PrimitiveConstructorSpec

from dpok_gym.utils.validation import suggest

if TYPE_CHECKING:
    from agents.common.arguments import Argument

Options = TypeVar("Options")

#: Types that a command line can express as they are.
_SIMPLE = (bool, int, float, str, types.NoneType)

#: Arguments that are one text on the command line, whatever else they can be in Python, and what the help calls it.
_TEXTS = {"model": "NAME|FOLDER|HUB-ID", "prompts": "TEXT|SET|FILE", "reward": "NAME[=WEIGHT],..."}

#: What tyro draws around its messages.
_BOX = re.compile(r"[╭╮╰╯│]")
_RULE = re.compile(r"─{5,}")


class UsageError(ValueError):
    """A command line that cannot be read."""


def parse_options(options: type[Options], prog: str, argv: Sequence[str], default: Options | None = None) -> Options:
    """Reads a command's options; ``--help`` prints them and ends the program.

    Args:
        options: dataclass of the options.
        prog: the command as it is written, for the help.
        argv: the words after the command.
        default: an instance with the defaults; None for those of the class.

    Raises:
        UsageError: if an option is unknown, or a value cannot be read; the message is one line.
    """
    # tyro prints a box and ends the program; here every error is one line.
    printed = io.StringIO()
    more = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            parsed, unknown = tyro.cli(options, prog=prog, args=argv, return_unknown_args=True, **more)
    except SystemExit as ended:
        if not ended.code:
            raise
        raise UsageError(_first_message(printed.getvalue())) from None
    if unknown:
        raise UsageError(_describe_unknown(unknown, option_names(options)))
    sys.stderr.write(printed.getvalue())
    return parsed


def default_hint(metavar: str, text: str) -> Any:
    """Says in the help where an option's default comes from.

    Args:
        metavar: what the help calls the value.
        text: what the default is.
    """
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {text})")


def given(options: Any, *names: str) -> dict[str, Any]:
    """Returns those of the options that are not None."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def option_names(options: type) -> list[str]:
    """Returns the options of a dataclass as they are written, those of nested ones included."""
    names: list[str] = []
    for option in fields(options):  # type: ignore[arg-type]  # a dataclass
        kind = get_args(option.type)[0] if get_origin(option.type) is Annotated else option.type
        if is_dataclass(kind):
            names += option_names(kind)  # type: ignore[arg-type]
        else:
            names.append(f"--{option.name.replace('_', '-')}")
    return names


def make_options(name: str, arguments: Iterable[Argument], defaults: Mapping[str, Any]) -> type:
    """Makes a dataclass whose fields are the arguments of a constructor that a command line can express.

    Args:
        name: name of the dataclass, which is the heading of these options in the help.
        arguments: the arguments; their descriptions become the help texts.
        defaults: the default of each.
    """
    made = []
    for argument in arguments:
        kind = _command_line_type(argument)
        if kind is None or argument.name not in defaults:
            continue
        default = to_command_line(argument.name, defaults[argument.name])
        shown = tyro.conf.arg(help=clean_docstring(argument.doc), metavar=_TEXTS.get(argument.name))
        annotation = Annotated[kind, shown]
        made.append((argument.name, annotation, field(default_factory=lambda value=default: value)))
    return make_dataclass(name, made)


def to_command_line(name: str, value: Any) -> Any:
    """Returns an argument's value as the options hold it: a reward is a text, a sequence a tuple."""
    if name == "reward":
        return format_reward(value)
    if name in _TEXTS:
        return value if value is None else str(value)
    return tuple(value) if isinstance(value, list) else value


def format_reward(reward: Any) -> str:
    """Returns the text that :func:`agents.cli.environments.parse_reward` reads; a component with settings of its own shows its weight only."""
    if isinstance(reward, str):
        return reward
    entries = []
    for name, weight in dict(reward).items():
        number = weight.get("weight", 1.0) if isinstance(weight, Mapping) else weight
        entries.append(f"{name}={number}")
    return ",".join(entries)


def clean_docstring(text: str) -> str:
    """Returns a description without the marks of reStructuredText: ``:class:`~a.B``` is B."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda match: match[1].rpartition(".")[2], text)
    text = text.replace("``", "")
    return text[:1].upper() + text[1:]


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


def _command_line_type(argument: Argument) -> Any:
    """Returns the type of an argument's option, or None if a command line cannot express it."""
    if argument.name in _TEXTS:
        return str | None
    return _expressible(argument.annotation)


def _expressible(annotation: Any) -> Any:
    """Returns the part of a type hint that a command line can express, or None."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in _SIMPLE or origin is Literal:
        return annotation
    if annotation is None:
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
    for kind in kinds:
        outer = get_origin(kind) or kind
        if _is_subclass(outer, Mapping):
            return Annotated[Union[dict, None], _mapping_spec(optional)]
        if _is_subclass(outer, Collection) and outer is not str and _is_of_any_length(kind):
            return Annotated[Union[tuple, str, None], _words_spec(kind, optional, kinds)]
    found = [kind for kind in map(_expressible, kinds) if kind is not None]
    if not found:
        return None
    if optional:
        found.append(types.NoneType)
    return Union[tuple(found)]


def _is_subclass(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def _is_of_any_length(annotation: Any) -> bool:
    """Returns whether a sequence type is not a tuple of a fixed number of entries."""
    return get_origin(annotation) is not tuple or Ellipsis in get_args(annotation)


def _words_spec(sequence: Any, optional: bool, union: Sequence[Any] = ()) -> PrimitiveConstructorSpec[Any]:
    """Reads one or several words.

    Args:
        sequence: type of the sequence, which says of the entries.
        optional: True if "None" stands for None.
        union: the types that are allowed in all. If it has that of an entry, a single word is an entry, such as the
            name of a set of layers.
    """
    parts = get_args(sequence)
    convert: Callable[[str], Any] = parts[0] if parts and parts[0] in (int, float) else str

    def read(words: list[str]) -> Any:
        if optional and words == ["None"]:
            return None
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


def _mapping_spec(optional: bool) -> PrimitiveConstructorSpec[Any]:
    """Reads a mapping; see :func:`parse_mapping`."""

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


def _read_yaml(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} cannot be read: write a number, true, false, null or a word") from None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # 1e-3 is a text in YAML
    return value


def _first_message(box: str) -> str:
    """Returns the message in one of tyro's boxes, without the advice that follows it."""
    lines = [_BOX.sub("", line).strip() for line in box.splitlines()]
    lines = [line for line in lines[1:] if line]
    for number, line in enumerate(lines):
        if _RULE.match(line):
            lines = lines[:number]
            break
    return " ".join(lines)


def _describe_unknown(words: Sequence[str], known: Sequence[str]) -> str:
    """Returns the message for words that belong to no option; it names the nearest option of the first one."""
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not options:
        return f"unexpected {words[0]!r}: a text of several words needs quotation marks"
    written = options[0].replace("_", "-")
    hint = suggest(written, known).partition("There are:")[0].strip()
    return f"unknown option {options[0]}; {hint or 'the option --help lists all of them'}"
