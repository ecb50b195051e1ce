"""Makes two Jupyter notebooks of each lab: ``python docs/notebooks.py FOLDER``.

A lab (``docs/labs/lab*.md``) is a MyST notebook. Each of its exercises has three parts, in this order:

- a template for the student, a ``{code-block} python`` with ``:class: exercise``, which the site only shows;
- a code cell with the tag ``solution``, which the site hides and runs;
- a code cell with the tag ``check``, which runs after either of the two.

The student's notebook has the templates as code cells, and no solutions. The solved one has the solutions instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jupytext
import nbformat
from markdown_it import MarkdownIt
from nbformat import NotebookNode, v4

LABS = Path(__file__).parent / "labs"
#: Where a notebook that was downloaded finds the pages that a lab links to as ``../page.md``.
PAGES = "https://github.com/dpok-gym/dpok-gym/blob/main/docs/"
_MARK = ":class: exercise\n"


def labs() -> list[Path]:
    """Returns the files of all labs, in their order."""
    return sorted(LABS.glob("lab*.md"))


def read(lab: Path) -> NotebookNode:
    """Reads a lab. The templates of its exercises are code cells with the tag ``exercise``."""
    notebook = jupytext.read(lab, fmt="md:myst")
    notebook.cells = [part for cell in notebook.cells for part in _split(cell)]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # a random one would make each build a new file
        if "hide-input" in tags(cell):
            cell.metadata["jupyter"] = {"source_hidden": True}  # the same for JupyterLab
    return notebook


def student(lab: Path) -> NotebookNode:
    """Returns a lab with the templates of its exercises, and without the solutions."""
    return _without("solution", lab)


def solved(lab: Path) -> NotebookNode:
    """Returns a lab with the solutions in place of the templates."""
    return _without("exercise", lab)


def tags(cell: NotebookNode) -> list[str]:
    """Returns the tags of a cell."""
    return list(cell.metadata.get("tags", []))


def write(folder: Path) -> list[Path]:
    """Writes ``NAME.ipynb``, the student's, and ``NAME_solved.ipynb`` of each lab; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for lab in labs():
        for suffix, notebook in (("", student(lab)), ("_solved", solved(lab))):
            paths.append(folder / f"{lab.stem}{suffix}.ipynb")
            nbformat.write(notebook, paths[-1])
    return paths


def _split(cell: NotebookNode) -> list[NotebookNode]:
    """Splits a cell of text where it holds templates of exercises."""
    if cell.cell_type != "markdown":
        return [cell]
    parts, begin, lines = [], 0, cell.source.splitlines()
    for token in MarkdownIt().parse(cell.source):
        if token.type == "fence" and token.info == "{code-block} python" and token.content.startswith(_MARK):
            assert token.map is not None  # the lines of a fence are always known
            template = token.content.removeprefix(_MARK).strip("\n")
            parts.append(_text(lines[begin : token.map[0]]))
            parts.append(v4.new_code_cell(template, metadata={"tags": ["exercise"]}))
            begin = token.map[1]
    parts.append(_text(lines[begin:]))
    return [part for part in parts if part.source]


def _text(lines: list[str]) -> NotebookNode:
    return v4.new_markdown_cell("\n".join(lines).strip("\n").replace("](../", f"]({PAGES}"))


def _without(tag: str, lab: Path) -> NotebookNode:
    notebook = read(lab)
    notebook.cells = [cell for cell in notebook.cells if tag not in tags(cell)]
    return notebook


def main() -> None:
    """Writes the notebooks of all labs."""
    parser = argparse.ArgumentParser(description="Writes two notebooks of each lab: the student's and the solved one.")
    parser.add_argument("folder", type=Path, help="where the notebooks go")
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
