"""A sparse reward for :mod:`benchmarks.algorithms`."""

from __future__ import annotations

from torch import Tensor

from dpok_gym.rewards.registry import load_reward


def fully_aligned(images: Tensor, prompts: list[str]) -> Tensor:
    """Returns 1 for each image in which the judge finds all that the prompt asks for, else 0; (B,).

    Args:
        images: (B, 3, 64, 64) in [0, 1].
        prompts: B prompts that the shapes world can read.
    """
    alignment = load_reward("shapes-alignment")(images, prompts)
    assert isinstance(alignment, Tensor)
    return (alignment == 1).float()
