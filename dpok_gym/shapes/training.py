"""The training loop of the shapes world's networks. An interrupted run continues where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpok_gym.utils.files import replacing


def seeded_generator(step: int) -> torch.Generator:
    """Returns the generator of one training step, and seeds torch's own one.

    Both depend on the step's number alone, so a resumed run draws what an uninterrupted one would.
    """
    torch.manual_seed(step)
    return torch.Generator().manual_seed(step)


def minimise(
    name: str,
    modules: nn.ModuleDict,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    folder: Path,
    ema_decay: float = 0.0,
    warmup: int = 100,
) -> nn.ModuleDict:
    """Minimises ``loss(step)`` with AdamW; the learning rate falls linearly to zero.

    A checkpoint is written every 250 steps to ``folder/name.pt``. If it exists at the start, the run continues from it.

    Args:
        name: of the checkpoint, and of this stage in the log.
        modules: the networks to train.
        loss: returns the loss of a step, a scalar.
        steps: number of optimiser steps.
        learning_rate: the highest one.
        folder: of the checkpoint and ``log.jsonl``.
        ema_decay: decay of the exponential moving average of the weights, in [0, 1); 0 for no average.
        warmup: steps in which the learning rate rises linearly.

    Returns:
        The modules, with averaged weights if ``ema_decay`` is above 0, else with the last ones.
    """
    averaged = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    )
    optimizer = torch.optim.AdamW(modules.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(1 - step / steps, 0.0))
    )
    state: dict[str, Any] = {"modules": modules, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    checkpoint, first = folder / f"{name}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        for key, part in state.items():
            part.load_state_dict(saved[key])
        first = saved["step"]
    running, started = 0.0, time.monotonic()
    for step in range(first, steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(modules)
        running += value.item()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            line = {"stage": name, "step": step + 1, "loss": round(running / 50, 5), "seconds": round(seconds, 1)}
            print(json.dumps(line), flush=True)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            running = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            saved = {key: part.state_dict() for key, part in state.items()} | {"step": step + 1}
            with replacing(checkpoint) as file:
                torch.save(saved, file)
    return averaged.module if ema_decay else modules  # type: ignore[return-value]  # it is a copy of the modules
