"""The evaluation of images of the shapes world; see :class:`dpok_gym.worlds.World`."""

from __future__ import annotations

from collections.abc import Sequence

from dpok_gym.shapes.captions import parse_prompt
from dpok_gym.shapes.prompts import unseen_prompts
from dpok_gym.shapes.scenes import IMAGE_SIZE
from dpok_gym.worlds import World


def check_prompts(prompts: Sequence[str]) -> None:
    """Checks that the judge can read the prompts.

    Raises:
        ValueError: if it cannot read one of them; the message has examples of prompts that it reads.
    """
    for prompt in prompts:
        parse_prompt(prompt)


WORLD = World(
    image_shape=(IMAGE_SIZE, IMAGE_SIZE),
    evaluation_rewards=("shapes-alignment", "shapes-quality"),
    held_out_rewards=("shapes-preference",),
    alignment_reward="shapes-alignment",
    quality_reward="shapes-quality",
    check_prompts=check_prompts,
    unseen_prompts=unseen_prompts,
)
