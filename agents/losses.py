"""The terms of the objectives, one pure function for each equation.

Letters used for shapes: B transitions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpok_gym.checks import one_of

Clipping = Literal["pessimistic", "clamp"]


def policy_gradient_loss(
    log_ratio: Tensor, advantages: Tensor, clip_range: float, clipping: Clipping = "pessimistic"
) -> Tensor:
    """The importance-sampled policy gradient with a clipped ratio rho = exp(log_ratio).

    "pessimistic" is PPO's (Schulman et al. 2017, Eq. 7), -min(rho A, clip(rho) A): a transition that has moved too far
    still gets a gradient if it points back. "clamp" is that of DPOK's published code, -clip(rho) A: outside the range
    there is no gradient at all. The ratio is clipped in its logarithm, to [exp(-c), exp(c)], which for the usual small
    ranges is [1 - c, 1 + c], and unlike that makes sense for large ones too.

    Args:
        log_ratio: (B,) log of new over old density.
        advantages: (B,).
        clip_range: c, in the unit of ``log_ratio``.
        clipping: which of the two.

    Returns:
        (B,) losses.
    """
    one_of("clipping", clipping, "pessimistic", "clamp")
    clipped = advantages * log_ratio.clamp(-clip_range, clip_range).exp()
    if clipping == "clamp":
        return -clipped
    return -torch.minimum(advantages * log_ratio.exp(), clipped)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Squared error of the value function, (B,)."""
    return (values - returns).square()


def generalized_advantages(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, gae_lambda: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of finished trajectories (Schulman et al. 2016, Eq. 16).

    With gamma = lambda = 1 and a reward r at the end only, the advantage is r - V(x_t) and the return r, as in DPOK.

    Args:
        rewards: (N, T) of N trajectories.
        values: (N, T) of the states the actions were taken in; the state after the last one is worth 0.
        gamma: discount per denoising step.
        gae_lambda: 1 for Monte-Carlo returns, less to trust the values more.

    Returns:
        Advantages and returns, both (N, T).
    """
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    errors = rewards + gamma * next_values - values
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = errors[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    return advantages, advantages + values


def denoising_loss(output: Tensor, target: Tensor) -> Tensor:
    """What diffusion models are trained with: the mean squared error of the output, (B,); both (B, ...).

    Its mean over timesteps bounds -log p_theta(x_0 | z) from above, up to weights and a constant (Ho et al. 2020,
    Eq. 12 and 14), which is how Eq. 10 of DPOK is minimised.
    """
    return (output - target).square().flatten(1).mean(dim=1)
