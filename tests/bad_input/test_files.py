"""Damaged files of runs, rewards, models and LoRAs: each is one line that names the folder, and changes nothing."""

import pytest

from agents import load_run
from agents.cli.main import main
from dpok_gym.models import load_model
from dpok_gym.models.lora import LoRA
from dpok_gym.rewards import make_reward
from tests.bad_input.support import check_message, contents, damaged_copy, damages_of, refused

#: The files of the folders of the fixtures. A checkpoint's name has the images drawn.
MIXTURE_RUN = ["config.yaml"]
MIXTURE_RUN += [f"checkpoint-4/{name}.safetensors" for name in ("critic", "denoiser", "optimizer")]
MIXTURE_RUN += ["checkpoint-4/trainer_state.json"]
REWARD = ["config.json", "model.safetensors"]
MODEL = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
#: A tokenizer without settings reads as many tokens as its text encoder.
HARMLESS = [("tokenizer/tokenizer_config.json", damage) for damage in ("missing", "no keys")]
LORA = "pytorch_lora_weights.safetensors"


def _cases(files):
    return [pytest.param(file, damage, id=f"{file}-{damage}") for file in files for damage in damages_of(file)]


def _no_trace(folder):
    assert not list(folder.rglob("trace"))


@pytest.mark.parametrize(("file", "damage"), _cases(MIXTURE_RUN))
def test_load_run(mixture_run, tmp_path, file, damage):
    folder = damaged_copy(mixture_run, tmp_path / "run", file, damage)
    before = contents(folder)
    with refused(str(folder)):
        load_run(folder, "cpu")
    assert contents(folder) == before
    _no_trace(folder)


def _cases_of_commands():
    for command in ("evaluate", "sample", "export"):
        for case in _cases(["config.yaml", f"checkpoint-2/{LORA}"]):
            # Without its config, dpok sample takes a run's folder for a LoRA's.
            if (command, *case.values) != ("sample", "config.yaml", "missing"):
                yield pytest.param(command, *case.values, id=f"{command}-{case.id}")


@pytest.mark.parametrize(("command", "file", "damage"), list(_cases_of_commands()))
def test_commands_that_read_a_run(shapes_run, tmp_path, monkeypatch, capsys, command, file, damage):
    monkeypatch.chdir(tmp_path)
    folder = damaged_copy(shapes_run, tmp_path / "run", file, damage)
    before = contents(tmp_path)
    words = {
        "evaluate": ["evaluate", str(folder), "--images", "1", "--device", "cpu"],
        "export": ["export", str(folder), "--out", str(tmp_path / "out")],
        "sample": ["sample", "--prompt", "a red circle", "--n", "1", "--lora", str(folder), "--device", "cpu"],
    }
    assert main(words[command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpok: error: ")
    assert error.count("\n") == 1
    check_message(error, str(folder))
    assert contents(tmp_path) == before
    _no_trace(folder)


@pytest.mark.parametrize(("file", "damage"), _cases(REWARD))
def test_rewards(reward_folder, tmp_path, file, damage):
    folder = damaged_copy(reward_folder, tmp_path / "reward", file, damage)
    before = contents(folder)
    with refused(str(folder)):
        make_reward(str(folder))
    assert contents(folder) == before
    _no_trace(folder)


def _cases_of_models():
    for case in _cases(MODEL):
        if case.values not in HARMLESS:
            yield case


@pytest.mark.parametrize(("file", "damage"), list(_cases_of_models()))
def test_models(tiny_sd_folder, tmp_path, file, damage):
    folder = damaged_copy(tiny_sd_folder, tmp_path / "model", file, damage)
    before = contents(folder)
    with refused(str(folder)):
        load_model(folder, "cpu")
    assert contents(folder) == before
    _no_trace(folder)


@pytest.mark.parametrize(("file", "damage"), _cases([LORA]))
def test_loras(shapes_run, tmp_path, file, damage):
    folder = damaged_copy(shapes_run / "lora", tmp_path / "lora", file, damage)
    model = load_model("shapes", "cpu")
    with refused(str(folder)):
        LoRA.from_folder(model.denoiser, folder, model.lora_prefix)
    _no_trace(folder)
