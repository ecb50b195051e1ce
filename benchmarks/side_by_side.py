"""One iteration of DDPO here, in TRL, and in plain torch: ``python -m benchmarks.side_by_side --trl TRL/bin/python``.

All draw 48 images of the embedded diffusion model in 20 steps with guidance 2, decode them, and take one optimiser step
on all 960 transitions, with a LoRA of rank 4 in the attention, 48 transitions to a pass of the network. They do so in
float32, where nothing else is said:

- ``floor``: the calls of the denoiser and the decoder, forward and backward, and nothing else;
- ``dpok-gym``: :class:`agents.DDPO`, and the same in bfloat16, with ``torch.compile``, and with both;
- ``trl``: ``DDPOTrainer`` of TRL 0.19.1 (version 0.24 has none), and the same in bfloat16. It needs an
  environment of its own::

    python -m venv TRL
    TRL/bin/pip install torch==2.13.0 trl==0.19.1 diffusers transformers peft accelerate datasets

Each is a process of its own. They wait for each other and take turns, so that a noisy machine is noisy for all. The
table has the medians; "first" is the first iteration of a process. The iterations after which ``torch.compile`` has won
back the time of its own first one are printed below.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Any

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "dpok_gym" / "shapes" / "weights"
N_IMAGES, N_STEPS, GUIDANCE, PROMPT = 48, 20, 2.0, "three green squares"
FLOOR, OURS, TRL = "floor", "dpok-gym", "trl"
BFLOAT16, COMPILED = ", bfloat16", ", compiled"

#: An iteration's parts, with the seconds that they took.
Seconds = dict[str, float]


def main(arguments: list[str] | None = None) -> None:
    """Measures in turn, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="Python of an environment with TRL; without it, TRL is left out")
    parser.add_argument("--repeats", type=int, default=5, help="iterations of each, after the first")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(WORKERS[options.worker]())
        return
    pythons = {name: Path(sys.executable) for name in WORKERS if not name.startswith(TRL)}
    if options.trl:
        pythons |= dict.fromkeys((TRL, TRL + BFLOAT16), options.trl)
    seconds = take_turns(pythons, options.repeats)
    show(seconds)
    if options.out:
        options.out.write_text(json.dumps(seconds, indent=2) + "\n", encoding="utf-8")


def take_turns(pythons: dict[str, Path], repeats: int) -> dict[str, list[Seconds]]:
    """Starts the workers, and lets one after the other make an iteration.

    Args:
        pythons: the interpreter of each worker.
        repeats: number of iterations after the first.

    Returns:
        The seconds of the iterations of each worker.
    """
    workers = {}
    for name, python in pythons.items():
        words = [str(python), "-m", "benchmarks.side_by_side", "--worker", name]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers[name] = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
    seconds: dict[str, list[Seconds]] = {name: [] for name in workers}
    try:
        for worker in workers.values():
            _ask(worker)  # it is ready
        for _ in range(1 + repeats):
            for name, worker in workers.items():
                seconds[name].append(_ask(worker, "go\n"))
    finally:
        for worker in workers.values():
            worker.kill()
    return seconds


def _ask(worker: subprocess.Popen[str], words: str = "") -> Any:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(words)
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise RuntimeError(f"{worker.args!r} has ended; what it printed is above")
    return json.loads(answer)


def show(seconds: dict[str, list[Seconds]]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    title = f"{N_IMAGES} images, T = {N_STEPS}, guidance {GUIDANCE:g}: medians of {len(seconds[FLOOR]) - 1} iterations"
    table = Table("", "rollout, s", "update, s", "images/s", "of the floor's time", "first, s", title=title)
    floor = _medians(seconds[FLOOR])
    for name, iterations in seconds.items():
        own = _medians(iterations)
        ratios = ", ".join(f"{own[part] / floor[part]:.2f}" for part in ("rollout", "update", "both"))
        first = sum(iterations[0].values())
        cells = [f"{own[part]:.2f}" for part in ("rollout", "update")]
        table.add_row(name, *cells, f"{N_IMAGES / own['both']:.2f}", ratios, f"{first:.1f}")
    Console(width=120).print(table)
    for name in (OURS, OURS + BFLOAT16):
        if name + COMPILED not in seconds:
            continue
        compiled, eager = seconds[name + COMPILED], seconds[name]
        lost = sum(compiled[0].values()) - sum(eager[0].values())
        won = _medians(eager)["both"] - _medians(compiled)["both"]
        print(f"{name}{COMPILED}: {lost:.0f} s more at first, {won:.2f} s less in each iteration after it", end="")
        print(f": even after {lost / won:.0f} iterations" if won > 0 else ": never even")


def _medians(iterations: list[Seconds]) -> Seconds:
    warm = [each | {"both": sum(each.values())} for each in iterations[1:]]
    return {part: median(each[part] for each in warm) for part in warm[0]}


# ------------------------------------------------------------------------------------------------------------- workers


def serve(iterate: Callable[[], Seconds]) -> None:
    """Makes an iteration for each line that is read, and prints its seconds as JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    print("null", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(iterate()), file=answers, flush=True)


def plain_torch() -> Callable[[], Seconds]:
    """The calls of the networks, and nothing else."""
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS)
    unet, vae = pipeline.unet.requires_grad_(False), pipeline.vae.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    with torch.no_grad():
        conditional, empty = pipeline.encode_prompt(PROMPT, "cpu", N_IMAGES, True)
    texts = torch.cat([empty, conditional])
    latents = torch.randn(2 * N_IMAGES, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    timesteps = torch.full((2 * N_IMAGES,), 500)

    def rollout() -> None:
        with torch.no_grad():
            for _ in range(N_STEPS):
                unet(latents, timesteps, texts)
            vae.decode(latents[:N_IMAGES])

    def update() -> None:
        for _ in range(N_STEPS):
            unet(latents, timesteps, texts).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda: {"rollout": _seconds_of(rollout), "update": _seconds_of(update)}


def dpok_gym(precision: str = "float32", compiled: bool = False) -> Callable[[], Seconds]:
    """DDPO of this library."""
    from agents import DDPO
    from benchmarks.throughput import halves_of_iteration
    from dpok_gym.vector_env import DenoisingVectorEnv

    env = DenoisingVectorEnv(
        N_IMAGES,
        prompts=PROMPT,
        reward=_brightness,
        num_inference_steps=N_STEPS,
        guidance_scale=GUIDANCE,
        decode_batch_size=N_IMAGES,
        model_kwargs={"compile": True} if compiled else None,
        device="cpu",
    )
    kwargs = {"lora_rank": 4, "target_modules": "attention", "precision": precision}
    agent: Any = DDPO(env=env, micro_batch_size=N_IMAGES, policy_kwargs=kwargs, device="cpu", seed=0)
    rollout, update = halves_of_iteration(agent)
    return lambda: {"rollout": _seconds_of(rollout), "update": _seconds_of(update)}


def trl(precision: str = "no") -> Callable[[], Seconds]:
    """DDPOTrainer of TRL."""
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    config = DDPOConfig(
        mixed_precision=precision,
        allow_tf32=False,
        sample_num_steps=N_STEPS,
        sample_guidance_scale=GUIDANCE,
        sample_batch_size=N_IMAGES,
        sample_num_batches_per_epoch=1,
        train_batch_size=N_IMAGES,
        save_freq=10**9,
        project_kwargs={"project_dir": tempfile.mkdtemp()},
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(str(WEIGHTS), use_lora=True)
    trainer = DDPOTrainer(
        config, lambda images, prompts, _: (_brightness(images, prompts), {}), lambda: (PROMPT, {}), pipeline
    )
    spent = 0.0
    generate = trainer._generate_samples

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        started = time.perf_counter()
        result = generate(*args, **kwargs)
        spent = time.perf_counter() - started
        return result

    trainer._generate_samples = timed

    def iterate() -> Seconds:
        seconds = _seconds_of(lambda: trainer.step(0, 0))
        return {"rollout": spent, "update": seconds - spent}

    return iterate


def _brightness(images: Any, prompts: Any) -> Any:
    return images.float().mean(dim=(1, 2, 3))


def _seconds_of(function: Callable[[], Any]) -> float:
    return timeit(function, number=1)


WORKERS: dict[str, Callable[[], Callable[[], Seconds]]] = {
    FLOOR: plain_torch,
    OURS: dpok_gym,
    OURS + BFLOAT16: lambda: dpok_gym("bfloat16"),
    OURS + COMPILED: lambda: dpok_gym(compiled=True),
    OURS + BFLOAT16 + COMPILED: lambda: dpok_gym("bfloat16", compiled=True),
    TRL: trl,
    TRL + BFLOAT16: lambda: trl("bf16"),
}


if __name__ == "__main__":
    main()
