"""Files that are either whole or not there, and folders that only one process writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

_PART = ".part"
_LOCK = ".lock"


class WriteError(OSError):
    """A file could not be written; the message names it and says why."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; the new file replaces ``path`` at the end of the block.

    The old file stays whole until the new one is on the disk, also if the process is killed or the power fails.

    Raises:
        WriteError: if the file cannot be written.
    """
    part = path.with_name(path.name + _PART)
    try:
        with naming(path):
            yield part
            # A rename can reach the disk before the content does. After a power cut the file would then be empty.
            flush_to_disk(part)
            part.replace(path)
            flush_to_disk(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink()  # it may have filled the disk
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is whole or not there; errors as :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error in writing name the file, which Python's message for a full disk does not.

    Raises:
        WriteError: in place of the block's error.
    """
    try:
        yield
    except WriteError:
        raise  # it names a file already
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        kept = "; the old one is kept" if path.is_file() else ""
        raise WriteError(f"{path} cannot be written: {reason}{kept}") from error


def flush_to_disk(path: Path) -> None:
    """Waits until the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone, and makes it first; if it is empty at the end, it is removed again.

    The lock of a process that was killed is free.

    Raises:
        WriteError: if another process holds the folder, or it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise WriteError(
                f"another process is writing to {folder}; wait for its end, or choose another folder"
            ) from None
        except OSError as error:
            raise WriteError(f"the folder {folder} cannot be written: {error.strerror}; choose another one") from error
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)  # before the release, or it might be the next process's
            lock.release()
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
