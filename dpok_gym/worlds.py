"""Embedded worlds: small models that ship with the package, whose images a program can judge.

A world is a folder of its own with data, model, rewards and prompts. The rest of the package finds it through this
table and never names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dpok_gym.prompts import PromptSet
from dpok_gym.utils.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from dpok_gym.samplers import DenoisingProcess, Transition

    #: From finished latents (B, C, h, w) and a prompt to the rewards of the images, (B,) float64.
    RewardOfLatents = Callable[[Tensor, str], NDArray[np.float64]]


@dataclass(frozen=True)
class KnownOptimum:
    """What is known of DPOK's objective E[r] - beta KL where its optimum can be computed, without drawing images.

    The functions take the denoising process, the prompts, the reward of finished latents and beta. The policy chooses
    the mean of each step's Gaussian; standard deviations, x_T and prompts are the environment's.

    Attributes:
        value: computes the largest E[r] - beta KL.
        value_of: computes that of a policy, whose transition is the fifth argument.
        transition: returns the transition of the best policy.
        positions: takes images (N, H, W, 3) uint8, and returns where each lies in the plane, (N, 2), for a figure.
        reach: the plane is shown from -reach to reach.
    """

    value: Callable[[DenoisingProcess, PromptSet, RewardOfLatents, float], float]
    value_of: Callable[[DenoisingProcess, PromptSet, RewardOfLatents, float, Transition], float]
    transition: Callable[[DenoisingProcess, PromptSet, RewardOfLatents, float], Transition]
    positions: Callable[[NDArray[np.uint8]], NDArray[np.float64]]
    reach: float


@dataclass(frozen=True)
class World:
    """The evaluation of images of an embedded world: its judge's rewards, and the prompts that the judge can read.

    Attributes:
        image_shape: (H, W) in pixels, of the images that the judge can read.
        evaluation_rewards: rewards that every evaluation computes, beside the reward that the run trains on.
        held_out_rewards: further rewards for ``dpok evaluate``, which most runs do not train on.
        alignment_reward: name of the reward that is 1 if an image shows all that was asked for and nothing else; None
            if there is no judge.
        quality_reward: name of the reward, in [0, 1], that says how clean an image is; None if there is no judge.
        check_prompts: takes prompts, and raises a ValueError for one that the judge cannot read.
        unseen_prompts: takes a set of prompts, and returns prompts that training on this set never shows.
        optimum: what is known of the best policy; None if nobody knows it.
    """

    image_shape: tuple[int, int]
    evaluation_rewards: tuple[str, ...]
    held_out_rewards: tuple[str, ...]
    alignment_reward: str | None
    quality_reward: str | None
    check_prompts: Callable[[Sequence[str]], None]
    unseen_prompts: Callable[[PromptSet], tuple[str, ...]]
    optimum: KnownOptimum | None = None

    def can_judge(self, prompts: Sequence[str], image_shape: tuple[int, int]) -> bool:
        """Returns whether the judge can read these prompts, and images of the shape (H, W)."""
        try:
            self.check_prompts(prompts)
        except ValueError:
            return False
        return image_shape == self.image_shape


WORLDS: Registry[World] = Registry("world", "Add one with register_world().")


def register_world(model: str, world: World | str) -> None:
    """Says which world a registered model belongs to.

    Args:
        model: the model's registered name.
        world: the world, or ``"module:attribute"``, imported on first use.

    Raises:
        ValueError: if the model already belongs to another world.
    """
    WORLDS.register(model, world)


def find_world(model: str) -> World | None:
    """Returns the world of a model, or None if it belongs to none."""
    return WORLDS.load(model) if model in WORLDS else None
