"""The comparison of the algorithms: what it runs, and how it is tuned."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agents import PRESETS
from agents.algorithms.registry import load_algorithm
from agents.common.arguments import check_arguments
from benchmarks import algorithms
from benchmarks.algorithms import PRETRAINED, Tuning
from benchmarks.prompt_splits import prompt_splits
from benchmarks.runs import HERE, Description
from benchmarks.sparse_reward import fully_aligned
from benchmarks.training_run import UNTRAINED, key_of
from dpok_gym import make_reward
from dpok_gym.prompts import load_prompts
from dpok_gym.shapes.captions import corrupt, sample_requested_scenes
from dpok_gym.shapes.prompts import unseen_prompts
from dpok_gym.shapes.scenes import render

SETTINGS = yaml.safe_load((HERE / "algorithms.yaml").read_text(encoding="utf-8"))
SEARCHES = ("diffusion", "flow")
TUNED = {(search, label): {"learning_rate": 0.5} for search in SEARCHES for label in SETTINGS["methods"]}
RUNS = list(algorithms.descriptions(SETTINGS, TUNED))


def find(task: str, label: str, seed: int = 0) -> Description:
    (run,) = (each for each in RUNS if (each["task"], each["label"], each["seed"]) == (task, label, seed))
    return run


def test_every_run_is_described_once() -> None:
    methods, tasks = len(SETTINGS["methods"]), len(SETTINGS["tasks"])
    n_components = 3 * 2 * len(SETTINGS["components"]["changes"])
    n_long = methods - len(SETTINGS["long"]["without"])
    n_left_out = 5 * (2 + 3 * 3)  # of DRaFT on the tasks without a gradient, and of three variants on three tasks
    assert len(RUNS) == 5 * tasks * (methods + len(SETTINGS["untrained"])) - n_left_out + n_components + n_long
    assert len({json.dumps(each, sort_keys=True) for each in RUNS}) == len(RUNS)


def test_a_run_has_the_settings_of_its_task_its_method_and_its_search() -> None:
    run = find("flow", "DPOK", 3)
    assert run["environment"] == {"model": "shapes-flow"}
    assert run["settings"]["policy_kwargs"]["target_modules"] == "attention"
    assert run["settings"]["learning_rate"] == 0.5
    assert run["settings"]["step_weighting"] == "output"
    assert "step_weighting" not in find("count", "DPOK", 3)["settings"]
    assert (run["images"], run["prompts"]) == (512, "a blue triangle")
    assert {*run["also"]} == {"best of 4", "LoRA x 0.7", "LoRA x 1.4", "less noise"}
    assert "also" not in find("flow", "DDPO")
    assert find("flow", "SFT")["settings"]["policy_kwargs"]["target_modules"] == "all"
    assert find("many", "SFT")["settings"]["n_gradient_steps"] == 213
    assert find("long", "RWR")["settings"]["n_gradient_steps"] == 4167
    tuned = TUNED | {("diffusion", "SFT, no KL"): {"batch_size": 128}}
    of_large_batches = algorithms.describe(SETTINGS, "many", "SFT, no KL", 0, tuned)["settings"]
    assert (of_large_batches["batch_size"], of_large_batches["n_gradient_steps"]) == (128, 107)
    assert find("long", "DPOK")["prompts"] == find("count", "DPOK")["prompts"]
    assert find("count", "guidance 2") == SETTINGS["common"] | {
        "prompts": "three green squares",
        "task": "count",
        "label": "guidance 2",
        "algorithm": UNTRAINED,
        "seed": 0,
        "settings": {},
        "draw": {"environment": {"guidance_scale": 2.0}},
    }


def test_a_smaller_comparison_has_some_of_the_same_runs(tmp_path: Path) -> None:
    assert algorithms.choose(SETTINGS) is SETTINGS
    smaller = algorithms.choose(SETTINGS, ["sparse"], ["GRPO", "DRaFT"], 2)
    runs = list(algorithms.descriptions(smaller, TUNED))
    assert all(run in RUNS for run in runs)
    assert {run["label"] for run in runs} == {"GRPO", *SETTINGS["untrained"]}  # DRaFT needs a gradient
    assert len(runs) == 2 * (1 + len(SETTINGS["untrained"]))
    searched = {(run["task"], run["label"]) for run in Tuning(smaller, tmp_path / "tuning.jsonl").missing()}
    assert searched == {("diffusion", label) for label in ("GRPO", PRETRAINED)}
    assert list(algorithms.choose(SETTINGS, ["flow"])["tuning"]["searches"]) == ["diffusion", "flow"]
    assert smaller["shown"]["families"] == [["GRPO"], ["DRaFT"]]
    assert algorithms.choose(SETTINGS, methods=["DPOK, no KL"])["shown"]["families"] == []  # no figure of curves
    with pytest.raises(ValueError, match="no methods ddpo; there are DPOK, "):
        algorithms.choose(SETTINGS, methods=["ddpo"])
    with pytest.raises(ValueError, match="seeds must be"):
        algorithms.choose(SETTINGS, seeds=0)


def test_the_long_runs_come_last() -> None:
    others = [run["seed"] for run in RUNS if run["task"] != "long"]
    assert others == sorted(others)
    assert all(run["task"] == "long" for run in RUNS[len(others) :])


def test_a_method_runs_on_the_tasks_that_it_names() -> None:
    assert {run["task"] for run in RUNS if run["label"] == "DPOK, published"} == {"count", "location", "many"}
    for label in ("DPOK, no KL", "SFT, no KL"):
        runs = [run for run in RUNS if run["label"] == label and run["task"] != "long"]
        assert {run["task"] for run in runs} == {"count", "location", "pair"}


@pytest.mark.parametrize("task", SETTINGS["tasks"])
def test_a_reward_has_a_gradient_or_says_that_it_has_none(task: str) -> None:
    reward = make_reward(SETTINGS["tasks"][task].get("reward", SETTINGS["common"]["reward"]))
    if SETTINGS["tasks"][task].get("gradient", True):
        reward.check_differentiable()
    else:
        with pytest.raises(ValueError, match="no gradient"):
            reward.check_differentiable()


def test_a_component_changes_one_thing() -> None:
    settings = find("location", "DPOK", 2)["settings"]
    for label, change in SETTINGS["components"]["changes"].items():
        run = find("location", f"DPOK: {label}", 2)
        assert run["settings"] == settings | change != settings
        also = {"also": SETTINGS["methods"]["DPOK"]["also"]}
        assert run | {"label": "DPOK", "settings": settings} | also == find("location", "DPOK", 2)


@pytest.mark.parametrize("label", SETTINGS["methods"])
def test_the_settings_are_arguments(label: str) -> None:
    """Also those that are searched, and those that a component changes."""
    algorithm = load_algorithm(SETTINGS["methods"][label]["algorithm"])
    changes = SETTINGS["components"]["changes"].values() if label == "DPOK" else []
    axes = dict.fromkeys(SETTINGS["methods"][label]["axes"])
    for change in (axes, *changes):
        check_arguments(algorithm, find("count", label)["settings"] | change)


def test_the_policy_is_that_of_the_laptop() -> None:
    laptop = PRESETS["laptop"].algorithm_kwargs("dpok")
    assert SETTINGS["settings"]["policy_kwargs"] == laptop["policy_kwargs"]


def test_the_sparse_reward() -> None:
    """Images with one thing wrong have nothing of it."""
    generator = torch.Generator().manual_seed(0)
    scenes, requests = sample_requested_scenes(50, generator)
    images = render(scenes)
    assert fully_aligned(images, [str(request) for request in requests]).mean() > 0.9
    assert fully_aligned(images, [str(corrupt(request, generator)) for request in requests]).sum() == 0


# --- The tuning


def make_runs(tuning: Tuning, reward: Any, quality: Any = lambda run: 0.9) -> list[Description]:
    """Makes the runs that are missing, until none is; returns all of them."""
    made = []
    while missing := tuning.missing():
        with tuning.file.open("a", encoding="utf-8") as file:
            for run in missing:
                scores = {"reward": reward(run), "quality": quality(run), "aligned": 0.5, "kl": 1.0}
                scores |= {"judged": 0.8, "entropy_of_positions": 3.0}
                results = {"scores": {"training": scores}, "seconds": 1.0, "num_gradient_evaluations": 3}
                file.write(json.dumps(run | results) + "\n")
        made += missing
    return made


def likes_small_rates(run: Description) -> float:
    return -run["settings"].get("learning_rate", 1.0)


def unseen_of(task: dict[str, Any]) -> tuple[str, ...]:
    return tuple(unseen_prompts(load_prompts(task["prompts"]))) if "prompts" in task else ()


def test_no_task_has_the_prompt_of_a_search() -> None:
    """Nor a set of prompts: they would be tuned on what they are compared with."""
    prompts = {task.get("prompts") for task in SETTINGS["tasks"].values()}.union(*prompt_splits().values())
    prompts |= {text for task in SETTINGS["tasks"].values() for text in unseen_of(task)}
    assert prompts.isdisjoint(search["prompts"] for search in SETTINGS["tuning"]["searches"].values())


def test_each_method_is_tuned_by_the_same_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuning = Tuning(SETTINGS, tmp_path / "tuning.jsonl")
    with pytest.raises(ValueError, match="--tune"):
        tuning.tuned()
    made = make_runs(tuning, likes_small_rates)
    assert len({json.dumps(each, sort_keys=True) for each in made}) == len(made)
    assert {each["seed"] for each in made} == {100, 101, 102}
    assert all(each["images"] == 512 for each in made)
    numbers = {}
    for label in SETTINGS["methods"]:
        numbers[label] = [sum((r["task"], r["label"]) == (search, label) for r in made) for search in SEARCHES]
    # Seven values of the rate, seven of the other setting, of which one run is the same, and two finalists. Two
    # methods have limits of the other setting, and three have no task of the second search.
    expected = {label: [7 + 6 + 4, 0 if "tasks" in method else 7 + 4] for label, method in SETTINGS["methods"].items()}
    assert numbers == expected | {"REINFORCE": [7 + 4 + 4, 7 + 4], "best of n, distilled": [7 + 3 + 4, 7 + 4]}
    chosen = tuning.tuned()
    assert chosen["diffusion", "GRPO"]["learning_rate"] == chosen["flow", "GRPO"]["learning_rate"] == 9.375e-5
    assert chosen["flow", "GRPO"]["kl_coef"] == chosen["diffusion", "GRPO"]["kl_coef"]
    tuning.show()
    printed = capsys.readouterr().out
    assert "learning_rate at the edge" in printed
    assert printed.count(" yes") == len(chosen) == 2 * len(SETTINGS["methods"]) - 3
    rows = tuning.table().splitlines()[2:]
    assert len(rows) == len(SETTINGS["methods"])
    rate = "learning_rate 9.375e-05"
    kl = f"kl_coef {chosen['diffusion', 'GRPO']['kl_coef']:g}"
    edge = "learning_rate at the edge"
    assert f"| GRPO | {rate}, {kl}, {edge} (+0.000) | {rate}, {edge} (+0.000) | 20 |" in rows
    assert next(row for row in rows if row.startswith("| SFT, no KL |")).endswith("|  | 13 |")


def test_the_table_says_how_far_a_setting_is_ahead_and_if_it_is_at_a_limit(tmp_path: Path) -> None:
    def reward(run: Description) -> float:
        settings = run["settings"]
        away = (
            math.log2(settings.get("learning_rate", 3e-3) / 3e-3),
            math.log2((settings.get("kl_coef") or 5e-3) / 5e-3),
        )
        return settings.get("n", 0) - abs(away[0]) - abs(away[1]) / 4

    tuning = Tuning(SETTINGS, tmp_path / "tuning.jsonl")
    make_runs(tuning, reward)
    rows = tuning.table().splitlines()
    (dpok,) = (row for row in rows if row.startswith("| DPOK |"))
    assert dpok.startswith("| DPOK | learning_rate 0.003, kl_coef 0.005 (+0.500) | learning_rate 0.003 (+1.000) |")
    (best_of_n,) = (row for row in rows if row.startswith("| best of n, distilled |"))
    assert "| learning_rate 0.003, n 64, n at its limit (+32.000) |" in best_of_n


def test_a_setting_that_ruins_the_images_is_not_chosen(tmp_path: Path) -> None:
    """However high its reward is; a little loss of quality does not count."""

    def quality(run: Description) -> float:
        if run["label"] == PRETRAINED:
            return 0.9
        return 0.885 if run["settings"]["learning_rate"] >= 3e-3 else 0.85

    tuning = Tuning(SETTINGS, tmp_path / "tuning.jsonl")
    make_runs(tuning, likes_small_rates, quality)
    assert tuning.tuned()["diffusion", "DPOK"]["learning_rate"] == 3e-3


def change_runs_below(tuning: Tuning, rate: float, changes: dict[str, Any]) -> None:
    """Changes the scores of the runs with small rates; a change named "diverged" is of the run itself."""
    records = [json.loads(line) for line in tuning.file.read_text().splitlines()]
    for record in records:
        if record["settings"].get("learning_rate", 1) < rate:
            if "diverged" in changes:
                record |= {"scores": {}} | changes
            else:
                record["scores"]["training"] |= changes
    tuning.file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_setting_that_draws_one_layout_is_not_chosen(tmp_path: Path) -> None:
    tuning = Tuning(SETTINGS, tmp_path / "tuning.jsonl")
    made = make_runs(tuning, likes_small_rates)
    change_runs_below(tuning, 3e-3, {"entropy_of_positions": 1.0})
    assert len(make_runs(tuning, likes_small_rates)) < len(made)
    assert tuning.tuned()["diffusion", "DPOK"]["learning_rate"] == 3e-3


@pytest.mark.parametrize("changes", [{"diverged": "the image is not finite"}, {"kl": 0.0}])
def test_a_setting_without_a_trained_model_is_not_chosen(changes: dict[str, Any], tmp_path: Path) -> None:
    """Nor one that goes back to where it began, as DRaFT does if its first update is too far: that keeps all limits."""
    tuning = Tuning(SETTINGS, tmp_path / "tuning.jsonl")
    make_runs(tuning, likes_small_rates)
    change_runs_below(tuning, 1.5e-3, changes)
    make_runs(tuning, likes_small_rates)
    assert tuning.tuned()["diffusion", "DPOK"]["learning_rate"] == 1.5e-3
    tuning.show()


def test_the_search_goes_on_from_the_runs_that_are_there(tmp_path: Path) -> None:
    tuning = Tuning(SETTINGS, tmp_path / "tuning.jsonl")
    made = make_runs(tuning, likes_small_rates)
    lines = tuning.file.read_text().splitlines(keepends=True)
    tuning.file.write_text("".join(lines[: len(lines) // 2]))
    again = make_runs(Tuning(SETTINGS, tuning.file), likes_small_rates)
    assert {*map(key_of, again)} == {*map(key_of, made[len(lines) // 2 :])}
    assert len(again) == len(made) - len(lines) // 2
