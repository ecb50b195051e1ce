"""Speed and memory: ``python -m benchmarks.throughput --model random-sd15 --device cuda --dtype bfloat16``.

For each number of images side by side it measures

- the images per second of rollouts, and the transitions per second of updates;
- the shares of a rollout's time;
- the peak memory;
- the floating-point operations per second of the denoiser, beside those of a large matrix product on the same device.

It prints one table, and writes JSON with ``--out``.

``random-sd15`` is Stable Diffusion 1.5 at full size with random weights. It is written to ``--work`` once (2 GB in half
precision), and loaded from there like any checkpoint.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import CallbackList
from torch.utils.flop_counter import FlopCounterMode

from agents import DPOK
from agents.common.algorithm import DenoisingAlgorithm
from dpok_gym.vector_env import DenoisingVectorEnv

#: Name of the share of a rollout's time that is this project's own.
OUTSIDE = "outside networks and reward"


@dataclass
class Measurement:
    """The measurements with one number of images.

    Attributes:
        images: number of images side by side.
        images_per_second: of rollouts, decoding and reward included.
        shares: of a rollout's time, in [0, 1]: in the denoiser, the text encoder, the decoder and the reward, and
            outside of these.
        rollout_flops: floating-point operations of the denoiser in rollouts, for each second that it runs.
        transitions_per_second: of updates.
        update_flops: floating-point operations for each second of updates, forward and backward, the pre-trained
            model's included.
        rollout_gib: peak memory; on a GPU of rollouts alone, else of the process so far.
        update_gib: the same of updates.
    """

    images: int
    images_per_second: float
    shares: dict[str, float]
    rollout_flops: float
    transitions_per_second: float
    update_flops: float
    rollout_gib: float
    update_gib: float


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the options; None for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="shapes, random-sd15, or a local diffusers folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--images", type=int, nargs="+", default=[64], help="side by side; several make several rows")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--micro-batch-size", type=int, help="transitions of a forward and backward pass")
    parser.add_argument("--transitions", type=int, default=256, help="most transitions that an update learns from")
    parser.add_argument("--rollouts", type=int, default=2, help="number of rollouts measured, after one to warm up")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for random-sd15")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    options = parse(arguments)
    model, prompts = options.model, "shapes" if options.model == "shapes" else "dpok"
    if model == "random-sd15":
        from benchmarks.random_model import save_random

        model = str(save_random("sd15", options.work / model))
    ceiling, measurements, device = 0.0, [], torch.device("cpu")
    for images in options.images:
        env = DenoisingVectorEnv(
            images,
            model=model,
            prompts=prompts,
            reward="jpeg-compressibility",
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            image_size=options.image_size,
            device=options.device,
            dtype=options.dtype,
            model_kwargs={"compile": options.compile},
        )
        device = env.model.device
        ceiling = ceiling or matrix_product_flops(device, getattr(torch, options.dtype))
        measurements.append(measure(env, options))
    settings = {key: value for key, value in vars(options).items() if key not in ("work", "out", "images")}
    settings["hardware"] = platform.processor() or platform.machine()
    if device.type == "cuda":
        settings["hardware"] = torch.cuda.get_device_name(device)
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    show(measurements, ceiling, settings)
    if options.out:
        rows = [asdict(measurement) for measurement in measurements]
        results = {"settings": settings, "ceiling_flops": ceiling, "rows": rows}
        options.out.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")


def measure(env: DenoisingVectorEnv, options: argparse.Namespace) -> Measurement:
    """Measures rollouts and updates of DPOK in an environment."""
    device, n_transitions = env.model.device, env.num_envs * env.process.num_inference_steps
    agent = DPOK(
        env=env,
        timestep_fraction=min(1.0, options.transitions / n_transitions),
        micro_batch_size=options.micro_batch_size,
        use_critic=False,
        policy_kwargs={"gradient_checkpointing": options.gradient_checkpointing},
        device=str(device),
        seed=0,
    )
    collect, update = halves_of_iteration(agent)
    collect()  # warms up: kernels, compilation, encoded prompts
    with peak_memory(device) as rollout_memory:
        rollout_seconds = seconds_of(collect, device, options.rollouts)
    with counted_flops() as counter:
        collect()
    denoiser_flops = sum(counter.flop_counts[type(env.model.denoiser).__name__].values())
    spent = time_parts(env, collect, options.rollouts)
    total = spent.pop("total")
    shares = {name: seconds / total for name, seconds in spent.items()}
    shares[OUTSIDE] = 1 - sum(shares.values())

    update()  # warms up
    with peak_memory(device) as update_memory:
        update_seconds = seconds_of(update, device)
    with counted_flops() as counter:
        update()
    return Measurement(
        images=env.num_envs,
        images_per_second=env.num_envs / rollout_seconds,
        shares=shares,
        rollout_flops=options.rollouts * denoiser_flops / spent["denoiser"],
        transitions_per_second=round(agent.timestep_fraction * n_transitions) / update_seconds,
        update_flops=counter.get_total_flops() / update_seconds,
        rollout_gib=rollout_memory[0],
        update_gib=update_memory[0],
    )


def halves_of_iteration(agent: DenoisingAlgorithm) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns two functions, a rollout and an update, which together are one iteration of ``agent.learn``.

    So each rollout has new images and prompts.
    """
    callback = CallbackList([])
    callback.init_callback(agent)
    agent._setup_learn(1)

    def collect() -> None:
        agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
        agent._finish_iteration(log_interval=0)

    def update() -> None:
        with agent._logged_update(len(agent.rollout_buffer)):
            agent.train()

    return collect, update


def time_parts(env: DenoisingVectorEnv, collect: Callable[[], None], n: int) -> dict[str, float]:
    """Measures the seconds of ``n`` rollouts in all, and in the networks and the reward."""
    device = env.model.device
    spent: dict[str, float] = defaultdict(float)
    with (
        timed(env.model, "predict", spent, "denoiser", device),
        timed(env.model, "_encode", spent, "text encoder", device),
        timed(env.model, "decode", spent, "decoder", device),
        timed(env.reward, "components", spent, "reward", device),
    ):
        spent["total"] = seconds_of(collect, device, n) * n
    return spent


def seconds_of(function: Callable[[], Any], device: torch.device, n: int = 1) -> float:
    """Measures the mean wall time of ``n`` calls."""
    wait_for(device)
    started = time.perf_counter()
    for _ in range(n):
        function()
    wait_for(device)
    return (time.perf_counter() - started) / n


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed(owner: Any, method: str, spent: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Within the block, adds the seconds spent in ``owner.method`` to ``spent[name]``."""
    original: Callable[..., Any] = getattr(owner, method)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wait_for(device)
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            wait_for(device)
            spent[name] += time.perf_counter() - started

    # The wrapper hides the method of the class; an attribute that the owner itself had comes back.
    replaced = vars(owner).get(method)
    setattr(owner, method, wrapper)
    try:
        yield
    finally:
        if replaced is None:
            delattr(owner, method)
        else:
            setattr(owner, method, replaced)


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Yields a counter of the floating-point operations in the block, which runs without compilation: it hides them."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        yield counter


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Yields a list that holds, after the block, the peak in GiB: of the block on a GPU, of the process otherwise."""
    peak: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak.append(torch.cuda.max_memory_allocated(device) / 2**30)
    else:
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the operations per second of the best of ten products of two square matrices: a ceiling in practice."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: left @ right, device) for _ in range(10))


def show(measurements: Sequence[Measurement], ceiling: float, settings: dict[str, Any]) -> None:
    """Prints the table.

    Args:
        measurements: one for each row.
        ceiling: operations per second of the matrix product.
        settings: for the title.
    """
    title = ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, False))
    table = Table(title=f"{title}\nmatrix product: {ceiling / 1e12:.3g} TFLOP/s", show_lines=True)
    for heading in ("side by side", "rollout", "of its time", "denoiser", "update", "denoiser ", "peak GiB"):
        table.add_column(heading)
    for row in measurements:
        shares = sorted(row.shares.items(), key=lambda item: -item[1])
        table.add_row(
            str(row.images),
            f"{row.images_per_second:.3g} images/s",
            "\n".join(f"{share:6.1%} {name}" for name, share in shares),
            f"{row.rollout_flops / 1e12:.3g} TFLOP/s\n{row.rollout_flops / ceiling:.0%} of the product",
            f"{row.transitions_per_second:.3g} transitions/s",
            f"{row.update_flops / 1e12:.3g} TFLOP/s\n{row.update_flops / ceiling:.0%} of the product",
            f"{row.rollout_gib:.2f} rollout\n{row.update_gib:.2f} update",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
