"""Speed and memory of a denoiser alone: ``python -m benchmarks.denoiser --model sd3-medium --device cuda --compile``.

For each batch size it measures forward passes without gradients; and once a forward and backward pass of one sample
through a LoRA, with gradient checkpointing. The weights are random, at full size. It prints one table, and writes JSON
with ``--out``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.random_model import make_sd3_transformer, make_sd15_unet
from benchmarks.throughput import counted_flops, matrix_product_flops, peak_memory, seconds_of
from dpok_gym.models.lora import LoRA
from dpok_gym.models.stable_diffusion import StableDiffusion

#: Tokens of CLIP's text encoders, and of these with those of T5.
_CLIP_TOKENS, _CLIP_AND_T5_TOKENS = 77, 77 + 256


@dataclass
class Denoiser:
    """A network and the arguments of its call.

    Attributes:
        make: returns the network.
        inputs: for each argument but the timestep, the shape of one sample.
    """

    make: Callable[[], Any]
    inputs: dict[str, tuple[int, ...]]


DENOISERS = {
    "sd15": Denoiser(make_sd15_unet, {"sample": (4, 64, 64), "encoder_hidden_states": (_CLIP_TOKENS, 768)}),
    "sd3-medium": Denoiser(
        make_sd3_transformer,
        {
            "hidden_states": (16, 128, 128),
            "encoder_hidden_states": (_CLIP_AND_T5_TOKENS, 4096),
            "pooled_projections": (2048,),
        },
    ),
}


@dataclass
class Forward:
    """Forward passes of a batch without gradients.

    Attributes:
        batch_size: samples in a pass; with guidance an image is two.
        samples_per_second: that went through the network.
        flops: floating-point operations per second.
        gib: peak memory; on a GPU of these passes, else of the process so far.
    """

    batch_size: int
    samples_per_second: float
    flops: float
    gib: float


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the options; None for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", choices=DENOISERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--passes", type=int, default=5, help="that are measured, after one to warm up")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    options = parse(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    denoiser = DENOISERS[options.model]
    with torch.device(device):
        network = denoiser.make().to(dtype).requires_grad_(False).eval()
    if options.compile:
        network.compile()
    ceiling = matrix_product_flops(device, dtype)
    rows = [measure_forward(network, denoiser, size, device, dtype, options.passes) for size in options.batch_sizes]
    update_seconds, update_gib = measure_update(network, denoiser, device, dtype, options.passes)
    settings = {"model": options.model, "device": str(device), "dtype": options.dtype, "compile": options.compile}
    table = Table(title=f"{settings}\nmatrix product: {ceiling / 1e12:.3g} TFLOP/s")
    for heading in ("samples", "samples per second", "of the matrix product", "peak GiB"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            str(row.batch_size), f"{row.samples_per_second:.3g}", f"{row.flops / ceiling:.0%}", f"{row.gib:.2f}"
        )
    table.add_row("1, with a LoRA's gradient", f"{1 / update_seconds:.3g}", "", f"{update_gib:.2f}")
    Console().print(table)
    if options.out:
        results: dict[str, Any] = {
            "settings": settings,
            "ceiling_flops": ceiling,
            "rows": [asdict(row) for row in rows],
        }
        results |= {"update_seconds": update_seconds, "update_gib": update_gib}
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def make_inputs(denoiser: Denoiser, batch_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns random arguments of the network for a batch."""
    inputs = {
        name: torch.randn(batch_size, *shape, device=device, dtype=dtype) for name, shape in denoiser.inputs.items()
    }
    return inputs | {"timestep": torch.full((batch_size,), 500, device=device)}


@torch.no_grad()
def measure_forward(
    network: nn.Module, denoiser: Denoiser, batch_size: int, device: torch.device, dtype: torch.dtype, passes: int
) -> Forward:
    """Measures forward passes of a batch."""
    inputs = make_inputs(denoiser, batch_size, device, dtype)
    network(**inputs)  # warms up: kernels, compilation
    with peak_memory(device) as memory:
        seconds = seconds_of(lambda: network(**inputs), device, passes)
    with counted_flops() as counter:
        network(**inputs)
    return Forward(batch_size, batch_size / seconds, counter.get_total_flops() / seconds, memory[0])


def measure_update(
    network: Any, denoiser: Denoiser, device: torch.device, dtype: torch.dtype, passes: int
) -> tuple[float, float]:
    """Returns the seconds and the peak GiB of a forward and backward pass of one sample through a LoRA."""
    lora = LoRA(network, 8, StableDiffusion.lora_layers["attention"])
    network.enable_gradient_checkpointing()
    inputs = make_inputs(denoiser, 1, device, dtype)

    def update() -> None:
        with lora.enabled():
            network(**inputs).sample.float().square().mean().backward()

    update()  # warms up
    with peak_memory(device) as memory:
        seconds = seconds_of(update, device, passes)
    return seconds, memory[0]


if __name__ == "__main__":
    main()
