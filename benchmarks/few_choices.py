"""Rewards that ``dpok fit-reward`` learns from few choices: ``python -m benchmarks.few_choices``.

Two simulated people compare images that the pre-trained model draws for one prompt; each image is in one pair. One asks
for what the prompt says, ``alignment + 0.2 quality`` of the judge, as the person of the shipped reward does. The other
also likes large shapes: the share of the image that is coloured, standardised, counts 0.3. Pairs that differ by less
than 0.03 are ties, and 5 % of the others are errors. A reward is fitted with the defaults of the command, from nothing
and from ``shapes-preference``. The table has its agreement with what the person meant in fresh choices. With the
defaults here it takes about 15 minutes on one core.

Letters used for shapes: N pairs, M images.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dpok_gym.models import load_model
from dpok_gym.rewards.preference.data import Comparisons
from dpok_gym.rewards.preference.fit import fit, log_odds, measure
from dpok_gym.rewards.preference.reward import PreferenceReward
from dpok_gym.samplers.process import DenoisingProcess
from dpok_gym.shapes import PREFERENCE
from dpok_gym.shapes.captions import parse_prompt
from dpok_gym.shapes.choices import ERROR_RATE, JUST_NOTICEABLE, sample_images, utilities

_BATCH = 50  # images that are drawn at a time


def draw(prompt: str, n: int, steps: int) -> Tensor:
    """Draws n images of a prompt, (n, 3, 64, 64) uint8."""
    process = DenoisingProcess(load_model("shapes", "cpu"), num_inference_steps=steps)
    rngs = [np.random.default_rng([5, k]) for k in range(n)]
    parts = [rngs[first : first + _BATCH] for first in range(0, n, _BATCH)]
    images = np.concatenate([sample_images(process, [prompt] * len(part), part) for part in parts])  # (n, H, W, 3)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def tastes(images: Tensor, prompt: str) -> dict[str, Tensor]:
    """Returns how much each person likes each image (M, 3, H, W) uint8, (M,)."""
    levels = images.float() / 255
    aligned = utilities(levels, [parse_prompt(prompt)])[0]
    coloured = (1 - levels).mean((1, 2, 3))  # the background is white
    large = 0.3 * (coloured - coloured.mean()) / coloured.std()
    return {"what the prompt says": aligned, "large shapes too": aligned + large}


def choose(images: Tensor, liked: Tensor, prompt: str, error_rate: float) -> Comparisons:
    """Returns the choices between neighbouring images of M, N = M / 2."""
    pairs = torch.arange(len(images)).reshape(-1, 2)
    first, second = liked[pairs].T
    errs = torch.from_numpy(np.random.default_rng(0).random(len(pairs)) < error_rate)
    pairs = torch.where(((first > second) != errs)[:, None], pairs, pairs.flip(1))
    outcomes = torch.where((first - second).abs() < JUST_NOTICEABLE, 0.5, 1.0)
    return Comparisons(images, [prompt] * len(pairs), pairs, outcomes)


def main() -> None:
    """Draws, lets both people choose, fits, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="three green squares", help="prompt of all images")
    parser.add_argument("--choices", type=int, nargs="*", default=[50, 100, 200, 400], help="numbers of choices")
    parser.add_argument("--fresh", type=int, default=200, help="choices to measure with")
    parser.add_argument("--seeds", type=int, default=3, help="fits for each number")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of the images")
    options = parser.parse_args()
    n_learned = max(options.choices)
    images = draw(options.prompt, 2 * (n_learned + options.fresh), options.steps)
    table = Table(title=f"agreement with {options.fresh} fresh choices, mean of {options.seeds} seeds")
    for heading in ("the person likes", "choices", "shapes-preference", "from nothing", "from it", "seconds a fit"):
        table.add_column(heading)
    for person, liked in tastes(images, options.prompt).items():
        noisy = choose(images, liked, options.prompt, ERROR_RATE)
        fresh = choose(images, liked, options.prompt, 0)[torch.arange(n_learned, n_learned + options.fresh)]

        odds = log_odds(PreferenceReward.load(PREFERENCE, device="cpu"), fresh)
        shipped = measure(odds, fresh.outcomes).agreement
        for n in options.choices:
            scores: dict[bool, list[float]] = {False: [], True: []}
            begun = time.perf_counter()
            for seed in range(options.seeds):
                for is_shipped, found in scores.items():
                    reward = PreferenceReward.load(PREFERENCE, device="cpu") if is_shipped else None
                    fitted = fit(noisy[torch.arange(n)], reward=reward, seed=seed, device="cpu").reward
                    found.append(measure(log_odds(fitted, fresh), fresh.outcomes).agreement)
            seconds = (time.perf_counter() - begun) / (2 * options.seeds)
            means = [f"{np.mean(found):.1%}" for found in scores.values()]
            table.add_row(person, str(n), f"{shipped:.1%}", *means, f"{seconds:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
