"""Two libraries to the same target: how a run is followed, and what is printed."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trl_target
from benchmarks.runs import HERE
from benchmarks.trl_target import OURS, RATES, TRL, TUNING_SEED, Rate
from tests.benchmarks.support import RESULTS, values

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
    """No run is made twice, and TRL has four times the slowest of our runs at our fastest rate."""
    made: list[tuple[str, float, int]] = []
    limits: dict[str, set[float]] = {OURS: set(), TRL: set()}

    def pretend(python: Path, library: str, rate: Rate, seed: int, limit: float) -> dict[str, Any]:
        made.append((library, rate.learning_rate, seed))
        limits[library].add(limit)
        # The lowest rates would be the fastest, but do not reach the target. Each seed adds some time.
        reached = rate != RATES[library][0]
        seconds = (1 / rate.learning_rate if reached else 5.0) + seed / 10
        return {"images": 64, "seconds": seconds, "aligned": 1, "reached": reached}

    monkeypatch.setattr(trl_target, "follow", pretend)
    out = tmp_path / "runs.json"
    for _ in range(2):
        trl_target.main(["--out", str(out), "--trl", "python"])
    for library in (OURS, TRL):
        rates = [rate.learning_rate for rate in RATES[library]]
        expected = [*((rate, 100) for rate in rates), *((max(rates), seed) for seed in (0, 1, 2))]
        assert [run[1:] for run in made if run[0] == library] == expected
    assert limits[OURS] == {math.inf}
    assert list(limits[TRL]) == pytest.approx([4 * (1 / 1.2e-2 + 10)])
    assert len(json.loads(out.read_text())) == 14
    printed = capsys.readouterr().out
    assert all(printed.count(f"│ {library} ") == 2 * 7 for library in (OURS, TRL))


@pytest.mark.parametrize(("label", "library"), [("here", OURS), ("TRL", TRL)])
def test_the_published_table(label: str, library: str) -> None:
    runs = json.loads((RESULTS / "trl_target.json").read_text(encoding="utf-8"))
    runs = [run for run in runs if run["library"] == library]
    page = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    chosen = next(run["learning_rate"] for run in runs if run["seed"] != TUNING_SEED)
    groups = {
        "seeds 0 to 2": [run for run in runs if run["seed"] != TUNING_SEED],
        "the other rates": [run for run in runs if run["learning_rate"] != chosen],
    }
    for name, group in groups.items():
        (line,) = (line for line in page if line.startswith(f"| {label}, {name} | "))
        rates, images, seconds, aligned = values(line)
        assert rates == ", ".join(dict.fromkeys(f"{run['learning_rate']:g}" for run in group))
        assert aligned == ", ".join(f"{100 * run['aligned']:.0f}" for run in group)
        for cell, numbers in (
            (images, [f"{run['images']:,}" for run in group]),
            (seconds, [f"{run['seconds']:.0f}" for run in group]),
        ):
            assert cell.count("not in") == sum(not run["reached"] for run in group)
            assert cell.replace("not in ", "") == ", ".join(numbers)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_our_worker(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(trl_target, "N_STEPS", 2)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the worker changes it
    trl_target.dpok_gym(Rate(1e-3, 128), 0)
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["images"] for line in lines] == [64, 128]
    assert all(0 <= line["aligned"] <= 1 and line["seconds"] >= 0 for line in lines)
