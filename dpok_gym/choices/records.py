"""The files that people's choices are kept in: JSONL, with one comparison of two images on each line.

    {"prompt": "a red star", "images": ["a.png", "b.png"], "preferred": 0, "who": "ada", "when": "2026-01-31T12:00"}

Only the first three fields are needed. ``images`` are paths relative to the file. ``preferred`` is 0 for the first
image and 1 for the second; null says that none was preferred, and ``reason`` says why. ``dpok label`` writes all fields
of :class:`Choice`, with ``version``, the number of this form. A line may have further fields.

A file only grows. To take a choice back, a line ``{"undo": "<id>"}`` is added, and the choice with that id counts no
more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from dpok_gym.utils.reading import parse_json

#: The number of the form of the lines.
VERSION = 1
#: Why no image is preferred: they are alike, or both are bad; or the person does not know.
Reason = Literal["tie", "both-bad", "skip"]
#: A longer line is cut off, and then no JSON.
MAX_LINE_BYTES = 2**20


@dataclass(frozen=True)
class Choice:
    """One comparison of two images.

    Attributes:
        prompt: the images were compared for this text.
        images: their paths.
        preferred: 0 for the first image, 1 for the second, None for neither.
        reason: why none is preferred; None if one is.
        who: name of the person who chose; None if unknown.
        when: time of the choice, ISO 8601; None if unknown.
        left: 0 or 1, the image that was shown on the left; None if unknown.
        milliseconds: from the moment the images were shown to the choice; None if unknown.
        id: name of this choice, which no other line of the file has; None if it has none.
        repeat_of: the ``id`` of an earlier choice of the same person between the same images; None if it is no repeat.
        sha256: hashes of the images' files, in hexadecimal; None if unknown.
        origins: where each image is from, such as ``{"model": "sd15", "run": None, "seed": 0, "step": 0}``; None if
            unknown. ``run`` is None for the pre-trained model; ``step`` counts the images that a run had trained on,
            or its optimiser steps on a file of choices.
        line: number of the line in the file, from 1; 0 if it is in no file.
    """

    prompt: str
    images: tuple[Path, Path]
    preferred: Literal[0, 1] | None
    reason: Reason | None = None
    who: str | None = None
    when: str | None = None
    left: Literal[0, 1] | None = None
    milliseconds: int | None = None
    id: str | None = None
    repeat_of: str | None = None
    sha256: tuple[str, str] | None = None
    origins: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
    line: int = 0

    @property
    def outcome(self) -> float | None:
        """The share of a win that the first image gets: 1, 0, or 1/2 if none is preferred; None if skipped."""
        if self.preferred is not None:
            return 1.0 - self.preferred
        return None if self.reason == "skip" else 0.5

    @property
    def favourite(self) -> Path | None:
        """The image that is preferred; None for neither."""
        return None if self.preferred is None else self.images[self.preferred]

    def to_fields(self, folder: Path) -> dict[str, Any]:
        """Returns the fields of the line, for a file in ``folder``."""
        fields = {name: value for name, value in vars(self).items() if name != "line"}
        # os.path.relpath, because Path.relative_to of Python 3.11 knows no "..".
        images = [Path(os.path.relpath(image, folder)).as_posix() for image in self.images]
        return {"version": VERSION} | fields | {"images": images}


def read_choices(path: str | os.PathLike[str]) -> list[Choice]:
    """Reads a file of choices, without those that were taken back. It checks that the images exist.

    A last line without a line break that is no JSON is left out: whoever wrote it was killed, and never called it done.

    Raises:
        FileNotFoundError: if the file or an image does not exist; the message has the number of the line.
        ValueError: if a line is malformed; the message has its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of choices at {str(path)!r}; give a JSONL file with one on a line")
    choices: list[Choice] = []
    undone: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES), b""), 1):
            if not line.strip():
                continue
            where = f"line {number} of {str(path)!r}"
            try:
                fields = parse_json(line.decode("utf-8-sig"), "it")
            except ValueError as error:  # json's and Unicode's errors are ValueErrors
                if not line.endswith(b"\n") and not file.read(1):
                    break
                raise ValueError(f"{where}: {error}") from None
            try:
                if isinstance(fields, dict) and "undo" in fields:
                    undone.add(_text(fields, "undo", required=True))
                else:
                    choices.append(parse_choice(fields, path.parent, number))
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from None
    return [choice for choice in choices if choice.id not in undone]


def parse_choice(fields: Any, folder: Path, line: int = 0) -> Choice:
    """Makes a choice of the fields of a line.

    Args:
        fields: what is on the line.
        folder: the folder of the file, which the images' paths begin at.
        line: the line's number.

    Raises:
        FileNotFoundError: if an image does not exist.
        ValueError: if a field is missing or malformed.
    """
    if not isinstance(fields, dict):
        raise ValueError(f'a choice is an object such as {{"prompt": ..., "images": ...}}, not {fields!r}')
    missing = [name for name in ("prompt", "images", "preferred") if name not in fields]
    if missing:
        raise ValueError(f"the field {missing[0]!r} is missing; a choice has prompt, images and preferred")
    if fields.get("version", VERSION) != VERSION:
        raise ValueError(f"'version' must be {VERSION}, not {fields['version']!r}; another version of dpok wrote it")
    prompt, names, preferred = fields["prompt"], fields["images"], fields["preferred"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"'prompt' must be a text that is not blank, not {prompt!r}")
    if not _is_pair(names, str) or names[0] == names[1]:
        raise ValueError(f"'images' must be two different paths, not {names!r}")
    if isinstance(preferred, bool) or preferred not in (0, 1, None):
        raise ValueError(f"'preferred' must be 0 for the first image, 1 for the second or null, not {preferred!r}")
    reason = _text(fields, "reason")
    if preferred is None and reason not in get_args(Reason):
        raise ValueError(f"without a preferred image, 'reason' must be one of {', '.join(get_args(Reason))}")
    if preferred is not None and reason is not None:
        raise ValueError(f"'reason' says why no image is preferred, but 'preferred' is {preferred}")
    left, milliseconds = fields.get("left"), fields.get("milliseconds")
    if isinstance(left, bool) or left not in (0, 1, None):
        raise ValueError(f"'left' must be 0 or 1, the image that was on the left, not {left!r}")
    if milliseconds is not None and (isinstance(milliseconds, bool) or not isinstance(milliseconds, int)):
        raise ValueError(f"'milliseconds' must be an integer, not {milliseconds!r}")
    hashes, origins = fields.get("sha256"), fields.get("origins")
    if hashes is not None and not _is_pair(hashes, str):
        raise ValueError(f"'sha256' must be two texts, not {hashes!r}")
    if origins is not None and not _is_pair(origins, dict):
        raise ValueError(f"'origins' must be two objects, not {origins!r}")
    when = _text(fields, "when")
    if when is not None:
        try:
            datetime.fromisoformat(when)
        except ValueError:
            raise ValueError(f"'when' must be a time in ISO 8601, such as 2026-01-31T12:00:00, not {when!r}") from None
    images = (folder / names[0], folder / names[1])
    for image in images:
        if not image.is_file():
            raise FileNotFoundError(f"there is no image {str(image)!r}; paths are relative to the file of choices")
    return Choice(
        prompt,
        images,
        preferred,
        reason,  # type: ignore[arg-type]  # one of its values, as just checked
        _text(fields, "who"),
        when,
        left,
        milliseconds,
        _text(fields, "id"),
        _text(fields, "repeat_of"),
        None if hashes is None else (hashes[0], hashes[1]),
        None if origins is None else (origins[0], origins[1]),
        line,
    )


def _text(fields: Mapping[str, Any], name: str, required: bool = False) -> Any:
    value = fields.get(name)
    if not isinstance(value, str) and (required or value is not None):
        raise ValueError(f"{name!r} must be a text, not {value!r}")
    return value


def _is_pair(values: Any, kind: type) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    return is_list and len(values) == 2 and all(isinstance(value, kind) for value in values)
