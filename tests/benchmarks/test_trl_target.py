"""Two libraries to the same target: how a run is followed, and what is printed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trl_target
from benchmarks.trl_target import OURS, RATES, Rate

RATE = Rate(1e-3, 640)


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., Path]:
    """From the aligned shares of iterations of a second each to an "interpreter" that prints them."""

    def make(*shares: float, end: str = "") -> Path:
        path = tmp_path / "python"
        lines = ["import json, time", f"for n, share in enumerate({shares}, 1):"]
        lines += ["    print(json.dumps({'images': 64 * n, 'seconds': n, 'aligned': share}), flush=True)", end]
        path.write_text(f"#!{sys.executable}\n" + "\n".join(lines) + "\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    return make


def follow(python: Path, limit: float = 100) -> Any:
    return trl_target.follow(python, OURS, RATE, 0, limit)


def test_a_run_ends_at_the_target(python: Callable[..., Path]) -> None:
    """The latest 128 images are good enough, not the latest 64."""
    run = follow(python(0.5, 1.0, 0.9, 0.92, 1.0, end="time.sleep(1000)"))
    assert run == {"images": 192, "seconds": 3, "aligned": pytest.approx(0.95), "reached": True}


def test_a_run_ends_at_the_limit(python: Callable[..., Path]) -> None:
    shares = [0.5] * 9
    assert follow(python(*shares, end="time.sleep(1000)"), limit=3.5)["seconds"] == 4
    assert follow(python(*shares)) == {"images": 576, "seconds": 9, "aligned": 0.5, "reached": False}


def test_a_worker_that_fails(python: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        follow(python(0.5, end="raise SystemExit(3)"))
    with pytest.raises(RuntimeError, match="exit code 0"):
        follow(python())


def test_the_fastest_rate_runs_with_the_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no run is made twice."""
    made = []

    def pretend(python: Path, library: str, rate: Rate, seed: int, limit: float) -> dict[str, Any]:
        made.append((rate.learning_rate, seed))
        reached = rate.learning_rate != 1.5e-3  # which would be the fastest
        return {
            "images": 64,
            "seconds": 5.0 if not reached else 1 / rate.learning_rate,
            "aligned": 1,
            "reached": reached,
        }

    monkeypatch.setattr(trl_target, "follow", pretend)
    rates = [rate.learning_rate for rate in RATES[OURS]]
    out = tmp_path / "runs.json"
    for _ in range(2):
        trl_target.main(["--out", str(out)])
    assert made == [*((rate, 100) for rate in rates), *((max(rates), seed) for seed in (0, 1, 2))]
    assert len(json.loads(out.read_text())) == 7
    assert capsys.readouterr().out.count(f"│ {OURS} ") == 2 * 7


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_our_worker(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(trl_target, "N_STEPS", 2)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the worker changes it
    trl_target.dpok_gym(Rate(1e-3, 128), 0)
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["images"] for line in lines] == [64, 128]
    assert all(0 <= line["aligned"] <= 1 and line["seconds"] >= 0 for line in lines)
