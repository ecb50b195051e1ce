"""The terms of the objectives, one pure function for each equation.

Letters used for shapes: B transitions, D dimensions of a latent.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpok_gym import diffusion
from dpok_gym.diffusion import Reduction
from dpok_gym.utils.validation import check_choice

ClipType = Literal["ppo", "clamp"]

#: What an update logs: tensors (B,) by name.
Metrics = dict[str, Tensor]


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: float, clip_type: ClipType = "ppo") -> Tensor:
    """The policy gradient with a clipped importance ratio rho = exp(log_ratio).

    "ppo" is PPO's (Schulman et al. 2017, Eq. 7), -min(rho A, clip(rho) A): a transition that has moved too far still
    gets a gradient that brings it back. "clamp" is that of DPOK's published code, -clip(rho) A: outside the range there
    is no gradient at all. The ratio is clipped in its logarithm, to [exp(-c), exp(c)]. For the usual small ranges that
    is [1 - c, 1 + c]; for large ones it still makes sense, which 1 - c does not.

    Args:
        log_ratio: (B,) log of new over old density.
        advantages: (B,).
        clip_range: c, in the unit of ``log_ratio``, above 0.
        clip_type: which of the two.

    Returns:
        (B,) losses.
    """
    check_choice("clip_type", clip_type, "ppo", "clamp")
    # Where the clamp is active, its gradient is 0.
    clipped = advantages * log_ratio.clamp(-clip_range, clip_range).exp()
    if clip_type == "clamp":
        return -clipped
    return -torch.minimum(advantages * log_ratio.exp(), clipped)


def policy_gradient_loss(
    actions: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_type: ClipType = "ppo",
    reduction: Reduction = "sum",
) -> tuple[Tensor, Metrics]:
    """-A rho of transitions, with rho = p_theta(x_{t-1} | x_t, z) / p_old(x_{t-1} | x_t, z), clipped.

    Args:
        actions: (B, ...) x_{t-1}, drawn from the old policy.
        mean: (B, ...) of the new policy.
        old_mean: (B, ...) of the old policy.
        std: (B,).
        advantages: (B,).
        clip_range: largest change of a transition's log-probability, in nats of the whole latent, above 0.
        clip_type: see :func:`clipped_surrogate`.
        reduction: "sum" takes the densities as they are (the papers' equations); "mean" takes the ratio of the
            densities per dimension, rho^(1/D), and clips at ``clip_range`` / D (the papers' codes).

    Returns:
        (B,) losses, and the ratio and whether it was clipped as metrics.
    """
    log_ratio = diffusion.log_ratio(actions, mean, old_mean, std, reduction)
    # clip_range is in nats of the latent, and log_ratio perhaps in nats per dimension.
    limit = clip_range / _unit(actions, reduction)
    loss = clipped_surrogate(log_ratio, advantages, limit, clip_type)
    is_clipped = (log_ratio.detach().abs() > limit).float()
    return loss, {"mean_ratio": log_ratio.detach().exp(), "clip_fraction": is_clipped}


def score_function_loss(
    actions: Tensor, mean: Tensor, std: Tensor, advantages: Tensor, reduction: Reduction = "sum"
) -> Tensor:
    """-A log p_theta(x_{t-1} | x_t, z) up to a constant, (B,); only its gradient counts.

    Args:
        actions: (B, ...) x_{t-1}, drawn from the current policy.
        mean: (B, ...) of the current policy, with a gradient.
        std: (B,).
        advantages: (B,).
        reduction: "sum" for the log-probability itself, "mean" for its value per dimension.
    """
    return -advantages * diffusion.log_ratio(actions, mean, mean.detach(), std, reduction)


def output_difference(output_mse: Tensor, latents: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Squared difference of two network outputs, (B,): the KL of DPOK's published code.

    It is the KL of the Gaussians without its factor output_coef^2 / (2 std^2), which differs between timesteps.

    Args:
        output_mse: (B,) mean squared difference.
        latents: (B, ...) any latents, for their number of dimensions D.
        reduction: "sum" or "mean" over the dimensions, as for the other terms.
    """
    return output_mse * (_dims(latents) / _unit(latents, reduction))


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Squared error of the value function, (B,)."""
    return (values - returns).square()


def denoising_loss(output: Tensor, target: Tensor) -> Tensor:
    """The loss that diffusion models are trained with: the mean squared error of the output, (B,); both (B, ...).

    Its mean over timesteps bounds -log p_theta(x_0 | z) from above, up to weights and a constant (Ho et al. 2020,
    Eq. 12 and 14). In this way Eq. 10 of DPOK is minimised.
    """
    return diffusion.reduce((output - target).square(), "mean")


def _dims(latents: Tensor) -> int:
    """D."""
    return latents[0].numel()


def _unit(latents: Tensor, reduction: Reduction) -> int:
    """The number of nats of a whole latent that count as 1."""
    return _dims(latents) if reduction == "mean" else 1
