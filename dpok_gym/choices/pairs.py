"""Pairs of images that people choose from; a folder keeps them as ``pairs.json`` and ``images/``.

The folder holds copies of the images, so it can be moved, and given to others.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpok_gym.utils.files import replacing, write_text
from dpok_gym.utils.reading import check_file, parse_json, read_image, read_json
from dpok_gym.utils.validation import shorten

#: The file of the pairs, the folder of their images, and the number of the file's form.
FILE_NAME, IMAGES, VERSION = "pairs.json", "images", 1
#: Tables of prompts that are looked for in a folder of images; the last two are those of Hugging Face's image folders.
TABLES = ("prompts.csv", "prompts.jsonl", "metadata.csv", "metadata.jsonl")
#: Columns of the image's path and of its prompt in such a table.
_FILE_COLUMNS, _PROMPT_COLUMNS = ("file", "file_name", "image"), ("prompt", "text", "caption")
#: Bytes of a table: a hundred thousand long prompts have about 20 MB.
_MAX_TABLE_BYTES = 2**28


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt.

    Attributes:
        number: place of the pair among those of the folder, from 0.
        prompt: the images' text.
        images: their paths.
        sha256: hashes of their files, in hexadecimal.
        origins: where each is from, as in :class:`dpok_gym.choices.records.Choice`.
    """

    number: int
    prompt: str
    images: tuple[Path, Path]
    sha256: tuple[str, str]
    origins: tuple[Mapping[str, Any], Mapping[str, Any]]


def is_complete(folder: Path, settings: Mapping[str, Any], may_grow: Sequence[str] = ()) -> bool:
    """Returns whether a folder has the pairs of some settings already.

    Args:
        folder: the folder; it need not be there.
        settings: how the pairs are made, as JSON can keep it.
        may_grow: names of the settings that may be larger than they were.

    Raises:
        ValueError: if the folder was begun with other settings.
    """
    if not (folder / FILE_NAME).exists():
        return False
    content = _read(folder)
    before = content["settings"]
    for name in {**settings, **before}:
        then, now = before.get(name), settings.get(name)
        has_grown = name in may_grow and None not in (then, now) and now > then
        if then != now and not has_grown:
            raise ValueError(
                f"{folder} was begun with {name} {shorten(then)}, and not {shorten(now)}; choose another --out, or "
                "give --out alone to go on with the pairs that are there"
            )
    return before == settings and bool(content["pairs"])


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder of pairs, unless it is there; it says how the pairs are made before the first image comes."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    if not (folder / FILE_NAME).exists():
        write_pairs(folder, settings, [])


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns how the pairs of a folder were made."""
    return _read(folder)["settings"]


def write_pairs(folder: Path, settings: Mapping[str, Any], pairs: Sequence[Pair]) -> None:
    """Writes the pairs of a folder; the file is whole or not there."""
    rows = [
        {
            "prompt": pair.prompt,
            "images": [image.relative_to(folder).as_posix() for image in pair.images],
            "sha256": pair.sha256,
            "origins": pair.origins,
        }
        for pair in pairs
    ]
    content = {"version": VERSION, "settings": dict(settings), "pairs": rows}
    write_text(folder / FILE_NAME, json.dumps(content, indent=1) + "\n")


def read_pairs(folder: Path) -> list[Pair]:
    """Reads the pairs of a folder; there are none until all of them are drawn.

    Raises:
        FileNotFoundError: if the folder, or an image of it, is not there.
        ValueError: if the file is damaged.
    """
    pairs = []
    try:
        for number, row in enumerate(_read(folder)["pairs"]):
            first, second = (folder / name for name in row["images"])
            images, hashes = (first, second), (str(row["sha256"][0]), str(row["sha256"][1]))
            pairs.append(Pair(number, row["prompt"], images, hashes, (row["origins"][0], row["origins"][1])))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{folder / FILE_NAME} is damaged: {error!r}; choose another --out") from error
    for image in (image for pair in pairs for image in pair.images):
        if not image.is_file():
            raise FileNotFoundError(f"{folder / FILE_NAME} names {image}, which is not there; choose another --out")
    return pairs


def _read(folder: Path) -> dict[str, Any]:
    content = read_json(folder / FILE_NAME)
    is_known = isinstance(content, dict) and content.get("version") == VERSION
    if not is_known or not isinstance(content.get("settings"), dict) or not isinstance(content.get("pairs"), list):
        raise ValueError(f"{folder / FILE_NAME} was not written by this version of dpok; choose another --out")
    return content


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ images that are there


def find_table(folder: Path) -> Path:
    """Returns the table of prompts in a folder of images.

    Raises:
        FileNotFoundError: if there is none.
    """
    for name in TABLES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder} has no table of prompts; add prompts.csv with the columns file and prompt, or give one by --prompts"
    )


def import_images(source: Path, table: Path, seed: int, folder: Path) -> None:
    """Makes pairs of images that are there, and copies them into the folder of the pairs.

    Each image is in one pair, with another one of the same prompt: from another model or run, where there is one. An
    image that is left over has no pair. All further columns of the table are kept as the image's origin.

    Args:
        source: the folder of images.
        table: CSV with a header, or JSON lines: the columns ``file`` (or ``file_name``, ``image``), relative to the
            source, and ``prompt`` (or ``text``, ``caption``); also ``model`` and ``run``, to compare these.
        seed: of the random pairs.
        folder: the folder of the pairs.

    Raises:
        FileNotFoundError: if the table or an image does not exist.
        ValueError: if the table is malformed, an image cannot be read or lies outside the source, no prompt has two
            different images, or the folder was begun in another way.
    """
    settings = {"images_from": source.as_posix(), "table": hash_file(check_file(table)), "seed": seed}
    if is_complete(folder, settings):
        return
    rng = np.random.default_rng(seed)
    images: dict[str, dict[str, tuple[Path, dict[str, Any]]]] = {}  # by prompt and hash, so none is there twice
    for line, row in _read_table(table):
        name, prompt = _take(row, _FILE_COLUMNS, table, line), _take(row, _PROMPT_COLUMNS, table, line)
        path = source / name
        if not path.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"line {line} of {table}: {name!r} lies outside {source}; move the image into the folder")
        read_image(path)  # for its errors
        images.setdefault(prompt, {}).setdefault(hash_file(path), (path, row))
    pairs: list[Pair] = []
    originals: dict[Path, Path] = {}
    for prompt, of_prompt in images.items():
        hashes = [list(of_prompt)[k] for k in rng.permutation(len(of_prompt))]
        # Sorted by origin, the first half and the second half differ in it wherever that is possible.
        hashes.sort(key=lambda digest: name_origin(of_prompt[digest][1]))
        half = len(hashes) // 2
        for first, second in zip(hashes[:half], hashes[len(hashes) - half :], strict=True):
            copies = _copy_of(of_prompt[first][0], first, folder), _copy_of(of_prompt[second][0], second, folder)
            originals |= {copies[0]: of_prompt[first][0], copies[1]: of_prompt[second][0]}
            pairs.append(Pair(0, prompt, copies, (first, second), (of_prompt[first][1], of_prompt[second][1])))
    if not pairs:
        raise ValueError(f"{table} has no prompt with two different images; list two or more of each")
    begin(folder, settings)
    for copy, original in originals.items():
        if not copy.exists():
            with replacing(copy) as part:
                shutil.copyfile(original, part)
    order = rng.permutation(len(pairs))  # or else one prompt would follow after the other
    write_pairs(folder, settings, [replace(pairs[k], number=number) for number, k in enumerate(order)])


def name_origin(origin: Mapping[str, Any] | None) -> str:
    """Returns the model or the run that an image is from; "" if it is unknown."""
    origin = origin or {}
    model, run = origin.get("model"), origin.get("run")
    return str(run) if run else str(model or "")


def _copy_of(path: Path, digest: str, folder: Path) -> Path:
    """Returns the path of an image's copy. Its ending says the format that the file really has."""
    from PIL import Image

    with Image.open(path) as image:
        return folder / IMAGES / f"{digest}.{str(image.format).lower()}"


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a table with their lines; names of columns are in lower case."""
    try:
        text = check_file(path, _MAX_TABLE_BYTES).read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            lines = enumerate(text.split("\n"), 1)
            rows = [(line, parse_json(content, f"line {line}")) for line, content in lines if content.strip()]
        else:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            rows = [(reader.line_num, row) for row in reader]
        for line, row in rows:
            if not isinstance(row, dict) or None in row:
                raise ValueError(f"line {line} does not fit the columns; a cell with commas needs quotation marks")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"the table {path} cannot be read: {error}") from error
    for line, row in rows:
        yield line, {name.lower().strip(): value for name, value in row.items()}


def _take(row: dict[str, Any], columns: Sequence[str], table: Path, line: int) -> str:
    """Removes a text from a row, and returns it."""
    for name in columns:
        value = row.pop(name, None)
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise ValueError(f"line {line} of {table}: the column {columns[0]!r} is missing or blank; fill it in")
