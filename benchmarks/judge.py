"""The accuracy and the speed of the judge of the shapes world: ``python -m benchmarks.judge``.

It draws random scenes, which are known, and judges their images, clean and after the autoencoder.

Letters used for shapes: B images, H x W an image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dpok_gym.shapes import WEIGHTS
from dpok_gym.shapes.captions import sample_requested_scenes
from dpok_gym.shapes.judge import Judgement, judge
from dpok_gym.shapes.scenes import Scenes, render

Result = TypeVar("Result")


def object_kinds(scenes: Scenes) -> list[list[tuple[int, int]]]:
    """Returns the (colour, shape) of every object, sorted, one list for each scene."""
    kinds = []
    for count, colours, shapes in zip(
        scenes.count.tolist(), scenes.colour.tolist(), scenes.shape.tolist(), strict=True
    ):
        kinds.append(sorted(zip(colours[:count], shapes[:count], strict=True)))
    return kinds


def share_exact(true: Scenes, detected: Scenes) -> float:
    """Returns the share of scenes in which exactly the true objects were detected."""
    pairs = zip(object_kinds(true), object_kinds(detected), strict=True)
    return sum(ours == theirs for ours, theirs in pairs) / len(true)


@torch.no_grad()
def reconstruct(vae: Any, images: Tensor, batch_size: int = 50) -> Tensor:
    """Encodes and decodes images with a diffusers autoencoder, by the mean of the posterior.

    Args:
        vae: the autoencoder.
        images: (B, 3, H, W) in [0, 1].
        batch_size: images at a time.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    decoded = []
    for batch in images.split(batch_size):
        latents = vae.encode(2 * batch - 1).latent_dist.mean
        decoded.append(vae.decode(latents).sample)
    return ((torch.cat(decoded) + 1) / 2).clamp(0, 1)


def timed(function: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """Calls a function; returns its result, and the wall time in seconds."""
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def aligned_share(judgement: Judgement) -> float:
    """Returns the share of images with alignment 1."""
    return (judgement.alignment == 1).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of scenes to draw and judge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, default=WEIGHTS, help="diffusers folder with a vae/ in it")
    options = parser.parse_args(arguments)
    if options.images < 1:
        parser.error(f"--images must be at least 1, not {options.images}")
    if not (options.vae / "vae" / "config.json").is_file():
        parser.error(f"there is no autoencoder in {options.vae / 'vae'}; name its diffusers folder with --vae")
    vae = AutoencoderKL.from_pretrained(options.vae, subfolder="vae").eval()

    generator = torch.Generator().manual_seed(options.seed)
    (scenes, requests), sampling_seconds = timed(sample_requested_scenes, options.images, generator)
    prompts = [str(request) for request in requests]
    images, drawing_seconds = timed(render, scenes)
    clean, judging_seconds = timed(judge, images, prompts)
    reconstructed, judging_again_seconds = timed(judge, reconstruct(vae, images), prompts)

    print(f"{options.images} scenes, seed {options.seed}, {torch.get_num_threads()} threads")
    print(f"{'':32}{'clean':>8}{'autoencoder':>14}")
    rows = {
        "read exactly": (share_exact(scenes, clean.scenes), share_exact(scenes, reconstructed.scenes)),
        "alignment 1 with their caption": (aligned_share(clean), aligned_share(reconstructed)),
        "mean quality": (clean.quality.mean().item(), reconstructed.quality.mean().item()),
    }
    for name, (of_clean, of_reconstructed) in rows.items():
        print(f"{name:32}{of_clean:8.4f}{of_reconstructed:14.4f}")
    drawn = options.images / (sampling_seconds + drawing_seconds)
    judged = 2 * options.images / (judging_seconds + judging_again_seconds)
    print(f"scenes sampled and drawn per second  {drawn:8.0f}")
    print(f"images judged per second             {judged:8.0f}")


if __name__ == "__main__":
    main()
