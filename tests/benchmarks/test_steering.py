"""The benchmark of steering: its rows, its table and its figure."""

import json
from pathlib import Path
from typing import Any

import pytest

from agents import BestOf
from benchmarks import steering


@pytest.mark.slow
def test_rows_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "METHODS", {"best of n": BestOf})
    monkeypatch.setattr(steering, "PARTICLES", (2,))
    monkeypatch.setattr(steering, "TASKS", {"count": "three green squares"})
    file = tmp_path / "steering.json"
    rows = steering.run(2, 5, file)
    assert json.loads(file.read_text()) == rows
    assert [(row["label"], row["denoiser_calls"], row["reward_calls"]) for row in rows] == [
        ("pre-trained", 10, 1),
        ("best of n", 20, 2),
    ]
    # Both have the first particle of each image, so the best of two is never worse.
    assert rows[1]["reward"] >= rows[0]["reward"]
    monkeypatch.setattr(steering, "measure", None)  # calling it would be an error
    assert steering.run(2, 5, file) == rows


def test_table_and_figure(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for task in steering.TASKS:
        for k, label in [(1, steering.PRETRAINED), *((k, label) for k in (2, 4) for label in steering.METHODS)]:
            row: dict[str, Any] = {"task": task, "label": label, "particles": k, "images": 256}
            row |= {"diversity": None if k > 1 else 0.25}
            for score in ("aligned", "quality", "reward"):
                row |= {score: 0.5 + 0.1 * k, f"{score}_error": 0.01}
            rows.append(row | {"denoiser_calls": 10.0 * k, "reward_calls": k, "seconds": 0.1 * k})
    table = steering.make_table(rows)
    assert table.row_count == len(rows)
    assert list(table.columns[3].cells)[:2] == ["60.0 ± 1.0", "70.0 ± 1.0"]
    path = tmp_path / "steering.png"
    steering.draw_figure(rows, path)
    assert path.stat().st_size > 10_000
