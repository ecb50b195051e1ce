"""Reads files of prompts: plain lines, JSON, JSON lines and tables."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dpok_gym.utils.reading import check_file

#: Largest size of a file: a million long prompts have about 200 MB.
MAX_BYTES = 2**30
#: The prompts of a file, each with its weight and its line; 0 for a format without lines.
Entries = list[tuple[str, float, int]]

#: Names of the field or column that holds the prompt.
_PROMPT_FIELDS = ("prompt", "prompts", "text", "caption")


def read_prompt_file(path: Path) -> Entries:
    """Reads the prompts of a UTF-8 file. Its ending says the format:

    - ``.json``: ``{prompt: {"category": ...}}`` as DrawBench is published, or a list of prompts;
    - ``.jsonl``: an object on each line, with the prompt under ``prompt``, ``prompts``, ``text`` or ``caption``;
    - ``.csv``: a header, and the prompt in a column of one of these names. A cell with commas has quotation marks
      around it; where the prompt is the only column, it needs none;
    - ``.tsv``: the same with tabs. Quotation marks have no meaning, a line is a row;
    - anything else but :data:`UNREADABLE`: a prompt on each line. Blank lines and lines that start with ``#`` are
      skipped.

    Names of columns and fields may be in upper or lower case. Where an entry has fields, the field ``weight`` says how
    often its prompt is sampled. Without it the weight is 1.

    Args:
        path: of the file.

    Returns:
        The prompts, at least one, with their weights and lines.

    Raises:
        ValueError: if the file is not UTF-8, is not of its format, or has no prompt.
    """
    suffix = path.suffix.lower()
    if suffix in UNREADABLE:
        raise ValueError(
            f"the file of prompts {str(path)!r} is of a format that is not read; save it as a .jsonl, .csv or .txt, "
            "such as with pandas.read_parquet(file).to_json('prompts.jsonl', orient='records', lines=True)"
        )
    try:
        content = check_file(path, MAX_BYTES).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file of prompts {str(path)!r} is not UTF-8 text: {error}") from error
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


def _number_lines(content: str) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, with their numbers."""
    # Not splitlines(): a text may hold further line separators, such as U+2028.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield number, line


def _read_lines(content: str) -> Entries:
    lines = ((number, line.strip()) for number, line in _number_lines(content))
    return [(line, 1.0, number) for number, line in lines if not line.startswith("#")]


def _read_json(content: str) -> Entries:
    data = json.loads(content)
    if isinstance(data, dict):
        for text, fields in data.items():
            if not isinstance(fields, dict):
                raise ValueError(f"the prompt {text!r} must have an object of fields, such as {{}}, not {fields!r}")
        return [(text, _read_weight(_lower(fields), text), 0) for text, fields in data.items()]
    if isinstance(data, list):
        return [_read_entry(entry, 0) if isinstance(entry, dict) else (entry, 1.0, 0) for entry in data]
    raise ValueError("it is neither an object with the prompts as its keys nor a list of prompts")


def _read_json_lines(content: str) -> Entries:
    entries = []
    for number, line in _number_lines(content):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number}: each line must be an object, such as {{"prompt": "a green star"}}')
        entries.append(_read_entry(row, number))
    return entries


def _read_tsv(content: str) -> Entries:
    rows = [(number, line.split("\t")) for number, line in _number_lines(content)]
    return _read_rows(rows, "cells are separated by tabs")


def _read_csv(content: str) -> Entries:
    lines = [f"{line}\n" for line in content.removesuffix("\n").split("\n")]
    reader = csv.reader(lines, strict=True)
    rows: list[tuple[int, list[str]]] = []
    end = 0  # lines read so far: a row has several if a cell does
    try:
        for cells in reader:
            start, end = end, reader.line_num
            if len(cells) > 1 and rows and len(rows[0][1]) == 1 and not re.search('(^|,)"', lines[start]):
                cells = [lines[start].rstrip("\n")]  # the commas of an only column separate nothing
            if cells:
                rows.append((start + 1, cells))
    except csv.Error as error:
        raise ValueError(
            f'line {reader.line_num}: {error}; a cell with commas or quotation marks is written as "a sign, ""stop"""'
        ) from error
    if rows and len(rows[0][1]) == 1 and ";" in rows[0][1][0]:
        raise ValueError("line 1: its cells are separated by semicolons, and those of CSV by commas; save it so")
    return _read_rows(rows, 'write quotation marks around a cell with commas, such as "a dog, asleep"')


def _read_rows(rows: Sequence[tuple[int, list[str]]], advice: str) -> Entries:
    """Reads the rows of a table, each with its line. The first one is the header."""
    if not rows:
        return []
    (_, header), *body = rows
    entries = []
    for line, cells in body:
        if len(cells) > len(header):
            raise ValueError(f"line {line} has {len(cells)} cells, and the header has {len(header)}; {advice}")
        entries.append(_read_entry(dict(zip_longest(header, cells)), line))
    return entries


def _read_entry(fields: Mapping[str, Any], line: int) -> tuple[str, float, int]:
    lower = _lower(fields)
    for name in _PROMPT_FIELDS:
        if name in lower:
            return lower[name], _read_weight(lower, lower[name]), line
    fields_here, wanted = (", ".join(map(repr, names)) for names in (lower, _PROMPT_FIELDS))
    where = f"line {line}: " if line else ""
    raise ValueError(f"{where}none of the fields {fields_here} is named {wanted}; name the one with the prompts so")


def _lower(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key.lower().strip(): value for key, value in fields.items()}


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
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}

#: Endings of files that may hold prompts, in formats that are not read here.
UNREADABLE = (".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".yaml", ".yml", ".gz", ".zip", ".npy", ".pkl")
#: Endings by which a text is taken for the path of a file.
SUFFIXES = (".txt", *_READERS, *UNREADABLE)
