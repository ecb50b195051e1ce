"""The benchmarks of long and large runs, in short."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import large_run, long_run, prompt_files


def test_growth_compares_the_end_with_the_time_after_the_warm_up() -> None:
    points = [(1, 100.0), (12, 200.0), (18, 202.0), (50, 220.0), (92, 203.0), (99, 219.0)]
    assert long_run.growth(points, 100) == pytest.approx(211 / 201)
    mib = long_run.resident_mib(os.getpid())
    assert mib is not None
    assert 10 < mib < 100_000
    assert long_run.resident_mib(2**22 + 1) is None


@pytest.mark.slow
def test_a_long_run(tmp_path: Path) -> None:
    points = long_run.train(8, "dpok", tmp_path / "run", seconds=0.05)
    assert points
    assert all(1 <= done <= 8 and mib > 100 for done, mib in points)


@pytest.mark.slow
def test_a_large_run(tmp_path: Path) -> None:
    cost = large_run.train(tmp_path / "run", 8, iterations=1)
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["agent"]["images_drawn"] == 8
    assert cost.checkpoint_mib > 0
    assert 0 < cost.peak_gib < large_run.MOST_GIB


@pytest.mark.parametrize("name", ["prompts.txt", "weighted.jsonl"])
def test_a_file_of_prompts(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt_files.write(tmp_path / name, 50)
    assert len(set((tmp_path / name).read_text().splitlines())) == 50
    prompt_files.main(["--file", str(tmp_path / name)])
    assert json.loads(capsys.readouterr().out).keys() == {"seconds", "mib", "microseconds"}
