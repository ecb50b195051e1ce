"""``dpok sample``: with the pre-trained model, a LoRA, a run, and a model that has moved."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from agents.cli.main import main
from dpok_gym.models.lora_files import FILE_NAME as LORA
from tests.agents.cli.support import TINY, sample, train


def _pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_sample(finished, tmp_path, capsys):
    code, out = sample(tmp_path, finished)
    assert code == 0
    assert Image.open(out).format == "PNG"
    printed = capsys.readouterr().out
    assert "2 images, " in printed
    assert "of them fully aligned" in printed
    fine_tuned = _pixels(out)
    shutil.copytree(finished / "lora", tmp_path / "elsewhere")
    assert sample(tmp_path, tmp_path / "elsewhere")[0] == 0
    assert np.abs(_pixels(out) - fine_tuned).max() <= 1  # of 255
    assert sample(tmp_path, finished / "checkpoint-4")[0] == 0
    assert np.abs(_pixels(out) - fine_tuned).max() <= 1
    assert sample(tmp_path, finished / "typo")[0] == 2
    # A run that was killed has no LoRA beside its checkpoints, and one that is trained further has an older one.
    killed = shutil.copytree(finished, tmp_path / "killed")
    save_file({"of": torch.zeros(1)}, killed / "lora" / LORA)
    assert sample(tmp_path, killed)[0] == 0
    assert np.abs(_pixels(out) - fine_tuned).max() <= 1
    shutil.rmtree(killed / "lora")
    assert sample(tmp_path, killed)[0] == 0
    assert np.abs(_pixels(out) - fine_tuned).max() <= 1


@pytest.mark.slow
def test_loras_of_other_tools(finished, tmp_path, capsys):
    _, out = sample(tmp_path, finished)
    expected = _pixels(out)
    assert main(["export", str(finished), "--format", "kohya", "--out", str(tmp_path / "kohya")]) == 0
    state = load_file(tmp_path / "kohya" / "kohya.safetensors")
    torch.save(state, tmp_path / "theirs.bin")
    assert sample(tmp_path, tmp_path / "kohya")[0] == 0
    assert np.abs(_pixels(out) - expected).max() <= 1  # of 255
    assert sample(tmp_path, tmp_path / "theirs.bin")[0] == 2
    assert "is a pickle, which may run code" in capsys.readouterr().err
    assert sample(tmp_path, tmp_path / "theirs.bin", "--trust")[0] == 0
    assert np.abs(_pixels(out) - expected).max() <= 1


@pytest.mark.slow
def test_the_pre_trained_model(finished, tmp_path, capsys):
    words = ["sample", "--num-inference-steps", "2", "--n", "2", "--device", "cpu", "--out", str(tmp_path / "one.png")]
    assert main([*words, "--prompt", "a red circle"]) == 0
    assert "of them fully aligned" in capsys.readouterr().out
    _, out = sample(tmp_path, finished)
    assert np.abs(_pixels(tmp_path / "one.png") - _pixels(out)).max() > 1
    # The judge cannot read this, the model can.
    assert main([*words, "--prompt", "circle", "--out", str(tmp_path / "new" / "circle.png")]) == 0
    assert (tmp_path / "new" / "circle.png").is_file()
    assert "aligned" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_how_noise_is_added(tmp_path, capsys):
    words = ["sample", "--prompt", "a red circle", "--num-inference-steps", "3", "--n", "1", "--device", "cpu"]
    drawn = {}
    for more in ("", "--eta 0", "--sampler ode", "--sde-steps 0 1", "--model-kwargs vae_tiling=true"):
        out = tmp_path / "one.png"
        assert main([*words, "--out", str(out), *more.split()]) == 0
        drawn[more] = _pixels(out)
    assert np.array_equal(drawn["--eta 0"], drawn["--sampler ode"])
    assert np.array_equal(drawn[""], drawn["--model-kwargs vae_tiling=true"])  # a small image is a single tile
    for one, other in (("", "--eta 0"), ("", "--sde-steps 0 1"), ("--eta 0", "--sde-steps 0 1")):
        assert not np.array_equal(drawn[one], drawn[other])
    capsys.readouterr()
    for more, message in {
        "--sampler euler": "sampler must be one of 'ddim', 'flow-sde', ",
        "--sde-steps 0,2": "--sde-steps cannot be read: write '0 2', with spaces and without commas",
        "--sde-steps 2 2": "sde_steps=(2, 2) ends after step 3, but the last of the 3 denoising steps is step 2",
        "--model-kwargs tiling=true": "argument of load_model 'tiling'",
    }.items():
        assert main([*words, *more.split()]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_model_has_moved(tiny_sd_folder, tmp_path, capsys, fresh_models):
    """And all of its denoiser was trained, which draws with the options of the command."""
    model, run = shutil.copytree(tiny_sd_folder, tmp_path / "before" / "model"), tmp_path / "run"
    options = ["--env", "DPOK-SD15-v0", "--model", str(model), "--prompts", "a dog", "--reward", "jpeg-compressibility"]
    assert (
        train(run, "--images", "2", *options, *TINY, "--lora-rank", "0", "--dtype", "float32", "--guidance-scale", "1")
        == 0
    )
    moved = (tmp_path / "before").rename(tmp_path / "after") / "model"
    fresh_models()
    scores = ["evaluate", str(run), "--images", "2", "--device", "cpu"]
    assert main(scores) == 2
    assert str(model) in capsys.readouterr().err
    assert main([*scores, "--model", str(moved)]) == 0
    assert train(tmp_path / "next", "--lora", str(run), "--images", "2", *options, *TINY) == 2
    assert "--lora names a run that trained the whole denoiser" in capsys.readouterr().err
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(model), str(moved)))
    assert train(run, "--resume", "--images", "4") == 0
    drawn = []
    for guidance_scale in ("1", "5"):
        code, out = sample(tmp_path, run, "--guidance-scale", guidance_scale, "--num-inference-steps", "3")
        assert code == 0
        drawn.append(_pixels(out))
    assert not np.array_equal(*drawn)
    assert sample(tmp_path, run, "--dtype", "bfloat16")[0] == 2
    assert "leave out --dtype" in capsys.readouterr().err
