"""The cost and the gain of several ranks: ``python -m benchmarks.ranks``.

It trains DPOK on the Shapes environment with 1, 2 and 4 ranks of one thread each on this machine, and prints the
images per second of whole iterations and the bytes that a rank puts into exchanges. Then it computes the time of an
iteration for Stable Diffusion 1.5 on 8 to 512 GPUs. From the code come: the trained parameters, the bytes, the number
of exchanges, and how unequal the ranks' shares of a batch are. The speed of a GPU was measured by
:mod:`benchmarks.gpu`, that of the network is assumed: :class:`Cluster` has the numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from agents import DPOK
from agents.common import distributed
from agents.common.buffer import even_sizes
from benchmarks.random_model import make_sd15_unet
from dpok_gym.models.lora import LoRA
from dpok_gym.models.stable_diffusion import StableDiffusion

#: Iterations that are measured, after one that warms up.
ITERATIONS = 3


@dataclass(frozen=True)
class Cluster:
    """The assumptions about the machines and the training.

    Attributes:
        flops: operations per second that the denoiser reaches on a GPU: an H100's with eight samples at a time, in
            rollouts and in updates (``results/gpu.json``).
        bandwidth: bytes per second between neighbours of the ring that adds up gradients; one 400 Gbit/s card for each
            GPU, at 80 %.
        latency: seconds for a message between neighbours.
        images_per_rank: images of an iteration for each GPU.
        steps: denoising steps, T.
        batches: optimiser steps of an iteration.
    """

    flops: float = 118e12
    bandwidth: float = 40e9
    latency: float = 20e-6
    images_per_rank: int = 8
    steps: int = 50
    batches: int = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, computes, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--images", type=int, default=64, help="of an iteration, all ranks together")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ranks.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # what each rank runs
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.images)))
        return
    measured = [start(n_ranks, options.images) for n_ranks in options.ranks]
    computed = [project(n_ranks, Cluster()) for n_ranks in (1, 8, 64, 512)]
    show(measured, computed)
    results = {"cores": os.cpu_count(), "measured": measured, "assumed": asdict(Cluster()), "computed": computed}
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def start(n_ranks: int, images: int) -> dict[str, Any]:
    """Runs :func:`measure` in some ranks, and returns what rank 0 measured."""
    words = ["-m", "benchmarks.ranks", "--one", "--images", str(images)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks)]
    command = [sys.executable, *(launcher if n_ranks > 1 else []), *words]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    lines = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]
    return next(line for line in lines if line["rank"] == 0)


def measure(images: int) -> dict[str, Any]:
    """Trains a few iterations in this rank."""
    torch.set_num_threads(1)
    distributed.start()
    agent = DPOK(env="DPOK-Shapes-v0", n_envs=16, images_per_iteration=images, kl_coef=0.01, seed=0, device="cpu")
    timesteps = images * agent.n_steps
    agent.learn(timesteps)
    distributed.barrier()
    started, given = time.perf_counter(), distributed.bytes_given
    agent.learn(ITERATIONS * timesteps, reset_num_timesteps=False)
    seconds = (time.perf_counter() - started) / ITERATIONS
    measured = {
        "rank": distributed.index(),
        "ranks": distributed.count(),
        "images_per_second": images / seconds,
        "bytes_per_iteration": (distributed.bytes_given - given) / ITERATIONS,
    }
    distributed.stop()
    return measured


def project(n_ranks: int, cluster: Cluster) -> dict[str, Any]:
    """Computes the seconds of an iteration of DPOK with a KL on Stable Diffusion 1.5, LoRA of rank 8, no guidance.

    A forward and backward pass costs three forward passes, and the pre-trained model's pass one more.
    """
    n_images = cluster.images_per_rank * n_ranks
    parameters, pass_flops = size_of_model()
    of_pass = pass_flops / cluster.flops
    draw = cluster.images_per_rank * cluster.steps * of_pass
    transitions = cluster.images_per_rank * cluster.steps / cluster.batches  # of a rank in a batch, on average
    update = cluster.batches * 4 * of_pass * transitions * inequality(n_images, n_ranks, cluster)
    gradient = 4 * parameters
    # A ring sends every byte twice, in 2 (W - 1) messages.
    ring = 2 * (n_ranks - 1) / n_ranks * gradient / cluster.bandwidth + 2 * (n_ranks - 1) * cluster.latency
    # Rewards, validity and prompts' features of all images; one exchange.
    gathered = n_images * (4 * 3 + 4 * 768) / cluster.bandwidth + (n_ranks - 1) * cluster.latency
    exchange = (cluster.batches * ring + 5 * gathered) if n_ranks > 1 else 0.0
    seconds = draw + update + exchange
    return {
        "gpus": n_ranks,
        "images": n_images,
        "seconds": seconds,
        "draw": draw,
        "update": update,
        "exchange": exchange,
        "images_per_second": n_images / seconds,
        "efficiency": 5 * cluster.images_per_rank * cluster.steps * of_pass / seconds,
    }


def inequality(n_images: int, n_ranks: int, cluster: Cluster) -> float:
    """Returns the largest share of a batch over the mean share, averaged over the batches of an iteration.

    A batch is a random choice of all transitions, so some ranks have more of them than others, and all wait.
    """
    n_transitions = n_images * cluster.steps
    order = np.random.default_rng(0).permutation(n_transitions) // (cluster.images_per_rank * cluster.steps)
    sizes = even_sizes(n_transitions, -(-n_transitions // cluster.batches))
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return float(np.mean([np.bincount(part, minlength=n_ranks).max() / (len(part) / n_ranks) for part in parts]))


@functools.cache
def size_of_model() -> tuple[int, float]:
    """Counts for Stable Diffusion 1.5, without its weights.

    Returns:
        The parameters of a LoRA of rank 8 on the attention layers, and the operations of a forward pass at 512x512.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = make_sd15_unet().requires_grad_(False)
        unet(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
        lora = LoRA(unet, 8, StableDiffusion.lora_layers["attention"])
    return sum(values.numel() for values in lora.parameters.values()), counter.get_total_flops()


def show(measured: Sequence[dict[str, Any]], computed: Sequence[dict[str, Any]]) -> None:
    """Prints the two tables."""
    console = Console(width=120)
    table = Table(title=f"DPOK on DPOK-Shapes-v0, one thread a rank, {os.cpu_count()} cores")
    for heading in ("ranks", "images/s", "of one rank", "kB a rank gives per iteration"):
        table.add_column(heading, justify="right")
    for row in measured:
        ratio = row["images_per_second"] / measured[0]["images_per_second"]
        kilobytes = row["bytes_per_iteration"] / 1e3
        table.add_row(str(row["ranks"]), f"{row['images_per_second']:.1f}", f"{ratio:.2f}", f"{kilobytes:,.0f}")
    console.print(table)
    table = Table(title="computed: Stable Diffusion 1.5 at 512x512, T = 50, LoRA of rank 8")
    headings = ("GPUs", "images", "seconds", "drawing", "update", "exchange", "images/s", "of the ideal")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in computed:
        times = [f"{row[name]:.3g}" for name in ("seconds", "draw", "update", "exchange", "images_per_second")]
        table.add_row(str(row["gpus"]), str(row["images"]), *times, f"{row['efficiency']:.0%}")
    console.print(table)


if __name__ == "__main__":
    main()
