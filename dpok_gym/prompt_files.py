"""Reads files of prompts: plain lines, JSON, JSON lines and tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpok_gym.utils.reading import check_file

#: Largest size of a file: a million long prompts have about 200 MB.
MAX_BYTES = 2**30
#: The prompts of a file, each with its weight and its line; 0 for a format without lines.
Entries = list[tuple[str, float, int]]

#: Names of the field or column that holds the prompt.
_PROMPT_FIELDS = ("prompt", "text", "caption")


def read_prompt_file(path: Path) -> Entries:
    """Reads the prompts of a UTF-8 file. Its ending says the format:

    - ``.json``: ``{prompt: {"category": ...}}`` as DrawBench is published, or a list of prompts;
    - ``.jsonl``: an object on each line, with the prompt under ``prompt``, ``text`` or ``caption``;
    - ``.csv``, ``.tsv``: a header, and the prompt in a column of one of these names, in upper or lower case;
    - anything else: a prompt on each line. Blank lines and lines that start with ``#`` are skipped.

    Where an entry has fields, the field ``weight`` says how often its prompt is sampled. Without it the weight is 1.

    Args:
        path: of the file.

    Returns:
        The prompts, at least one, with their weights and lines.

    Raises:
        ValueError: if the file is not UTF-8, is not of its format, or has no prompt.
    """
    try:
        content = check_file(path, MAX_BYTES).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file of prompts {str(path)!r} is not UTF-8 text: {error}") from error
    suffix = path.suffix.lower()
    try:
        entries = _READERS.get(suffix, _read_lines)(content)
    except (ValueError, TypeError, RecursionError) as error:  # json's errors are ValueErrors
        raise ValueError(
            f"the file of prompts {str(path)!r} cannot be read as {suffix[1:].upper()}: {error}"
        ) from error
    if not entries:
        advice = "add one" if suffix in _READERS else "write one on each line, without a leading #"
        raise ValueError(f"there is no prompt in the file {str(path)!r}; {advice}")
    return entries


def _read_lines(content: str) -> Entries:
    lines = enumerate(map(str.strip, content.split("\n")), start=1)
    return [(line, 1.0, number) for number, line in lines if line and not line.startswith("#")]


def _read_json(content: str) -> Entries:
    data = json.loads(content)
    if isinstance(data, dict):
        for text, fields in data.items():
            if not isinstance(fields, dict):
                raise ValueError(f"the prompt {text!r} must have an object of fields, such as {{}}, not {fields!r}")
        return [(text, _read_weight(fields, text), 0) for text, fields in data.items()]
    if isinstance(data, list):
        return [_read_entry(entry, 0) if isinstance(entry, dict) else (entry, 1.0, 0) for entry in data]
    raise ValueError("it is neither an object with the prompts as its keys nor a list of prompts")


def _read_json_lines(content: str) -> Entries:
    # Not splitlines(): JSON texts may hold further line separators, such as U+2028, unescaped.
    entries = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number}: each line must be an object, such as {{"prompt": "a green star"}}')
        entries.append(_read_entry(row, number))
    return entries


def _read_table(content: str, delimiter: str) -> Entries:
    rows = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        return [_read_entry(row, rows.line_num) for row in rows]
    except csv.Error as error:
        raise ValueError(f"line {rows.reader.line_num}: {error}") from error


def _read_entry(fields: dict[Any, Any], line: int) -> tuple[str, float, int]:
    # The keys of a table's row are not all texts: csv puts surplus cells under None.
    lower = {key.lower().strip(): value for key, value in fields.items() if isinstance(key, str)}
    for name in _PROMPT_FIELDS:
        if name in lower:
            return lower[name], _read_weight(lower, lower[name]), line
    fields_here, wanted = (", ".join(map(repr, names)) for names in (lower, _PROMPT_FIELDS))
    raise ValueError(f"none of the fields {fields_here} is named {wanted}")


def _read_weight(fields: Mapping[str, Any], text: Any) -> float:
    weight = fields.get("weight")
    if weight is None or not str(weight).strip():
        return 1.0
    try:
        return float(weight)
    except (TypeError, ValueError):
        raise ValueError(f"the weight of the prompt {text!r} must be a number, not {weight!r}") from None


_READERS: dict[str, Callable[[str], Entries]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
}

#: Endings by which a text is taken for the path of a file.
SUFFIXES = (".txt", *_READERS)
