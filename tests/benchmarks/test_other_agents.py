"""The sweep of other libraries' agents: its runs, and its table."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import other_agents
from benchmarks.other_agents import AGENTS, ALL_NUMBERS, LORA
from tests.benchmarks.support import RESULTS


def test_a_run_is_scored_on_the_same_images_whatever_it_trains_with() -> None:
    """The pre-trained model, and agents that have hardly trained or not at all, have nearly the same reward."""
    rewards = []
    for label, images in (("pre-trained", 64), ("DPOK", 1), ("evolution strategy", 0)):
        description = {"task": "mixture", "label": label, "images": images, "eval_images": 256, "seed": 0}
        record = other_agents.run(description)
        assert description.items() <= record.items()
        assert record["scores"]["aligned"] is None
        rewards.append(record["scores"]["reward"])
    assert max(rewards) - min(rewards) < 0.1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = other_agents.parse_arguments([])
    runs = [run for run in other_agents.make_descriptions(options) if run["label"] in ("DPOK", "TorchRL, PPO")]
    lines = [json.dumps(run | {"scores": {"reward": run["seed"] / 4}, "seconds": 7}) for run in runs]
    (tmp_path / "runs.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    other_agents.main(["--report", "--out", str(tmp_path)])
    assert f"{len(runs)} of 66 runs" in capsys.readouterr().out
    table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[2:] == [
        f"| {label} | 0.250 [0.000, 0.500] | 7 | 0.250 [0.000, 0.500] | 7 |" for label in ("DPOK", "TorchRL, PPO")
    ]


def test_the_runs() -> None:
    """What makes no difference is left out, and what the model has no place for."""
    options = other_agents.parse_arguments([])
    runs = list(other_agents.make_descriptions(options))
    assert len(runs) == 66 == 3 * (2 * len(AGENTS) - 2)
    assert not [run for run in runs if run["task"] == "mixture" and run["label"] in (ALL_NUMBERS, LORA)]


def test_the_published_table_is_that_of_the_published_runs(tmp_path: Path) -> None:
    folder = RESULTS / "other_agents"
    (tmp_path / "runs.jsonl").write_bytes((folder / "runs.jsonl").read_bytes())
    other_agents.main(["--report", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()


def test_the_guide_has_the_numbers_of_the_published_table() -> None:
    """In its own words, and with two decimals for the shapes; the pre-trained model has no intervals and one time."""
    guide = (RESULTS.parents[1] / "docs" / "guides" / "recipes.md").read_text(encoding="utf-8")
    shown = guide.split("## What they reach")[1].split("\n\n")[2].splitlines()[2:]
    published = (RESULTS / "other_agents" / "table.md").read_text(encoding="utf-8").splitlines()[2:]
    assert len(shown) == len(published)
    for row, expected in zip(shown, published, strict=True):
        for cell, number in zip(row.split("|")[2:-1], expected.split("|")[2:-1], strict=True):
            ours, theirs = (list(map(float, re.findall(r"-?[\d.]+", text))) for text in (cell, number))
            if row is shown[0]:
                theirs = theirs[: len(ours)]
            assert ours == pytest.approx(theirs, abs=0.0051), row
