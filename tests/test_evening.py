"""docs/guides/own_checkpoint.md: its five commands, on small pipelines with CLIP's vocabulary, for all checkpoints.

``dpok doctor`` takes half of the time, so it runs for a folder alone. It reads the model's options as a training does.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from agents.cli.main import main
from dpok_gym.models import clear_model_cache
from dpok_gym.testing import save_tiny_pipeline
from tests.dpok_gym.models.test_families import single_file
from tests.support import real_clip_tokenizer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guides" / "own_checkpoint.md").read_text(encoding="utf-8")
#: What makes a training as small as the pipeline; ImageReward's weights are not here.
SMALL = shlex.split(
    "--reward jpeg-incompressibility --num-inference-steps 4 --images 8 --images-per-iteration 4 --batch-size 4 "
    "--n-envs 2 --eval-images 2 --device cpu"
)
HUB_ID = "somebody/small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline in diffusers' format."""
    return save_tiny_pipeline(
        tmp_path_factory.mktemp("evening") / "model", "stable-diffusion", tokenizer=real_clip_tokenizer()
    )


def as_folder(folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shutil.copytree(folder, here / "my_model")
    return ["my_model"]


def as_file(folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    save_file(single_file(StableDiffusionPipeline.from_pretrained(folder)), here / "my_model.safetensors")
    return ["my_model.safetensors", "--model-kwargs", f"config={folder}"]


def as_hub_id(folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    repository = here / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr("diffusers.utils.constants.HF_HUB_CACHE", str(here / "hub"), raising=False)
    return [HUB_ID]


def commands(model: list[str]) -> list[list[str]]:
    """Returns the words of the page's five commands, for a checkpoint."""
    (block,) = re.findall(r"## Five commands\n.*?```sh\n(.*?)```", PAGE, re.DOTALL)
    found = []
    for line in block.splitlines():
        words = shlex.split(line)[1:]
        words = [str(ROOT / word) if word.startswith("benchmarks/") else word for word in words]
        if "--model" in words:
            place = words.index("--model") + 1
            words[place : place + 1] = model
            words += SMALL
        found.append(words)
    assert len(found) == 5
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [as_folder, as_file, as_hub_id])
def test_five_commands(
    checkpoint: Callable[..., list[str]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clear_model_cache()
    monkeypatch.chdir(tmp_path)
    (prompts,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    Path("prompts.txt").write_text(prompts)
    dry_run, doctor, train, for_diffusers, for_others = commands(checkpoint(folder, tmp_path, monkeypatch))

    assert main(dry_run) == 0
    assert not Path("runs").exists()
    assert "GiB" in capsys.readouterr().out
    if checkpoint is as_folder:
        main(doctor)  # some checks may fail: this pipeline draws noise
        said = capsys.readouterr().out
        assert re.search(r"prompts.*\b3\b", said)
        assert not re.search(r"FAILED +(first|gradient|images equal)", said)
    assert main(train) == 0
    assert main(for_diffusers) == 0
    assert main(for_others) == 0

    images = {}
    for name in (None, "evening_diffusers", "evening_kohya"):
        pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        pipe.set_progress_bar_config(disable=True)
        if name is not None:
            pipe.load_lora_weights(name)
        drawn = pipe("a green rabbit", 16, 16, 4, output_type="pt", generator=torch.Generator().manual_seed(0))
        images[name] = drawn.images
    torch.testing.assert_close(images["evening_diffusers"], images["evening_kohya"])
    assert (images["evening_diffusers"] - images[None]).abs().max() > 1e-4
    state = load_file("evening_kohya/evening_kohya.safetensors")
    names = r"lora_unet_\w+attn[12]_to_(q|k|v|out_0)\.(lora_down\.weight|lora_up\.weight|alpha)"
    assert state
    assert all(re.fullmatch(names, key) for key in state)
