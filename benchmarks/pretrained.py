"""What the embedded model draws before any fine-tuning: ``python -m benchmarks.pretrained``.

Prints the share of fully aligned pictures and the mean quality for each category of prompts, next to the quality of
VAE reconstructions of real scenes, and writes a grid of pictures with ``--grid``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import dpok_gym
from agents.common.evaluation import draw
from agents.cli.plots import picture_grid
from dpok_gym.shapes.captions import CATEGORIES, all_requests, sample_requested_scenes
from dpok_gym.shapes.judge import judge
from dpok_gym.shapes.scenes import render
from dpok_gym.vector_env import DenoisingVectorEnv


def reconstruction_quality(n_scenes: int, seed: int) -> float:
    """Mean quality of real scenes after a way through the autoencoder."""
    scenes, requests = sample_requested_scenes(n_scenes, torch.Generator().manual_seed(seed))
    vae = dpok_gym.load_model("shapes").vae  # type: ignore[attr-defined]
    with torch.no_grad():
        parts = [vae.decode(vae.encode(2 * part - 1).latent_dist.mean).sample for part in render(scenes).split(64)]
    pictures = (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
    return judge(pictures, [str(request) for request in requests]).quality.mean().item()


def main() -> None:
    """Draws, judges and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=256, help="pictures for each category")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="write a PNG of the first pictures of each category")
    options = parser.parse_args()

    env = DenoisingVectorEnv(
        min(options.pictures, 64),
        reward={"shapes-alignment": 1.0, "shapes-quality": 1.0},
        guidance_scale=options.guidance_scale,
        num_inference_steps=options.num_inference_steps,
    )
    table = Table("category", "fully aligned", "alignment", "quality", title="pre-trained embedded model")
    rng, aligned, qualities, rows, prompts_of = np.random.default_rng(options.seed), [], [], [], []
    for category in CATEGORIES:
        requests = all_requests(category)
        prompts = [str(requests[i]) for i in rng.integers(len(requests), size=options.pictures)]
        drawn = draw(env.pretrained_transition, env, prompts, options.seed)
        qualities.append(drawn.rewards["shapes-quality"].mean())
        alignment = drawn.rewards["shapes-alignment"].mean()
        table.add_row(category, f"{drawn.aligned_share:.3f}", f"{alignment:.3f}", f"{qualities[-1]:.3f}")
        aligned.append(drawn.rewards["shapes-alignment"] == 1)
        rows.append(drawn.pictures[:16])
        prompts_of += prompts[:16]
    table.add_row("all", f"{np.mean(aligned):.3f}", "", f"{np.mean(qualities):.3f}")
    reconstructed = reconstruction_quality(options.pictures, options.seed)
    table.add_row("VAE reconstructions", "", "", f"{reconstructed:.3f}")
    table.add_row("ratio", "", "", f"{np.mean(qualities) / reconstructed:.3f}")
    Console().print(table)
    if options.grid:
        picture_grid(np.concatenate(rows), prompts_of, options.grid, "pre-trained embedded model")


if __name__ == "__main__":
    main()
