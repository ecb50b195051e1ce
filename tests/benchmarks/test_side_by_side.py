"""The table of iterations side by side: its workers, and what it prints."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import side_by_side
from benchmarks.runs import HERE
from benchmarks.side_by_side import BFLOAT16, COMPILED, FLOOR, OURS, TRL
from tests.benchmarks.support import RESULTS, values


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "N_IMAGES", 2)
    monkeypatch.setattr(side_by_side, "N_STEPS", 1)


@pytest.mark.usefixtures("_small", "fresh_models")
@pytest.mark.parametrize("name", [FLOOR, OURS])
def test_an_iteration(name: str) -> None:
    iterate = side_by_side.WORKERS[name]()
    for _ in range(2):
        seconds = iterate()
        assert seconds.keys() == {"rollout", "update"}
        assert min(seconds.values()) > 0


def test_workers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answers once it is ready, and once for each iteration that it is asked for."""
    worker = tmp_path / "python"
    lines = ["import sys", "print('null', flush=True)"]
    lines += ["for n, _ in enumerate(sys.stdin):", '    print(\'{"rollout": %d, "update": 2}\' % n, flush=True)']
    worker.write_text(f"#!{sys.executable}\n" + "\n".join(lines) + "\n", encoding="utf-8")
    worker.chmod(0o755)
    seconds = side_by_side.take_turns({"one": worker, "other": worker}, repeats=2)
    assert seconds == {name: [{"rollout": n, "update": 2} for n in range(3)] for name in ("one", "other")}


def test_a_worker_that_ends(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="has ended"):
        side_by_side.take_turns({"one": Path("/bin/true")}, repeats=1)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Medians of the iterations after the first, and their ratios to plain torch's."""
    seconds = {
        FLOOR: [{"rollout": 9.0, "update": 9.0}, *({"rollout": 1.0, "update": k} for k in (2.0, 2.0, 50.0))],
        OURS: [{"rollout": 3.0, "update": 4.0}, {"rollout": 2.0, "update": 2.0}],
    }
    side_by_side.show(json.loads(json.dumps(seconds)))
    (row,) = (line for line in capsys.readouterr().out.splitlines() if f" {OURS} " in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        OURS,
        "2.00",
        "2.00",
        "12.00",
        "2.00, 1.00, 1.33",
        "7.0",
    ]


def test_when_compiling_is_even(capsys: pytest.CaptureFixture[str]) -> None:
    eager = [{"rollout": 2.0, "update": 2.0}] * 2
    compiled = [{"rollout": 10.0, "update": 6.0}, {"rollout": 1.0, "update": 1.0}]
    names = (OURS, OURS + BFLOAT16)
    side_by_side.show({FLOOR: eager, **dict.fromkeys(names, eager), names[0] + COMPILED: compiled})
    printed = capsys.readouterr().out
    assert printed.count("12 s more at first, 2.00 s less in each iteration after it: even after 6") == 1
    side_by_side.show({FLOOR: eager, **dict.fromkeys(names, compiled), names[1] + COMPILED: eager})
    assert capsys.readouterr().out.count("never even") == 1


def test_the_published_table() -> None:
    seconds = json.loads((RESULTS / "side_by_side.json").read_text(encoding="utf-8"))
    page = (HERE / "README.md").read_text(encoding="utf-8")
    rows = {
        "plain torch, nothing but the networks": FLOOR,
        "here": OURS,
        "here, bfloat16": OURS + BFLOAT16,
        "here, compiled": OURS + COMPILED,
        "here, bfloat16 and compiled": OURS + BFLOAT16 + COMPILED,
        "TRL": TRL,
        "TRL, bfloat16": TRL + BFLOAT16,
    }
    assert set(rows.values()) == set(seconds)
    medians = {name: side_by_side._medians(each) for name, each in seconds.items()}
    for label, name in rows.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {label} | "))
        own = medians[name]
        speed = side_by_side.N_IMAGES / own["both"]
        cells = [f"{own['rollout']:.2f}", f"{own['update']:.2f}", f"{speed:.1f}"]
        cells += ["1" if name == TRL else f"{medians[TRL]['both'] / own['both']:.2f}"]
        assert values(line) == [*cells, f"{sum(seconds[name][0].values()):.1f}"]
