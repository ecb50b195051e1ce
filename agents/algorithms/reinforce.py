"""REINFORCE with a baseline (Williams 1992), on the denoising steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.algorithms.policy_gradient import PolicyGradient
from agents.common.advantages import leave_one_out
from agents.common.buffer import Transitions, number_groups
from agents.common.losses import Metrics, score_function_loss
from agents.common.policy import DenoisingPolicy


class REINFORCE(PolicyGradient):
    """The plain policy gradient, with one optimiser step in each iteration.

    It follows

        E[ sum_t  grad log p_theta(x_{t-1} | x_t, z)  (r - b) ],

    where b is the mean reward of the other images of the same prompt in the iteration, or of all others if there is
    none. As b does not depend on the image itself, it adds no bias to the gradient (leave-one-out: Kool et al. 2019);
    weights of the steps do (``step_weighting``).

    The arguments of the ratio's clipping have no effect.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.

    Raises:
        ValueError: if several optimiser steps in an iteration are asked for.
    """

    def __init__(self, policy: str | type[DenoisingPolicy] = "DenoisingPolicy", env: Any = None, **kwargs: Any) -> None:
        # The score function's gradient holds only for the policy that drew the images: after one step they are used up.
        if kwargs.get("batch_size") is not None or kwargs.get("n_epochs", 1) > 1:
            raise ValueError(
                "REINFORCE takes one optimiser step in each iteration: leave batch_size None and n_epochs 1, and draw "
                "fewer images in an iteration (images_per_iteration) for more steps"
            )
        super().__init__(policy, env, **kwargs)

    def loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """-(r - b) log p_theta of each transition, (B,); only its gradient counts."""
        mean, std = self.policy.transition(batch.state)
        loss = self.step_weights[batch.step] * score_function_loss(batch.actions, mean, std, batch.advantages)
        return batch.weight * loss / self.loss_scale, {}

    def image_advantages(self, rewards: Tensor, prompts: list[str], images: Tensor) -> Tensor:
        """r - b of each image, (n,)."""
        return leave_one_out(rewards, number_groups(prompts).to(rewards.device))
