"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_quick_start_and_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        # A thousand pictures of PPO show no more than one does.
        exec(block.replace("env).learn(10_000)", "env, n_steps=20, batch_size=20).learn(20)"), names)
    assert (tmp_path / "my_lora" / "pytorch_lora_weights.safetensors").is_file()
    assert names["agent"].num_timesteps == 2 * 16 * 20
    names["env"].reset(seed=0)
    judged = names["env"].reward(torch.rand(2, 3, 64, 64), ["a red circle"] * 2)
    assert list(judged.components) == ["contrast", "shapes-alignment"]


def test_quick_start_is_short() -> None:
    code = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(code) <= 15


def test_pictures_are_there() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parent.parent / path).is_file(), path
