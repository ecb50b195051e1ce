"""The machinery of the comparisons: statistics, one run, and sweeps that go on where they stopped."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from agents import Evaluation
from benchmarks import compare, compare_figures, judge, kl_analysis, mixture, preference, runs
from benchmarks.kl_analysis import SHOWN
from benchmarks.statistics import improvement, interquartile_band, interquartile_mean, probability_of_improvement
from dpok_gym.models import load_model
from dpok_gym.shapes.captions import sample_requested_scenes

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


PROMPTS = ("training", "held_out")


def test_interquartile_mean() -> None:
    found = interquartile_mean([[0.0, 2.0, 3.0, 100.0], [1.0, 1.0, 4.0, -50.0]])
    assert found.value == np.mean([np.mean([2, 3]), np.mean([1, 1])])  # of each task the middle half
    assert found.low < found.value < found.high
    assert f"{found:.2f}" == f"1.75 [{found.low:.2f}, {found.high:.2f}]"
    assert f"{interquartile_mean([[0.5]]):.2f}" == "0.50"  # one run has no interval


def test_interquartile_band() -> None:
    curves = np.random.default_rng(0).normal([0, 10, 20], size=(5, 3))
    band = interquartile_band(curves)
    points = [interquartile_mean([column]) for column in curves.T]
    np.testing.assert_allclose(np.array(band), np.array(points).T)
    assert np.isnan(interquartile_band(curves[:1])[1:]).all()


def test_intervals_get_narrower_and_are_resampled_within_tasks() -> None:
    rng = np.random.default_rng(0)
    few, many = (interquartile_mean([rng.normal(size=n)]) for n in (5, 500))
    assert many.high - many.low < 0.3 * (few.high - few.low)
    # The middle half's mean has 1.09 times a mean's standard deviation; 95 % are within 1.96 of these.
    assert many.high - many.low == pytest.approx(2 * 1.96 * 1.09 / 500**0.5, rel=0.15)
    # Tasks far apart: a bootstrap that mixed them would have wide intervals.
    apart = interquartile_mean([rng.normal(size=50), 1000 + rng.normal(size=50)])
    assert apart.high - apart.low < 50


def test_improvement() -> None:
    ours, theirs = [[3.0, 1.0], [5.0, 6.0]], [[2.0, 0.0], [5.0, 5.0]]
    found = improvement(ours, theirs)
    assert found.value == np.mean([1.0, 0.5])
    assert found.low < found.value < found.high
    assert improvement(theirs, ours).value == -found.value


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
    [
        ("dpok", {"use_critic": False}),
        ("draft", {"batch_size": 2}),
        ("rwr", {"n_gradient_steps": 4, "log_every": 2, "batch_size": 2}),
    ],
)
def test_a_run(algorithm: str, settings: dict[str, Any], tmp_path: Path) -> None:
    description = TINY | {"algorithm": algorithm, "settings": settings}
    if algorithm == "draft":
        description["reward"] = {"shapes-preference": 1.0}
    found = runs.run(description, tmp_path / "pictures" / "row.png")
    assert json.loads(json.dumps(found)) == found
    assert description.items() <= found.items()
    assert set(found["scores"]) == {"training", "held_out"}
    names = {"aligned", "alignment", "quality", "reward", "kl"}
    assert found["scores"]["training"].keys() == names | {"diversity", "step_kl"}
    assert found["scores"]["held_out"].keys() == names | {"step_kl"}  # three pictures of three prompts
    for scores in found["scores"].values():
        assert sum(scores["step_kl"]) == pytest.approx(scores["kl"], abs=1e-3)
        assert np.isfinite([scores[name] for name in names]).all()
    assert algorithm == "draft" or found["scores"]["training"]["reward"] < 0  # minus the size in kB
    points = [(point["pictures"], point["network_calls"]) for point in found["curve"]]
    # Two pictures, and their update, of DPOK with the pre-trained model's pass; then once more. Of RWR: four pictures,
    # and four updates of two. The evaluations within a run do not count.
    expected = {
        "dpok": [(0, 0), (2, 2 + 4), (4, 12)],
        "draft": [(0, 0), (2, 2 + 2), (4, 8)],
        "rwr": [(0, 0), (2, 2), (4, 4 + 4), (4, 4 + 8), (4, 4 + 8)],
    }
    assert points == expected[algorithm]
    assert found["network_calls"] == points[-1][1]
    assert 0 < found["seconds"] == found["curve"][-1]["seconds"]
    assert found["curve"][-1]["alignment"] == pytest.approx(found["scores"]["training"]["alignment"], abs=1e-4)
    assert (tmp_path / "pictures" / "row.png").is_file()


def test_rejection_costs_network_calls() -> None:
    plain, best = (runs.run(TINY | {"algorithm": "rejection", "settings": {"n": n}}) for n in (1, 4))
    assert (plain["network_calls_to_draw"], best["network_calls_to_draw"]) == (1, 4)
    assert best["scores"]["training"]["reward"] > plain["scores"]["training"]["reward"]
    assert plain["scores"]["training"]["kl"] == 0
    assert best["scores"]["training"]["kl"] == pytest.approx(np.log(4) - 3 / 4)
    assert best["curve"] == []
    assert (best["network_calls"], best["seconds"]) == (0, 0)


def test_a_sweep_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    wanted = [TINY | {"algorithm": "rejection", "settings": {"n": 1}, "seed": seed} for seed in range(2)]
    done = wanted[1] | {"scores": {"training": {"aligned": 0.5}}, "curve": [], "seconds": 1.0}
    done |= {"network_calls_to_draw": 1, "network_calls": 0}
    file.write_text(json.dumps(done) + "\n" + json.dumps(wanted[0])[:20])  # the last line was cut off
    assert runs.known(wanted, file) == [None, done]
    runs.sweep(wanted, file, processes=1)
    made, kept = runs.known(wanted, file)
    assert kept == done
    assert made is not None
    assert made["seed"] == 0
    assert np.isfinite(made["scores"]["training"]["aligned"])
    assert (tmp_path / "pictures" / "count-ours.png").is_file()
    assert runs.read_runs(file) == [done, made]
    runs.sweep(wanted, file, processes=1)
    assert runs.known(wanted, file) == [made, done]
    file.write_text("no json\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no JSON"):
        runs.read_runs(file)


def test_a_sweep_survives_a_failing_run(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    sound = TINY | {"algorithm": "rejection", "settings": {"n": 1}}
    wanted = [sound | {"settings": {"n": 0}}, sound]
    with pytest.raises(RuntimeError, match=r"count, ours, seed 0: best_of must be an integer of at least 1"):
        runs.sweep(wanted, file, processes=1, pictures=False)
    failed, made = runs.known(wanted, file)
    assert failed is None
    assert made is not None
    assert not (tmp_path / "pictures").exists()


def test_descriptions() -> None:
    everything = list(compare.descriptions(SETTINGS))
    assert len(everything) == SETTINGS["seeds"] * len(SETTINGS["tasks"]) * len(SETTINGS["algorithms"])
    assert len({json.dumps(description, sort_keys=True) for description in everything}) == len(everything)
    quick = list(compare.descriptions(SETTINGS, quick=True))
    assert len(quick) == 3 * 4
    assert {(run["task"], run["pictures"], run["eval_pictures"]) for run in quick} == {("count", 960, 128)}
    kl = kl_analysis.descriptions(KL_SETTINGS)
    assert len({json.dumps(description, sort_keys=True) for description in kl}) == len(kl)
    trials = list(compare.trials(SETTINGS))
    budgets = Counter((trial["task"], trial["seed"], trial["label"]) for trial in trials)
    assert len({(task, seed, n) for (task, seed, _), n in budgets.items()}) == len(SETTINGS["tuning"]["rounds"])
    assert len(budgets) == len(SETTINGS["tuning"]["rounds"]) * 8  # the same for each
    assert len({json.dumps(trial, sort_keys=True) for trial in trials}) == len(trials)
    assert not any(trial["seed"] in range(SETTINGS["seeds"]) for trial in trials)
    many = {each["label"]: each for each in everything if each["task"] == "many"}
    assert (many["SFT"]["settings"]["n_gradient_steps"], many["DPOK"]["pictures"]) == (600, 1920)


def fake_records(descriptions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs in which no two figures are the same."""
    rng = np.random.default_rng(0)
    names = ("aligned", "alignment", "quality", "reward", "kl", "diversity")
    axes = ("pictures", "network_calls", "seconds", "alignment", "quality", "reward")
    return [
        description
        | {"scores": {each: {"step_kl": [1.0, 3.0]} | {name: rng.random() for name in names} for each in PROMPTS}}
        | {"curve": [dict.fromkeys(axes, float(k)) for k in range(3)], "seconds": 2.0, "network_calls_to_draw": 10}
        | {"network_calls": 100}
        for description in descriptions
    ]


def mean_score(records: list[dict[str, Any]], prompts: str, name: str) -> float:
    return float(np.mean([record["scores"][prompts][name] for record in records]))


def values(line: str) -> list[str]:
    """The cells of a table's line without its label, without intervals."""
    return [cell.strip().partition(" [")[0] for cell in line.strip("| \n").split("|")[1:]]


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
    training, held_out = (
        {
            name: mean_score(runs_of("DDPO"), prompts, name)
            for name in ("aligned", "quality", "reward", "kl", "diversity")
        }
        for prompts in PROMPTS
    )
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
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("curves.png", "frontier.png"))


def test_report_of_the_kl_analysis(tmp_path: Path) -> None:
    records = fake_records(kl_analysis.descriptions(KL_SETTINGS | {"seeds": 2}))
    kl_analysis.report(records, KL_SETTINGS, tmp_path)
    text = (tmp_path / "table.md").read_text()
    (row,) = (line for line in text.split("\n") if line.startswith("| SFT, KL-O, 2 |"))
    found = [record for record in records if record["label"] == "SFT, KL-O, 2"]
    assert values(row) == ["2", *(f"{mean_score(found, *SHOWN[name][:2]):{SHOWN[name][2]}}" for name in SHOWN)]
    for one, other in KL_SETTINGS["claims"]:
        (row,) = (line for line in text.split("\n") if line.startswith(f"| {one} - {other} |"))
        both = ([record for record in records if record["label"] == label] for label in (one, other))
        ours, theirs = ([mean_score(runs, *SHOWN[name][:2]) for name in SHOWN] for runs in both)
        formats = [written for _, _, written in SHOWN.values()]
        differences = zip(ours, theirs, formats, strict=True)
        assert values(row) == [f"{mine - their:+{written}}" for mine, their, written in differences]
    assert (tmp_path / "kl_analysis.png").stat().st_size > 10_000


def test_largest_share() -> None:
    assert compare.largest_share([1.0, 3.0, 0.0]) == 0.75
    assert compare.largest_share([0.0, 0.0]) is None


def test_settings_are_ranked_by_the_reward(capsys: pytest.CaptureFixture[str]) -> None:
    def record(rate: float, reward: float) -> dict[str, Any]:
        scores = {"reward": reward, "aligned": 0.5, "quality": 0.5, "kl": 1.0}
        settings = {"learning_rate": rate, "lora_rank": 4}
        return {"task": "count", "label": "DPOK", "settings": settings, "scores": {"training": scores}}

    compare.rank([record(0.1, 1.0), record(0.2, 3.0), record(0.3, 1.5), record(0.1, 2.5)], {"lora_rank": 4})
    rows = [line.split("│")[3:8] for line in capsys.readouterr().out.split("\n") if "learning_rate" in line]
    found = [(cells[0].strip(), cells[1].strip()) for cells in rows]
    assert found == [("learning_rate 0.2", "3.000"), ("learning_rate 0.1", "1.750"), ("learning_rate 0.3", "1.500")]


def test_curves_are_running_means_of_what_is_drawn() -> None:
    heights = [0.0, 1.0, 5.0, 2.0, 7.0, 4.0, 9.0]
    points = [{"pictures": float(min(k, 5)), "quality": y, "seconds": float(k)} for k, y in enumerate(heights)]
    x, y = compare_figures._smooth(points, "quality", "seconds")
    assert x.tolist() == list(range(7))
    # Of five points, at the ends of fewer; and the last two are of a fit, and are as they are.
    assert y.tolist() == [2.0, 2.0, 3.0, 3.75, 14 / 3, 4.0, 9.0]
    x, y = compare_figures._smooth(points, "quality", "pictures")
    assert (x.tolist(), y[-1]) == ([0, 1, 2, 3, 4, 5], 9.0)


# --- Measures behind single figures


def mixture_policy(model: str = "mixture") -> Any:
    return SimpleNamespace(model=load_model(model, "cpu"))


def test_components_by_hand() -> None:
    policy = mixture_policy()
    means = policy.model.mixtures["two modes"].means
    points = torch.stack([means[0], means[0] + 0.1, means[1]]).double()
    weights, found = mixture.components(policy, "two modes", points, torch.tensor([1.0, 2.0, 5.0]).double())
    assert weights.tolist() == pytest.approx([3 / 8, 5 / 8])
    torch.testing.assert_close(found, torch.stack([means[0] + 0.2 / 3, means[1]]).double())


def test_tilts_by_hand() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.5]]).double()
    weights = mixture.tilts(mixture_policy(), points, {"mixture-linear": 0.5}, beta=0.25)
    assert (weights[1:] / weights[0]).tolist() == pytest.approx([np.exp(2)] * 2, rel=1e-3)


def test_share_of_scenes_read_exactly() -> None:
    truth, _ = sample_requested_scenes(10, torch.Generator().manual_seed(0))
    other = replace(truth, colour=truth.colour.clone())
    other.colour[:3, 0] += 1
    other.colour[5, -1] += 1 if truth.count[5] < truth.colour.shape[1] else 0  # beyond the objects there are
    assert judge.share_exact(truth, truth) == 1
    assert judge.share_exact(truth, other) == 0.7


def test_area_under_the_curve() -> None:
    """Of pairs with the same prompt: here two of three, and one of one."""
    aligned = np.array([1.0, 0.5, 1.0, 1.0, 0.0])
    found = Evaluation(
        prompts=["a", "a", "a", "a", "b"],
        pictures=np.zeros((5, 1, 1, 3), np.uint8),
        reward=aligned,
        rewards={"shapes-alignment": aligned},
        step_kl=np.zeros((5, 1)),
    )
    assert preference.area_under_curve(found, np.array([3.0, 2.0, 1.0, 4.0, 9.0])) == pytest.approx(2 / 3)
    assert preference.area_under_curve(found, np.zeros(5)) == 0.5  # ties count half


def test_agreement_with_what_was_chosen_and_meant() -> None:
    def row(kind: str, preferred: int, utilities: list[float]) -> dict[str, Any]:
        return {"prompt": kind, "preferred": preferred, "utilities": utilities, "pictures": ["0-1.png", "0-2.png"]}

    colour = "a red star"
    rows = [
        row(colour, 0, [1.0, 0.0]),
        row(colour, 1, [1.0, 0.0]),  # erred
        row("two red stars", 1, [0.0, 1.0]),
        row("two red stars", 1, [0.0, 1.0]),
    ]
    odds = torch.tensor([1.0, -2.0, 0.5, -1.0])  # of what was chosen
    table = preference.agreement_table(odds, rows)
    cells = {row[0]: row[1:] for row in zip(*(list(column.cells) for column in table.columns), strict=True)}
    assert cells["colour"] == ("2", "50.0%", "100.0%")
    assert cells["count"] == ("2", "50.0%", "50.0%")
    assert cells["all"] == ("4", "50.0%", "75.0%")
