"""Threads for slow rewards: ``python -m benchmarks.reward_threads``.

It draws images of the mixture world with a reward of a second an image, with and without ``reward_workers``, and prints
how many times faster the rollout is. One reward waits, as for the answer of a server; the other computes, in one of
torch's threads. So the second one gains no more than the machine has cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpok_gym import DenoisingVectorEnv


class Waiting:
    """A reward that waits for some seconds an image."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) zeros."""
        time.sleep(self.seconds * len(images))
        return torch.zeros(len(images))


class Computing:
    """A reward that multiplies matrices: as often for an image as took some seconds when it was made."""

    def __init__(self, seconds: float) -> None:
        self.matrix = torch.eye(512)
        self.products = 1
        while (taken := self._seconds_of(self.products)) < min(seconds, 0.1):
            self.products *= 2
        self.products = max(1, round(self.products * seconds / taken))

    def _seconds_of(self, products: int) -> float:
        started = time.perf_counter()
        for _ in range(products):
            self.matrix @ self.matrix
        return time.perf_counter() - started

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) zeros."""
        self._seconds_of(self.products * len(images))
        return torch.zeros(len(images))


def seconds_of_a_rollout(reward: Callable[[Tensor, list[str]], Tensor], images: int, workers: int) -> float:
    """Returns the seconds in which images are drawn and scored."""
    env = DenoisingVectorEnv(
        images, model="mixture", prompts="mixture", reward=reward, num_inference_steps=5, reward_workers=workers
    )
    latents = torch.zeros(images, *env.model.latent_shape).numpy()
    env.reset(seed=0)
    started = time.perf_counter()
    for _ in range(env.process.num_inference_steps):
        env.step(latents)
    seconds = time.perf_counter() - started
    env.close()
    return seconds


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measures and prints; returns the ratio of each reward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="images of a rollout")
    parser.add_argument("--workers", type=int, default=4, help="threads")
    parser.add_argument("--seconds", type=float, default=1.0, help="of the reward of an image")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ratios = {}
    for reward in (Waiting(options.seconds), Computing(options.seconds)):
        alone, threaded = (seconds_of_a_rollout(reward, options.images, n) for n in (0, options.workers))
        name = type(reward).__name__.lower()
        ratios[name] = alone / threaded
        with_threads = f"with {options.workers} threads {threaded:.1f} s"
        print(f"{name}: {alone:.1f} s, {with_threads}: {ratios[name]:.2f} times as fast")
    return ratios


if __name__ == "__main__":
    main()
