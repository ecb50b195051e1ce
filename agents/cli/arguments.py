"""Options of a command: parsing, error messages, and the options that are made from constructors' arguments.

Nothing that takes long to import is imported here, so that help and errors come at once.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import field, is_dataclass, make_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from agents.cli.option_types import expressible_type
from dpok_gym.utils.validation import check_path, suggest

if TYPE_CHECKING:
    from agents.common.arguments import Argument

Options = TypeVar("Options")

#: Arguments that are always one text on the command line, with the name of the text in the help. In Python they may
#: also be objects.
_TEXTS = {
    "model": "NAME|FOLDER|HUB-ID",
    "prompts": "TEXT|SET|FILE",
    "reward": "NAME[=WEIGHT],...",
    "lora": "FOLDER|FILE",
    "choices": "FILE",
    "held_out_reward": "NAME[=WEIGHT],...",
}

#: The box that tyro draws around its messages, and the rules in it. For a terminal without such characters it draws no
#: box, and rules of hyphens.
_BOX = re.compile(r"[╭╮╰╯│]")
_RULE = re.compile(r"[─-]{5,}")

#: tyro's messages for a value of the wrong type, and ours.
_WRONG_VALUES = (
    (r"invalid literal for int\(\) with base 10: (?P<value>.*)", "takes an integer, not {value}"),
    (r"could not convert string to float: (?P<value>.*)", "takes a number, not {value}"),
    (r"no type matching (?P<kinds>.*) could be instantiated from \[(?P<value>.*?)\].*", "takes {kinds}, not {value}"),
    (r"(?P<message>.*)", "cannot be read: {message}"),
)


#: How options are read that tyro reads otherwise.
REGISTRY = tyro.constructors.ConstructorRegistry()


class UsageError(ValueError):
    """A command line that cannot be read."""


def parse_options(options: type[Options], prog: str, argv: Sequence[str]) -> Options:
    """Reads a command's options; ``--help`` prints them and ends the program.

    Args:
        options: dataclass of the options.
        prog: the command as it is written, for the help.
        argv: the words after the command.

    Raises:
        UsageError: if an option is unknown, or a value cannot be read; the message is one line.
    """
    parsed, unknown = _call_tyro(options, argv, prog=prog)
    # tyro's own error for an unknown option names no similar one, so it hands unknown words back instead.
    if unknown:
        raise UsageError(_describe_unknown(unknown, list(kinds_of_options(options)), argv))
    return parsed


def parse_some_options(options: type[Options], argv: Sequence[str]) -> Options:
    """Reads the options of a dataclass, and ignores all other words, even ``--help``.

    Args:
        options: dataclass of the options.
        argv: the words after the command.

    Raises:
        UsageError: if a value cannot be read.
    """
    return _call_tyro(options, argv, add_help=False)[0]


def _call_tyro(options: type[Options], argv: Sequence[str], **settings: Any) -> tuple[Options, list[str]]:
    """Returns the options, and the words that belong to none of them."""
    # tyro prints its errors in a box over several lines and exits. main() prints all errors in the same way instead.
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(options, args=argv, return_unknown_args=True, registry=REGISTRY, **settings)
    except SystemExit as ended:
        if not ended.code:  # after --help
            raise
        raise UsageError(_first_message(printed.getvalue())) from None


@REGISTRY.primitive_rule
def _path_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    """Refuses a blank path: ``Path("")`` would be the working folder."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: check_path("it", words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def default_hint(metavar: str, text: str) -> Any:
    """Returns tyro's settings for an option whose default is not known before the other options are.

    Args:
        metavar: the name of the value in the help.
        text: the description of the default in the help.
    """
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {text})")


def given(options: Any, *names: str) -> dict[str, Any]:
    """Returns those of the options that are not None."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def kinds_of_options(options: type) -> dict[str, Any]:
    """Returns the type of each option of a dataclass by its name as it is written, those of nested ones included."""
    kinds: dict[str, Any] = {}
    for name, annotation in get_type_hints(options, include_extras=True).items():
        kind, *notes = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        if is_dataclass(kind):
            kinds |= kinds_of_options(kind)  # type: ignore[arg-type]
        elif tyro.conf.Positional not in notes:
            kinds[f"--{name.replace('_', '-')}"] = kind
    return kinds


def make_options(name: str, arguments: Iterable[Argument], defaults: Mapping[str, Any]) -> type:
    """Makes a dataclass whose fields are the arguments of a constructor that a command line can express.

    Args:
        name: name of the dataclass, which is the heading of these options in the help.
        arguments: the arguments; their descriptions become the help texts.
        defaults: the default of each.
    """
    made: list[Any] = []
    for argument in arguments:
        kind: Any = _command_line_type(argument)
        # Functions and loaded models cannot be written on a command line; num_envs and the like are no settings.
        if kind is None or argument.name not in defaults:
            continue
        default = to_command_line(argument.name, defaults[argument.name])
        shown = tyro.conf.arg(help=clean_docstring(argument.doc), metavar=_TEXTS.get(argument.name))
        annotation = Annotated[kind, shown]
        # A copy for each instance: dataclasses refuse a list or a dict as a default that all instances share.
        made.append((argument.name, annotation, field(default_factory=partial(copy, default))))
    return make_dataclass(name, made)


def to_command_line(name: str, value: Any) -> Any:
    """Returns an argument's value as the options hold it: a reward is a text, a sequence a tuple."""
    if isinstance(value, Mapping) and name in _TEXTS:  # a reward
        return format_reward(value)
    if name in _TEXTS:
        return value if value is None else str(value)
    return tuple(value) if isinstance(value, list) else value


def format_reward(reward: Any) -> str:
    """Returns the text that :func:`agents.cli.environments.parse_reward` reads.

    A component with settings of its own shows its weight only.
    """
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


def _command_line_type(argument: Argument) -> Any:
    """Returns the type of an argument's option, or None if a command line cannot express it."""
    if argument.name in _TEXTS:
        return str | None
    return expressible_type(argument.annotation)


def _first_message(box: str) -> str:
    """Returns the message in one of tyro's boxes, without the advice that follows it."""
    lines = [_BOX.sub("", line).strip() for line in box.splitlines()]
    lines = [line for line in lines[1:] if line]  # the first line is the box's heading
    if lines and _RULE.match(lines[0]):
        lines = lines[1:]
    ends = [number for number, line in enumerate(lines) if _RULE.match(line)]
    return _reword(" ".join(lines[: ends[0] if ends else None]))


def _reword(message: str) -> str:
    """Returns one of tyro's messages in our words, without the names of Python's types."""
    if wrong := re.fullmatch(r"Error parsing (--\S+|\w+): (.*)", message):
        for pattern, ours in _WRONG_VALUES:
            if found := re.fullmatch(pattern, wrong[2]):
                parts = found.groupdict()
                kinds = re.sub(r"[{}]", "", parts.get("kinds", "")).split("|")
                parts["kinds"] = " or ".join(sorted(kinds, key="None".__eq__))
                return f"{wrong[1]} {ours.format_map(parts)}"
    if wrong := re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.", message):
        choices = [choice.strip().strip("'") for choice in wrong[3].split(",")]
        return f"{wrong[2]} cannot be {wrong[1]!r}; {suggest(wrong[1], [choice for choice in choices if choice])}"
    if wrong := re.match(r"Missing value for argument '(.*?)'", message):
        return f"{wrong[1]} needs a value"
    return message


def _describe_unknown(words: Sequence[str], known: Sequence[str], argv: Sequence[str]) -> str:
    """Returns the message for words that belong to no option; it names the nearest option of the first one."""
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and value in words and word not in words and name.replace("_", "-") in known:
            return f"{name} takes no value: write {name}, or --no-{name.removeprefix('--')}, and not {word!r}"
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not options:
        return f"unexpected {words[0]!r}: a text of several words needs quotation marks"
    return f"unknown option {options[0]}; {suggest_option(options[0], known)}"


def suggest_option(written: str, known: Sequence[str]) -> str:
    """Returns the end of an error message: the nearest option, or where all of them are listed."""
    # There are about 60 options, too many to list them all in an error.
    suggestion, _, _ = suggest(written.replace("_", "-"), known).partition(" There are:")  # --kl_coeff is --kl-coef
    return suggestion if suggestion.startswith("did you mean") else "the option --help lists all of them"
