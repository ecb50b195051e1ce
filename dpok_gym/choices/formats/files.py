"""Parts that the formats share: rows of JSON and Parquet files, and images.

The files are other people's. No path in them is trusted, and the size of what is read is bounded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dpok_gym.choices.records import Choice
from dpok_gym.utils.files import replacing, write_text
from dpok_gym.utils.reading import MAX_IMAGE_BYTES, check_file, find_image_format, parse_json, read_text

#: Bytes of a JSON file: HPDv2 has 650,000 comparisons in one.
MAX_JSON_BYTES = 512 * 2**20
#: Bytes of a row group of a Parquet file, unpacked; they are read one by one.
MAX_ROW_GROUP_BYTES = 4 * 2**30
#: Images in one ranking, which becomes a choice for each pair of them.
MAX_RANKED = 64
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class LeftOut:
    """A comparison that is no choice.

    Attributes:
        reason: why, to be read after a number: "3 without a label".
    """

    reason: str


class ImageStore:
    """Writes images into ``folder/images``, each once, named by the SHA-256 of its content.

    Args:
        folder: parent of the folder of images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "images"

    def add(self, content: Any, what: str) -> tuple[Path, str]:
        """Returns the path and the hash of an image.

        Args:
            content: the image's file, as bytes or as ``{"bytes": ..., "path": ...}``, which datasets of images have.
            what: what it is, for the error message.

        Raises:
            ValueError: if it is no image.
        """
        if isinstance(content, Mapping):
            content = content.get("bytes")
        if not isinstance(content, bytes):
            raise ValueError(f"{what} must be the bytes of an image, not {type(content).__name__}")
        name = hashlib.sha256(content).hexdigest()
        path = self.folder / f"{name}.{find_image_format(content, what).lower()}"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:  # a kill leaves no half image under its name
                part.write_bytes(content)
        return path, name

    def copy(self, path: Path) -> str:
        """Copies an image's file, and returns its new path, relative to the parent of the folder of images."""
        copied, _ = self.add(read_image_bytes(path), str(path))
        return f"{self.folder.name}/{copied.name}"


def read_image_bytes(path: Path) -> bytes:
    """Returns the content of an image's file; errors as :func:`~dpok_gym.utils.reading.check_file`."""
    return check_file(path, MAX_IMAGE_BYTES).read_bytes()


def find_image(root: Path, name: Any) -> Path:
    """Returns the path of an image that a file names.

    Args:
        root: the folder that paths begin at.
        name: the path in the file.

    Raises:
        FileNotFoundError: if there is no such image.
        ValueError: if the path is no text, is absolute, or leaves the folder.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"the path of an image must be a text, not {name!r}")
    path = root / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"the image {name!r} is not inside {root}; paths must be relative, and stay in the folder")
    if not path.is_file():
        raise FileNotFoundError(f"there is no image {path}; give the folder that paths begin at with --images")
    return path


def list_files(source: Path, *suffixes: str) -> list[Path]:
    """Returns the files to read: the source, or those in this folder and below that have the first suffix found there.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not source.is_dir():
        return [check_file(source)]
    for suffix in suffixes:
        if found := sorted(source.glob(f"**/*{suffix}")):
            return found
    raise FileNotFoundError(f"the folder {source} has no {' or '.join(suffixes)} file; give another one")


def read_rows(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Reads the rows of a JSON list of objects, or of a Parquet file.

    Args:
        path: the file; the suffix ``.parquet`` stands for Parquet.
        required: keys that each row must have.
        optional: further columns to read of a Parquet file; of a JSON file all are read.

    Raises:
        ImportError: if it is a Parquet file and pyarrow is missing.
        ValueError: if it is too large or malformed, or a key is missing.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, required, optional)
        return
    rows = parse_json(read_text(path, MAX_JSON_BYTES), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds no list of objects; is it of this format?")
    for number, row in enumerate(rows, 1):
        missing = [name for name in required if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"row {number} of {path} has no {missing[0]!r}; is it of this format?")
        yield row


def _read_parquet(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    parquet = import_parquet()
    with _naming_parquet(path):
        file = parquet.ParquetFile(check_file(path))
        there = file.schema_arrow.names
        sizes = [file.metadata.row_group(k).total_byte_size for k in range(file.num_row_groups)]
    if missing := [name for name in required if name not in there]:
        raise ValueError(f"{path} has no column {missing[0]!r}; is it of this format?")
    if max(sizes, default=0) > MAX_ROW_GROUP_BYTES:
        raise ValueError(f"{path} has a row group of {max(sizes):,} bytes; at most {MAX_ROW_GROUP_BYTES:,} are read")
    columns = [*required, *(name for name in optional if name in there)]
    batches = file.iter_batches(_ROWS_AT_ONCE, columns=columns)
    while True:
        with _naming_parquet(path):
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        yield from rows


@contextmanager
def _naming_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (ValueError, OSError, NotImplementedError, KeyError) as error:  # pyarrow's errors are of these kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no Parquet file that can be read: {reason}") from error


def import_parquet() -> Any:
    """Returns the module ``pyarrow.parquet``.

    Raises:
        ImportError: if it is missing; the message says how to install it.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'dpok-gym[parquet]'") from error
    return parquet


def write_parquet(path: Path, rows: Iterable[dict[str, Any]], schema: Any) -> None:
    """Writes rows into a Parquet file that is whole or not there, a few at a time.

    Args:
        path: the file.
        rows: the rows.
        schema: pyarrow's schema of them.

    Raises:
        WriteError: if it cannot be written.
    """
    import pyarrow

    remaining = iter(rows)
    with replacing(path) as part, import_parquet().ParquetWriter(part, schema) as writer:
        while batch := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a JSON list of objects, one on each line."""
    write_text(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


@contextmanager
def naming_row(path: Path, number: int) -> Iterator[None]:
    """Lets errors in the block name the row, counted from 1."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"row {number} of {path}: {error}") from None


def take_text(row: Mapping[str, Any], name: str) -> str:
    """Returns a field of a row.

    Raises:
        ValueError: if it is no text, or blank.
    """
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} must be a text that is not blank, not {value!r}")
    return value


def parse_time(value: Any) -> str | None:
    """Returns a time, or the text of one, in ISO 8601; None for anything else."""
    try:
        return (value if isinstance(value, datetime) else datetime.fromisoformat(value)).isoformat()
    except (TypeError, ValueError):
        return None


def compare_ranked(
    prompt: str, images: Sequence[Path], ranks: Sequence[Any], who: str | None = None
) -> Iterator[Choice | LeftOut]:
    """Yields a choice for each pair of ranked images: the lower rank is preferred, and equal ranks are a tie.

    Args:
        prompt: the prompt of all of them.
        images: their paths.
        ranks: their ranks, numbers; an image without one is left out.
        who: the person who ranked them; None if unknown.

    Raises:
        ValueError: if there are too many images, or not as many ranks, or a rank is no number.
    """
    if len(images) != len(ranks) or len(images) > MAX_RANKED:
        raise ValueError(f"a ranking needs a rank for each image, of at most {MAX_RANKED}; it has {len(ranks)} ranks")
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int | float | None):
            raise ValueError(f"a rank must be a number, not {rank!r}")
    for a, b in itertools.combinations(range(len(images)), 2):
        if ranks[a] is None or ranks[b] is None:
            yield LeftOut("without a rank")
        elif images[a] == images[b]:
            yield LeftOut("of an image with itself")
        elif ranks[a] == ranks[b]:
            yield Choice(prompt, (images[a], images[b]), None, "tie", who)
        else:
            yield Choice(prompt, (images[a], images[b]), 0 if ranks[a] < ranks[b] else 1, who=who)
