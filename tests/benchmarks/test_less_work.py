"""The work of the default run: its variations, and when they reach the goal."""

from typing import Any

import pytest
import yaml

from benchmarks import less_work
from benchmarks.runs import HERE, find_records
from tests.benchmarks.support import RESULTS

SETTINGS = yaml.safe_load((HERE / "less_work.yaml").read_text(encoding="utf-8"))


def test_a_change_is_of_the_run_or_of_the_algorithm() -> None:
    by_label = {run["label"]: run for run in less_work.descriptions(SETTINGS)}
    before = by_label["as before"]
    assert before["settings"] == SETTINGS["settings"]
    assert by_label["T = 5"] == before | {"label": "T = 5", "num_inference_steps": 5}
    half = before | {"label": "half of the steps", "settings": before["settings"] | {"timestep_fraction": 0.5}}
    assert by_label["half of the steps"] == half
    assert len(by_label) == len(SETTINGS["changes"])


def record_of(shares: list[float], per_iteration: int = 64) -> dict[str, Any]:
    points: list[dict[str, float]] = []
    for n, share in enumerate(shares):
        points.append({"images": n * per_iteration, "seconds": 2.0 * n, "aligned": share})
    evaluation = {"images": len(shares) * per_iteration, "seconds": 99.0, "aligned": 1.0}
    scores = {"training": {"aligned": 1.0, "quality": 0.9, "kl": 5.0}}
    settings = {"images_per_iteration": per_iteration}
    return {"settings": settings, "curve": [*points, evaluation], "scores": scores, "seconds": 99.0}


@pytest.mark.parametrize(
    ("shares", "per_iteration", "expected"),
    [
        ([0.5, 1.0, 0.7, 0.9, 0.92, 1.0], 64, (320, 8.0)),  # 128 images are two iterations
        ([0.5, 1.0, 0.7, 0.9, 0.92, 1.0], 128, (256, 2.0)),
        ([0.5, 0.9, 0.89], 64, None),  # the evaluation does not count
    ],
)
def test_when_the_goal_is_reached(shares: list[float], per_iteration: int, expected: tuple[int, float] | None) -> None:
    assert less_work.cost_of_target(record_of(shares, per_iteration), 0.9, 128) == expected


def test_report(tmp_path: Any) -> None:
    records = [record_of([0.5, 0.9, 0.9]) | {"label": "as before"}, record_of([0.9, 0.9]) | {"label": "T = 5"}]
    records.append(record_of([0.5]) | {"label": "T = 7"})
    less_work.report(records, SETTINGS, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| T = 5 |"))
    assert row == "| T = 5 | 128 | 0.50 | 100 | 0.900 | 5.0 | 99 |"
    assert any(line.startswith("| T = 7 | not reached |  | 100 |") for line in lines)
    records.append(record_of([0.5]) | {"label": "T = 5"})
    less_work.report(records, SETTINGS, tmp_path)
    assert "| T = 5 | 128 (1 of 2 runs) | 0.50 | 100 [100, 100] |" in (tmp_path / "table.md").read_text()


def test_the_published_tables_are_those_of_the_published_runs(tmp_path: Any) -> None:
    records = find_records(list(less_work.descriptions(SETTINGS)), RESULTS / "less_work" / "runs.jsonl")
    less_work.report([record for record in records if record is not None], SETTINGS, tmp_path)
    assert (tmp_path / "table.md").read_text() == (RESULTS / "less_work" / "table.md").read_text()
    assert None not in records
    assert (tmp_path / "table.md").read_text() in (HERE / "README.md").read_text(encoding="utf-8")
