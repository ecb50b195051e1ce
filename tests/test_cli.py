import dataclasses
import inspect
import json
import math
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_rewards_remote import Endpoint, brightness

from agents import DPOK, PRESETS, RewardWeightedSFT, plots, run_folder
from agents.cli import main
from agents.config import ALGORITHMS, Config, parse_reward
from agents.options import LAPTOP, LAPTOP_ALGORITHMS, Evaluate, Sample, ServeReward, Train
from dpok_gym import DenoisingVectorEnv, RemoteReward

TINY = ["--num-inference-steps", "2", "--n-envs", "2", "--lora-rank", "2", "--eval-pictures", "3", "--device", "cpu"]
WRITTEN = {
    "config.yaml",
    "progress.csv",
    "tensorboard",
    "learning_curve.png",
    "before_after.png",
    "lora",
    "model.zip",
    "summary.json",
}


def _train(folder, *options):
    return main(["train", "--out", str(folder), *options])


def _summary(folder):
    return json.loads((folder / "summary.json").read_text())


def _sample(folder, lora, *options):
    out = folder / "sample.png"
    steps = ["--num-inference-steps", "2", "--device", "cpu"]
    code = main(
        ["sample", "--prompt", "a red circle", "--lora", str(lora), "--n", "2", "--out", str(out), *steps, *options]
    )
    return code, out


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert _train(folder, "--pictures", "3", "--seed", "1", *TINY) == 0
    return folder


def test_a_run_leaves_everything(finished):
    assert {path.name for path in finished.iterdir()} == WRITTEN
    summary = _summary(finished)
    for when in ("before", "after"):
        assert 0 <= summary[f"aligned_{when}"] <= 1
        assert 0 <= summary[f"quality_{when}"] <= 1
        assert set(summary[f"rewards_{when}"]) == {"shapes-alignment", "shapes-quality"}
        rewards = summary[f"rewards_{when}"]
        weighted = rewards["shapes-alignment"] + 0.2 * rewards["shapes-quality"]  # the default of the embedded world
        assert summary[f"reward_{when}"] == pytest.approx(weighted, abs=1e-6)
    assert summary["kl_to_pretrained"] > 0
    assert summary["pictures"] == 4  # two iterations of two
    assert summary["eval_pictures"] == 3
    assert summary["seconds"] > 0
    assert summary["seed"] == 1
    assert summary["interrupted"] is False
    assert summary["prompts"] == LAPTOP["prompts"]
    rows = plots.read_log(finished / "progress.csv")
    assert [row["rollout/pictures"] for row in rows] == [2, 4]
    for name in ("learning_curve.png", "before_after.png"):
        assert Image.open(finished / name).format == "PNG"
    assert load_file(finished / "lora" / "pytorch_lora_weights.safetensors")


def test_the_config_says_everything(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["env_kwargs"] == {
        "model": "shapes",
        "prompts": LAPTOP["prompts"],
        "reward": {"shapes-alignment": 1.0, "shapes-quality": 0.2},
        "num_inference_steps": 2,
        "eta": 1.0,
        "guidance_scale": 1.0,
        "negative_prompt": None,
        "image_size": None,
        "device": "cpu",
        "dtype": "float32",
        "model_kwargs": None,
        "non_finite": "error",
        "decode_batch_size": LAPTOP["decode_batch_size"],
        "reward_workers": 0,
    }
    assert config["algo_kwargs"]["policy_kwargs"]["lora_rank"] == 2
    assert config["algo_kwargs"]["policy_kwargs"]["target_modules"] == "all"
    assert config["algo_kwargs"]["kl_estimator"] == "exact"
    assert Config.read(finished) == Config(**config)


def test_the_same_seed_repeats_a_run(finished, tmp_path):
    assert _train(tmp_path / "again", "--pictures", "3", "--seed", "1", *TINY) == 0
    assert _summary(tmp_path / "again") | {"seconds": 0} == _summary(finished) | {"seconds": 0}
    one, other = (
        load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (finished, tmp_path / "again")
    )
    assert all((one[name] == other[name]).all() for name in one)


def test_a_finished_run_is_not_overwritten(finished, capsys):
    before = (finished / "summary.json").read_text()
    assert _train(finished, *TINY) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (finished / "summary.json").read_text() == before


def test_resume(finished, tmp_path, capsys):
    folder = tmp_path / "resumed"
    shutil.copytree(finished, folder)
    assert _train(folder, "--resume") == 2
    assert "ask for more with --pictures" in capsys.readouterr().err
    (folder / "config.yaml").rename(folder / "away.yaml")
    assert _train(folder, *TINY) == 2  # the agent of that run would be gone
    assert "already holds a run" in capsys.readouterr().err
    (folder / "away.yaml").rename(folder / "config.yaml")
    assert _train(folder, "--resume", "--kl-coef", "0.5") == 2
    assert "leave out --kl-coef" in capsys.readouterr().err
    assert _train(folder, "--resume", "--set", "n_epochs=2") == 2
    assert "leave out --set" in capsys.readouterr().err
    assert _train(folder, "--resume", "--pictures", "-5") == 2
    assert "pictures must be an integer of at least 1, got -5" in capsys.readouterr().err
    assert _train(folder, "--resume", "--pictures", "6") == 0
    assert [row["rollout/pictures"] for row in plots.read_log(folder / "progress.csv")] == [2, 4, 6]
    summary = _summary(folder)
    assert summary["pictures"] == 6
    assert summary["aligned_before"] == _summary(finished)["aligned_before"]
    assert summary["seconds"] > _summary(finished)["seconds"]


FIT = ["n_gradient_steps=2", "log_every=1", "batch_size=2"]
FEW_LAYERS = ["--lora-layers", "attention"]  # faster


@pytest.mark.usefixtures("fresh_models")
@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("ddpo", ["--clip-range", "0.5"]),
        ("ddpo", ["--set", "score_function=True"]),
        ("grpo", ["--kl-coef", "0.5", "--set", "group_size=2"]),
        ("reinforce", []),
        ("sft", ["--set", "regularization=KL-O", *FIT]),
        ("rwr", ["--set", "temperature=0.5", *FIT]),
        ("best-of-n", ["--set", "n=2", *FIT]),
        ("draft", ["--reward", "test_algorithms:Brightness", "--batch-size", "1"]),
    ],
)
def test_algorithms(tmp_path, algo, options):
    folder = tmp_path / "run"
    tiny = [*TINY, *FEW_LAYERS, "--eval-pictures", "1"]
    assert _train(folder, "--algo", algo, "--pictures", "2", *tiny, *options) == 0
    assert {path.name for path in folder.iterdir()} == WRITTEN
    summary = _summary(folder)
    assert summary["algo"] == Config.read(folder).algo == algo
    assert summary["kl_to_pretrained"] > 0
    assert main(["evaluate", str(folder), "--pictures", "1", "--device", "cpu"]) == 0
    scores = json.loads((folder / "evaluation.json").read_text())["prompts"]["training"]
    assert scores["kl_to_pretrained"] == pytest.approx(summary["kl_to_pretrained"], rel=1e-3)
    assert _train(folder, "--resume", "--pictures", "4") == 0
    assert _summary(folder)["pictures"] == 4
    rows = plots.read_log(folder / "progress.csv")
    assert [row["rollout/pictures"] for row in rows if "rollout/pictures" in row] == [2, 4]
    updates = [row["train/n_updates"] for row in rows if "train/n_updates" in row]
    assert updates == sorted(set(updates))
    saved = ALGORITHMS[algo].load(folder / "model.zip", device="cpu")
    assert type(saved) is ALGORITHMS[algo]
    for setting in options[options.index("--set") + 1 :] if "--set" in options else ():
        name, value = setting.split("=")
        assert str(getattr(saved, name)) == value


@pytest.mark.usefixtures("fresh_models")
def test_an_interrupted_fit_is_resumed(tmp_path, monkeypatch):
    folder, fit = tmp_path / "run", RewardWeightedSFT.train

    def interrupted(self):
        if self._n_updates == 1:
            raise KeyboardInterrupt
        fit(self)

    with monkeypatch.context() as patched:
        patched.setattr(RewardWeightedSFT, "train", interrupted)
        assert _train(folder, "--algo", "sft", "--pictures", "4", *TINY, *FEW_LAYERS, "--set", *FIT) == 130
    summary = _summary(folder)
    assert (summary["interrupted"], summary["pictures"]) == (True, 4)
    halfway = RewardWeightedSFT.load(folder / "model.zip", device="cpu")
    assert (halfway._n_updates, len(halfway.pictures)) == (1, 4)
    assert _train(folder, "--resume") == 0
    summary = _summary(folder)
    assert (summary["interrupted"], summary["pictures"]) == (False, 4)
    rows = plots.read_log(folder / "progress.csv")
    assert [row["rollout/pictures"] for row in rows if "rollout/pictures" in row] == [2, 4]
    assert [row["train/n_updates"] for row in rows if "train/denoising_loss" in row] == [1, 2]
    finished = RewardWeightedSFT.load(folder / "model.zip", device="cpu")
    assert torch.equal(finished.pictures.latents, halfway.pictures.latents)  # none was drawn again
    assert _train(folder, "--resume") == 2


def _interrupt_step(monkeypatch, number, error=KeyboardInterrupt):
    """Ctrl-C, or an error, in a step of the environments that are trained in."""
    step, calls = DenoisingVectorEnv.step, []

    def interrupted(self, actions):
        calls.append(0)
        if len(calls) == number:
            raise error
        return step(self, actions)

    monkeypatch.setattr(DenoisingVectorEnv, "step", interrupted)


def test_an_interrupted_run_keeps_what_it_learned(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        _interrupt_step(patched, 4)
        assert _train(tmp_path / "run", "--pictures", "100", *TINY) == 130
    assert "--resume" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == WRITTEN
    summary = _summary(tmp_path / "run")
    assert summary["interrupted"] is True
    assert summary["pictures"] == 3  # of the second iteration, one of two steps
    assert summary["kl_to_pretrained"] > 0
    assert _sample(tmp_path, tmp_path / "run")[0] == 0
    assert _train(tmp_path / "run", "--resume", "--pictures", "4") == 0
    assert _summary(tmp_path / "run")["interrupted"] is False


def test_a_run_that_an_error_stops_keeps_what_it_learned(tmp_path, monkeypatch, capsys):
    error = ConnectionError("no server of the reward 'a:1' is left")
    with monkeypatch.context() as patched:
        _interrupt_step(patched, 4, error)
        assert _train(tmp_path / "run", "--pictures", "100", *TINY) == 2
    captured = capsys.readouterr()
    assert f"dpok train --resume --out {tmp_path / 'run'}" in " ".join(captured.out.split())
    assert captured.err.strip().splitlines()[-1] == f"dpok: error: {error}"
    saved = DPOK.load(tmp_path / "run" / "model.zip", device="cpu")
    assert saved.num_timesteps == 3 * 2  # of the second iteration, one of two steps
    assert _train(tmp_path / "run", "--resume", "--pictures", "6") == 0
    assert _summary(tmp_path / "run")["pictures"] >= 6


def test_a_run_that_stops_once_all_is_drawn_is_resumed(tmp_path, monkeypatch):
    evaluate, calls = run_folder.evaluate, []

    def fails(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:  # of the fine-tuned model
            raise ConnectionError("the server is gone")
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "evaluate", fails)
        assert _train(tmp_path / "run", "--pictures", "2", *TINY) == 2
    stopped = _summary(tmp_path / "run")
    assert (stopped["interrupted"], stopped["pictures"], stopped["eval_pictures"]) == (True, 2, 0)
    assert stopped["seconds"] > 0
    assert _train(tmp_path / "run", "--resume") == 0
    summary = _summary(tmp_path / "run")
    assert (summary["interrupted"], summary["pictures"], summary["eval_pictures"]) == (False, 2, 3)
    assert summary["seconds"] >= stopped["seconds"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == WRITTEN


@pytest.mark.parametrize("changes", [["--image-size", "128"], ["--prompts", "circle"]])
def test_pictures_that_the_judge_does_not_know(tmp_path, changes):
    few = ["--pictures", "2", "--reward", "jpeg-compressibility", *TINY, "--eval-pictures", "1"]
    assert _train(tmp_path / "run", *changes, *few) == 0
    assert _summary(tmp_path / "run")["aligned_after"] is None
    assert set(_summary(tmp_path / "run")["rewards_after"]) == {"jpeg-compressibility"}
    assert main(["evaluate", str(tmp_path / "run"), "--pictures", "1", "--device", "cpu"]) == 0
    assert _sample(tmp_path, tmp_path / "run")[0] == 0


def test_an_error_of_a_diverged_agent_does_not_overwrite_a_sound_one(tmp_path, monkeypatch):
    def diverged(self):
        with torch.no_grad():
            self.policy.denoiser_parameters()[0].fill_(math.nan)

    monkeypatch.setattr(DPOK, "train", diverged)
    assert _train(tmp_path / "run", "--pictures", "4", *TINY) == 2
    saved = DPOK.load(tmp_path / "run" / "model.zip", device="cpu")
    assert saved.num_timesteps == 0
    assert all(weights.isfinite().all() for weights in saved.policy.parameters())


def test_remote_rewards(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Endpoint(brightness) as endpoint:
        thread = threading.Thread(target=endpoint.serve_forever, args=[0.01])
        thread.start()
        reward = ["--reward", f"{endpoint.url}=0.5,shapes-quality", "--normalize-rewards", "--reward-workers", "2"]
        assert _train(tmp_path / "run", "--pictures", "2", *reward, *TINY) == 0
        endpoint.shutdown()
        thread.join()
    config = Config.read(tmp_path / "run").env_kwargs
    assert config["reward_workers"] == 2
    assert config["reward"] == {
        endpoint.url: {"weight": 0.5, "normalize": "running"},
        "shapes-quality": {"weight": 1.0, "normalize": "running"},
    }
    summary = _summary(tmp_path / "run")
    rewards = summary["rewards_after"]
    assert set(rewards) == {"shapes-alignment", "shapes-quality", endpoint.name}
    raw = 0.5 * rewards[endpoint.name] + rewards["shapes-quality"]  # evaluations are not normalised
    assert summary["reward_after"] == pytest.approx(raw, rel=1e-5)
    assert f"rollout/{endpoint.name}" in plots.read_log(tmp_path / "run" / "progress.csv")[0]
    # Now that it is gone:
    monkeypatch.setattr(RemoteReward.__init__, "__kwdefaults__", RemoteReward.__init__.__kwdefaults__ | {"backoff": 0})
    assert main(["evaluate", str(tmp_path / "run"), "--pictures", "1", "--device", "cpu"]) == 2
    assert f"{endpoint.url} failed 5 times in a row" in capsys.readouterr().err


@pytest.mark.parametrize("again", [False, True])
def test_an_interruption_before_the_training(tmp_path, monkeypatch, again):
    evaluate, calls = run_folder.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(0)
        if len(calls) <= 1 + again:  # the second one while the first is dealt with
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(run_folder, "evaluate", interrupted)
    assert _train(tmp_path / "run", "--pictures", "2", *TINY) == 130
    summary = _summary(tmp_path / "run")
    assert summary["interrupted"] is True
    assert summary["pictures"] == 0
    assert summary["aligned_after"] == (None if again else summary["aligned_before"])
    assert {"model.zip", "lora", "learning_curve.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_sample(finished, tmp_path, capsys):
    code, out = _sample(tmp_path, finished)
    assert code == 0
    assert Image.open(out).format == "PNG"
    assert "2 pictures" in capsys.readouterr().out
    tuned = np.asarray(Image.open(out)).astype(int)
    shutil.copytree(finished / "lora", tmp_path / "elsewhere")
    assert _sample(tmp_path, tmp_path / "elsewhere")[0] == 0
    assert _sample(tmp_path, finished / "typo")[0] == 2
    assert np.abs(np.asarray(Image.open(out)) - tuned).max() <= 1  # of 255
    # The judge cannot read this, the model can.
    pretrained = ["sample", "--prompt", "circle", "--num-inference-steps", "2", "--n", "1", "--device", "cpu"]
    assert main([*pretrained, "--out", str(tmp_path / "new" / "circle.png")]) == 0
    assert "aligned" not in capsys.readouterr().out.splitlines()[-1]


def test_evaluate(finished, capsys):
    assert main(["evaluate", str(finished), "--pictures", "3", "--device", "cpu"]) == 0
    written = json.loads((finished / "evaluation.json").read_text())
    (finished / "evaluation.json").unlink()
    summary = _summary(finished)
    training, held_out = written["prompts"]["training"], written["prompts"]["held-out"]
    for name in ("aligned_after", "quality_after", "reward_before", "kl_to_pretrained"):  # of the same seeds
        assert training[name] == pytest.approx(summary[name], rel=1e-3)
    assert held_out["n_prompts"] >= 14
    assert set(held_out["rewards_after"]) == {"shapes-alignment", "shapes-quality", "shapes-preference"}
    out = capsys.readouterr().out
    assert "held-out prompts" in out
    assert "nats" in out


def test_another_environment(tiny_sd_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    of_model = ["--env", "DPOK-SD15-v0", "--model", str(tiny_sd_folder), "--guidance-scale", "2"]
    of_model += ["--reward", "jpeg-compressibility"]
    assert _train(folder, "--pictures", "2", "--prompts", "a dog on the moon", *of_model, *TINY) == 0
    summary = _summary(folder)
    assert summary["aligned_before"] is summary["aligned_after"] is summary["quality_after"] is None
    assert summary["rewards_after"] == {"jpeg-compressibility": pytest.approx(summary["reward_after"])}
    assert summary["reward_after"] < 0
    more = ["--reward", "jpeg-incompressibility"]
    assert main(["evaluate", str(folder), "--pictures", "2", "--device", "cpu", *more]) == 0
    scores = json.loads((folder / "evaluation.json").read_text())["prompts"]["training"]
    assert scores["rewards_after"]["jpeg-incompressibility"] == pytest.approx(-scores["reward_after"])
    assert "there are no held-out prompts" in capsys.readouterr().out
    assert _sample(tmp_path, folder)[0] == 0


def test_the_model_has_moved(tiny_sd_folder, tmp_path, capsys, fresh_models):
    """And all of its denoiser was trained, which draws with the options of the command."""
    model, run = shutil.copytree(tiny_sd_folder, tmp_path / "before" / "model"), tmp_path / "run"
    options = ["--env", "DPOK-SD15-v0", "--model", str(model), "--prompts", "a dog", "--reward", "jpeg-compressibility"]
    assert _train(run, "--pictures", "2", *options, *TINY, "--lora-rank", "0", "--guidance-scale", "1") == 0
    moved = (tmp_path / "before").rename(tmp_path / "after") / "model"
    fresh_models()
    scores = ["evaluate", str(run), "--pictures", "2", "--device", "cpu"]
    assert main(scores) == 2
    assert str(model) in capsys.readouterr().err
    assert main([*scores, "--model", str(moved)]) == 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(model), str(moved)))
    assert _train(run, "--resume", "--pictures", "4") == 0
    drawn = []
    for guidance_scale in ("1", "5"):
        code, out = _sample(tmp_path, run, "--guidance-scale", guidance_scale, "--num-inference-steps", "3")
        assert code == 0
        drawn.append(np.asarray(Image.open(out)))
    assert not np.array_equal(*drawn)
    assert _sample(tmp_path, run, "--dtype", "bfloat16")[0] == 2
    assert "leave out --dtype" in capsys.readouterr().err


def test_a_folder_of_that_name_does_not_make_a_prompt_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()
    assert Config.of(Train(env="DPOK-SD15-v0", prompts="cat")).env_kwargs["prompts"] == "cat"
    (tmp_path / "dog").write_text("a dog")
    assert Config.of(Train(env="DPOK-SD15-v0", prompts="dog")).env_kwargs["prompts"] == str(tmp_path / "dog")


def test_an_environment_of_another_module(tmp_path, monkeypatch):
    register = "dpok_gym:DenoisingVectorEnv"
    text = f"import gymnasium\ngymnasium.register('Mine-v0', vector_entry_point={register!r}, kwargs={{'eta': 0.5}})\n"
    (tmp_path / "my_envs.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert Config.of(Train(env="my_envs:Mine-v0")).env_kwargs["eta"] == 0.5
    with pytest.raises(ValueError, match="there is no environment 'no_envs:Mine-v0'"):
        Config.of(Train(env="no_envs:Mine-v0"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--env", "DPOK-Nothing-v0"], "DPOK-Nothing"),
        (["--env", "CartPole-v1"], "no denoising environment"),
        (["--reward", "shapes-beauty"], "shapes-beauty"),
        (["--reward", "shapes-quality=much"], "must be a number"),
        (["--reward", "localhost:8000"], "is http:// missing?"),
        (["--reward", "http://localhost:port"], "written http://host:port"),
        (["--reward-workers", "-1"], "reward_workers must be"),
        (["--prompts", "three green cats"], "cats"),
        (["--prompts", "nothing.txt"], "nothing.txt"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--pictures", "0"], "pictures must be an integer of at least 1"),
        (["--eval-pictures", "0"], "eval_pictures must be an integer of at least 1"),
        (["--seed", "-1"], "seed"),
        (["--prompts", ""], "blank"),
        (["--reward", ""], "a reward is written NAME"),
        (["--dtype", "float16"], "use dtype='bfloat16'"),
        (["--set", "model_kwargs=3"], "model_kwargs must be a mapping such as {name: value} or null, not 3"),
        (["--timestep-fraction", "2"], "timestep_fraction"),
        (["--device", "abacus"], "abacus"),
        (["--resume"], "no run folder"),
        (["--set", "kl_coef"], "a setting is written NAME=VALUE, not 'kl_coef'"),
        (["--set", "n_epochs=2", "=3"], "a setting is written NAME=VALUE, not '=3'"),
        (["--set", "kl_coefficient=1"], "dpok has no setting kl_coefficient; it has autocast, batch_size, "),
        (["--set", "kl_in=advantage"], "kl_in must be one of"),
        (["--set", "n_epochs=["], "the value of 'n_epochs=[' cannot be read"),
        (["--set", "n_epochs=two"], "n_epochs must be an integer, not 'two'"),
        (["--set", "n_epochs=1.5"], "n_epochs must be an integer, not 1.5"),
        (["--set", "use_critic=nonsense"], "use_critic must be true or false, not 'nonsense'"),
        (["--set", "batch_size=2.5"], "batch_size must be an integer or null, not 2.5"),
        (["--set", "normalize_advantage=2"], "normalize_advantage must be true or false or a word, not 2"),
        (["--set", "normalize_advantage=mean"], "normalize_advantage must be one of"),
        (
            ["--algo", "rwr", "--set", "group_size=2", "n=2"],
            "rwr has no setting group_size, n; it has autocast, batch_size, ",
        ),
        (["--algo", "ddpo", "--kl-coef", "0.1"], "ddpo has no setting kl_coef; it has advantage_clip, "),
        (["--algo", "sft", "--clip-range", "0.1"], "sft has no setting clip_range"),
        (["--algo", "grpo", "--preset", "paper"], "the preset 'paper' is one of dpok; leave it out for grpo"),
        (["--algo", "grpo", "--n-envs", "24"], "24 environments cannot be split into groups of 16"),
        (["--algo", "draft", "--device", "cpu"], "the reward 'shapes-alignment' has no gradient"),
    ],
)
def test_mistakes_in_training_options(tmp_path, capsys, options, message):
    assert _train(tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dpok: error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "nowhere"], "no run folder"),
        (["sample", "--prompt", "a red circle", "--lora", "nowhere"], "no LoRA"),
        (["sample", "--prompt", "a red cat"], "cat"),
        (["sample", "--prompt", "a red circle", "--n", "0"], "--n must be"),
        (["serve-reward", "beauty"], "unknown reward 'beauty'"),
        (["serve-reward", "jpeg-compressibility", "--max-batch", "0"], "max_batch must be an integer of at least 1"),
    ],
)
def test_mistakes_elsewhere(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dpok: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_mistake_can_be_looked_into(monkeypatch):
    monkeypatch.setenv("DPOK_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["evaluate", "nowhere"])


@pytest.mark.parametrize(
    ("command", "options", "units"),
    [
        ("train", Train, ["nats", "(0, 1]", "1 or more", "0 or more"]),
        ("sample", Sample, ["1 or more", "0 or more"]),
        ("evaluate", Evaluate, ["1 or more"]),
        ("serve-reward", ServeReward, ["1 or more"]),
    ],
)
def test_help(command, options, units, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(options):
        positional = {"evaluate": "run", "serve-reward": "reward"}.get(command)
        assert field.name == positional or f"--{field.name.replace('_', '-')}" in text
    assert all(unit in text for unit in units)


def test_help_does_not_load_torch():
    check = "import sys, agents.cli; sys.exit(bool({'torch', 'gymnasium', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_presets_and_options():
    paper = Config.of(Train(preset="paper"))
    assert paper.n_envs == PRESETS["paper"]["n_envs"]
    assert paper.algo_kwargs["reward_weight"] == 10
    assert paper.algo_kwargs["policy_kwargs"]["lora_rank"] == 4
    assert paper.env_kwargs["prompts"] == LAPTOP["prompts"]
    assert paper.pictures == LAPTOP["pictures"]
    mine = Config.of(
        Train(
            preset="paper",
            kl_coef=0.5,
            lora_rank=2,
            lora_layers="all",
            autocast=True,
            gradient_checkpointing=True,
            image_size=(64, 128),
            dtype="bfloat16",
            n_envs=3,
            prompts="count",
        )
    )
    assert mine.env_kwargs["image_size"] == (64, 128)
    assert mine.env_kwargs["dtype"] == "bfloat16"
    assert mine.algo_kwargs["policy_kwargs"]["target_modules"] == "all"
    assert mine.algo_kwargs["policy_kwargs"]["gradient_checkpointing"]
    assert mine.algo_kwargs["kl_coef"] == 0.5
    assert mine.algo_kwargs["policy_kwargs"]["lora_rank"] == 2
    assert mine.algo_kwargs["policy_kwargs"]["autocast"] is True
    assert (mine.n_envs, mine.env_kwargs["prompts"]) == (3, "count")
    other = Config.of(Train(env="DPOK-SD15-v0"))
    assert other.env_kwargs["prompts"] == "dpok"
    assert other.env_kwargs["reward"] == {"image-reward": 1.0}
    assert other.pictures == 20_000


def test_no_option_is_ignored():
    other = {
        "seed": 1,
        "env": "DPOK-SD15-v0",
        "prompts": "count",
        "reward": "jpeg-compressibility",
        "normalize_rewards": True,
        "reward_workers": 2,
        "model": "sd15",
        "algo": "grpo",
        "preset": "paper",
        "pictures": 7,
        "n_envs": 3,
        "kl_coef": 0.7,
        "learning_rate": 0.7,
        "lora_rank": 3,
        "lora_layers": "attention",
        "batch_size": 3,
        "micro_batch_size": 3,
        "n_epochs": 3,
        "timestep_fraction": 0.7,
        "clip_range": 0.7,
        "set": ("gamma=0.7",),
        "num_inference_steps": 3,
        "guidance_scale": 0.7,
        "negative_prompt": "a dog",
        "image_size": 128,
        "dtype": "bfloat16",
        "eval_pictures": 3,
        "device": "cpu",
        "gradient_checkpointing": True,
        "autocast": True,
    }
    assert other.keys() == {field.name for field in dataclasses.fields(Train)} - {"out", "resume"}
    ignored = [name for name, value in other.items() if Config.of(Train(**{name: value})) == Config.of(Train())]
    assert not ignored


def test_a_folder_with_a_reward_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "my_reward").mkdir()
    monkeypatch.chdir(tmp_path)
    weights = Config.of(Train(reward="my_reward=0.5,shapes-quality")).env_kwargs["reward"]
    assert weights == {str(tmp_path / "my_reward"): 0.5, "shapes-quality": 1.0}


def test_settings_are_typed():
    expected = {
        "kl_in": "reward",
        "use_critic": True,
        "batch_size": None,
        "n_epochs": 3,
        "target_kl_to_pretrained": 2.5,
        "normalize_advantage": "center",
        "micro_batch_size": "auto",
        "vf_batch_size": None,
    }
    elsewhere = {"max_batch_size": 8, "target_modules": ["to_q"], "eta": 0.5, "model_kwargs": {"vae_tiling": True}}
    texts = tuple(f"{name}={json.dumps(value)}" for name, value in (expected | elsewhere).items())
    config = Config.of(Train(set=texts))
    settings = config.algo_kwargs
    further = settings["policy_kwargs"] | config.env_kwargs
    assert {name: further[name] for name in elsewhere} == elsewhere
    found = {name: settings[name] for name in expected}
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]
    others = Config.of(Train()).algo_kwargs
    assert {name for name in others if others[name] != settings[name]} == {*expected, "policy_kwargs"}
    assert Config.of(Train(algo="rwr", set=("sparse_fraction=0.25",))).algo_kwargs["sparse_fraction"] == 0.25


def test_settings_of_each_algorithm():
    for algo, algorithm in ALGORITHMS.items():
        config = Config.of(Train(algo=algo))
        own = inspect.signature(algorithm).parameters.keys() - {"policy", "env", "kwargs"}
        assert own <= config.algo_kwargs.keys()
        for name, value in LAPTOP_ALGORITHMS[algo].items():
            assert (config.n_envs if name == "n_envs" else config.algo_kwargs[name]) == value
        assert config.algo_kwargs["learning_rate"] == LAPTOP["learning_rate"]
        elsewhere = Config.of(Train(algo=algo, env="DPOK-SD15-v0"))
        assert elsewhere.algo_kwargs["learning_rate"] == 1e-3


def test_rewards_are_read():
    assert parse_reward("shapes-alignment") == {"shapes-alignment": 1.0}
    assert parse_reward("a=2, b=-0.5,c") == {"a": 2.0, "b": -0.5, "c": 1.0}
    assert parse_reward({"a": 3}) == {"a": 3}
    assert parse_reward("http://a:1 https://b=0.5,http://c?d=e=2,mine:f=3,http://g") == {
        "http://a:1 https://b": 0.5,
        "http://c?d=e": 2.0,
        "mine:f": 3.0,
        "http://g": 1.0,
    }
    for wrong in ("", "=1", "a,a", "a=1=2", "http://a?b=c"):
        with pytest.raises(ValueError, match="reward"):
            parse_reward(wrong)


def test_the_class_room_environment(tmp_path, capsys):
    """It trains the whole of its small network, with settings of its own; what was trained can be drawn with."""
    few = ["--pictures", "8", "--n-envs", "4", "--eval-pictures", "4", "--device", "cpu"]
    assert _train(tmp_path / "run", "--env", "DPOK-Mixture-v0", *few) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["algo_kwargs"]["kl_in"] == "reward"
    assert config["algo_kwargs"]["step_weighting"] == "likelihood"
    assert not (tmp_path / "run" / "lora").exists()
    out = tmp_path / "sample.png"
    sample = ["sample", "--prompt", "two modes", "--n", "2", "--device", "cpu", "--out", str(out)]
    assert main([*sample, "--lora", str(tmp_path / "run")]) == 0
    tuned = out.read_bytes()
    assert main([*sample, "--env", "DPOK-Mixture-v0"]) == 0
    assert out.read_bytes() != tuned
    assert main(["evaluate", str(tmp_path / "run"), "--pictures", "2", "--device", "cpu"]) == 0
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(written["prompts"]["held-out"]["rewards_after"]) == {"mixture-linear"}
