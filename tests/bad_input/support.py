"""What the tests of bad input share: values of every wrong kind, damaged files, and what an error must look like."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

#: What libraries and Python itself say about values that nobody checked.
_FOREIGN = (
    "not supported between",
    "unhashable",
    "object is not",
    "object has no attribute",
    "not iterable",
    "is ambiguous",
    "got an unexpected keyword",
    "expected str, bytes",
    "negative dimension",
    "invalid literal",
    "[Errno",
)

#: Values that are wrong for arguments of a kind, in Python.
WRONG: dict[str, list[Any]] = {
    "integer": ["3", 1.5, True, -1, math.nan, 10**30, [], b"1", np.ones(2)],
    "number": ["1", True, -1, math.nan, -math.inf, 1e39, 10**400, [], 1j, np.ones(2)],
    "switch": ["false", 1, 0.0, None, [], np.ones(2)],
    "text": [3, 1.5, [], {}, b"x", np.ones(2)],
    "mapping": ["x", 3, 1.5, [1], {1: 2}, np.ones(2)],
    "choice": ["x", "", 3, [], {}, np.ones(2)],
    "path": [None, 3, 1.5, "", " ", "a\0b", b"x", [], np.ones(2)],
}

#: Words that are wrong for options of a kind, on a command line.
WRONG_WORDS: dict[str, list[str]] = {
    "integer": ["x", "", "1.5", "-1", "99999999999999999999999"],
    "number": ["x", "", "nan", "-1", "1e39"],
    "switch": ["x"],
    "mapping": ["x", "=1"],
    "choice": ["x", ""],
    "path": ["", " "],
}


def kind_of(annotation: Any) -> str | None:
    """Returns the key in :data:`WRONG` of an argument's type; None for one that may be nearly anything."""
    if get_origin(annotation) is Annotated:
        return kind_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = {kind_of(part) for part in get_args(annotation) if part is not types.NoneType}
        # Beside a function, a number is still a number; beside a text, it is something else.
        kinds -= {None} if any(get_origin(part) is Callable for part in get_args(annotation)) else set()
        kinds -= {"choice"} if "integer" in kinds else set()
        return kinds.pop() if len(kinds) == 1 else None
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return "choice"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    names = {int: "integer", float: "number", bool: "switch", Path: "path"}
    return names.get(origin)


def describe(value: Any) -> str:
    """Returns a short name of a value, for a test's id."""
    # An address in memory would give each process of the tests another name.
    text = "array" if isinstance(value, np.ndarray) else re.sub(" at 0x[0-9a-f]+", "", repr(value))
    return re.sub(r"[^\w.,=+\[\]{}'-]", "_", text)[:40]


@contextmanager
def refused(*names: str) -> Iterator[None]:
    """The block must raise an error of ours: of a class that users cause, on one line, that says what was wrong.

    Args:
        *names: parts of the message, one of which must be in it; hyphens, underscores and blanks are the same.
    """
    with pytest.raises((ValueError, TypeError, FileNotFoundError, ImportError)) as caught:
        yield
    check_message(str(caught.value), *names)


def check_message(message: str, *names: str) -> None:
    """Asserts that an error's message is ours; see :func:`refused`."""
    assert "\n" not in message.strip(), message
    assert len(message) > 20, message
    own = re.sub(r"\(\w+Error: .*\)", "", message)  # a library's reason may stand behind ours
    assert not [text for text in _FOREIGN if text in own], message
    simple = re.sub(r"[-_ ]+", " ", message)
    assert not names or any(re.sub(r"[-_ ]+", " ", name).strip() in simple for name in names), message


def contents(folder: Path) -> dict[str, bytes | None]:
    """Returns the content of every file below a folder, by its path; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return open, (str(self.trace), "w")


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[min(position, len(content) - 1)] ^= 0xFF
    path.write_bytes(content)


def _change_tensors(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(change(load_file(path)), path)


def _without_first(values: dict[str, Any]) -> dict[str, Any]:
    return dict(list(values.items())[1:])


def _grown(values: dict[str, Any]) -> dict[str, Any]:
    name = next(iter(values))
    return values | {name: np.zeros((*values[name].shape, 2), np.float32)}


#: What can happen to any file.
ANY_FILE: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: _flip(path, 9),  # in a text near its start, in a file of tensors in its header
    "a folder": _replace_by_folder,
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Intruder(path.parent / "trace"))),
}
JSON_FILE: dict[str, Callable[[Path], Any]] = {
    "a list": lambda path: path.write_text("[]"),
    "no keys": lambda path: path.write_text("{}"),
    "a number": lambda path: path.write_text("3"),
    "deep": lambda path: path.write_text("[" * 10**5),
    "wrong values": lambda path: path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), "x"))),
}
TENSORS: dict[str, Callable[[Path], Any]] = {
    "a tensor less": lambda path: _change_tensors(path, _without_first),
    "another shape": lambda path: _change_tensors(path, _grown),
    "other names": lambda path: _change_tensors(path, lambda values: {f"x.{k}": v for k, v in values.items()}),
}


def damages_of(path: str) -> dict[str, Callable[[Path], Any]]:
    """Returns what can happen to a file, by its ending."""
    further = {".json": JSON_FILE, ".safetensors": TENSORS}
    return ANY_FILE | further.get(Path(path).suffix, {})


def damaged_copy(folder: Path, copy: Path, file: str, damage: str) -> Path:
    """Copies a folder and damages one file in it."""
    shutil.copytree(folder, copy)
    damages_of(file)[damage](copy / file)
    return copy
