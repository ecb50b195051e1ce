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


def p_value_cell(p_value: float | None) -> str:
    """Returns a p-value as a cell: bold if it is below 5 %; empty if there is none."""
    if p_value is None:
        return ""
    text = "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
    return f"**{text}**" if p_value < 0.05 else text
