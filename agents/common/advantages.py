"""Advantages: how much better an image is than expected.

Letters used for shapes: N images, T denoising steps, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agents.common.normalization import NEGLIGIBLE


def generalized_advantages(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, gae_lambda: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of finished trajectories (Schulman et al. 2016, Eq. 16).

    With gamma = lambda = 1 and a reward r at the end only, the advantage is r - V(x_t) and the return r, as in DPOK.

    Args:
        rewards: (N, T).
        values: (N, T) of the states that the actions were taken in; the state after the last one is worth 0.
        gamma: discount per denoising step, in [0, 1].
        gae_lambda: 1 for Monte-Carlo returns; less trusts the values more.

    Returns:
        Advantages and returns, both (N, T).
    """
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    # Temporal-difference errors; the advantage is their discounted sum, from the end.
    errors = rewards + gamma * next_values - values
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = errors[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    return advantages, advantages + values


def center(advantages: Tensor, valid: Tensor) -> Tensor:
    """Subtracts the mean of each denoising step: a baseline that all images share. A single image keeps its advantage.

    Args:
        advantages: (N, T).
        valid: (N,) bool, the images that the mean is taken over.

    Returns:
        (N, T).
    """
    return advantages - advantages[valid].mean(dim=0) if valid.sum() > 1 else advantages


def standardize_in_groups(rewards: Tensor, groups: Tensor, std_of_group: bool = True) -> Tensor:
    """(r - mean) / std over the images of the same group (Liu et al. 2025, Eq. 4).

    Args:
        rewards: (N,).
        groups: (N,) int64, the group of each image.
        std_of_group: False divides by the standard deviation of all rewards.

    Returns:
        (N,).
    """
    values = rewards.double()  # in float32, the mean of equal rewards is not exactly theirs
    members = _membership(groups, values)
    size = members.sum(dim=0)
    mean = members @ (values @ members / size)
    centred = values - mean
    if std_of_group:
        std = members @ (centred.square() @ members / size).sqrt()
    else:
        mean, std = values.mean(), values.std(correction=0)
    return (centred / divisor(std, mean)).to(rewards)


def divisor(std: Tensor, mean: Tensor) -> Tensor:
    """The standard deviation that rewards are divided by; 1 where it is the rounding of equal rewards in float32.

    Args:
        std: of some rewards, any shape.
        mean: of the same rewards, the same shape.
    """
    return std.where(std > NEGLIGIBLE * mean.abs(), 1.0)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """r - b, where b is the mean reward of the other images of the same group (Kool et al. 2019).

    An image that is alone in its group is compared with all others; a single image keeps its reward.

    Args:
        rewards: (N,).
        groups: (N,) int64, the group of each image.

    Returns:
        (N,).
    """
    if len(rewards) == 1:
        return rewards
    # Leaving the image itself out keeps the baseline independent of it.
    others = 1 - torch.eye(len(rewards), device=rewards.device)
    same = (groups[:, None] == groups[None]).float() * others
    alone = same.sum(dim=1) == 0
    same[alone] = others[alone]
    return rewards - same @ rewards / same.sum(dim=1)


def _membership(groups: Tensor, like: Tensor) -> Tensor:
    """(N, G) with a 1 where the image is in the group; every group has an image."""
    return nn.functional.one_hot(groups.unique(return_inverse=True)[1]).to(like)
