"""``dpok train``: what a run leaves, algorithms, interruptions and mistakes."""

import math
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from agents import DPOK, PRESETS, DiffusionDPO, RewardWeightedSFT, list_algorithms, load_run
from agents.algorithms.registry import load_algorithm
from agents.cli import run
from agents.cli.config import Config
from agents.cli.logs import read_log
from agents.cli.main import main
from agents.cli.run_folder import load_evaluation
from agents.common.checkpoint import find_checkpoint, list_checkpoints
from benchmarks.kill import in_child
from dpok_gym import DenoisingVectorEnv, RemoteReward
from tests.agents.cli.support import FEW_LAYERS, TINY, WRITTEN, list_written, read_summary, sample, train
from tests.bad_input.support import contents
from tests.dpok_gym.rewards.remote.test_client import Endpoint, brightness
from tests.support import assert_same, write_choices

LORA = "pytorch_lora_weights.safetensors"


def test_a_run_leaves_everything(finished):
    assert list_written(finished) == WRITTEN
    assert [path.name for path in list_checkpoints(finished)] == ["checkpoint-4"]
    summary = read_summary(finished)
    for when in ("before", "after"):
        assert 0 <= summary[f"aligned_{when}"] <= 1
        assert 0 <= summary[f"quality_{when}"] <= 1
        assert set(summary[f"rewards_{when}"]) == {"shapes-alignment", "shapes-quality", "shapes-preference"}
        rewards = summary[f"rewards_{when}"]
        weighted = rewards["shapes-alignment"] + 0.2 * rewards["shapes-quality"]  # the default of the embedded world
        assert summary[f"reward_{when}"] == pytest.approx(weighted, abs=1e-6)
    assert summary["kl_to_pretrained"] > 0
    assert summary["pictures"] == 4  # two iterations of two
    assert summary["eval_images"] == 3
    assert summary["seconds"] > 0
    assert summary["seed"] == 1
    assert summary["interrupted"] is False
    assert summary["prompts"] == PRESETS["laptop"].env_kwargs["prompts"]
    rows = read_log(finished / "progress.csv")
    assert [row["rollout/images"] for row in rows] == [2, 4]
    assert [row["train/n_updates"] for row in rows] == [1, 2]  # a row has the images and the update that they led to
    for name in ("learning_curve.png", "before_after.png"):
        assert Image.open(finished / name).format == "PNG"
    assert load_file(finished / "lora" / LORA)
    before = load_evaluation(finished / "evaluation_before.npz")
    assert (len(before), before.images.shape, before.kl.max()) == (3, (3, 64, 64, 3), 0)
    assert before.aligned_share == summary["aligned_before"]


def test_a_run_logs_a_second_opinion(finished):
    """And what its images are like; the figure shows the opinion."""
    for row in read_log(finished / "progress.csv"):
        assert np.isfinite(row["rollout/held_out_reward"])  # shapes-preference, as the judge is trained on
        assert row["rollout/aligned_share"] in (0, 0.5, 1)  # of two images
        assert all(0 <= row[f"images/{name}"] <= 1 for name in ("brightness", "saturation", "contrast", "diversity"))
    summary = read_summary(finished)
    assert summary["warnings"] == []
    for when in ("before", "after"):  # the evaluations have it too
        assert np.isfinite(summary[f"rewards_{when}"]["shapes-preference"])


@pytest.mark.slow
def test_a_run_that_pleases_its_reward_alone_says_so(tmp_path, capsys):
    """Followed without bound, brightness ends in bright images that show nothing."""
    options = ["--algo", "draft", "--reward", "tests.agents.cli.support:Brightness", "--max-kl", "None", "--seed", "1"]
    options += ["--images", "160", "--images-per-iteration", "8", "--num-inference-steps", "4", "--eval-images", "1"]
    options += ["--final-lr-fraction", "1", "--target-modules", "attention", "--device", "cpu"]
    assert train(tmp_path / "run", *options) == 0
    printed = capsys.readouterr().out
    assert "held-out reward: shapes-alignment, shapes-quality" in printed
    assert len(re.findall(r"warning: iteration \d+: .* the training reward rose", printed)) == 1
    for warning in read_summary(tmp_path / "run")["warnings"]:
        assert f"warning: {warning}" in printed


def test_the_lora_is_that_of_the_newest_checkpoint(finished):
    assert_same(load_file(finished / "lora" / LORA), load_file(finished / "checkpoint-4" / LORA))


def test_the_config_says_everything(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["env_kwargs"] == {
        "model": "shapes",
        "prompts": "three green squares",
        "reward": {"shapes-alignment": 1.0, "shapes-quality": 0.2},
        "num_inference_steps": 2,
        "eta": 1.0,
        "guidance_scale": 1.0,
        "negative_prompt": None,
        "image_size": None,
        "long_prompts": "error",
        "timestep_spacing": None,
        "sampler": "ddim",
        "sde_steps": None,
        "dtype": "float32",
        "model_kwargs": None,
        "max_prompt_bytes": 512,
        "non_finite": "error",
        "decode_batch_size": 16,
        "reward_workers": 0,
        "reference_info": False,
        "reference_log_prob_coef": 0.0,
    }
    assert config["policy_kwargs"]["lora_rank"] == 2
    assert config["policy_kwargs"]["target_modules"] == "all"
    assert config["algo_kwargs"]["kl_estimator"] == "exact"
    assert config["device"] == "cpu"
    assert Config.read(finished) == Config(**config)


@pytest.mark.slow
def test_the_same_seed_repeats_a_run(finished, tmp_path):
    assert train(tmp_path / "again", "--images", "3", "--seed", "1", *TINY) == 0
    assert read_summary(tmp_path / "again") | {"seconds": 0} == read_summary(finished) | {"seconds": 0}
    assert_same(load_file(tmp_path / "again" / "lora" / LORA), load_file(finished / "lora" / LORA))


def test_a_finished_run_is_not_overwritten(finished, capsys):
    before = (finished / "summary.json").read_text()
    assert train(finished, *TINY) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (finished / "summary.json").read_text() == before


@pytest.mark.slow
def test_new_runs_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    for _ in range(2):
        assert main(["train", "--images", "2", *TINY, "--eval-images", "1"]) == 0
    names = os.listdir("runs")
    assert len(names) == 2
    assert all(name.startswith("DPOK-Shapes-v0-dpok-seed0-20260101-120000-") for name in names)


FIT = ["--n-gradient-steps", "2", "--log-every", "1", "--batch-size", "2"]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("ddpo", ["--clip-range", "0.5"]),
        ("ddpo", ["--score-function", "--batch-size", "None"]),
        ("grpo", ["--kl-coef", "0.5", "--group-size", "2"]),
        ("reinforce", []),
        ("sft", ["--regularization", "KL-O", *FIT]),
        ("rwr", ["--temperature", "0.5", *FIT]),
        ("best-of-n", ["--n", "2", *FIT]),
        ("diffusion-dpo", ["--group-size", "2", "--batch-size", "2", "--steps-per-iteration", "1"]),
        ("draft", ["--reward", "tests.agents.cli.support:Brightness", "--batch-size", "1"]),
    ],
)
def test_algorithms(tmp_path, algo, options):
    folder = tmp_path / "run"
    tiny = [*TINY, *FEW_LAYERS, "--eval-images", "1"]
    assert train(folder, "--algo", algo, "--images", "2", *tiny, *options) == 0
    assert list_written(folder) == WRITTEN
    summary = read_summary(folder)
    assert summary["algo"] == Config.read(folder, trust=True).algo == algo
    assert summary["kl_to_pretrained"] > 0
    assert main(["evaluate", str(folder), "--images", "1", "--device", "cpu", "--trust"]) == 0
    scores = yaml.safe_load((folder / "evaluation.json").read_text())["prompts"]["training"]
    assert scores["kl_to_pretrained"] == pytest.approx(summary["kl_to_pretrained"], rel=1e-3)
    assert train(folder, "--resume", "--images", "4", "--trust") == 0
    assert read_summary(folder)["pictures"] == 4
    rows = read_log(folder / "progress.csv")
    assert [row["rollout/images"] for row in rows if "rollout/images" in row] == [2, 4]
    updates = [row["train/n_updates"] for row in rows if "train/n_updates" in row]
    assert updates == sorted(set(updates))
    agent = load_run(folder, device="cpu", trust=True)
    assert type(agent) is load_algorithm(algo)
    assert agent.images_drawn == 4
    for name in ("clip_range", "score_function", "group_size", "regularization", "temperature", "n_gradient_steps"):
        option = f"--{name.replace('_', '-')}"
        if option in options:
            value = "True" if name == "score_function" else options[options.index(option) + 1]
            assert str(getattr(agent, name)) == value


def _interrupt_judge(monkeypatch, number, error=KeyboardInterrupt):
    """Raises Ctrl-C, or an error, when the images of an iteration are judged."""
    judge, calls = DenoisingVectorEnv.judge, []

    def interrupted(self, latents, prompts):
        calls.append(0)
        if len(calls) == number:
            raise error
        return judge(self, latents, prompts)

    monkeypatch.setattr(DenoisingVectorEnv, "judge", interrupted)


#: The images before training are judged first; then those of each iteration.
SECOND_ITERATION = 3


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_learned(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        _interrupt_judge(patched, SECOND_ITERATION)
        assert train(folder, "--images", "100", *TINY) == 130
    assert "--resume" in capsys.readouterr().out
    assert list_written(folder) == WRITTEN - {"before_after.png", "held_out.png"}
    summary = read_summary(folder)
    assert summary["interrupted"] is True
    assert summary["pictures"] == 2  # the second iteration was not complete
    assert summary["eval_images"] == 0  # the reward may be what hangs
    assert sample(tmp_path, folder)[0] == 0
    assert train(folder, "--resume", "--images", "4") == 0
    assert read_summary(folder)["interrupted"] is False
    assert train(tmp_path / "whole", "--images", "4", *TINY) == 0
    # The learning rate falls with the share of the images that are drawn: 100 in the one run, 4 in the other.
    rows, whole = (read_log(run / "progress.csv") for run in (folder, tmp_path / "whole"))
    assert [row["rollout/images"] for row in rows] == [row["rollout/images"] for row in whole] == [2, 4]


def _send(monkeypatch, algorithm, n_updates, number=signal.SIGINT, times=1):
    """Sends a signal in the middle of an update, as Ctrl-C does."""
    step, calls = algorithm.optimizer_step, []

    def sent(self):
        calls.append(0)
        if len(calls) == n_updates:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(algorithm, "optimizer_step", sent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "number", "code"),
    [("dpok", signal.SIGINT, 130), ("dpok", signal.SIGTERM, 143), ("sft", signal.SIGHUP, 129)],
)
@pytest.mark.usefixtures("fresh_models")
def test_a_signal_in_an_update_ends_the_run_after_it(tmp_path, monkeypatch, algo, number, code):
    """Then the resumed run is the uninterrupted one."""
    options = ["--algo", algo, "--images", "4", *TINY, *FEW_LAYERS]
    options += FIT if algo == "sft" else []
    previous = signal.getsignal(number)
    with monkeypatch.context() as patched:
        _send(patched, load_algorithm(algo), 1, number)
        assert train(tmp_path / "run", *options) == code
    assert signal.getsignal(number) == previous
    summary = read_summary(tmp_path / "run")
    assert (summary["interrupted"], summary["pictures"]) == (True, 2 if algo == "dpok" else 4)
    stopped = load_run(tmp_path / "run", device="cpu")
    assert stopped._n_updates == 1
    assert train(tmp_path / "run", "--resume") == 0
    assert train(tmp_path / "whole", *options) == 0
    one, other = (find_checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert one.name == other.name
    assert_same(load_file(one / LORA), load_file(other / LORA))
    rows, whole = (read_log(tmp_path / name / "progress.csv") for name in ("run", "whole"))
    assert [row.get("train/n_updates") for row in rows] == [row.get("train/n_updates") for row in whole]


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(tmp_path, monkeypatch, capfd):
    options = ["--images", "6", *TINY, *FEW_LAYERS, "--checkpointing-steps", "1"]
    with monkeypatch.context() as patched:
        _send(patched, DPOK, 2, times=2)
        assert in_child(lambda: train(tmp_path / "run", *options)) == 130
    error = capfd.readouterr().err
    assert "what is under way is finished first (a second signal leaves at once)" in error
    assert "left at once" in error
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert train(tmp_path / "run", "--resume") == 0
    assert read_summary(tmp_path / "run")["pictures"] == 6


def _hang(monkeypatch, number):
    """Lets the judge hang, and a signal come while it does; returns its calls."""
    judge, calls = DenoisingVectorEnv.judge, []

    def hangs(self, latents, prompts):
        calls.append(0)
        if len(calls) == number:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)
        return judge(self, latents, prompts)

    monkeypatch.setattr(DenoisingVectorEnv, "judge", hangs)
    return calls


@pytest.mark.slow
def test_a_signal_while_a_reward_hangs(tmp_path, monkeypatch):
    """What was learned is saved at once, and the reward is not asked again."""
    with monkeypatch.context() as patched:
        calls = _hang(patched, SECOND_ITERATION)
        assert train(tmp_path / "run", "--images", "6", *TINY, *FEW_LAYERS) == 143
    assert len(calls) == SECOND_ITERATION
    assert read_summary(tmp_path / "run")["pictures"] == 2
    assert train(tmp_path / "run", "--resume") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_choices_are_learned_from_without_drawing(tmp_path, monkeypatch, capsys):
    """A run has the files of any other. Interrupted, it goes on to the same weights, but not with other choices."""
    monkeypatch.chdir(tmp_path)
    file = write_choices(tmp_path / "choices", ["three green squares", "a red star"], 4, (64, 64))
    options = ["--algo", "diffusion-dpo", "--choices", "choices/choices.jsonl", *TINY, *FEW_LAYERS, "--batch-size", "2"]
    options += ["--n-gradient-steps", "3", "--steps-per-iteration", "1"]
    with monkeypatch.context() as patched:
        _send(patched, DiffusionDPO, 2)
        assert train("run", *options) == 130
    summary, config = read_summary(Path("run")), Config.read(Path("run"))
    assert (summary["interrupted"], summary["pictures"]) == (True, 0)
    assert config.algo_kwargs["choices"] == str(file)  # absolute: the run may be resumed from another folder
    assert [path.name for path in list_checkpoints("run")] == ["checkpoint-0-2"]
    printed = capsys.readouterr().out
    assert "4 choices between 8 images, for 2 prompts; no image is drawn in training" in printed
    assert "warning" not in printed

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]))
    assert train("run", "--resume") == 2
    assert "are not those that this training began with" in capsys.readouterr().err
    file.write_text("".join(lines))
    monkeypatch.chdir(tmp_path / "choices")
    assert train(tmp_path / "run", "--resume", "--choices", "other.jsonl") == 2
    assert "leave out --choices" in capsys.readouterr().err
    assert train(tmp_path / "run", "--resume") == 0
    assert "after 2 optimiser steps" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert train("whole", *options) == 0
    assert list_written(tmp_path / "whole") == WRITTEN
    printed = capsys.readouterr().out
    assert "reward (not trained on)" in printed
    assert re.search(r"choices learned from\W+4\b", printed)
    assert "images drawn" not in printed
    one, other = (find_checkpoint(name) for name in ("run", "whole"))
    assert one.name == other.name == "checkpoint-0-3"
    assert_same(load_file(one / LORA), load_file(other / LORA))
    rows, whole = (read_log(f"{name}/progress.csv") for name in ("run", "whole"))
    assert [row["train/preference_loss"] for row in rows] == [row["train/preference_loss"] for row in whole]
    assert read_summary(Path("run"))["kl_to_pretrained"] == read_summary(Path("whole"))["kl_to_pretrained"] > 0

    assert train("run", "--resume") == 2
    assert "is complete, after 3 optimiser steps; train anew" in capsys.readouterr().err
    assert read_summary(Path("run"))["choices"] == 4
    file.unlink()  # the trained model needs no choices
    assert main(["evaluate", "run", "--images", "1", "--device", "cpu"]) == 0
    assert "reward (not trained on)" in capsys.readouterr().out
    assert main(["export", "run", "--out", "exported"]) == 0
    card = Path("exported/README.md").read_text()
    assert "learned from people's choices between images, `choices.jsonl`, in 3 optimiser steps" in card
    assert "reward (not trained on)" in card
    assert "images drawn" not in card
    assert "- reward:" not in card
    assert train("again", *options) == 2
    assert "there is no file of choices at" in capsys.readouterr().err


def test_choices_for_other_prompts_than_the_evaluations_are_noticed(tmp_path, capsys):
    file = write_choices(tmp_path / "choices", ["a red star"], 4, (64, 64))
    options = ["--algo", "diffusion-dpo", "--choices", str(file), *TINY, *FEW_LAYERS, "--n-gradient-steps", "1"]
    assert train(tmp_path / "run", *options, "--prompts", "three green squares") == 0
    assert capsys.readouterr().out.count("warning: the choices are for other prompts, such as 'a red star', than") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_an_interrupted_fit_is_resumed(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        _send(patched, RewardWeightedSFT, 1)
        assert train(folder, "--algo", "sft", "--images", "4", *TINY, *FEW_LAYERS, *FIT) == 130
    summary = read_summary(folder)
    assert (summary["interrupted"], summary["pictures"]) == (True, 4)
    halfway = load_file(find_checkpoint(folder) / "images.safetensors")
    assert len(halfway["latents"]) == 4
    assert train(folder, "--resume") == 0
    summary = read_summary(folder)
    assert (summary["interrupted"], summary["pictures"]) == (False, 4)
    rows = read_log(folder / "progress.csv")
    assert [row["rollout/images"] for row in rows if "rollout/images" in row] == [2, 4]
    assert [row["train/n_updates"] for row in rows if "train/denoising_loss" in row] == [1, 2]
    assert_same(load_file(find_checkpoint(folder) / "images.safetensors"), halfway)  # none was drawn again
    assert train(folder, "--resume") == 2


@pytest.mark.slow
def test_a_run_that_an_error_stops_keeps_what_it_learned(tmp_path, monkeypatch, capsys):
    error = ConnectionError("no server of the reward 'a:1' is left")
    with monkeypatch.context() as patched:
        _interrupt_judge(patched, SECOND_ITERATION, error)
        assert train(tmp_path / "run", "--images", "100", *TINY) == 2
    captured = capsys.readouterr()
    assert f"dpok train --resume --out {tmp_path / 'run'}" in " ".join(captured.out.split())
    assert captured.err.strip().splitlines()[-1] == f"dpok: error: {error}"
    assert load_run(tmp_path / "run", device="cpu").num_timesteps == 2 * 2
    assert train(tmp_path / "run", "--resume", "--images", "6") == 0
    assert read_summary(tmp_path / "run")["pictures"] == 6


def _fail_evaluation(monkeypatch, numbers, error):
    evaluate, calls = run.evaluate, []

    def fails(*args, **kwargs):
        calls.append(0)
        if len(calls) in numbers:
            raise error
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(run, "evaluate", fails)


@pytest.mark.slow
def test_a_run_that_stops_once_all_is_drawn_is_resumed(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        _fail_evaluation(patched, {2}, ConnectionError("the server is gone"))  # with the fine-tuned model
        assert train(folder, "--images", "2", *TINY) == 2
    stopped = read_summary(folder)
    assert (stopped["interrupted"], stopped["pictures"], stopped["eval_images"]) == (True, 2, 0)
    assert stopped["seconds"] > 0
    assert train(folder, "--resume") == 0
    summary = read_summary(folder)
    assert (summary["interrupted"], summary["pictures"], summary["eval_images"]) == (False, 2, 3)
    assert summary["seconds"] >= stopped["seconds"]
    assert list_written(folder) == WRITTEN


@pytest.mark.slow
def test_an_interruption_before_the_training(tmp_path, monkeypatch, capsys):
    """Nothing was learned yet, so there is nothing to save."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        _fail_evaluation(patched, {1}, KeyboardInterrupt)
        assert train(folder, "--images", "2", *TINY) == 130
    assert "there is no checkpoint yet, resume with: dpok train --resume" in capsys.readouterr().out
    assert train(folder, "--resume") == 0
    assert "the run begins anew" in capsys.readouterr().out
    assert read_summary(folder)["pictures"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("changes", [["--image-size", "128"], ["--prompts", "circle"]])
def test_images_that_the_judge_cannot_read(tmp_path, changes):
    few = ["--images", "2", "--reward", "jpeg-compressibility", *TINY, "--eval-images", "1"]
    assert train(tmp_path / "run", *changes, *few) == 0
    assert read_summary(tmp_path / "run")["aligned_after"] is None
    assert set(read_summary(tmp_path / "run")["rewards_after"]) == {"jpeg-compressibility"}
    assert main(["evaluate", str(tmp_path / "run"), "--images", "1", "--device", "cpu"]) == 0
    assert sample(tmp_path, tmp_path / "run")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("n_images", [4, 6])
def test_a_diverged_agent_does_not_overwrite_a_sound_one(tmp_path, monkeypatch, capsys, n_images):
    """The weights are NaN after the second update, be it the last one or not. The first one's checkpoint is kept."""
    folder, update, kept = tmp_path / "run", DPOK.train, {}

    def diverge(self):
        update(self)
        if self.iteration:
            kept.update(contents(folder / "checkpoint-2"))
            with torch.no_grad():
                self.policy.denoiser_parameters()[0].fill_(math.nan)

    monkeypatch.setattr(DPOK, "train", diverge)
    assert train(folder, "--images", str(n_images), *TINY, *FEW_LAYERS, "--checkpointing-steps", "1") == 2
    captured = capsys.readouterr()
    assert "checkpoint-2 is kept, resume with" in captured.out
    assert "the weights are infinite or NaN, so no checkpoint of them is written" in captured.err
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2"]
    assert contents(folder / "checkpoint-2") == kept
    assert not (folder / "lora").exists()


@pytest.mark.slow
def test_remote_rewards(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Endpoint(brightness) as endpoint:
        thread = threading.Thread(target=endpoint.serve_forever, args=[0.01])
        thread.start()
        reward = ["--reward", f"{endpoint.url}=0.5,shapes-quality", "--normalize-rewards", "--reward-workers", "2"]
        assert train(tmp_path / "run", "--images", "2", *reward, *TINY) == 0
        endpoint.shutdown()
        thread.join()
    config = Config.read(tmp_path / "run")
    assert config.env_kwargs["reward_workers"] == 2
    assert config.env_kwargs["reward"] == {endpoint.url: 0.5, "shapes-quality": 1.0}
    assert config.algo_kwargs["normalize_rewards"] is True
    summary = read_summary(tmp_path / "run")
    rewards = summary["rewards_after"]
    assert set(rewards) == {"shapes-alignment", "shapes-quality", endpoint.name, "shapes-preference"}
    raw = 0.5 * rewards[endpoint.name] + rewards["shapes-quality"]  # evaluations are not normalised
    assert summary["reward_after"] == pytest.approx(raw, rel=1e-5)
    assert f"rollout/{endpoint.name}" in read_log(tmp_path / "run" / "progress.csv")[0]
    # Now that it is gone:
    defaults = RemoteReward.__init__.__kwdefaults__ or {}
    monkeypatch.setattr(RemoteReward.__init__, "__kwdefaults__", defaults | {"backoff": 0})
    assert main(["evaluate", str(tmp_path / "run"), "--images", "1", "--device", "cpu"]) == 2
    assert f"{endpoint.url} failed 8 times in a row" in capsys.readouterr().err


@pytest.mark.slow
def test_another_environment(tiny_sd_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    of_model = ["--env", "DPOK-SD15-v0", "--model", str(tiny_sd_folder), "--guidance-scale", "2"]
    of_model += ["--reward", "jpeg-compressibility"]
    assert train(folder, "--images", "2", "--prompts", "a dog on the moon", *of_model, *TINY) == 0
    summary = read_summary(folder)
    assert summary["aligned_before"] is summary["aligned_after"] is summary["quality_after"] is None
    assert summary["rewards_after"] == {"jpeg-compressibility": pytest.approx(summary["reward_after"])}
    assert summary["reward_after"] < 0
    more = ["--reward", "jpeg-incompressibility"]
    assert main(["evaluate", str(folder), "--images", "2", "--device", "cpu", *more]) == 0
    scores = yaml.safe_load((folder / "evaluation.json").read_text())["prompts"]["training"]
    assert scores["rewards_after"]["jpeg-incompressibility"] == pytest.approx(-scores["reward_after"])
    assert "there are no held-out prompts" in capsys.readouterr().out
    assert sample(tmp_path, folder)[0] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_a_run_that_trains_the_whole_denoiser(tmp_path):
    """The environment with a known answer has such a preset; what was trained can be drawn with."""
    few = ["--images", "8", "--images-per-iteration", "4", "--eval-images", "4", "--device", "cpu"]
    folder = tmp_path / "run"
    assert train(folder, "--env", "DPOK-Mixture-v0", *few) == 0
    config = Config.read(folder)
    assert config.algo_kwargs["kl_placement"] == "reward"
    assert config.algo_kwargs["step_weighting"] == "likelihood"
    assert not (folder / "lora").exists()
    assert (find_checkpoint(folder) / "denoiser.safetensors").is_file()
    objective = read_summary(folder)["objective"]
    assert objective["nat_price"] == config.algo_kwargs["kl_coef"]
    assert objective["before"] < objective["optimum"]
    assert objective["regret"] == objective["optimum"] - objective["after"] > 0
    assert (folder / "optimum.png").is_file()
    out = tmp_path / "sample.png"
    words = ["sample", "--prompt", "two modes", "--n", "2", "--device", "cpu", "--out", str(out)]
    assert main([*words, "--lora", str(folder)]) == 0
    fine_tuned = out.read_bytes()
    assert main([*words, "--env", "DPOK-Mixture-v0"]) == 0
    assert out.read_bytes() != fine_tuned
    assert main(["evaluate", str(folder), "--images", "2", "--device", "cpu"]) == 0
    written = yaml.safe_load((folder / "evaluation.json").read_text())
    assert set(written["prompts"]["held-out"]["rewards_after"]) == {"mixture-bump"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--env", "DPOK-Nothing-v0"], "DPOK-Nothing"),
        (["--env", "CartPole-v1"], "no denoising environment"),
        (["--algo", "dpook"], "unknown algorithm 'dpook'; did you mean 'dpok'?"),
        (["--algo", "nowhere:Mine"], "nowhere"),
        (["--algo", "collections:OrderedDict"], "must be a subclass of DenoisingAlgorithm"),
        (["--preset", "labtop"], "unknown preset 'labtop'; did you mean 'laptop'?"),
        (["--reward", "shapes-beauty"], "shapes-beauty"),
        (["--reward", "shapes-quality=much"], "must be a number"),
        (["--reward", "localhost:8000"], "is http:// missing?"),
        (["--reward", "http://localhost:port"], "written http://host:port"),
        (["--reward-workers", "-1"], "reward_workers must be"),
        (["--prompts", "three green cats"], "cats"),
        (["--prompts", "three", "green", "squares"], "unexpected 'green'"),
        (["--prompts", "nothing.txt"], "nothing.txt"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--images", "0"], "images must be an integer of at least 1"),
        (["--eval-images", "0"], "eval_images must be an integer of at least 1"),
        (["--checkpointing-steps", "0"], "checkpointing_steps must be an integer of at least 1"),
        (["--checkpoints-total-limit", "0"], "checkpoints_total_limit must be an integer of at least 1"),
        (["--seed", "-1"], "seed"),
        (["--prompts", ""], "blank"),
        (["--reward", ""], "a reward is written NAME"),
        (["--dtype", "float16"], "use dtype='bfloat16'"),
        (["--model-kwargs", "3"], "write NAME=VALUE, not '3'"),
        (["--model-kwargs", "revison=main"], "did you mean 'revision'?"),
        (["--timestep-fraction", "2"], "timestep_fraction"),
        (["--device", "abacus"], "abacus"),
        (["--resume"], "no run folder"),
        (["--algo"], "--algo needs a value"),
        (["--kl-coefficient", "1"], "unknown option --kl-coefficient; did you mean '--kl-coef"),
        (["--set", "kl_coef=1"], "unknown option --set"),
        (["--kl-placement", "advantage"], "advantage"),
        (["--n-epochs", "two"], "two"),
        (["--n-epochs", "1.5"], "1.5"),
        (["--batch-size", "2.5"], "2.5"),
        (["--normalize-advantage", "mean"], "mean"),
        (["--algo", "rwr", "--group-size", "2"], "unknown option --group-size"),
        (["--algo", "ddpo", "--kl-coef", "0.1"], "unknown option --kl-coef"),
        (["--algo", "sft", "--clip-range", "0.1"], "unknown option --clip-range"),
        (
            ["--algo", "grpo", "--preset", "paper"],
            "this preset is for dpok only; choose another one, or none, for grpo",
        ),
        (["--algo", "grpo", "--images-per-iteration", "24"], "cannot be split into groups of 16"),
        (["--algo", "draft", "--device", "cpu"], "the reward 'shapes-alignment' has no gradient"),
    ],
)
def test_mistakes_in_training_options(tmp_path, capsys, options, message):
    assert train(tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("dpok: error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_help_of_an_algorithm(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # one column of options
    texts = {}
    for words in (["--algo", "grpo"], ["--preset", "paper"], ["--env", "DPOK-SD15-v0", "--algo", "rwr"]):
        with pytest.raises(SystemExit) as ended:
            main(["train", *words, "--help"])
        assert ended.value.code == 0
        texts[words[-1]] = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--group-size INT" in texts["grpo"]
    for name in (*list_algorithms(), *PRESETS, "DPOK-SD15-v0"):
        assert name in texts["grpo"]
    assert "--gae-lambda" not in texts["grpo"]
    assert "(default: shapes-alignment=1.0,shapes-quality=0.2)" in texts["grpo"]
    for name, value in (
        ("reward-weight", "10.0"),
        ("lora-rank", "4"),
        ("learning-rate", "1e-05"),
        ("images-per-iteration", "10"),
    ):
        assert f"(default: {value})" in texts["paper"].partition(f"--{name} ")[2].partition(" --")[0]
    assert "--temperature" in texts["rwr"]
    assert "(default: image-reward=1.0)" in texts["rwr"]
    for unit in ("nats", "(0, 1]", "1 or more", "0 or more"):
        assert unit in texts["paper"]


@pytest.mark.slow
def test_images_are_those_of_any_number_of_environments(finished, tmp_path):
    """--n-envs is a matter of memory: with images_per_iteration fixed, the weights are the same."""
    options = ["--images", "3", "--seed", "1", *TINY, "--n-envs", "1"]
    assert train(tmp_path / "run", *options) == 0
    rows, known = (read_log(run / "progress.csv") for run in (tmp_path / "run", finished))
    for ours, theirs in zip(rows, known, strict=True):
        np.testing.assert_allclose(ours["rollout/shapes-quality"], theirs["rollout/shapes-quality"], rtol=1e-4)
    assert read_summary(tmp_path / "run")["pictures"] == 4
