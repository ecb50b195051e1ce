"""One run of a sweep: its scores, its curve and its cost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import DPOK
from benchmarks import training_run
from tests.benchmarks.support import TINY

#: The scores that take two images of a prompt.
ENTROPIES = {f"entropy_of_{name}" for name in ("positions", "colours", "shapes", "counts")}


def test_images_of_a_row() -> None:
    assert training_run.choose_row(["a", "a", "b"]) == [0, 1, 2]
    assert training_run.choose_row(["a"] * 20) == list(range(8))
    prompts = list("aabbccddeeffgghh")
    assert training_run.choose_row(prompts) == list(range(0, 16, 2))
    many = [str(k) for k in range(33)]
    assert training_run.choose_row(many) == list(range(0, 32, 4))


def without_seconds(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scores.items() if name != "seconds"}


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("dpok", {"use_critic": False}),
        ("draft", {"batch_size": 2}),
        pytest.param("rwr", {"n_gradient_steps": 4, "log_every": 2, "batch_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run(algorithm: str, settings: dict[str, Any], tmp_path: Path) -> None:
    description = TINY | {"algorithm": algorithm, "settings": settings}
    if algorithm == "draft":
        description["reward"] = {"shapes-preference": 1.0}
    record = training_run.run(description, tmp_path / "images" / "row.png")
    assert json.loads(json.dumps(record)) == record
    assert description.items() <= record.items()
    assert set(record["scores"]) == {"training", "held_out"}
    names = {"aligned", "alignment", "quality", "reward", "kl", "late_drift", "judged", "judged_std", "reward_std"}
    names |= {"seconds", "calls", "reward_calls"}
    assert record["scores"]["training"].keys() == names | {"step_kl", "diversity"}
    assert record["scores"]["held_out"].keys() == names | {"step_kl"}  # three images of three prompts
    for scores in record["scores"].values():
        assert sum(scores["step_kl"]) == pytest.approx(scores["kl"], abs=1e-3)
        assert np.isfinite([scores[name] for name in names]).all()
    points = record["curve"]
    if algorithm != "draft":  # minus the size in kB
        assert record["scores"]["training"]["reward"] < 0
        assert all(point["reward"] < 0 for point in points)
    # Two images, and their update, of DPOK with the pre-trained model's pass; then once more. Of RWR: four images, and
    # four updates of two. The evaluations within a run do not count.
    expected = {
        "dpok": [(0, 0), (2, 2 + 4), (4, 12)],
        "draft": [(0, 0), (2, 2 + 2), (4, 8)],
        "rwr": [(0, 0), (2, 2), (4, 4 + 4), (4, 4 + 8), (4, 4 + 8)],
    }
    assert [(point["images"], point["num_function_evaluations"]) for point in points] == expected[algorithm]
    assert record["num_function_evaluations"] == points[-1]["num_function_evaluations"]
    # Each image is learned from once; DRaFT differentiates the last step, and RWR takes four updates of two images.
    assert record["num_gradient_evaluations"] == {"dpok": 4, "draft": 4, "rwr": 8}[algorithm]
    assert 0 < record["seconds"] == points[-1]["seconds"]
    assert points[-1]["alignment"] == pytest.approx(record["scores"]["training"]["alignment"], abs=1e-4)
    assert (tmp_path / "images" / "row.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("dpok", {"kl_coef": 0.01}),
        ("diffusion-nft", {"group_size": 2}),
        ("rwr", {"n_gradient_steps": 8, "log_every": 2, "batch_size": 2}),
    ],
)
def test_a_run_goes_on(
    algorithm: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run has the same scores, curve and cost as one that was not stopped; it does not begin anew."""
    description = TINY | {"algorithm": algorithm, "settings": settings, "images": 8, "held_out": False}
    whole = training_run.run(description)
    monkeypatch.setattr(training_run, "_MINUTES", 1e-9)  # before each iteration
    rollouts = []
    on_rollout_end = training_run.Curve._on_rollout_end

    def stop(curve: training_run.Curve) -> None:
        rollouts.append(curve.model.iteration)
        if len(rollouts) == 3:
            raise KeyboardInterrupt
        on_rollout_end(curve)

    monkeypatch.setattr(training_run.Curve, "_on_rollout_end", stop)
    with pytest.raises(KeyboardInterrupt):
        training_run.run(description, unfinished=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    another = training_run.run(description | {"seed": 1}, unfinished=tmp_path)
    assert another["scores"] != whole["scores"]
    del rollouts[3:]
    record = training_run.run(description, unfinished=tmp_path)
    assert rollouts[3] == rollouts[2]  # the iteration that was not over, and not the first one
    assert not list(tmp_path.iterdir())
    for made in (record, whole):
        del made["seconds"]
        made["curve"] = [without_seconds(point) for point in made["curve"]]
        made["scores"] = {name: without_seconds(scores) for name, scores in made["scores"].items()}
    assert record == whole


@pytest.mark.slow
def test_a_run_with_smaller_rollouts_of_its_own() -> None:
    """As REINFORCE has in the comparison."""
    settings = {"n_envs": 1}
    record = training_run.run(TINY | {"algorithm": "reinforce", "settings": settings, "images": 2, "held_out": False})
    assert [point["images"] for point in record["curve"]] == [0, 1, 2]
    assert record["settings"] == settings
    assert set(record["scores"]) == {"training"}


@pytest.mark.slow
def test_images_of_a_sampler_without_noise_can_be_judged() -> None:
    environment = {"model": "shapes-flow", "sampler": "ode", "eta": 0.0}
    changes = {"algorithm": training_run.UNTRAINED, "settings": {}, "num_inference_steps": 8}
    run = training_run.run(TINY | changes | {"environment": environment})
    assert run["scores"]["training"]["quality"] > 0.2


def test_the_pretrained_model_in_other_ways() -> None:
    """With less noise, guidance or steering, whose KL is not known."""
    untrained = TINY | {"algorithm": training_run.UNTRAINED, "settings": {}, "num_inference_steps": 2}
    plain, calm, guided, steered = (
        training_run.run(untrained | {"draw": draw})
        for draw in (
            {},
            {"noise_scale": 0.5},
            {"environment": {"guidance_scale": 2.0}},
            {"steering": "fk", "n_particles": 4},
        )
    )
    calls = [run["num_function_evaluations_to_draw"] for run in (plain, calm, guided, steered)]
    assert calls == [2, 2, 4, 8]
    assert plain["scores"]["training"]["kl"] == 0
    for run in (calm, guided, steered):
        assert "kl" not in run["scores"]["training"]
        assert run["scores"]["training"]["reward"] != plain["scores"]["training"]["reward"]
    best_of_one = training_run.run(untrained | {"draw": {"steering": "best-of", "n_particles": 1}})
    assert without_seconds(best_of_one["scores"]["training"]) == without_seconds(plain["scores"]["training"])
    assert steered["scores"]["training"]["reward_calls"] > plain["scores"]["training"]["reward_calls"] == 1


@pytest.mark.slow
def test_the_trained_model_in_other_ways() -> None:
    """As it was without its LoRA, and the same as ever after that."""
    also: dict[str, Any] = {"as before": {"lora_scale": 0.0}, "calm": {"noise_scale": 0.5}, "again": {}}
    guidance = {"environment": {"guidance_scale": 2.0}}
    also |= {"guided": guidance, "best of 2": {"steering": "best-of", "n_particles": 2}}
    also |= {"guided as before": guidance | {"lora_scale": 0.0}, "last": {}}
    settings = {"use_critic": False, "learning_rate": 0.01}
    run = training_run.run(TINY | {"algorithm": "dpok", "settings": settings, "also": also})
    plain = training_run.run(TINY | {"algorithm": training_run.UNTRAINED, "settings": {}})
    scores = run["scores"]
    assert without_seconds(scores["again"]) == without_seconds(scores["last"]) == without_seconds(scores["training"])
    assert scores["as before"]["reward"] == plain["scores"]["training"]["reward"] != scores["again"]["reward"]
    assert scores["as before"]["kl"] == 0 < scores["again"]["kl"]
    assert scores["best of 2"]["calls"] == 2 * scores["again"]["calls"]
    assert "kl" not in scores["best of 2"] | scores["calm"] | scores["guided"]
    guided = training_run.run(TINY | {"algorithm": training_run.UNTRAINED, "settings": {}, "draw": guidance})
    assert scores["guided as before"]["reward"] == guided["scores"]["training"]["reward"] != scores["guided"]["reward"]
    assert scores["guided"]["calls"] == 2 * scores["again"]["calls"]
    assert scores["calm"]["reward"] != scores["again"]["reward"]


def test_less_noise_is_around_the_same_mean() -> None:
    agent = DPOK(env="DPOK-Mixture-v0", n_envs=1, device="cpu")
    model = agent.process.model
    conditioning = model.encode(agent.denoising_env.prompts.train[:1])
    state = agent.process.state(torch.ones(1, *model.latent_shape), 0, conditioning)
    mean, std = agent.policy.transition(state)
    with training_run.scaled_noise(agent.policy, 0.25):
        other_mean, other_std = agent.policy.transition(state)
    assert torch.equal(other_mean, mean)
    assert torch.equal(other_std, std / 4)
    assert torch.equal(agent.policy.transition(state)[1], std)


def test_a_run_that_diverges() -> None:
    """It has no scores, and its cost."""
    settings = {"use_critic": False, "learning_rate": 1e18}
    run = training_run.run(TINY | {"algorithm": "dpok", "settings": settings})
    assert "is not finite" in run["diverged"]
    assert (run["scores"], run["curve"]) == ({}, [])
    assert run["num_function_evaluations"] > 0
    with pytest.raises(ValueError, match="learning_rate"):
        training_run.run(TINY | {"algorithm": "dpok", "settings": {"learning_rate": -1.0}})


def test_entropies_need_many_images() -> None:
    untrained = TINY | {"algorithm": training_run.UNTRAINED, "settings": {}, "held_out": False}
    few, many = (training_run.run(untrained | {"eval_images": n})["scores"]["training"] for n in (15, 16))
    assert many.keys() - few.keys() == ENTROPIES


def test_the_spread_is_that_within_prompts() -> None:
    values = np.array([1.0, 3.0, 10.0, 14.0, 12.0])
    assert training_run.spread(values, ["a", "a", "b", "b", "b"]) == pytest.approx(np.sqrt((2 + 8) / 3))
    assert training_run.spread(values[:2], ["a", "b"]) == 1


@pytest.mark.slow
def test_kinds_of_prompts() -> None:
    splits = ["paraphrases", "category"]
    description = TINY | {"algorithm": "dpok", "settings": {"use_critic": False}, "splits": splits}
    description.pop("prompts")
    scores = training_run.run(description)["scores"]
    assert [*scores] == ["training", "category"]


def test_the_best_of_n_costs_function_evaluations() -> None:
    untrained = TINY | {"algorithm": training_run.UNTRAINED, "settings": {}}
    draws = ({"steering": "best-of", "n_particles": n} for n in (1, 4))
    plain, best = (training_run.run(untrained | {"draw": draw}) for draw in draws)
    assert (plain["num_function_evaluations_to_draw"], best["num_function_evaluations_to_draw"]) == (1, 4)
    assert best["scores"]["training"]["reward"] > plain["scores"]["training"]["reward"]
    assert plain["scores"]["training"]["kl"] == 0
    assert best["scores"]["training"]["kl"] == pytest.approx(np.log(4) - 3 / 4)
    assert best["curve"] == []
    assert (best["num_function_evaluations"], best["seconds"]) == (0, 0)
