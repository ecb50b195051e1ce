"""How fast and how large: ``python -m benchmarks.throughput --model random-sd15 --device cuda --dtype bfloat16``.

For each number of pictures at a time: pictures drawn a second in rollouts and transitions learned from a second in
updates, where the time goes, peak memory, and the floating-point operations per second of the denoiser against those of
a large matrix product on the same device, measured in the same run. Prints one table and writes JSON with ``--out``.

``random-sd15`` is Stable Diffusion 1.5 at full size with random weights: speed and memory do not depend on them. It is
written to ``--work`` once (2 GB in half precision) and loaded from there like any checkpoint.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import string
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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
from dpok_gym.vector_env import DenoisingVectorEnv


@dataclass
class Row:
    """What was measured with one number of pictures at a time.

    Attributes:
        pictures: at a time.
        pictures_per_second: of rollouts, decoding and reward included.
        shares: of a rollout's time in the denoiser, the text encoder, the decoder, the reward, and everything else.
        rollout_flops: floating-point operations of the denoiser in rollouts, for each second that it runs.
        transitions_per_second: of updates.
        update_flops: the same, for each second of updates, forward and backward, the pre-trained model's included.
        rollout_gib: peak memory so far; on a GPU, of rollouts alone.
        update_gib: peak memory so far; on a GPU, of updates alone.
    """

    pictures: int
    pictures_per_second: float
    shares: dict[str, float]
    rollout_flops: float
    transitions_per_second: float
    update_flops: float
    rollout_gib: float
    update_gib: float


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="shapes, random-sd15, or a local diffusers folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pictures", type=int, nargs="+", default=[64], help="at a time; several make several rows")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--micro-batch-size", type=int, help="of updates")
    parser.add_argument("--transitions", type=int, default=256, help="that each update learns from, at most")
    parser.add_argument("--rollouts", type=int, default=2, help="measured, after one to warm up")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "random-sd15")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()

    model = str(save_random_sd15(options.work)) if options.model == "random-sd15" else options.model
    ceiling, rows, device = 0.0, [], torch.device("cpu")
    for pictures in options.pictures:
        env = DenoisingVectorEnv(
            pictures,
            model=model,
            prompts="shapes" if options.model == "shapes" else "dpok",
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
        rows.append(measure(env, options))
    settings = {key: value for key, value in vars(options).items() if key not in ("work", "out", "pictures")}
    settings["hardware"] = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    show(rows, ceiling, settings)
    if options.out:
        found = {"settings": settings, "ceiling_flops": ceiling, "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


def measure(env: DenoisingVectorEnv, options: argparse.Namespace) -> Row:
    """Rollouts and updates of DPOK in an environment."""
    n_transitions = env.num_envs * len(env.schedule)
    agent = DPOK(
        "DenoisingPolicy",
        env,
        timestep_fraction=min(1.0, options.transitions / n_transitions),
        micro_batch_size=options.micro_batch_size,
        use_critic=False,
        policy_kwargs={"gradient_checkpointing": options.gradient_checkpointing},
        device=str(env.model.device),
        seed=0,
    )
    callback = CallbackList([])
    callback.init_callback(agent)
    agent._setup_learn(1)
    device = env.model.device

    def collect() -> None:
        assert agent.env is not None
        agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)

    collect()  # warms up: kernels, compilation, encoded prompts
    with peak_memory(device) as rollout_memory:
        rollout_seconds = seconds_of(collect, device, options.rollouts)
    with FlopCounterMode(display=False) as counter:
        collect()
    denoiser_flops = sum(counter.flop_counts[type(env.model.denoiser).__name__].values())
    spent: dict[str, float] = defaultdict(float)
    with (
        timed(env.model, "predict", spent, "denoiser", device),
        timed(env.model, "_encode", spent, "text encoder", device),
        timed(env.model, "decode", spent, "decoder", device),
        timed(env.reward, "components", spent, "reward", device),
    ):
        total = seconds_of(collect, device, options.rollouts) * options.rollouts
    shares = {name: value / total for name, value in spent.items()}
    shares["everything else"] = 1 - sum(shares.values())

    agent.train()  # warms up
    with peak_memory(device) as update_memory:
        update_seconds = seconds_of(agent.train, device)
    with FlopCounterMode(display=False) as counter:
        agent.train()
    learned = round(agent.timestep_fraction * n_transitions)
    return Row(
        pictures=env.num_envs,
        pictures_per_second=env.num_envs / rollout_seconds,
        shares=shares,
        rollout_flops=options.rollouts * denoiser_flops / spent["denoiser"],
        transitions_per_second=learned / update_seconds,
        update_flops=counter.get_total_flops() / update_seconds,
        rollout_gib=rollout_memory[0],
        update_gib=update_memory[0],
    )


def seconds_of(function: Callable[[], Any], device: torch.device, n: int = 1) -> float:
    """Mean wall time of a call."""
    wait_for(device)
    started = time.perf_counter()
    for _ in range(n):
        function()
    wait_for(device)
    return (time.perf_counter() - started) / n


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed(owner: Any, method: str, into: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Within the block, adds up the seconds spent in ``owner.method``."""
    original: Callable[..., Any] = getattr(owner, method)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wait_for(device)
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            wait_for(device)
            into[name] += time.perf_counter() - started

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
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """A list that holds, after the block, the peak in GiB: of the block on a GPU, of the process otherwise."""
    peak: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak.append(torch.cuda.max_memory_allocated(device) / 2**30)
    else:
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of ten products of two square matrices: what the device can do at most, in practice."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: left @ right, device) for _ in range(10))


def show(rows: list[Row], ceiling: float, settings: dict[str, Any]) -> None:
    """Prints the table."""
    said = ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, False))
    table = Table(title=f"{said}\nmatrix product: {ceiling / 1e12:.3g} TFLOP/s", show_lines=True)
    for column in ("at a time", "rollout", "of its time", "denoiser", "update", "denoiser ", "peak GiB"):
        table.add_column(column)
    for row in rows:
        shares = sorted(row.shares.items(), key=lambda item: -item[1])
        table.add_row(
            str(row.pictures),
            f"{row.pictures_per_second:.3g} pictures/s",
            "\n".join(f"{share:6.1%} {name}" for name, share in shares),
            f"{row.rollout_flops / 1e12:.3g} TFLOP/s\n{row.rollout_flops / ceiling:.0%} of the product",
            f"{row.transitions_per_second:.3g} transitions/s",
            f"{row.update_flops / 1e12:.3g} TFLOP/s\n{row.update_flops / ceiling:.0%} of the product",
            f"{row.rollout_gib:.2f} rollout\n{row.update_gib:.2f} update",
        )
    Console(width=150).print(table)


def save_random_sd15(folder: Path) -> Path:
    """Writes Stable Diffusion 1.5 with random weights in bfloat16, unless it is there; returns the folder."""
    if (folder / "model_index.json").exists():
        return folder
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(special_tokens=special, end_of_word_suffix="</w>", show_progress=False)
    letters.train_from_iterator([*string.ascii_lowercase, *(f"{a}a" for a in string.ascii_lowercase), "."], trainer)
    found = json.loads(letters.to_str())["model"]
    merges = [tuple(pair) for pair in found["merges"]]
    tokenizer = CLIPTokenizer(vocab=found["vocab"], merges=merges, model_max_length=77)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **tokens
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
                sample_size=512,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),  # the defaults are those of 1.5
            scheduler=PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    pipeline.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
