"""Choices in the formats of other datasets and tools: reading them, and writing ours.

Each format is a module of this package with

- ``read(source, root, store)``, which yields a :class:`~dpok_gym.choices.records.Choice` or a
  :class:`~dpok_gym.choices.formats.files.LeftOut` for each comparison,
- ``write(choices, folder)``, which writes a folder that ``read`` reads, with the images in it, and
- ``CARRIES``, the answers besides a preferred image that the format has. Others are left out by :func:`export_choices`.

Where each schema was seen stands at the top of its module.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dpok_gym.choices.formats.files import ImageStore, LeftOut
from dpok_gym.choices.records import Choice
from dpok_gym.utils.files import write_text
from dpok_gym.utils.validation import check_choice

#: The names of the formats; their modules have underscores.
Format = Literal["pick-a-pic", "hpdv2", "image-reward-db", "open-image-preferences", "label-studio"]
#: Name of the file that an import writes.
FILE_NAME = "choices.jsonl"


@dataclass
class Tally:
    """The result of an import or an export, in numbers.

    Attributes:
        choices: number of choices, ties and skips included.
        ties: those of them that prefer neither image, skips not included.
        skips: those of them that were skipped.
        images: the different images.
        people: the names of the people.
        left_out: number of comparisons that were left out, by the reason.
    """

    choices: int = 0
    ties: int = 0
    skips: int = 0
    images: set[Path] = field(default_factory=set)
    people: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)

    def count(self, items: Iterable[Choice | LeftOut]) -> Iterator[Choice]:
        """Counts the items, and yields the choices among them."""
        for item in items:
            if isinstance(item, LeftOut):
                self.left_out[item.reason] += 1
                continue
            self.choices += 1
            self.ties += item.outcome == 0.5
            self.skips += item.outcome is None
            self.images |= {*item.images}
            if item.who is not None:
                self.people.add(item.who)
            yield item


def import_choices(source: Path, name: Format, folder: Path, images: Path | None = None) -> Tally:
    """Reads choices of another format, and writes them as ``choices.jsonl``.

    Images that are inside the files are written into ``folder/images``, each once, named by the hash of its content.
    Images that are files stay where they are.

    Args:
        source: a file, or a folder of files.
        name: the format.
        folder: where to write.
        images: the folder that the paths of images begin at; None for the source, or for the folder of the source file.

    Raises:
        FileExistsError: if the folder has choices already.
        FileNotFoundError: if the source or an image does not exist.
        ImportError: if the source is a Parquet file and pyarrow is missing.
        ValueError: if a file is malformed, a path of an image leaves its folder, or there are no choices.
    """
    form = _load(name)
    path = folder / FILE_NAME
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another folder")
    tally, seen = Tally(), set[str]()
    root = images or (source if source.is_dir() else source.parent)
    lines: list[str] = []
    for choice in tally.count(form.read(source, root, ImageStore(folder))):
        fields = choice.to_fields(folder)
        if choice.id is not None:
            fields["id"] = _make_unique(choice.id, seen)
        lines.append(json.dumps(fields) + "\n")
    if not lines:
        left_out = "".join(f", but {n} {reason}" for reason, n in tally.left_out.items())
        raise ValueError(f"{source} has no choices{left_out}; check that its format is {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))
    return tally


def export_choices(choices: Iterable[Choice], name: Format, folder: Path) -> Tally:
    """Writes choices in another format, with copies of their images.

    Args:
        choices: the choices.
        name: the format.
        folder: where to write; it must be empty or not exist.

    Raises:
        FileExistsError: if the folder holds files.
        ImportError: if the format is Parquet and pyarrow is missing.
        ValueError: if there is nothing that the format can hold, or an image cannot be read.
    """
    form = _load(name)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"the folder {folder} is not empty; choose another one")

    def fit(choice: Choice) -> Choice | LeftOut:
        reason = "tie" if choice.reason == "both-bad" else choice.reason
        if reason is None or reason in form.CARRIES:
            return choice
        return LeftOut(f"{'skipped' if reason == 'skip' else 'ties'}, which this format cannot hold")

    tally = Tally()
    kept = list(tally.count(map(fit, choices)))
    if not kept:
        raise ValueError(f"there are no choices that the format {name!r} has; it needs choices of a preferred image")
    folder.mkdir(parents=True, exist_ok=True)
    form.write(kept, folder)
    return tally


def _load(name: str) -> Any:
    check_choice("the format", name, *get_args(Format))
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def _make_unique(name: str, seen: set[str]) -> str:
    """Returns the name, with a number if it was seen before."""
    unique, number = name, 1
    while unique in seen:
        number += 1
        unique = f"{name}-{number}"
    seen.add(unique)
    return unique
