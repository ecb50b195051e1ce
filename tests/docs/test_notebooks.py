"""The labs keep their conventions, and docs/notebooks.py makes two notebooks of each. The site's build runs them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest

from docs import notebooks

LAB = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A lab

[A page](../rewards.md).

```{code-cell} python
:tags: [hide-input]
a = 1
```

Add one.

```{code-block} python
:class: exercise

b = ...  # the answer
```

```{code-cell} python
:tags: [solution, hide-cell]
b = a + 1
```

```{code-cell} python
:tags: [check]
assert b == 2, "one more than a"
```

```python
shown = "as text"
```
"""


@pytest.fixture(params=notebooks.labs(), ids=lambda path: path.stem)
def lab(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def codes(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def is_left_out(source: str) -> bool:
    """Whether an ellipsis stands for something that is to be written; the one in ``values[..., 0]`` does not."""
    nodes = list(ast.walk(ast.parse(source)))
    indices = {id(each) for node in nodes if isinstance(node, ast.Subscript) for each in ast.walk(node.slice)}
    return any(isinstance(node, ast.Constant) and node.value is ... and id(node) not in indices for node in nodes)


def test_the_two_notebooks_of_a_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab1.md").write_text(LAB, encoding="utf-8")
    monkeypatch.setattr(notebooks, "LABS", tmp_path)
    paths = notebooks.write(tmp_path / "out")
    assert [path.name for path in paths] == ["lab1.ipynb", "lab1_solved.ipynb"]
    student, solved = (nbformat.read(path, as_version=4) for path in paths)
    check = 'assert b == 2, "one more than a"'
    assert codes(student) == ["a = 1", "b = ...  # the answer", check]
    assert codes(solved) == ["a = 1", "b = a + 1", check]
    for notebook in (student, solved):
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"
        texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        assert texts[0] == f"# A lab\n\n[A page]({notebooks.PAGES}rewards.md)."
        assert texts[1] == "Add one."
        assert texts[-1] == '```python\nshown = "as text"\n```'
        assert notebook.cells[1].metadata.jupyter.source_hidden
    before = paths[0].read_bytes()
    notebooks.write(tmp_path / "out")
    assert paths[0].read_bytes() == before


def test_an_exercise_has_a_template_a_solution_and_a_check(lab: Path) -> None:
    parts = ("exercise", "solution", "check")
    cells = [cell for cell in notebooks.read(lab).cells if cell.cell_type == "code"]
    found = [next((part for part in parts if part in notebooks.tags(cell)), "") for cell in cells]
    number = found.count("exercise")
    assert 3 <= number <= 5
    assert " ".join(found).count(" ".join(parts)) == number == found.count("solution") == found.count("check")
    for cell, part in zip(cells, found, strict=True):
        if part == "exercise":
            assert is_left_out(cell.source)
        if part == "solution":
            assert "hide-cell" in notebooks.tags(cell)
            assert not is_left_out(cell.source)
        if part == "check":
            asserts = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Assert)]
            assert asserts
            assert all(node.msg is not None for node in asserts), "each assert says what is wrong"
            assert "print(" in cell.source, "a right answer is told so"


def test_the_students_notebook_holds_no_solution_and_compiles(lab: Path) -> None:
    solutions = [cell.source for cell in notebooks.read(lab).cells if "solution" in notebooks.tags(cell)]
    student = notebooks.student(lab)
    whole = "\n".join(cell.source for cell in student.cells)
    assert not [solution for solution in solutions if solution in whole]
    for source in codes(student) + codes(notebooks.solved(lab)):
        ast.parse(source)


def test_a_lab_ends_with_what_was_learned_and_has_its_licence(lab: Path) -> None:
    notebook = notebooks.student(lab)
    nbformat.validate(notebook)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert "## What you learned" in texts[-1]
    assert "CC BY 4.0" in " ".join(texts[-1].split())
    # A downloaded notebook has no pages beside it.
    assert not [link for text in texts for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("http")]


def test_the_instructors_page_has_a_section_for_each_lab() -> None:
    page = (notebooks.LABS / "instructor.md").read_text(encoding="utf-8")
    for lab in notebooks.labs():
        title = notebooks.read(lab).cells[0].source.splitlines()[0].removeprefix("# ")
        section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        for part in ("minutes", "**Common mistakes**", "| points | for |"):
            assert part in section, f"{part} of {title}"
        points = [int(row) for row in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]
        assert sum(points) == 10, title
