"""Tables of names that users can add to. Nothing heavy is imported before an entry is used."""

from __future__ import annotations

import importlib
from typing import Any, Generic, TypeVar

from dpok_gym.utils.validation import suggest

Entry = TypeVar("Entry")

#: How the note begins that is added to an error of a user's own code. Its author needs the traceback.
RAISED_BY = "It was raised by "


class Registry(Generic[Entry]):
    """Names, and what each stands for.

    An entry is an object, or the place where it is defined, written ``"module:attribute"`` and imported on first use.

    Args:
        kind: what the entries are, such as "reward", for error messages.
        advice: how a user adds one, for error messages.
    """

    def __init__(self, kind: str, advice: str) -> None:
        self.kind, self.advice = kind, advice
        self._entries: dict[str, Entry | str] = {}

    def register(self, name: str, entry: Entry | str) -> None:
        """Adds a name.

        A function or class that is defined anew, as a notebook cell does when it runs again, replaces itself.

        Raises:
            ValueError: if the name is blank, or already stands for something else.
        """
        if not isinstance(name, str) or not name.strip():
            article = "an" if self.kind[0] in "aeiou" else "a"
            raise ValueError(f"the name of {article} {self.kind} must be a text that is not blank, got {name!r}")
        known = self._entries.get(name, entry)
        if _definition(known) != _definition(entry):
            raise ValueError(f"the {self.kind} {name!r} is already registered, as {known!r}; choose another name")
        self._entries[name] = entry

    def names(self) -> list[str]:
        """Returns the registered names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str) -> Entry | str:
        """Returns what was registered, not imported.

        Raises:
            ValueError: if the name is unknown; the message has the nearest known one.
        """
        if name not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}; {suggest(name, self._entries)}. {self.advice}")
        return self._entries[name]

    def load(self, name: str) -> Entry:
        """Returns the entry, imported if need be. A place ``"module:attribute"`` needs no registration.

        Raises:
            ValueError: if the name is unknown.
            ImportError: if its module or attribute is not there.
        """
        entry: Any = name if name not in self._entries and all(name.partition(":")) else self.get(name)
        return import_attribute(f"{self.kind} {name!r}", entry) if isinstance(entry, str) else entry


def import_attribute(what: str, place: str) -> Any:
    """Imports ``"module:attribute"``.

    Args:
        what: what it is, for error messages.
        place: the module and the attribute.

    Raises:
        ImportError: if the module or the attribute is not there.
        Exception: whatever the module itself raises, with a note.
    """
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"the {what} cannot be imported from {place!r}: {error}; modules are looked for in the current folder and "
            "among the installed ones"
        ) from error
    except Exception as error:
        error.add_note(f"{RAISED_BY}the module of the {what}")
        raise


def _definition(entry: Any) -> Any:
    """Returns what stays the same when the same code runs again."""
    name = getattr(entry, "__qualname__", "<")
    return entry if "<" in name else (entry.__module__, name)
