"""docs/dpok_single_file.py computes what the library computes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from agents import DPOK, PRESETS

FILE = Path(__file__).parents[2] / "docs" / "dpok_single_file.py"
PRESET = PRESETS["laptop"]


class Enough(Exception):
    """Ends a training."""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dpok_single_file", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(
    monkeypatch: pytest.MonkeyPatch, owner: Any, loss: str, lora: Callable[[], dict[str, Tensor]], train: Callable[[], Any], n: int
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Trains for n optimiser steps; returns the loss of each, (n,), and the LoRA's n weights after them, by name."""
    losses: list[float] = []
    weights: list[dict[str, Tensor]] = []
    original = getattr(owner, loss)

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        losses.append((result if isinstance(result, Tensor) else result[0]).mean().item())
        return result

    def look(*unused: Any) -> None:
        weights.append({name: values.detach().clone() for name, values in lora().items()})
        if len(weights) == n:
            raise Enough

    hook = register_optimizer_step_post_hook(look)
    with monkeypatch.context() as patch:
        patch.setattr(owner, loss, recording)
        with pytest.raises(Enough):
            train()
    hook.remove()
    return torch.tensor(losses), weights


@pytest.mark.parametrize(("n_images", "batch_size", "n_steps"), [(64, 64, 3), (4, 20, 3)])
def test_losses_and_updates_are_those_of_the_library(
    n_images: int, batch_size: int, n_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = gymnasium.make_vec("DPOK-Shapes-v0", num_envs=64, **PRESET.env_kwargs)
    settings = PRESET.algorithm_kwargs("dpok") | {"images_per_iteration": n_images, "batch_size": batch_size}
    agent = DPOK(env=env, seed=3, held_out_reward=None, **settings)
    import time
    t = time.process_time()
    expected_losses, expected = record(
        monkeypatch, agent, "loss", agent.policy.lora.state_dict, lambda: agent.learn(PRESET.images * 10), n_steps
    )
    print(time.process_time() - t)

    single = load()
    monkeypatch.setattr(single, "IMAGES_PER_ITERATION", n_images)
    monkeypatch.setattr(single, "BATCH_SIZE", batch_size)
    policy = single.Policy(seed=3)
    t = time.process_time()
    losses, weights = record(
        monkeypatch, single, "dpok_loss", lambda: get_peft_model_state_dict(policy.unet, adapter_name="default"), lambda: single.train(policy, 3, PRESET.images), n_steps
    )
    print(time.process_time() - t)
    print(losses, losses - expected_losses, [max((a[k] - b[k]).abs().max() for k in a) for a, b in zip(weights, expected)])
    for k in weights[1]:
        d=(weights[1][k]-expected[1][k]).abs()
        if d.max()>0: print('DIFF',k,d.max(),(d>0).sum())
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
