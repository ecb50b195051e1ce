"""The file of choices while people choose: it only grows, and what it has taken is on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpok_gym.choices.records import Choice, read_choices
from dpok_gym.utils.files import flush_to_disk, naming


class ChoiceStore:
    """Appends to a file of choices. The caller holds the folder's lock: two writers would mix their lines.

    A last line that a kill cut off is removed: its choice was never said to be saved.

    Args:
        path: the file; it is made if it is not there.

    Attributes:
        choices: those that were not taken back, in the order of the file.
        ids: the ids of all choices, those that were taken back included. None may be used again.

    Raises:
        WriteError: if the file cannot be written.
        FileNotFoundError: if an image is missing, as :func:`~dpok_gym.choices.records.read_choices`.
        ValueError: if a line is malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            is_new = not path.exists()
            self._file = path.open("ab", buffering=0)
            if is_new:
                flush_to_disk(path.parent)
            self._mend()
        self.choices = read_choices(path)
        self.ids = {choice.id for choice in self.choices if choice.id is not None}
        with path.open("rb") as file:
            self.ids |= {json.loads(line).get("undo") for line in file if b'"undo"' in line}

    def add(self, choice: Choice) -> None:
        """Appends a choice; it is on the disk when this returns.

        Raises:
            WriteError: if it cannot be written, for example because the disk is full. The file then is as before.
        """
        self._append(choice.to_fields(self.path.parent))
        self.choices.append(choice)
        self.ids.add(str(choice.id))

    def undo(self, choice: Choice) -> None:
        """Takes a choice back, by a further line; errors as :meth:`add`."""
        self._append({"undo": choice.id})
        self.choices.remove(choice)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, fields: Mapping[str, Any]) -> None:
        line = json.dumps(fields).encode() + b"\n"
        with naming(self.path):
            size = os.fstat(self._file.fileno()).st_size
            try:
                written = self._file.write(line)
                if written != len(line):  # the disk is nearly full
                    raise OSError("no space is left for a whole line")
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    self._file.truncate(size)
                raise

    def _mend(self) -> None:
        """Removes what a kill left of a last line; if the line is whole, it gets the line break that is missing."""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        rest = content[end:]
        if not rest:
            return
        try:
            json.loads(rest)
        except ValueError:
            os.truncate(self.path, end)
        else:
            self._file.write(b"\n")
        os.fsync(self._file.fileno())
