"""REINFORCE with a baseline (Williams 1992), on the denoising steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.on_policy import Found
from agents.policy_gradient import PolicyGradient
from agents.rollout_buffer import Transitions


class REINFORCE(PolicyGradient):
    """The plain policy gradient, one optimiser step in each rollout:

        E[ sum_t  grad log p_theta(x_{t-1} | x_t, z)  (r - b) ],

    b the mean reward of the other pictures of the same prompt in the rollout, or of all others if there is none. As b
    does not depend on the picture itself, it adds no bias to the gradient (leave-one-out: Kool et al. 2019); weights of
    the steps do (``step_weighting``).

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`.
        **kwargs: further arguments of :class:`~agents.policy_gradient.PolicyGradient`. Those for several steps
            are refused, those of the ratio's clipping have no effect.

    Raises:
        ValueError: if several steps on a rollout are asked for, an argument is out of range, or the environment is none
            that a denoising policy can act in.
    """

    def __init__(self, policy: Any = "DenoisingPolicy", env: Any = None, **kwargs: Any) -> None:
        if kwargs.get("batch_size") is not None or kwargs.get("n_epochs", 1) > 1:
            raise ValueError(
                "REINFORCE takes one optimiser step in each rollout: leave batch_size None and n_epochs 1, and draw "
                "fewer pictures at a time (n_envs) for more steps"
            )
        super().__init__(policy, env, **kwargs)

    def _loss(self, part: Transitions, reference: Any, found: Found) -> Tensor:
        return part.weight * self._score_function_loss(part)

    def _advantages(self, rewards: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
        if len(rewards) == 1:
            return rewards
        same = (prompts[:, None] == prompts[None]).all(dim=2).float() - torch.eye(len(rewards), device=rewards.device)
        alone = same.sum(dim=1) == 0
        same[alone] = 1 - torch.eye(len(rewards), device=rewards.device)[alone]
        return rewards - same @ rewards / same.sum(dim=1)
