"""The tables of the comparison: what is computed from the runs, and what is shown."""

from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import algorithms, algorithms_tables
from benchmarks.algorithms_tables import PRETRAINED
from benchmarks.runs import Record
from benchmarks.training_run import UNTRAINED
from tests.benchmarks.support import HERE, values

SETTINGS = yaml.safe_load((HERE / "algorithms.yaml").read_text(encoding="utf-8"))
TASKS = ("one", "two")


def record(task: str, label: str, seed: int, aligned: float, **changes: Any) -> Record:
    """Returns a run whose reward and verdict are its aligned share."""
    scores = {
        "aligned": aligned,
        "alignment": aligned,
        "quality": 0.9,
        "reward": aligned,
        "reward_std": 0.5,
        "kl": 10 * aligned,
        "calls": 10,
    }
    scores |= {"judged": aligned, "judged_std": 0.25, "entropy_of_positions": 3.0, "diversity": 0.2}
    run = {"task": task, "label": label, "seed": seed, "algorithm": UNTRAINED if label == PRETRAINED else "dpok"}
    results = {"curve": [], "seconds": 5.0, "num_function_evaluations": 1000, "num_gradient_evaluations": 500}
    return run | results | {"scores": {"training": scores}, "num_function_evaluations_to_draw": 10} | changes


def points(*rewards: float, step: float = 100) -> list[dict[str, float]]:
    """Returns a curve whose points cost as much as each other; the last one is the evaluation."""
    curve = []
    for n, reward in enumerate(rewards):
        costs = {"images": n * step, "num_function_evaluations": n * step, "num_gradient_evaluations": n * step}
        curve.append(costs | {"seconds": float(n), "reward": reward, "alignment": reward / 2, "quality": 1 - reward})
    return curve


def test_a_row_of_a_task() -> None:
    records = [record("one", PRETRAINED, 0, 0.5)] + [record("one", "ours", seed, 0.7 + seed / 10) for seed in (1, 0)]
    records[1]["scores"]["training"]["judged"] = 0.5
    table = algorithms_tables.task_table(records, "one", ["ours", PRETRAINED, "absent"])
    ours, before = table.splitlines()[2:]
    # The reward has risen by 0.2 and 0.3, which is 0.4 and 0.6 spreads; the verdict by 0.8 spreads, and by none.
    cells = ["75.0", "0.900", "0.75", "7.5", "3.00", "0.200", "2", "10", "5", "+0.10", "70 80"]
    assert values(ours) == cells
    assert "75.0 [70.0, 80.0]" in ours
    assert values(before)[-2:] == ["+0.00", "50"]


def test_gains_are_above_the_pretrained_model() -> None:
    records = [record(task, PRETRAINED, seed, 0.4) for task in TASKS for seed in (0, 1)]
    records += [record("one", "ours", 0, 0.5), record("one", "ours", 1, 0.7), record("two", "ours", 0, 0.3)]
    records += [record("one", "half", 0, 0.5)]
    by_label = algorithms_tables.gains(records, TASKS, ["ours", "half", PRETRAINED])
    assert by_label.keys() == {"ours", PRETRAINED}  # the other one has no run on a task
    np.testing.assert_allclose(by_label["ours"][0], [10, 30])
    np.testing.assert_allclose(by_label["ours"][1], [-10])
    row = algorithms_tables.overview(records, TASKS, ["ours"]).splitlines()[2]
    assert values(row)[0] == "+5.0"


def test_a_difference_that_can_be_told_from_noise_is_bold() -> None:
    rng, records = np.random.default_rng(0), []
    for task in TASKS:
        for seed in range(8):
            records.append(record(task, PRETRAINED, seed, 0.4))
            for label, level in (("good", 0.8), ("same", 0.8), ("bad", 0.5)):
                records.append(record(task, label, seed, level + rng.normal(0, 0.02)))
    good, same, bad = algorithms_tables.pairs_table(records, TASKS, ["good", "same", "bad"]).splitlines()[2:]
    assert good.count("**") == same.count("**") == 2
    assert bad.count("**-") == 2


def test_equal_costs() -> None:
    """The run that costs less for an image is compared where the dear one has ended."""
    cheap, dear = points(0, 0.2, 0.4, 0.6, 0.8, 1.0), points(0, 0.5, 1.0)
    for n, point in enumerate(dear):
        point |= {"num_gradient_evaluations": 400.0 * n, "seconds": 2.0 * n}
    records = [record("one", "cheap", 0, 1, curve=cheap), record("one", "dear", 0, 1, curve=dear)]
    rows = algorithms_tables.equal_cost_table(records, ["one"], ["cheap", "dear"]).splitlines()[2:]
    # At 200 images, at 1500 passes and at 4 seconds; the mean over the last three points until then.
    assert values(rows[0]) == ["10.0", "40.0", "30.0"]
    assert values(rows[1])[0] == "25.0"


def test_a_run_that_is_not_so_long_has_no_score() -> None:
    run = record("one", "ours", 0, 1, curve=points(0.1, 0.2))
    assert algorithms_tables.at_cost(run, 101, algorithms_tables.COSTS["images"], "reward") is None
    assert algorithms_tables.at_cost(run, 100, algorithms_tables.COSTS["images"], "reward") == pytest.approx(0.15)


def test_equal_rewards() -> None:
    """The level is the highest that all runs reach, as means of three points; the evaluation does not count."""
    records = [
        record("one", "fast", 0, 1, curve=points(0.0, 0.3, 0.6, 0.9, 0.9, 0.9, 0.0)),
        record("one", "slow", 0, 1, curve=points(0.0, 0.2, 0.4, 0.6, 1.0)),
    ]
    assert algorithms_tables.at_reward(records[0], 0.4, "quality") == pytest.approx(1 - 0.6)
    assert algorithms_tables.at_reward(records[1], 0.41, "quality") is None
    rows = algorithms_tables.claims_table(records, ["one"], ["fast", "slow"]).splitlines()[2:]
    assert [values(row)[:2] for row in rows] == [["0.300", "0.400"], ["0.200", "0.600"]]


def test_components_are_compared_with_the_same_seeds() -> None:
    records = [record("one", "DPOK", seed, 0.9 if seed < 3 else 0.1) for seed in range(5)]
    records += [record("one", "DPOK: no KL", seed, 0.8) for seed in range(3)]
    row = algorithms_tables.components_table(records, ["one"]).splitlines()[2]
    assert row.startswith("| no KL | -10.0 |")


@pytest.mark.slow
def test_the_report(tmp_path: Any) -> None:
    tuned: Any = {(search, label): {} for search in ("diffusion", "flow") for label in SETTINGS["methods"]}
    rng, records = np.random.default_rng(0), []
    settings = SETTINGS | {"seeds": 2}
    for description in algorithms.descriptions(settings, tuned):
        run = record(description["task"], description["label"], description["seed"], rng.random())
        sets = [*description.get("splits", ["training", "held_out"])[1:], *description.get("also", {})]
        scores = dict.fromkeys(["training", *sets], run["scores"]["training"])
        records.append(run | description | {"scores": scores, "curve": points(*rng.random(8))})
    algorithms.report(records, settings, tmp_path)
    names = ("gains", "frontier", "costs", "over_optimisation")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in names)
    text = (tmp_path / "tables.md").read_text()
    titles = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    assert titles[:6] == [
        "All tasks",
        "Each two methods",
        "At equal costs",
        "The paper's two claims",
        "Components of DPOK",
        "Other ways to draw",
    ]
    assert len(titles) == 6 + len(SETTINGS["tasks"]) + 1
    parts = dict(zip(titles, text.split("\n### ")[1:], strict=True))
    n_labels = len(SETTINGS["methods"]) + len(SETTINGS["untrained"])
    assert parts["Task “flow”"].count("\n| ") == n_labels + 2
    assert parts["Components of DPOK"].count("\n| ") == len(SETTINGS["components"]["changes"]) + 2
    assert parts["Kinds of prompts of “many”"].count("\n| ") == n_labels + 2
    assert parts["Other ways to draw"].count("\n| DPOK") == 4
