"""The evaluation of images of the mixture world; see :class:`dpok_gym.worlds.World`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dpok_gym.mixture.image import IMAGE_SIZE, REACH, read_dots
from dpok_gym.mixture.optimum import optimal_transition, optimal_value, value_of
from dpok_gym.prompts import PromptSet
from dpok_gym.worlds import KnownOptimum, World


def check_prompts(prompts: Sequence[str]) -> None:
    """Accepts all prompts, because this world has no judge that reads them."""


def unseen_prompts(prompts: PromptSet) -> tuple[str, ...]:
    """Returns the held-out prompts of the set. The model knows no other prompts that training never shows."""
    return prompts.held_out


def positions(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns the positions of the dots in images (N, 64, 64, 3), (N, 2)."""
    return read_dots(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).numpy()


WORLD = World(
    image_shape=(IMAGE_SIZE, IMAGE_SIZE),
    evaluation_rewards=(),
    held_out_rewards=(),
    alignment_reward=None,
    quality_reward=None,
    check_prompts=check_prompts,
    unseen_prompts=unseen_prompts,
    optimum=KnownOptimum(optimal_value, value_of, optimal_transition, positions, REACH),
)
