"""The machinery of the comparisons: statistics, one run, and sweeps that go on where they stopped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import compare, kl_analysis, runs
from benchmarks.statistics import interquartile_mean, probability_of_improvement

SETTINGS = yaml.safe_load((Path(compare.__file__).parent / "compare.yaml").read_text())
KL_SETTINGS = yaml.safe_load((Path(compare.__file__).parent / "kl_analysis.yaml").read_text())
TINY: dict[str, Any] = {
    "task": "count",
    "label": "ours",
    "prompts": "three green squares",
    "reward": {"jpeg-compressibility": 1.0},
    "pictures": 4,
    "n_envs": 2,
    "num_inference_steps": 1,
    "eval_pictures": 3,
    "held_out": True,
    "seed": 0,
}


def test_interquartile_mean() -> None:
    found = interquartile_mean([[0.0, 2.0, 3.0, 100.0], [1.0, 1.0, 4.0, -50.0]])
    assert found.value == np.mean([1, 1, 2, 3])  # the middle half of -50, 0, 1, 1, 2, 3, 4, 100
    assert found.low < found.value < found.high
    assert f"{found:.1f}" == f"1.8 [{found.low:.1f}, {found.high:.1f}]"
    assert f"{interquartile_mean([[0.5]]):.2f}" == "0.50"  # one run has no interval


def test_intervals_get_narrower_and_are_resampled_within_tasks() -> None:
    rng = np.random.default_rng(0)
    few, many = (interquartile_mean([rng.normal(size=n)]) for n in (5, 500))
    assert many.high - many.low < 0.3 * (few.high - few.low)
    # Tasks far apart: a bootstrap that mixed them would have wide intervals.
    apart = interquartile_mean([rng.normal(size=50), 1000 + rng.normal(size=50)])
    assert apart.high - apart.low < 50


def test_probability_of_improvement() -> None:
    found = probability_of_improvement([[3.0, 1.0], [5.0, 5.0]], [[2.0, 0.0], [5.0, 6.0]])
    assert found.value == np.mean([3 / 4, 1 / 4])
    assert found.low <= found.value <= found.high
    assert probability_of_improvement([[1.0, 2.0]], [[0.0, 0.5]])[:3] == (1.0, 1.0, 1.0)


def test_diversity() -> None:
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    pictures[1] = 255
    pictures[2] = 51
    assert runs.diversity(pictures[:3], ["a"] * 3) == pytest.approx(np.mean([1.0, 0.2, 0.8]))
    assert runs.diversity(pictures, ["a", "a", "b", "c"]) == pytest.approx(1.0)  # single ones have no distance
    assert runs.diversity(pictures[:1], ["a"]) is None


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [("dpok", {"use_critic": False}), ("rwr", {"n_gradient_steps": 5, "log_every": 1, "batch_size": 2})],
)
def test_a_run(algorithm: str, settings: dict[str, Any], tmp_path: Path) -> None:
    description = TINY | {"algorithm": algorithm, "settings": settings}
    found = runs.run(description, tmp_path / "pictures" / "row.png")
    assert json.loads(json.dumps(found)) == found
    assert description.items() <= found.items()
    assert set(found["scores"]) == {"training", "held_out"}
    names = {"aligned", "alignment", "quality", "reward", "kl"}
    assert found["scores"]["training"].keys() == names | {"diversity"}
    assert found["scores"]["held_out"].keys() == names  # three pictures of three prompts
    assert all(np.isfinite(list(scores.values())).all() for scores in found["scores"].values())
    assert found["scores"]["training"]["reward"] < 0  # minus the size in kB
    assert [point["pictures"] for point in found["curve"]][:2] == [2, 4]
    calls = [point["network_calls"] for point in found["curve"]]
    # Of DPOK: two pictures, and their update with the pre-trained model's pass; then two more pictures. Of RWR: four
    # pictures, and five updates of two. The evaluations within a run do not count.
    assert calls == ([2, 2 + 4 + 2] if algorithm == "dpok" else [2, 4, 4 + 10])
    assert (tmp_path / "pictures" / "row.png").is_file()


def test_rejection_costs_network_calls() -> None:
    plain, best = (runs.run(TINY | {"algorithm": "rejection", "settings": {"n": n}}) for n in (1, 4))
    assert (plain["network_calls_to_draw"], best["network_calls_to_draw"]) == (1, 4)
    assert best["scores"]["training"]["reward"] > plain["scores"]["training"]["reward"]
    assert best["scores"]["training"]["kl"] == 0
    assert best["curve"] == []


def test_a_sweep_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    wanted = [TINY | {"algorithm": "rejection", "settings": {"n": 1}, "seed": seed} for seed in range(2)]
    done = wanted[1] | {"scores": {"training": {"aligned": 0.5}}, "curve": [], "seconds": 1.0}
    done |= {"network_calls_to_draw": 1}
    file.write_text(json.dumps(done) + "\n" + json.dumps(wanted[0])[:20])  # the last line was cut off
    found = runs.sweep(wanted, file, processes=1)
    assert found[1] == done
    assert found[0]["seed"] == 0
    assert np.isfinite(found[0]["scores"]["training"]["aligned"])
    assert (tmp_path / "pictures" / "count-ours.png").is_file()
    assert runs.read_runs(file) == [done, found[0]]
    assert runs.sweep(wanted, file, processes=1) == found
    file.write_text("no json\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no JSON"):
        runs.read_runs(file)


def test_descriptions() -> None:
    everything = list(compare.descriptions(SETTINGS, {}))
    assert len(everything) == SETTINGS["seeds"] * len(SETTINGS["tasks"]) * len(SETTINGS["algorithms"])
    assert len({json.dumps(description, sort_keys=True) for description in everything}) == len(everything)
    quick = list(compare.descriptions(SETTINGS, SETTINGS["quick"]))
    assert all(description in everything for description in quick)
    kl = kl_analysis.descriptions(KL_SETTINGS)
    assert len({json.dumps(description, sort_keys=True) for description in kl}) == len(kl)
    budgets = {len(grid) for grid in SETTINGS["tuning"]["grids"].values()}
    assert len(budgets) == 1  # the same for each


def fake_records(descriptions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    names = ("aligned", "alignment", "quality", "reward", "kl", "diversity")
    axes = ("pictures", "network_calls", "seconds", "alignment", "quality", "reward")
    return [
        description
        | {"scores": {name: dict.fromkeys(names, rng.random()) for name in ("training", "held_out")}}
        | {"curve": [dict.fromkeys(axes, float(k)) for k in range(3)], "seconds": 2.0, "network_calls_to_draw": 10}
        for description in descriptions
    ]


def test_reports(tmp_path: Path) -> None:
    compare.report(fake_records(list(compare.descriptions(SETTINGS, {"seeds": 2}))), tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert all(f"### {task}" in text for task in (*SETTINGS["tasks"], "all tasks"))
    assert text.count("| DDPO |") == len(SETTINGS["tasks"]) + 2
    kl_analysis.report(fake_records(kl_analysis.descriptions(KL_SETTINGS)), tmp_path)
    names = ("curves.png", "frontier.png", "kl_analysis.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
    with pytest.raises(SystemExit, match="there are no runs"):
        compare.report([], tmp_path)
