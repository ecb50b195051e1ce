"""The evaluation of images of the mixture world; see :class:`dpok_gym.worlds.World`."""

from __future__ import annotations

from collections.abc import Sequence

from dpok_gym.mixture.image import IMAGE_SIZE
from dpok_gym.mixture.optimum import optimal_value
from dpok_gym.prompts import PromptSet
from dpok_gym.worlds import World


def check_prompts(prompts: Sequence[str]) -> None:
    """Accepts all prompts, because this world has no judge that reads them."""


def unseen_prompts(prompts: PromptSet) -> tuple[str, ...]:
    """Returns the held-out prompts of the set. The model knows no other prompts that training never shows."""
    return prompts.held_out


WORLD = World(
    image_shape=(IMAGE_SIZE, IMAGE_SIZE),
    evaluation_rewards=(),
    held_out_rewards=(),
    alignment_reward=None,
    quality_reward=None,
    check_prompts=check_prompts,
    unseen_prompts=unseen_prompts,
    optimal_value=optimal_value,
)
