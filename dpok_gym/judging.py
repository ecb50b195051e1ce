"""From finished latents to images and their rewards: the task, apart from the dynamics.

Letters used for shapes: B images, C x h x w a latent, H x W an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpok_gym.models import TextToImageModel
from dpok_gym.rewards import Reward, RewardBatch, judge_chunks
from dpok_gym.utils.batching import BatchSize
from dpok_gym.utils.images import to_uint8
from dpok_gym.utils.threads import DaemonExecutor
from dpok_gym.utils.validation import check_integer

#: Pixels of the images that are scored together: 4,096 images of 64x64, or 64 of 512x512.
MAX_PIXELS = 2**24


class Outcome(NamedTuple):
    """Finished images and their rewards.

    Attributes:
        images: (B, H, W, 3) uint8.
        rewards: total, components and validity, each (B,).
    """

    images: NDArray[np.uint8]
    rewards: RewardBatch


class ImageJudge:
    """Decodes latents and computes the rewards of the images.

    Args:
        model: the model that decodes.
        reward: the reward of the images.
        decode_batch_size: images decoded at a time, or "auto" for as many as fit into memory.
        reward_workers: threads that compute rewards while later images are decoded, at least 0; 0 uses this thread.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        model: TextToImageModel,
        reward: Reward,
        decode_batch_size: int | Literal["auto"] = 1,
        reward_workers: int = 0,
    ) -> None:
        self.model, self.reward = model, reward
        self.reward_workers = check_integer("reward_workers", reward_workers, minimum=0)
        self._decoding = BatchSize("decode_batch_size", decode_batch_size)
        self._executor = DaemonExecutor(reward_workers, "reward") if reward_workers else None

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Outcome:
        """Returns the images of latents (B, C, h, w) x_0 and their rewards for B prompts.

        Raises:
            ValueError: if a reward is not finite and such images are not masked.
        """
        images: list[NDArray[np.uint8]] = []

        def decoded() -> Iterator[tuple[Tensor, list[str]]]:
            for rows in self._chunks(len(latents)):
                chunk = self.decode(latents[rows])
                images.append(to_uint8(chunk))
                yield chunk, list(prompts[rows])

        rewards = judge_chunks(self.reward, decoded(), self._executor)
        return Outcome(np.concatenate(images), rewards)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns the images (B, 3, H, W) in [0, 1] of latents (B, C, h, w)."""
        return self._decoding.map(lambda rows: self.model.decode(latents[rows]), len(latents))

    def close(self) -> None:
        """Ends the threads."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _chunks(self, n_images: int) -> Iterator[slice]:
        """Yields the rows that are decoded and then scored together."""
        # In full precision, all images of a large batch would need gigabytes.
        size = max(1, MAX_PIXELS // math.prod(self.model.image_shape))
        if self.reward_workers:
            # Two chunks for each thread, so that all are busy even if some chunks take longer.
            size = min(size, math.ceil(n_images / (2 * self.reward_workers)))
        # Whole decoding batches: the images are then the same bits, whatever the size of the chunks.
        decoded = self._decoding.size or 1
        size = math.ceil(size / decoded) * decoded
        for first in range(0, n_images, size):
            yield slice(first, first + size)


def make_info(outcome: Outcome, index: int, prompt: str) -> dict[str, Any]:
    """Returns what ``info`` says of a finished image; see :class:`dpok_gym.env.DenoisingEnv`."""
    components = outcome.rewards.components
    return {
        "prompt": prompt,
        "image": outcome.images[index].copy(),
        "rewards": {name: float(values[index]) for name, values in components.items()},
        "reward_valid": bool(outcome.rewards.valid[index]),
    }
