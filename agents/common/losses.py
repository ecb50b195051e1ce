"""The terms of the objectives, one pure function for each equation.

Letters used for shapes: B transitions, D dimensions of a latent.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpok_gym import diffusion
from dpok_gym.utils.validation import check_choice

ClipType = Literal["ppo", "clamp", "kl"]

#: "joint": rho. "per-dimension": rho^(1/D). "centred": (rho exp(KL))^(1/D), see :func:`importance_ratio`.
Ratio = Literal["joint", "per-dimension", "centred"]

#: The largest log-ratio that counts, see :func:`density_ratio`.
MAX_LOG_RATIO = 20.0

#: What an update logs: tensors (B,) by name.
Metrics = dict[str, Tensor]


def importance_ratio(
    actions: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor, ratio: Ratio = "joint"
) -> tuple[Tensor, int]:
    """The logarithm of rho = p_theta(x_{t-1} | x_t, z) / p_old(x_{t-1} | x_t, z), in one of three forms.

    - "joint" is log rho (the papers' equations). In thousands of dimensions, rho is soon 0 or huge.
    - "per-dimension" is log rho / D (the published codes). It stays near 0, but is no ratio of densities: its mean
      over the old policy is -KL(old || new) / D. So if advantages are negative on average, the loss falls as the new
      policy moves away from the old one, in whichever direction.
    - "centred" is (log rho + KL(old || new)) / D, whose mean over the old policy is 0 (RatioNorm of GRPO-Guard, Wang
      et al. 2025). In closed form it is (mean - old_mean) . (x_{t-1} - old_mean) / (D std^2).

    Args:
        actions: (B, ...) x_{t-1}, drawn from the old policy.
        mean: (B, ...) of the new policy.
        old_mean: (B, ...) of the old policy.
        std: (B,).
        ratio: which of the three.

    Returns:
        (B,), exactly 0 where the means are equal; and the number of dimensions that it is an average over, D or 1.
    """
    check_choice("ratio", ratio, "joint", "per-dimension", "centred")
    log_ratio = diffusion.log_ratio(actions, mean, old_mean, std)
    if ratio == "joint":
        return log_ratio, 1
    if ratio == "centred":
        log_ratio = log_ratio + diffusion.kl_divergence(mean, old_mean, std)
    dims = actions.shape[1:].numel()
    return log_ratio / dims, dims


def density_ratio(log_ratio: Tensor) -> Tensor:
    """rho = exp(log_ratio), (B,), which stays at exp(20) above that, without a gradient.

    The exponential of 89 is infinite in float32. A transition that has moved so far would make all weights NaN, even
    where it is clipped: its gradient is then 0 times infinity.
    """
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


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
    clipped = advantages * density_ratio(log_ratio.clamp(-clip_range, clip_range))
    if clip_type == "clamp":
        return -clipped
    return -torch.minimum(advantages * density_ratio(log_ratio), clipped)


def policy_gradient_loss(
    actions: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_type: ClipType = "ppo",
    ratio: Ratio = "joint",
) -> tuple[Tensor, Metrics]:
    """-A rho of transitions, clipped. At the old policy, its gradient is -A grad log p_theta, whatever the ratio.

    "ppo" and "clamp" clip the ratio, see :func:`clipped_surrogate`. "kl" clips nothing, but leaves out the transitions
    whose KL(old || new) is above ``clip_range`` and that would move still further (the mask of Flow-DPPO, 2026).

    Args:
        actions: (B, ...) x_{t-1}, drawn from the old policy.
        mean: (B, ...) of the new policy.
        old_mean: (B, ...) of the old policy.
        std: (B,).
        advantages: (B,).
        clip_range: largest change of a transition, in nats of the whole latent, above 0.
        clip_type: which of the three.
        ratio: see :func:`importance_ratio`.

    Returns:
        (B,) losses, and the ratio and whether it was clipped as metrics.
    """
    check_choice("clip_type", clip_type, "ppo", "clamp", "kl")
    log_ratio, dims = importance_ratio(actions, mean, old_mean, std, ratio)
    if clip_type == "kl":
        distance = diffusion.kl_divergence(mean.detach(), old_mean, std)
        is_clipped = (distance > clip_range) & (advantages * log_ratio.detach() > 0)
        loss = (-advantages * density_ratio(log_ratio)).masked_fill(is_clipped, 0)
    else:
        # clip_range is in nats of the latent, and log_ratio perhaps in nats per dimension.
        is_clipped = log_ratio.detach().abs() > clip_range / dims
        loss = clipped_surrogate(log_ratio, advantages, clip_range / dims, clip_type)
    # An average over D dimensions has 1/D of the gradient of the sum, which is that of the log-density.
    return dims * loss, {"mean_ratio": density_ratio(log_ratio.detach()), "clip_fraction": is_clipped.float()}


def score_function_loss(actions: Tensor, mean: Tensor, std: Tensor, advantages: Tensor) -> Tensor:
    """-A log p_theta(x_{t-1} | x_t, z) up to a constant, (B,); only its gradient counts.

    Args:
        actions: (B, ...) x_{t-1}, drawn from the current policy.
        mean: (B, ...) of the current policy, with a gradient.
        std: (B,).
        advantages: (B,).
    """
    return -advantages * diffusion.log_ratio(actions, mean, mean.detach(), std)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Squared error of the value function, (B,)."""
    return (values - returns).square()


def denoising_loss(output: Tensor, target: Tensor) -> Tensor:
    """The loss that diffusion models are trained with: the mean squared error of the output, (B,); both (B, ...).

    Its mean over timesteps bounds -log p_theta(x_0 | z) from above, up to weights and a constant (Ho et al. 2020,
    Eq. 12 and 14). In this way Eq. 10 of DPOK is minimised.
    """
    return diffusion.reduce((output - target).square(), "mean")


def safe_loser_scale(winner_error: Tensor, loser_error: Tensor, mu: float = 0.0) -> Tensor:
    """The largest lambda in [0, 1] at which a step on e_w - lambda e_l does not raise e_w (Diffusion-SDPO, 2511.03317).

    e = || d ||^2 is a squared error and d = output - target. If both outputs follow the gradient of e_w - lambda e_l,
    then to first order e_w falls as long as || d_w ||^2 > lambda d_w . d_l. So

        lambda = (1 - mu) || d_w ||^2 / (d_w . d_l), at most 1,    or 1 if d_w . d_l is not above 0.

    As in the paper, the gradients are those at the outputs, as if a step of the weights changed both outputs alike. The
    two noisy images of a pair have the same prompt, step and noise, so nearly all of it is the same for both.

    Args:
        winner_error: (B, ...) d_w.
        loser_error: (B, ...) d_l.
        mu: share of the winner's own gradient that is left at least, in [0, 1].

    Returns:
        (B,) in [0, 1].
    """
    product = diffusion.reduce(winner_error * loser_error, "sum")
    bound = (1 - mu) * diffusion.reduce(winner_error.square(), "sum")
    return torch.where(product > bound, bound / product, torch.ones_like(product))


def scale_gradient(values: Tensor, scale: Tensor) -> Tensor:
    """Returns the values as they are, with ``scale`` times their gradient; both (B,)."""
    return values.detach() + scale * (values - values.detach())
