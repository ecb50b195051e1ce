"""A run with each family of transformers: it learns, and a resumed one ends with the same bits.

The UNets of Stable Diffusion are those of all other tests of runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from agents.common.checkpoint import find_checkpoint, list_checkpoints
from benchmarks.kill import differences, fingerprint
from dpok_gym.models.lora_files import FILE_NAME
from dpok_gym.testing import TINY_FAMILIES
from tests.agents.cli.support import TINY, train

#: Two iterations of two images, with a checkpoint after each.
OPTIONS = ["--env", "DPOK-SD15-v0", *TINY, "--images", "4", "--checkpointing-steps", "1", "--eval-images", "1"]
OPTIONS += ["--prompts", "a dog", "--reward", "jpeg-compressibility", "--learning-rate", "1e-2", "--eta", "1"]
ALGORITHMS = {"dpok": ["--use-critic"], "grpo": ["--group-size", "2"]}

_UNETS = {"stable-diffusion", "stable-diffusion-v", "stable-diffusion-xl"}
#: Settings of each family: its guidance, and perhaps a small size of its images.
FAMILIES: dict[str, list[str]] = {
    "stable-diffusion-3": ["--guidance-scale", "3"],
    "stable-diffusion-3-no-t5": ["--guidance-scale", "3"],
    "flux-dev": ["--guidance-scale", "3.5", "--image-size", "16"],
    "flux-schnell": ["--guidance-scale", "1", "--image-size", "16"],
    "flux2-klein": ["--guidance-scale", "3", "--image-size", "16"],
    "pixart-sigma": ["--guidance-scale", "3"],
    "sana": ["--guidance-scale", "3"],
}


def test_every_family_is_trained() -> None:
    assert FAMILIES.keys() == TINY_FAMILIES.keys() - _UNETS


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
@pytest.mark.parametrize(("name", "algo"), [*((name, "dpok") for name in FAMILIES), ("stable-diffusion-3", "grpo")])
def test_it_learns_and_resumes(name: str, algo: str, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    model = ["--model", str(tiny_folder(name)), *FAMILIES[name]]
    assert train(tmp_path / "whole", "--algo", algo, *OPTIONS, *ALGORITHMS[algo], *model) == 0
    first, last = (load_file(path / FILE_NAME) for path in list_checkpoints(tmp_path / "whole"))
    assert first.keys() == last.keys()
    # B is zero at first, so it is what the first update changes; the second one changes A too. In its last block, the
    # transformer of Stable Diffusion 3 does not use what the text attends to.
    used = {key for key in first if "transformer_blocks.1.attn.add_q_proj" not in key}
    assert all(first[key].any() for key in used if ".lora_B." in key)
    assert all((first[key] != last[key]).any() for key in used)
    resumed = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(find_checkpoint(resumed))
    assert train(resumed, "--resume-from-checkpoint", list_checkpoints(resumed)[0].name) == 0
    assert not differences(fingerprint(resumed), fingerprint(tmp_path / "whole"))
