"""docs/dpok_single_file.py is short, stands alone, and computes what the library computes."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from agents import DPOK, PRESETS, evaluate
from dpok_gym.utils.images import to_uint8

FILE = Path(__file__).parents[2] / "docs" / "dpok_single_file.py"
PRESET = PRESETS["laptop"]
SEED = 3


class Enough(Exception):
    """Ends a training."""


@pytest.fixture
def single() -> ModuleType:
    """The file as a module of its own, whose settings a test may change."""
    spec = importlib.util.spec_from_file_location("dpok_single_file", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    loss: str,
    lora: Callable[[], dict[str, Tensor]],
    train: Callable[[], Any],
    n: int,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Trains for n optimiser steps; returns the loss of each, (n,), and the LoRA's weights after each, by name."""
    losses: list[float] = []
    weights: list[dict[str, Tensor]] = []
    compute = getattr(owner, loss)

    def note_loss(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        losses.append((result if isinstance(result, Tensor) else result[0]).mean().item())
        return result

    def note_weights(*unused: Any) -> None:
        weights.append({name: values.detach().clone() for name, values in lora().items()})
        if len(weights) == n:
            raise Enough

    hook = register_optimizer_step_post_hook(note_weights)
    with monkeypatch.context() as patch:
        patch.setattr(owner, loss, note_loss)
        with pytest.raises(Enough):
            train()
    hook.remove()
    return torch.tensor(losses), weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "n_updates"),
    [
        pytest.param({}, 3, id="the settings of dpok train"),
        pytest.param(
            {"images_per_iteration": 4, "batch_size": 20, "learning_rate": 3e-2, "clip_range": 1e-3},
            4,
            id="two iterations of few images, with long steps",
        ),
    ],
)
def test_losses_updates_and_evaluation_are_those_of_the_library(
    single: ModuleType,
    changes: dict[str, float],
    n_updates: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = gymnasium.make_vec("DPOK-Shapes-v0", num_envs=64, **PRESET.env_kwargs)
    agent = DPOK(env=env, seed=SEED, held_out_reward=None, **PRESET.algorithm_kwargs("dpok") | changes)
    assert agent.policy.lora is not None
    n_steps = PRESET.images * agent.process.num_inference_steps
    expected = record(monkeypatch, agent, "loss", agent.policy.lora.state_dict, lambda: agent.learn(n_steps), n_updates)
    if "clip_range" in changes:
        assert agent.mean_metrics()["clip_fraction"] > 0  # so the trust region is compared too

    for name, value in changes.items():
        monkeypatch.setattr(single, name.upper(), value)
    policy = single.Policy(SEED)
    losses, weights = record(
        monkeypatch,
        single,
        "dpok_loss",
        lambda: get_peft_model_state_dict(policy.unet, adapter_name="default"),
        lambda: single.train(policy, SEED, PRESET.images),
        n_updates,
    )
    torch.testing.assert_close(losses, expected[0], rtol=0, atol=1e-5)
    if "learning_rate" in changes:
        # Adam gives a gradient that is only rounding a long step: so a few weights may differ, and not all of them.
        ours, theirs = (
            torch.cat([value.flatten() for value in each.values()]) for each in (weights[-1], expected[1][-1])
        )
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    else:
        torch.testing.assert_close(weights, expected[1], rtol=0, atol=1e-5)

    monkeypatch.setattr(single, "EVALUATION_IMAGES", 4)
    images, aligned, kl = single.evaluate(policy, SEED)
    evaluation = evaluate(agent.policy, env, [single.PROMPT] * 4, seed=1_000_000 * (SEED + 1))  # that of dpok train
    assert evaluation.aligned is not None
    assert np.abs(to_uint8(images).astype(int) - evaluation.images).max() <= 1
    assert aligned.tolist() == evaluation.aligned.tolist()
    assert kl == pytest.approx(evaluation.kl.mean(), rel=1e-4)
    assert kl > 0


@pytest.mark.slow
def test_it_runs_as_a_script(
    single: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"IMAGES_PER_ITERATION": 2, "BATCH_SIZE": 20, "EVALUATION_IMAGES": 2}.items():
        monkeypatch.setattr(single, name, value)
    path = tmp_path / "before_after.png"
    monkeypatch.setattr(sys, "argv", ["dpok_single_file.py", "--images", "2", "--out", str(path)])
    single.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["before:", "2", "after:"]
    assert Image.open(path).height > Image.open(path).width / 4


def test_it_is_short_and_takes_nothing_from_the_library_but_the_world() -> None:
    source = FILE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    nodes = list(ast.walk(ast.parse(source)))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    ours = {module for module in modules if module is not None and module.split(".")[0] in ("dpok_gym", "agents")}
    assert ours == {"dpok_gym.shapes", "dpok_gym.shapes.judge"}
