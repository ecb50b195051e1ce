"""The benchmarks of long and large runs, in short."""

import json
import os
from pathlib import Path

import pytest

from agents.cli.train import parse
from benchmarks import growth, large_run, long_run, prompt_files
from dpok_gym.prompts import load_prompts


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
    words = ["--env", "DPOK-Mixture-v0", "--device", "cpu", "--eval-images", "4", "--images", "8"]
    cost = large_run.train(tmp_path / "run", [*words, "--n-envs", "8", "--images-per-iteration", "8"])
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["agent"]["images_drawn"] == 8
    assert cost.checkpoint_mib > 0
    assert cost.processor_seconds > 0
    assert 0 < cost.peak_gib < large_run.MOST_GIB


def test_growth(capsys: pytest.CaptureFixture[str]) -> None:
    """Each row has what a further one has cost since the row before."""
    costs = [(10, large_run.Cost(9, 2.0, 1.0, 0)), (20, large_run.Cost(9, 2.5, 1.5, 0))]
    growth.show("images", costs)
    row = capsys.readouterr().out.splitlines()[-2]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["20", "2.5", "1536", "50.00", "52428.8"]


@pytest.mark.parametrize("what", growth.SIZES)
def test_the_runs_that_grow(what: str, tmp_path: Path) -> None:
    config = parse([*growth.words(what, 7, tmp_path)]).config
    prompts = load_prompts(config.env_kwargs["prompts"]).train if what == "prompts" else [""] * 7
    assert len(prompts) == 7
    assert config.images == (7 if what == "images" else growth._SHAPES_IMAGES if what == "prompts" else 8192)
    assert config.n_envs == (7 if what == "environments" else config.n_envs)


@pytest.mark.parametrize("name", ["prompts.txt", "weighted.jsonl"])
def test_a_file_of_prompts(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt_files.write(tmp_path / name, 50)
    assert len(set((tmp_path / name).read_text().splitlines())) == 50
    prompt_files.main(["--file", str(tmp_path / name)])
    assert json.loads(capsys.readouterr().out).keys() == {"seconds", "mib", "microseconds"}
