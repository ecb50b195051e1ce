"""Checksums of files, which say whether results are of these weights: ``sha256sum -c SHA256SUMS`` checks them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def write_checksums(files: Iterable[Path], path: Path) -> None:
    """Writes the SHA-256 of files, one line each, with their places as seen from the written file.

    Args:
        files: files; those that do not exist are left out.
        path: file to write.
    """
    lines = []
    for file in files:
        if file.is_file():
            place = Path(os.path.relpath(file, path.parent)).as_posix()
            lines.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {place}\n")
    path.write_text("".join(lines), encoding="utf-8")
