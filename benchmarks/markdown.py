"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def markdown(rows: dict[str, list[str]], headings: Iterable[str]) -> str:
    """Returns a table in Markdown, whose first column has no heading.

    Args:
        rows: the cells of each row, by the text of the first column.
        headings: of the other columns.
    """
    headings = ["", *headings]
    lines = [headings, ["---"] * len(headings), *([label, *cells] for label, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
