"""Files that are either whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; the new file replaces ``path`` at the end of the block.

    An interruption leaves the old file whole.
    """
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)
