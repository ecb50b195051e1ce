"""The curves of the comparison, read at equal costs and at equal rewards."""

from typing import Any

import pytest

from benchmarks.algorithms_curves import COSTS, at_cost, at_reward, claims_table, equal_cost_table, smoothed
from benchmarks.algorithms_records import PRETRAINED
from benchmarks.runs import Record
from tests.benchmarks.support import points, values


def record(label: str, curve: list[dict[str, Any]], reward: float = 0.0) -> Record:
    scores = {"training": {"reward": reward, "quality": 0.7}}
    return {"task": "one", "label": label, "seed": 0, "curve": curve, "scores": scores}


def test_equal_costs() -> None:
    """Each method when it had cost as much as a run of the yardstick; the end of one that costs less."""
    cheap, dear = points(0, 0.2, 0.4, 0.6, 0.8, 1.0), points(0, 0.5, 1.0)
    for n, point in enumerate(dear):
        point |= {"num_gradient_evaluations": 400.0 * n, "seconds": 2.0 * n}
    records = [record("cheap", cheap), record("dear", dear), record("none", [])]
    table = equal_cost_table(records, ["one"], ["cheap", "dear", "none"], ["dear", "cheap"])
    # 200 images, 1800 passes and 4 seconds. A pass of the cheap one costs 3 an image: it has ended at 1500.
    assert [values(row) for row in table.splitlines()[2:]] == [
        ["20.0", "50.0", "40.0", "50.0"],
        ["50.0", "50.0", "50.0", f"{50 * 1500 / 1800:.1f}"],
    ]
    assert "| alignment at the images of dear, % |" in table
    assert "| alignment at the passes of cheap, % |" in table


def test_the_score_at_a_cost() -> None:
    run = record("ours", points(0.1, 0.2, 0.6, 0.9))
    assert at_cost(run, 150, COSTS["images"], "reward") == pytest.approx(0.4)
    assert at_cost(run, 297, COSTS["images"], "reward") == pytest.approx(0.891)
    assert at_cost(run, 298, COSTS["images"], "reward") == 0.9  # it costs less than one percent more
    assert at_cost(run, 300, COSTS["images"], "reward") == at_cost(run, 999, COSTS["images"], "reward") == 0.9
    assert at_cost(record("ours", []), 1, COSTS["images"], "reward") is None
    assert at_cost(record("ours", []) | {"diverged": "nan"}, 1, COSTS["images"], "alignment") == 0


def test_points_of_a_fit_are_not_averaged() -> None:
    """Those before it, of the model that draws the images, are."""
    curve = points(0.2, 0.4, 0.6, 0.8)
    curve[2]["drawn_for_it"] = curve[3]["drawn_for_it"] = True
    assert smoothed(curve, "reward") == pytest.approx([0.2, 0.3, 0.6, 0.8])


def test_equal_rewards() -> None:
    records = [
        record(PRETRAINED, [], 0.2),
        record("fast", points(0.0, 0.3, 0.9, 0.9, 0.0), 0.9),
        record("slow", points(0.0, 0.2, 0.4, 0.4, 1.0), 0.4),
    ]
    start = {"reward": 0.0, "alignment": 0.0, "quality": 1.0}
    # Means of three: 0, 0.15, 0.4, 0.7 and 0, 0.1, 0.2, 0.33, and the end. So the level 0.3 is between two points.
    assert at_reward(records[1], 0.3, "quality", start) == pytest.approx(0.7)
    assert at_reward(records[1], 0.3, "reward", start) == pytest.approx(0.3)
    assert at_reward(records[2], 0.9, "quality", start) == pytest.approx(0.1)
    assert at_reward(records[2], 1.1, "quality", start) is None
    assert at_reward(records[2], -1, "quality", start) == 1
    assert at_reward(records[0], 0.3, "quality", start) is None


def test_the_draws_before_a_fit_are_of_the_pretrained_model() -> None:
    """However high the reward of one of them is."""
    curve = points(0.0, 5.0, 0.2, 0.4)
    curve[2]["drawn_for_it"] = True
    start = {"reward": 0.0, "alignment": 0.0, "quality": 1.0}
    assert at_reward(record("fit", curve), 0.3, "reward", start) == pytest.approx(0.3)
    assert at_reward(record("fit", curve), 0.1, "quality", start) == pytest.approx(0.9)


def test_the_claims() -> None:
    """The level is three quarters of the way from the pre-trained model's reward to the lower final one of the two."""
    records = [
        record(PRETRAINED, [], 0.2),
        record("fast", points(0.0, 0.3, 0.9, 0.9, 0.9), 0.9),
        record("slow", points(0.0, 0.2, 0.4, 0.4, 0.4), 0.4),
        record("low", points(0.0, 0.0, 0.0, 0.0, 0.1), 0.1),
        record("still", points(0.0, 0.2, 0.2, 0.2, 0.24), 0.24),
    ]
    records[0]["scores"]["training"] |= {"alignment": 0.1, "quality": 0.8, "reward_std": 0.5}
    for run, quality in zip(records[1:], (0.7, 0.6, 0.5, 0.5), strict=True):
        run["scores"]["training"]["quality"] = quality
    for point in records[2]["curve"]:
        point["alignment"] = 0.1
    pairs = [("fast", "slow"), ("fast", "low"), ("fast", "still"), ("low", "absent")]
    (row,) = claims_table(records, ["one", "two"], pairs).splitlines()[2:]
    # The level is 0.2 + 3/4 x 0.2: 0.3 spreads above the start. The fast one has half of it as its alignment there. The
    # pairs with a method that ends below the pre-trained model, or 0.08 spreads above it, have no level.
    assert row.startswith("| “fast” minus “slow” | one | 0.30 | 2 of 2 | +0.075 | 1.000 | +0.000 | 1.000 | +0.100 |")


def test_a_run_that_does_not_reach_the_level_does_not_count() -> None:
    good, bad = record("ours", points(0.0, 0.9, 0.9), 0.9), record("ours", points(0.0, 0.1, 0.1), 0.1) | {"seed": 1}
    records = [record(PRETRAINED, [], 0.0), good, bad, record("theirs", points(0.0, 0.6, 0.8), 0.8)]
    records[0]["scores"]["training"] |= {"alignment": 0.0, "quality": 1.0, "reward_std": 0.5}
    (row,) = claims_table(records, ["one"], [("ours", "theirs")]).splitlines()[2:]
    assert values(row)[:3] == ["one", "0.75", "2 of 3"]
