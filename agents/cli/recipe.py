"""Recipes: YAML files of a command's options, as ``dpok train --config FILE`` reads and ``--dry-run`` prints them.

A recipe is a mapping of options, named as on the command line without the two hyphens:

    env: DPOK-SD15-v0
    learning-rate: 1e-4
    reward: {image-reward: 1.0, aesthetic: 0.1}
    gradient-checkpointing: auto
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from agents.cli.arguments import UsageError, format_reward, kinds_of_options, suggest_option
from dpok_gym.utils.reading import read_yaml

#: Options that a recipe cannot have: whom to trust, and what to go on with, are not for a file to say.
_NOT_IN_FILES = ("config", "dry-run", "resume", "resume-from-checkpoint", "trust")


class Recipe:
    """The options in a file.

    Args:
        path: the file.

    Attributes:
        options: the options by name, without hyphens in front.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no mapping of options to values.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        options = read_yaml(path)
        if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
            raise ValueError(
                f"{path} is no recipe: it must be a mapping of options to values, such as learning-rate: 1e-4"
            )
        self.options: dict[str, Any] = options

    def check_code(self, code: Sequence[str], trust: bool) -> None:
        """Checks that the file leads to no code that would run, unless it is trusted.

        Args:
            code: what the file leads to, as :func:`agents.cli.config.named_code` returns it.
            trust: whether it may.

        Raises:
            ValueError: if there is code and the file is not trusted.
        """
        if code and not trust:
            raise ValueError(
                f"{self.path} names code that would run: {', '.join(code)}; if you trust who wrote it, add --trust"
            )

    def first_words(self, names: Sequence[str]) -> list[str]:
        """Returns some of the options as words of a command line; those that are not here are left out.

        Args:
            names: of options that have one value each.
        """
        return [f"--{name}={self.options[name]}" for name in names if self.options.get(name) is not None]

    def words(self, options: type) -> list[str]:
        """Returns all options as words of a command line.

        Args:
            options: dataclass of the options that there are.

        Raises:
            ValueError: if one is unknown; the message names the nearest one. Or if a value would be read as an option.
        """
        kinds = {name.removeprefix("--"): kind for name, kind in kinds_of_options(options).items()}
        known = [name for name in kinds if name not in _NOT_IN_FILES]
        for name, value in self.options.items():
            if name not in known:
                raise UsageError(f"unknown option in {self.path} {name!r}; {suggest_option(name, known)}")
            # On a command line it would be one.
            if isinstance(value, list) and any(str(entry).startswith("--") for entry in value):
                raise UsageError(f"a value of {name!r} in {self.path} looks like an option: {value}")
        return [word for name, value in self.options.items() for word in _words(name, value, kinds[name] is bool)]


def _words(name: str, value: Any, is_flag: bool) -> Iterator[str]:
    """Yields an option as the words of a command line."""
    if is_flag and isinstance(value, bool):
        yield f"--{name}" if value else f"--no-{name}"
    elif isinstance(value, list):
        yield from (f"--{name}", *map(str, value))
    elif isinstance(value, Mapping):
        yield f"--{name}={format_reward(value) if name.endswith('reward') else json.dumps(value)}"
    else:
        yield f"--{name}={value}"


def format_recipe(options: Mapping[str, Any]) -> str:
    """Returns the text of a recipe.

    Args:
        options: the options by their names in Python.
    """
    plain = {name.replace("_", "-"): value for name, value in options.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
