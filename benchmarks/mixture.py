"""DPOK's results on DPOK-Mixture-v0 beside the known answers: ``python -m benchmarks.mixture --seeds 3``.

It trains with DPOK, and compares the result with the exact answer in three cases:

- one Gaussian: the optimum in closed form;
- mixtures in two dimensions: the sampler's own samples, weighted by exp(r / beta);
- the objective E[r] - beta KL of several algorithms, in one and two dimensions: the optimum by dynamic programming
  (:mod:`benchmarks.mixture_objective`).

It prints a table for each case. It draws the pre-trained and the fine-tuned model over the denoising steps into
``mixture.png``, and writes every number to ``mixture.json``.

Each training draws 15,360 images. Seconds are of the process's own computing, on one core.

Letters used for shapes: n points, K components, T denoising steps, d dimensions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from agents.common.policy import DenoisingPolicy
from benchmarks.mixture_figure import scatter
from benchmarks.mixture_objective import objectives
from benchmarks.mixture_policies import IMAGES, model_of, sample_trajectories, show, train_exactly
from dpok_gym import make_reward
from dpok_gym.mixture.exact import GaussianSampler
from dpok_gym.mixture.image import draw_dots
from dpok_gym.utils.validation import check_integer

RESULTS = Path(__file__).parent / "results"
#: Points drawn to measure a learned policy.
N_POINTS = 100_000

#: Prompt and reward of the mixtures in two dimensions; beta is 1.
MIXTURES: tuple[tuple[str, dict[str, float]], ...] = (
    ("two modes", {"mixture-linear": 0.5}),
    ("ring of six", {"mixture-linear": 0.5}),
    ("ring of six", {"mixture-quadratic": 0.3}),
)


def gaussian(seeds: int, images: int = IMAGES, beta: float = 0.5, n: int = N_POINTS) -> list[dict[str, Any]]:
    """Measures the mean and the variance of one Gaussian against those of the optimum, for r = x_1 and T = 20.

    Args:
        seeds: number of trainings.
        images: of each training.
        beta: kl_coef.
        n: points drawn.

    Returns:
        A row for each training.
    """
    rows = []
    for seed in range(seeds):
        policy, seconds = train_exactly("one gaussian", {"mixture-linear": 1.0}, beta, 20, seed, images)
        model = model_of(policy)
        data = model.mixtures["one gaussian"]
        sampler = GaussianSampler.of(data, policy.process.table, model.denoiser.alphas_cumprod)
        points = sample_trajectories(policy, "one gaussian", n, seed)[-1]
        std = sampler.covariance.diagonal().sqrt()
        shift = sampler.optimal_shift(torch.tensor([1.0, 0.0]).double(), beta)
        rows.append(
            {
                "seed": seed,
                "shift / sd": (shift / std).tolist(),
                "mean error / sd": ((points.mean(0) - sampler.mean - shift) / std).tolist(),
                "variance / exact": (points.var(0) / sampler.covariance.diagonal()).tolist(),
                "seconds": seconds,
            }
        )
    return rows


def components(policy: DenoisingPolicy, prompt: str, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the weights (K,) and the means (K, d) of the mixture that weighted points are drawn from.

    Args:
        policy: of the mixture model.
        prompt: says which mixture.
        points: (n, d); each counts for its most probable component.
        weights: (n,).
    """
    data = model_of(policy).mixtures[prompt]
    nearest = data.responsibilities(points).argmax(1)
    members = torch.nn.functional.one_hot(nearest, len(data.log_weights)).double() * weights[:, None]  # (n, K)
    return members.sum(0) / weights.sum(), (members.T @ points) / members.sum(0)[:, None]


def tilts(points: Tensor, reward: dict[str, float], beta: float) -> Tensor:
    """Computes exp(r / beta) of points (n, d), up to a factor, with the reward of their images; (n,)."""
    score = make_reward(reward)
    rewards = []
    for part in points.split(1000):
        batch = score(draw_dots(part), [""] * len(part))
        rewards.append(batch.total.double())
    return (torch.cat(rewards) / beta).softmax(0)


def mixtures(
    seeds: int, images: int = IMAGES, n: int = N_POINTS
) -> tuple[list[dict[str, Any]], dict[str, DenoisingPolicy]]:
    """Measures the weights and means of mixtures against the tilt of the sampler's own samples, at T = 50.

    Args:
        seeds: number of trainings of each case.
        images: of each training.
        n: points drawn; twice as many of the pre-trained model.

    Returns:
        A row for each training; and the first policy of each case with a linear reward, by prompt.
    """
    rows: list[dict[str, Any]] = []
    policies: dict[str, DenoisingPolicy] = {}
    for prompt, reward in MIXTURES:
        ((name, weight),) = reward.items()
        for seed in range(seeds):
            policy, seconds = train_exactly(prompt, reward, 1.0, 50, seed, images)
            if name == "mixture-linear":
                policies.setdefault(prompt, policy)
            sampled = sample_trajectories(policy, prompt, 2 * n, seed=1, reference=True)[-1]
            exact_weights, exact_means = components(policy, prompt, sampled, tilts(sampled, reward, 1.0))
            points = sample_trajectories(policy, prompt, n, seed=2)[-1]
            weights, means = components(policy, prompt, points, torch.ones(n).double())
            std = model_of(policy).mixtures[prompt].variances.min().sqrt()
            rows.append(
                {
                    "case": f"{prompt}, {weight} {name}",
                    "seed": seed,
                    "exact weights": exact_weights.tolist(),
                    "weights": weights.tolist(),
                    "largest weight error": (weights - exact_weights).abs().max().item(),
                    "largest mean error / sd": ((means - exact_means).norm(dim=1) / std).max().item(),
                    "seconds": seconds,
                }
            )
    return rows, policies


def main() -> None:
    """Trains, compares, prints, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each case")
    parser.add_argument("--images", type=int, default=IMAGES, help="of each training")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of mixture.png and mixture.json")
    options = parser.parse_args()
    seeds = check_integer("--seeds", options.seeds)
    images = check_integer("--images", options.images)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console = Console(width=120)
    results = {"gaussian": gaussian(seeds, images)}
    show("one Gaussian, r = x_1, beta = 0.5, T = 20", results["gaussian"], console)
    results["mixtures"], policies = mixtures(seeds, images)
    show("mixtures, beta = 1, T = 50, against the tilted samples of the sampler", results["mixtures"], console)
    results["objective"] = objectives(seeds, images)
    show("E[r] - beta KL, T = 20, against the optimum", results["objective"], console)
    scatter(policies, options.out / "mixture.png")
    (options.out / "mixture.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
