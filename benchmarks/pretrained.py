"""The images of the shapes world's models before any fine-tuning: ``python -m benchmarks.pretrained``.

It prints the share of fully aligned images and the mean quality for each category of prompts, beside the quality of
real scenes after the autoencoder. ``--grid`` writes a figure of some images. ``--env DPOK-ShapesFlow-v0`` is the
flow-matching model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from agents.cli.plots import image_grid
from agents.common.evaluation import sample_images
from dpok_gym.models import TextToImageModel
from dpok_gym.registration import DEFAULT_ENVIRONMENT
from dpok_gym.shapes.captions import CATEGORIES, all_requests, sample_requested_scenes
from dpok_gym.shapes.judge import judge
from dpok_gym.shapes.scenes import render

#: Images of each category in the grid.
_SHOWN = 16


@torch.no_grad()
def reconstruction_quality(model: TextToImageModel, n_scenes: int, seed: int) -> float:
    """Computes the mean quality of real scenes that the model's autoencoder has encoded and decoded.

    Args:
        model: of the shapes world.
        n_scenes: number of scenes.
        seed: of the scenes.
    """
    scenes, requests = sample_requested_scenes(n_scenes, torch.Generator().manual_seed(seed))
    parts = [model.decode(model.encode_images(part)).cpu() for part in render(scenes).split(64)]
    return judge(torch.cat(parts), [str(request) for request in requests]).quality.mean().item()


def main() -> None:
    """Draws, judges and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default=DEFAULT_ENVIRONMENT, metavar="ID", help="an environment of the shapes world")
    parser.add_argument("--images", type=int, default=256, help="images for each category")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--num-inference-steps", type=int, help="default: those of the environment")
    parser.add_argument("--sampler", help="default: that of the environment")
    parser.add_argument("--eta", type=float, help="default: that of the environment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="PNG file to write, with the first images of each category")
    options = parser.parse_args()

    given = {name: getattr(options, name) for name in ("num_inference_steps", "sampler", "eta")}
    env: Any = gymnasium.make_vec(
        options.env,
        num_envs=min(options.images, 64),
        reward={"shapes-alignment": 1.0, "shapes-quality": 1.0},
        guidance_scale=options.guidance_scale,
        **{name: value for name, value in given.items() if value is not None},
    )
    rng = np.random.default_rng(options.seed)
    evaluations = {}
    for category in CATEGORIES:
        requests = all_requests(category)
        prompts = [str(requests[index]) for index in rng.integers(len(requests), size=options.images)]
        evaluations[category] = sample_images(env.process, env, prompts, options.seed)

    table = Table("category", "fully aligned", "alignment", "quality", title="pre-trained model of the shapes world")
    for category, evaluation in evaluations.items():
        values = (evaluation.aligned_share, evaluation.mean("shapes-alignment"), evaluation.mean_quality)
        table.add_row(category, *(f"{value:.3f}" for value in values))
    # Each category has as many images, so these are the means over all images.
    aligned = np.mean([evaluation.aligned for evaluation in evaluations.values()])
    quality = np.mean([evaluation.rewards["shapes-quality"] for evaluation in evaluations.values()])
    reconstructed = reconstruction_quality(env.model, options.images, options.seed)
    table.add_row("all", f"{aligned:.3f}", "", f"{quality:.3f}")
    table.add_row("VAE reconstructions", "", "", f"{reconstructed:.3f}")
    table.add_row("ratio", "", "", f"{quality / reconstructed:.3f}")
    Console().print(table)
    if options.grid:
        images = np.concatenate([evaluation.images[:_SHOWN] for evaluation in evaluations.values()])
        labels = []
        for evaluation in evaluations.values():
            labels += evaluation.prompts[:_SHOWN]
        image_grid(images, labels, options.grid, "pre-trained model of the shapes world")


if __name__ == "__main__":
    main()
