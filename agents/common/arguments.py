"""The constructor arguments of a class, with those that it hands on to its base classes.

Each argument is written once, in the class that uses it: name, type and default in ``__init__``, its effect in the
docstring. The signatures that ``help()`` shows and the options of the command line are made from there.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from docstring_parser import google

from dpok_gym.utils.validation import check_bool, check_mapping, suggest


@dataclass(frozen=True)
class Argument:
    """One argument of a constructor.

    Attributes:
        name: its name.
        annotation: its type.
        default: its default, or ``inspect.Parameter.empty``.
        doc: its description in the docstring, on one line.
    """

    name: str
    annotation: Any
    default: Any
    doc: str


def describe_arguments(cls: type) -> dict[str, Argument]:
    """Returns all named arguments of a class's constructor by name, its own before those of its base classes.

    Arguments that begin with an underscore, ``*args`` and ``**kwargs`` are left out.
    """
    described: dict[str, Argument] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        # Some people document arguments in the class, others in its constructor.
        documented = google.parse(vars(base)["__init__"].__doc__ or "").params + google.parse(base.__doc__ or "").params
        docs = {param.arg_name: param.description or "" for param in documented}
        hints = _type_hints(vars(base)["__init__"])
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]  # without self
        for parameter in parameters:
            is_catch_all = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if is_catch_all or parameter.name.startswith("_"):
                continue
            doc = " ".join(docs.get(parameter.name, "").split())
            annotation = hints.get(parameter.name, Any)
            described.setdefault(parameter.name, Argument(parameter.name, annotation, parameter.default, doc))
        # A constructor without **kwargs hands nothing on.
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return described


def _type_hints(function: Any) -> dict[str, Any]:
    """Returns the types of a function's arguments; none if a name in them is known inside another function only."""
    try:
        return get_type_hints(function)
    except NameError:
        return {}


def show_inherited_arguments(cls: type) -> None:
    """Puts the arguments of the base classes into the signature and the docstring of a class."""
    arguments = describe_arguments(cls)
    own = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    positional: list[inspect.Parameter] = []
    keyword_only: list[inspect.Parameter] = []
    for argument in arguments.values():
        # A base's positional argument is one here too only if this constructor takes it so: the rest is **kwargs.
        is_positional = argument.name in own and own[argument.name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if is_positional else inspect.Parameter.KEYWORD_ONLY
        parameter = inspect.Parameter(argument.name, kind, default=argument.default, annotation=argument.annotation)
        (positional if is_positional else keyword_only).append(parameter)
    parameters = [*positional, *keyword_only]
    cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    doc = inspect.cleandoc(cls.__doc__ or "")
    documented = {param.arg_name for param in google.parse(doc).params}
    inherited = []
    for argument in arguments.values():
        if argument.name not in documented and argument.doc:
            text = f"{argument.name}: {argument.doc}"
            inherited.append(textwrap.fill(text, 112, initial_indent="    ", subsequent_indent="        "))
    if "Args:" not in doc:
        doc += "\n\nArgs:\n"
    # From "Args:" to the next line that is not indented.
    section = re.search(r"^Args:\n(?:(?: .*)?\n?)*?(?=^\S|\Z)", doc, re.MULTILINE)
    assert section is not None
    lines = [section.group().rstrip(), *inherited]
    cls.__doc__ = doc[: section.start()] + "\n".join(lines) + "\n\n" + doc[section.end() :]


def check_arguments(cls: type, given: Mapping[str, Any]) -> None:
    """Checks keyword arguments before a class is made of them: their names, and that switches are no texts.

    Raises:
        TypeError: if the constructor has no such argument (the message has the nearest one), or a value is of another
            type.
    """
    known = describe_arguments(cls)
    for name, value in given.items():
        if name in known and known[name].annotation is bool:
            check_bool(name, value)
        if name in known and name.endswith("_kwargs") and value is not None:
            check_mapping(name, value)
        if name not in known and not name.startswith("_"):
            # Arguments without a default are given by whoever makes the object, not by the user.
            choices = [name for name, argument in known.items() if argument.default is not inspect.Parameter.empty]
            raise TypeError(f"{cls.__name__} has no argument {name!r}; {suggest(name, choices)}")
