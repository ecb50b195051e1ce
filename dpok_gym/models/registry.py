"""Names of text-to-image models. Importing this module loads no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dpok_gym.utils.registry import Registry

if TYPE_CHECKING:
    from dpok_gym.models.base import TextToImageModel

#: Called with the model's name and a torch device such as "cuda:0".
ModelFactory = Callable[[str, str], "TextToImageModel"]

#: What each name stands for: a folder, a file, a hub id, ``"module:factory"`` or a factory.
MODELS: Registry[ModelFactory] = Registry("model", "Add your own with dpok_gym.models.register_model")

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def register_model(name: str, source: str | os.PathLike[str] | ModelFactory) -> None:
    """Gives a text-to-image model a name for :func:`dpok_gym.models.load_model` and the environments.

    Args:
        name: the new name.
        source: a diffusers folder, a single-file checkpoint, a hub id, ``"module:factory"`` (imported on first use), or
            a factory: a function ``factory(name, device)`` that returns a
            :class:`~dpok_gym.models.base.TextToImageModel`.

    Raises:
        ValueError: if the name already stands for something else, or the source is none of these.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not callable(source) and not (isinstance(source, str) and source.strip()):
        raise ValueError(
            f"the source of the model {name!r} must be a folder, a file, a hub id, 'module:factory' or a function, "
            f"got {source!r}"
        )
    MODELS.register(name, source)


def list_models() -> list[str]:
    """Returns the registered names, sorted."""
    return MODELS.names()


def find_source(name: str) -> str | ModelFactory:
    """Returns what a registered name stands for; any other name stands for itself."""
    return MODELS.get(name) if name in MODELS else name


def is_factory(source: str | ModelFactory) -> bool:
    """Returns whether a source is a factory or ``"module:factory"``, and not files."""
    if not isinstance(source, str):
        return True
    return bool(_IMPORT_PATH.fullmatch(source)) and not Path(source).exists()


def list_local_models() -> list[str]:
    """Returns the registered names that need no download: made by a factory, or in a folder that is there."""
    sources = {name: MODELS.get(name) for name in MODELS.names()}
    return [name for name, source in sources.items() if is_factory(source) or Path(str(source)).expanduser().exists()]
