"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which takes its place at the end: an interruption leaves the old one whole."""
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)
