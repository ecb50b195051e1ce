"""The expected memory of an update beside the measured one: ``python -m benchmarks.memory``.

For each precision, with and without gradient checkpointing, and each number of elements at a time, a process of its own
makes the denoiser at full size with random weights, and a policy with a LoRA. It takes one forward and backward pass on
the CPU, with the pre-trained model's pass beside it, and reports two peaks: of the process, without what it took before
the networks were made, and of the tensors that were alive. The first also has what operations use inside. The
expectation is :class:`agents.common.memory.Rehearsal`'s, from the configs alone. The C library is told to return what
was freed: by default it keeps much of it, and a process on the CPU then grows up to a third beyond the expectation.

It prints one table, and writes JSON with ``--out``. With ``--recipes`` it measures nothing, and prints what is expected
for each file of ``benchmarks/recipes`` on a GPU, with the margin; the held-out CLIP score, which is taken if its files
are on the disk, adds 0.9 GB. A full run takes ten minutes and 8 GB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gymnasium.spaces import Box, Dict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from agents.cli.dry_run import estimate_memory
from agents.cli.train import parse as parse_train
from agents.common.memory import LiveMemory, Rehearsal, size_of
from agents.common.policy import DenoisingPolicy
from dpok_gym.models.architecture import PUBLISHED, Architecture, find_architecture
from dpok_gym.models.base import Conditioning
from dpok_gym.samplers import DenoisingProcess, State

RECIPES = Path(__file__).parent / "recipes"

#: The C library keeps small pieces of memory that were freed, and returns larger ones. So it returns nearly all.
_RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the options; None for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="a registered name, or a diffusers folder, for its configs")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", type=int, nargs="+", default=[0, 1], choices=[0, 1])
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--image-size", type=int, help="pixels of a side; else those that the model was trained with")
    what = 'changes of the denoiser\'s config, to measure a part of a large one: {"num_layers": 2}'
    parser.add_argument("--changes", type=json.loads, default={}, metavar="JSON", help=what)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--recipes", action="store_true", help="print the expected memory of the recipes, and end")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the settings of one row, in a process of its own
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    options = parse(arguments)
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    if options.recipes:
        for path in sorted(RECIPES.glob("*.yaml")):
            print(f"{path.name:20}{expect_recipe(path) / 1e9:6.1f} GB")
        return
    rows = []
    for dtype, checkpoints, n in itertools.product(options.dtypes, options.checkpointing, options.micro_batch_sizes):
        settings = {
            "model": options.model,
            "dtype": dtype,
            "gradient_checkpointing": bool(checkpoints),
            "n": n,
            "guidance_scale": options.guidance_scale,
            "image_size": options.image_size,
            "changes": options.changes,
        }
        measured = measure_apart(settings)
        counted = expect(**settings)
        rows.append(settings | measured | {"expected": counted, "ratio": counted / measured["process"]})
        if options.out:  # after each row, as all of them take long
            software = {"torch": torch.__version__, "hardware": platform.processor() or platform.machine()}
            options.out.write_text(json.dumps({"settings": software, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    show(rows)


def expect_recipe(path: Path) -> int:
    """Returns the bytes to expect of a recipe on a GPU, with the margin and without a held-out reward."""
    config = parse_train(["--config", str(path), "--held-out-reward", "None"]).config
    return estimate_memory(config, PUBLISHED[config.env_kwargs["model"]]).expected


def measure_apart(settings: dict[str, Any]) -> dict[str, int]:
    """Returns what :func:`measure` does in a process of its own, whose peak is that of these settings alone."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", json.dumps(settings)]
    done = subprocess.run(command, env=os.environ | _RETURNS_MEMORY, stdout=subprocess.PIPE, check=True, text=True)
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def expect(
    model: str,
    dtype: str,
    gradient_checkpointing: bool,
    n: int,
    guidance_scale: float,
    image_size: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> int:
    """Returns the expected bytes: the denoiser, the LoRA with its gradient, and the passes.

    The optimiser's moments come after the first backward pass, which is the one that is measured.
    """
    rehearsal = Rehearsal(find_changed(model, changes), dtype, image_size, guidance_scale=guidance_scale)
    weights = rehearsal.denoiser_bytes + 2 * size_of(rehearsal.trained)
    return weights + rehearsal.update(n, gradient_checkpointing)


def measure(
    model: str,
    dtype: str,
    gradient_checkpointing: bool,
    n: int,
    guidance_scale: float,
    image_size: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Takes a forward and backward pass; returns the peaks in bytes, of the ``process`` and of its ``tensors``."""
    architecture = find_changed(model, changes)
    shapes = Rehearsal(architecture, dtype, image_size).told
    before = resident_bytes("VmRSS")
    policy, state = make_policy(architecture, dtype, gradient_checkpointing, n, guidance_scale, image_size, shapes)
    networks = size_of([*policy.model.denoiser.parameters()])
    for value in policy.denoiser_parameters():
        value.grad = torch.zeros_like(value)
    known = [*policy.model.denoiser.parameters(), *(value.grad for value in policy.denoiser_parameters())]
    with LiveMemory(value for value in known if value is not None) as memory, policy.adapter_enabled():
        mean, _ = policy.transition(state)
        policy.reference_transition(state)
        mean.sum().backward()
    tensors = networks + size_of(policy.denoiser_parameters()) + memory.peak
    return {"process": resident_bytes("VmHWM") - before, "tensors": tensors}


def find_changed(model: str, changes: Mapping[str, Any] | None) -> Architecture:
    """Finds the architecture of a model, with some changes of its denoiser's config."""
    found = find_architecture(model)
    part = found.family.denoiser_part
    return Architecture(found.pipeline, {**found.configs, part: {**found.configs[part], **(changes or {})}})


def make_policy(
    architecture: Architecture,
    dtype: str,
    gradient_checkpointing: bool,
    n: int,
    guidance_scale: float,
    image_size: int | None,
    shapes: Conditioning,
) -> tuple[DenoisingPolicy, State]:
    """Makes a policy with a LoRA on a denoiser of random weights, on the CPU, and ``n`` states of random latents.

    The other networks have no weights. The prompts are made up in the ``shapes`` that the text encoders give.
    """
    model: Any = architecture.make(getattr(torch, dtype)).configured(image_size, None)

    def told(rows: int) -> dict[str, Tensor]:
        return {name: torch.ones(rows, *value.shape[1:], dtype=value.dtype) for name, value in shapes.items()}

    conditioning, model._unconditional = told(n), told(1)
    _fill(model.denoiser)
    model.device = torch.device("cpu")
    process = DenoisingProcess(model, num_inference_steps=20, guidance_scale=guidance_scale)
    latent = Box(-1, 1, model.latent_shape)
    policy = DenoisingPolicy(
        Dict({"latent": latent}),
        latent,
        lambda _: 1e-4,
        process=process,
        gradient_checkpointing=gradient_checkpointing,
        max_batch_size=None,
    )
    return policy, process.state(torch.randn(n, *model.latent_shape), 0, conditioning)


@torch.no_grad()
def _fill(network: nn.Module) -> None:
    """Gives a network without weights random ones, on the CPU."""
    network.to_empty(device="cpu")
    for value in [*network.parameters(), *network.buffers()]:
        if value.is_floating_point():
            value.normal_(std=0.02)


def resident_bytes(name: str) -> int:
    """Returns the resident memory of this process: "VmRSS" is that of now, "VmHWM" the largest. Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 2**10
    raise OSError(f"/proc/self/status has no {name}; run this on Linux")


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table."""
    changes = "".join(f", {name} {value}" for name, value in rows[0]["changes"].items())
    table = Table(title=f"{rows[0]['model']}{changes}, one forward and backward pass, GiB with the weights")
    for heading in ("weights", "checkpointing", "at a time", "expected", "tensors", "process", "expected / process"):
        table.add_column(heading)
    for row in rows:
        sizes = [f"{row[name] / 2**30:.2f}" for name in ("expected", "tensors", "process")]
        checkpoints = "yes" if row["gradient_checkpointing"] else "no"
        table.add_row(row["dtype"], checkpoints, str(row["n"]), *sizes, f"{row['ratio']:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
