"""What the embedded model draws before any fine-tuning: ``python -m benchmarks.pretrained``.

Prints the share of fully aligned pictures and the mean quality for each category of prompts, next to the quality of
VAE reconstructions of real scenes, and writes a grid of pictures with ``--grid``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import dpok_gym
from dpok_gym.shapes.captions import CATEGORIES, all_requests, sample_requested_scenes
from dpok_gym.shapes.judge import judge
from dpok_gym.shapes.scenes import render


def draw(prompts: list[str], seed: int, guidance_scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Alignment (N,), quality (N,) and pictures (N, H, W, 3) uint8 of the pre-trained model."""
    env = gymnasium.make_vec(
        "DPOK-Shapes-v0",
        num_envs=len(prompts),
        reward={"shapes-alignment": 1.0, "shapes-quality": 1.0},
        guidance_scale=guidance_scale,
    )
    policy = dpok_gym.pretrained_policy(env, seed)
    observation, _ = env.reset(seed=seed, options={"prompt": prompts})
    ended = np.zeros(1, bool)
    while not ended.any():
        observation, _, ended, _, infos = env.step(policy(observation))
    last = infos["final_info"]
    return last["rewards"]["shapes-alignment"], last["rewards"]["shapes-quality"], last["image"]


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="write a PNG of the first pictures of each category")
    options = parser.parse_args()

    table = Table("category", "fully aligned", "alignment", "quality", title="pre-trained embedded model")
    rng, aligned, qualities, rows, prompts_of = np.random.default_rng(options.seed), [], [], [], []
    for category in CATEGORIES:
        requests = all_requests(category)
        prompts = [str(requests[i]) for i in rng.integers(len(requests), size=options.pictures)]
        alignment, quality, pictures = draw(prompts, options.seed, options.guidance_scale)
        full = alignment == 1
        table.add_row(category, f"{full.mean():.3f}", f"{alignment.mean():.3f}", f"{quality.mean():.3f}")
        aligned.append(full.mean())
        qualities.append(quality.mean())
        rows.append(pictures[:16])
        prompts_of.append(prompts[:16])
    table.add_row("all", f"{np.mean(aligned):.3f}", "", f"{np.mean(qualities):.3f}")
    reconstructed = reconstruction_quality(options.pictures, options.seed)
    table.add_row("VAE reconstructions", "", "", f"{reconstructed:.3f}")
    table.add_row("ratio", "", "", f"{np.mean(qualities) / reconstructed:.3f}")
    Console().print(table)
    if options.grid:
        from agents.plots import picture_grid

        picture_grid(np.concatenate(rows), [text for texts in prompts_of for text in texts], options.grid)


if __name__ == "__main__":
    main()
