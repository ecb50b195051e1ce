"""Scores of tasks: the same images whatever is scored, the rows, and the results file."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpok_gym
from agents.common.evaluation import Evaluation
from benchmarks import score
from dpok_gym.models import load_model
from dpok_gym.models.lora import LoRA

TASK = "DPOK-Mixture-TwoModes-v0"
PROMPTS = ["two modes"] * 8


def run(tmp_path: Path, *words: str, task: str = TASK) -> dict[str, Any]:
    """Runs the command; returns the last line of its results."""
    out = tmp_path / "scores.jsonl"
    score.main(["--env", task, "--images", "8", "--out", str(out), *words])
    return json.loads(out.read_text().splitlines()[-1])


def evaluation(reward: list[float], **kwargs: Any) -> Evaluation:
    n = len(reward)
    images = np.zeros((n, 2, 2, 3), np.uint8)
    return Evaluation(
        ["a"] * n,
        images,
        np.array(reward),
        {},
        **{"step_kl": np.zeros((n, 2)), "step_mse": np.zeros((n, 2)), "exploring": np.ones(2, bool)} | kwargs,
    )


def test_row() -> None:
    """By hand: mean 2, standard deviation 1, so the interval is +- 1.96 / sqrt(3)."""
    given = {"method": "mine", "author": "me", "images_used": 5, "command": "make"}
    row = score.make_row(evaluation([1.0, 2.0, 3.0], step_kl=np.full((3, 2), 0.25)), TASK, 7, **given)
    assert row == given | {
        "task": TASK,
        "version": dpok_gym.__version__,
        "score": 2.0,
        "interval": [0.8684, 3.1316],
        "aligned": None,
        "quality": None,
        "kl": 0.5,
        "images": 3,
        "seed": 7,
    }
    unknown = score.make_row(evaluation([1.0, 2.0], step_kl=np.full((2, 2), np.nan)), TASK, 7, **given)
    assert unknown["kl"] is None


def test_stepping_draws_what_the_evaluation_draws() -> None:
    """From the same x_T: with no noise at all, both end at the same points."""
    env = score.make_task(TASK, 4)
    noisy = dpok_gym.VectorNoiseAction(env)
    stepped = score.score_policy(noisy, lambda observation: np.zeros((4, 1, 1, 2), np.float32), PROMPTS, 3)

    def still(state: Any) -> Any:
        mean, std = env.process.transition(state)
        return mean, 0 * std

    drawn = score.sample_images(env.process, env, PROMPTS, 3, still)
    np.testing.assert_allclose(stepped.reward, drawn.reward, atol=1e-5)
    assert stepped.rewards.keys() == drawn.rewards.keys()
    assert np.abs(stepped.images.astype(int) - drawn.images).max() <= 1
    assert len(np.unique(stepped.reward)) == 8


def test_best_of_is_better() -> None:
    env = score.make_task(TASK, 4)
    assert score.score_pretrained(env, PROMPTS, 0, 4).mean_reward > score.score_pretrained(env, PROMPTS, 0).mean_reward


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = run(tmp_path, "--beta", "1")
    assert (row["method"], row["kl"], row["images"], row["images_used"]) == ("pre-trained", 0, 8, 0)
    assert row["command"].startswith(f"python -m benchmarks.score --env {TASK} --images 8")
    assert f"E[r] - 1.0 KL: {row['score']:.4f}; the best possible: 0.6" in capsys.readouterr().out
    assert run(tmp_path, "--best-of", "2")["kl"] == round(math.log(2) - 0.5, 3)
    row = run(tmp_path, "--policy", "dpok_gym:reference_policy", "--wrap", "noise", "features", "--author", "me")
    assert (row["method"], row["author"], row["kl"]) == ("dpok_gym:reference_policy", "me", None)
    rows = score.read_rows(tmp_path / "scores.jsonl", TASK)
    assert len(rows) == 3
    assert rows[0]["score"] >= rows[1]["score"] >= rows[2]["score"]
    assert score.read_rows(tmp_path / "scores.jsonl", "another task") == []


@pytest.mark.slow
def test_a_lora(tmp_path: Path) -> None:
    model = load_model("shapes", "cpu")
    LoRA(model.denoiser, 2, model.lora_layers["attention"]).save(tmp_path / "lora", model.lora_prefix)
    task = "DPOK-Shapes-Count-v0"
    plain, tuned = run(tmp_path, task=task), run(tmp_path, "--lora", str(tmp_path / "lora"), task=task)
    assert tuned["method"] == "LoRA lora"
    assert (tuned["score"], tuned["kl"]) == (plain["score"], 0)  # a new LoRA changes nothing
    assert 0 <= plain["aligned"] <= 1


def test_a_number_of_images_that_cannot_be_drawn() -> None:
    env = dpok_gym.VectorNoiseAction(score.make_task(TASK, 4))
    with pytest.raises(ValueError, match="must be a multiple of 4, which are drawn at a time; got 6"):
        score.score_policy(env, dpok_gym.reference_policy(env), PROMPTS[:6], 0)


@pytest.mark.parametrize("line", ["{", "3", '{"task": "DPOK-Mixture-TwoModes-v0"}'])
def test_a_damaged_results_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .*scores.jsonl is no result as benchmarks.score writes it"):
        score.read_rows(path, TASK)


def test_published_rows_can_be_read() -> None:
    rows = [json.loads(line) for line in score.RESULTS.read_text(encoding="utf-8").splitlines()]
    assert {row["task"] for row in rows} == score.TASKS.keys()
    for task, known in score.TASKS.items():
        by_method = {row["method"]: row["score"] for row in score.read_rows(score.RESULTS, task)}
        assert by_method["pre-trained"] == pytest.approx(known.reference_score, abs=1e-3)
        assert by_method["pre-trained, best of 4"] == pytest.approx(known.threshold, abs=1e-3)
