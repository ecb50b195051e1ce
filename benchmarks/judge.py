"""How well the judge reads the shapes world, and how fast: ``python -m benchmarks.judge``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dpok_gym.shapes import WEIGHTS
from dpok_gym.shapes.captions import sample_requested_scenes
from dpok_gym.shapes.judge import judge
from dpok_gym.shapes.scenes import Scenes, render


def kinds(scenes: Scenes) -> list[list[tuple[int, int]]]:
    """The (colour, shape) of every object, sorted, one list per scene."""
    rows = zip(scenes.count.tolist(), scenes.colour.tolist(), scenes.shape.tolist(), strict=True)
    return [sorted(zip(colours[:n], shapes[:n], strict=True)) for n, colours, shapes in rows]


def share_exact(truth: Scenes, found: Scenes) -> float:
    """Share of scenes in which exactly the true objects were found."""
    return sum(a == b for a, b in zip(kinds(truth), kinds(found), strict=True)) / len(truth)


@torch.no_grad()
def reconstruct(vae: Any, pictures: Tensor, batch_size: int = 50) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] through a diffusers autoencoder and back, by the mean of the posterior."""
    batches = [vae.decode(vae.encode(2 * batch - 1).latent_dist.mode()).sample for batch in pictures.split(batch_size)]
    return ((torch.cat(batches) + 1) / 2).clamp(0, 1)


def timed(function: Callable, *arguments):
    """The function's result, and the wall-clock seconds it took."""
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000, help="how many scenes to draw and read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, default=WEIGHTS, help="diffusers folder with a vae/ in it")
    options = parser.parse_args(arguments)
    if options.pictures < 1:
        parser.error(f"--pictures must be at least 1, not {options.pictures}")
    if not (options.vae / "vae" / "config.json").is_file():
        parser.error(f"there is no autoencoder in {options.vae / 'vae'}; name its diffusers folder with --vae")
    vae = AutoencoderKL.from_pretrained(options.vae, subfolder="vae").eval()

    generator = torch.Generator().manual_seed(options.seed)
    (scenes, requests), sampling = timed(sample_requested_scenes, options.pictures, generator)
    prompts = [str(request) for request in requests]
    pictures, drawing = timed(render, scenes)
    reconstructions = reconstruct(vae, pictures)
    clean, judging = timed(judge, pictures, prompts)
    reconstructed, judging_too = timed(judge, reconstructions, prompts)

    print(f"{options.pictures} scenes, seed {options.seed}, {torch.get_num_threads()} threads")
    print(f"{'':32}{'clean':>8}{'autoencoder':>14}")
    rows = {
        "read exactly": (share_exact(scenes, clean.scenes), share_exact(scenes, reconstructed.scenes)),
        "alignment 1 with their caption": tuple(
            (verdict.alignment == 1).float().mean().item() for verdict in (clean, reconstructed)
        ),
        "mean quality": (clean.quality.mean().item(), reconstructed.quality.mean().item()),
    }
    for name, (of_clean, of_reconstructed) in rows.items():
        print(f"{name:32}{of_clean:8.4f}{of_reconstructed:14.4f}")
    print(f"scenes sampled and drawn per second  {options.pictures / (sampling + drawing):8.0f}")
    print(f"pictures judged per second           {2 * options.pictures / (judging + judging_too):8.0f}")


if __name__ == "__main__":
    main()
