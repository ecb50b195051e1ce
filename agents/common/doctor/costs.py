"""Checks of what a training costs: memory and time."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import torch

from agents.common.algorithm import DenoisingAlgorithm
from agents.common.callbacks import format_seconds
from agents.common.doctor.finding import Finding, judge

#: Share of the memory that should be left for what was not measured.
_SPARE = 0.1


class Meter:
    """Measures the time and the peak of memory of a block of code: ``with meter: ...``.

    Args:
        device: whose memory is measured: a GPU's own, or that of the process.

    Attributes:
        seconds: that the block took.
        peak: bytes; on the CPU it is that of the process so far. 0 if it is unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds, self.peak = 0.0, 0

    def __enter__(self) -> Meter:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak = _peak_of_process()
        self.seconds = time.perf_counter() - self._started


def check_memory(device: torch.device, rollout: int, update: int) -> Finding:
    """Compares the peaks of drawing and of updating, in bytes, with the memory that there is."""
    total, peak = _memory_of(device), max(rollout, update)
    where = f"on {device}" if device.type == "cuda" else "in this process"
    return judge(
        "memory",
        f"at most {_gib(rollout)} while images are drawn, {_gib(update)} while it learns, {where}, of {_gib(total)}",
        f"{_SPARE:.0%} or more are left",
        "micro_batch_size='auto', gradient_checkpointing and dtype='bfloat16' take less to learn; fewer n_envs and a "
        "smaller max_batch_size to draw",
        False,
        0 < (1 - _SPARE) * total < peak,
    )


def check_throughput(
    agent: DenoisingAlgorithm,
    n_images: int,
    n_steps: int,
    rollout: Meter,
    update: Meter,
    total_images: int,
    eval_images: int,
) -> Finding:
    """Tells how long the whole training will take.

    Args:
        agent: the agent.
        n_images: images that were drawn and learned from.
        n_steps: optimiser steps of their update.
        rollout: around their drawing.
        update: around their update.
        total_images: images of the whole training, if it draws any.
        eval_images: images of each of the two evaluations; 0 if there is none.
    """
    drawing, learning = rollout.seconds / n_images, update.seconds / n_images
    seconds = total_images * (drawing + learning)
    speed = f"draws {1 / drawing:.3g} and learns from {1 / learning:.3g} images per second"
    what = f"{total_images:,} images"
    total_steps = agent.count_optimizer_steps(total_images)
    if total_steps is not None:
        of_step = update.seconds / n_steps
        seconds = total_images * drawing * agent.draws_images + total_steps * of_step
        speed = f"draws {1 / drawing:.3g} images and takes {1 / of_step:.3g} optimiser steps per second"
        what = what if agent.draws_images else f"{total_steps:,} optimiser steps"
    # The second evaluation asks the pre-trained model too, for the KL.
    evaluation = (
        f", and about {format_seconds(3 * eval_images * drawing)} for the two evaluations" if eval_images else ""
    )
    return Finding(
        "throughput",
        "ok",
        f"{speed}: about {format_seconds(seconds)} for {what}{evaluation}",
        "as long as you want to wait",
        "fewer num_inference_steps, guidance_scale=1, a smaller timestep_fraction or fewer images take less time",
    )


def _memory_of(device: torch.device) -> int:
    """Returns the bytes of memory that there are; 0 if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _peak_of_process() -> int:
    """Returns the most memory in bytes that this process has had; 0 if that is unknown."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes else "an unknown amount"
