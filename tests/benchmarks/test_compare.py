"""The comparison of the algorithms: its runs, its tables and its figures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, compare_tables, runs
from tests.benchmarks.support import RESULTS, SETTINGS, fake_records, mean_score, values


def test_descriptions() -> None:
    everything = list(compare.descriptions(SETTINGS))
    assert len(everything) == SETTINGS["seeds"] * len(SETTINGS["tasks"]) * len(SETTINGS["algorithms"])
    assert len({json.dumps(description, sort_keys=True) for description in everything}) == len(everything)
    quick = list(compare.descriptions(SETTINGS, quick=True))
    assert len(quick) == 3 * 4
    assert {(run["task"], run["images"], run["eval_images"]) for run in quick} == {("count", 960, 128)}
    trials = list(compare.trials(SETTINGS))
    budgets = Counter((trial["task"], trial["seed"], trial["label"]) for trial in trials)
    assert len({(task, seed, n) for (task, seed, _), n in budgets.items()}) == len(SETTINGS["tuning"]["rounds"])
    assert len(budgets) == len(SETTINGS["tuning"]["rounds"]) * 10  # the same for each
    assert len({json.dumps(trial, sort_keys=True) for trial in trials}) == len(trials)
    assert not any(trial["seed"] in range(SETTINGS["seeds"]) for trial in trials)
    many = {each["label"]: each for each in everything if each["task"] == "many"}
    assert (many["SFT"]["settings"]["n_gradient_steps"], many["DPOK"]["images"]) == (600, 1920)


@pytest.mark.slow
def test_reports(tmp_path: Path) -> None:
    order = list(SETTINGS["algorithms"])
    records = fake_records(list(compare.descriptions(SETTINGS | {"seeds": 2})))
    compare.report(records, order, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert all(f"### {task}" in text for task in (*SETTINGS["tasks"], "all tasks"))
    assert text.count("| DDPO |") == len(SETTINGS["tasks"]) + 1 + 2  # and a row and a column of probabilities

    def runs_of(label: str) -> list[dict[str, Any]]:
        return [record for record in records if (record["label"], record["task"]) == (label, "count")]

    (row,) = (line for line in text.split("### count")[1].split("###")[0].split("\n") if line.startswith("| DDPO |"))
    names = ("aligned", "quality", "reward", "kl", "diversity")
    training = {name: mean_score(runs_of("DDPO"), "training", name) for name in names}
    held_out = {name: mean_score(runs_of("DDPO"), "held_out", name) for name in names}
    assert values(row) == [
        *(f"{100 * training['aligned']:.1f}", f"{training['quality']:.3f}", f"{training['reward']:.2f}"),
        *(f"{100 * held_out['aligned']:.1f}", f"{held_out['quality']:.3f}"),
        *(f"{training['kl']:.1f}", "75", f"{training['diversity']:.3f}", "100", "10", "2"),
    ]
    (row,) = (
        line for line in text.split("### all tasks")[1].split("###")[0].split("\n") if line.startswith("| DDPO |")
    )
    assert values(row)[2] == ""  # rewards of different prompts have different zeros
    rows = [line for line in text.split("\n") if line.startswith("| count |")]
    assert len(rows) == 1  # DPOK over SFT
    difference = 100 * (
        mean_score(runs_of("DPOK"), "training", "aligned") - mean_score(runs_of("SFT"), "training", "aligned")
    )
    assert values(rows[0])[0] == f"{difference:+.1f}"
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("curves.png", "costs.png", "frontier.png"))


@pytest.mark.slow
def test_an_algorithm_without_runs_on_a_task_is_left_out() -> None:
    records = fake_records(list(compare.descriptions(SETTINGS | {"seeds": 1})))
    records = [record for record in records if (record["label"], record["task"]) != ("DDPO", "count")]
    rows = compare_tables.make_rows(records)
    assert "DDPO" not in rows["count"]
    assert "DDPO" not in rows["all tasks"]
    assert "DDPO" in rows["colour"]


def test_the_published_table_is_rebuilt() -> None:
    """From the lines of the quick comparison, which have old names and settings; its text has an old word."""
    records = runs.read_records(RESULTS / "compare_quick" / "runs.jsonl")
    order = list(SETTINGS["algorithms"])
    records.sort(key=lambda record: order.index(record["label"]))
    text = compare_tables.make_text(records, compare_tables.make_rows(records))
    published = (RESULTS / "compare_quick" / "table.md").read_text(encoding="utf-8")
    assert text == published.replace("picture", "image")


def test_largest_share() -> None:
    assert compare_tables.largest_share([1.0, 3.0, 0.0]) == 0.75
    assert compare_tables.largest_share([0.0, 0.0]) is None


def test_settings_are_ranked_by_the_reward(capsys: pytest.CaptureFixture[str]) -> None:
    def record(rate: float, reward: float) -> dict[str, Any]:
        scores = {"reward": reward, "aligned": 0.5, "quality": 0.5, "kl": 1.0}
        settings = {"learning_rate": rate, "lora_rank": 4}
        return {"task": "count", "label": "DPOK", "settings": settings, "scores": {"training": scores}}

    records = [record(0.1, 1.0), record(0.2, 3.0), record(0.3, 1.5), record(0.1, 2.5)]
    compare_tables.rank(records, {"lora_rank": 4})
    rows = [line.split("│")[3:8] for line in capsys.readouterr().out.split("\n") if "learning_rate" in line]
    cells = [(row[0].strip(), row[1].strip()) for row in rows]
    assert cells == [("learning_rate 0.2", "3.000"), ("learning_rate 0.1", "1.750"), ("learning_rate 0.3", "1.500")]
