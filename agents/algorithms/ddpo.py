"""DDPO: Denoising Diffusion Policy Optimization (Black et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agents.algorithms.policy_gradient import PolicyGradient
from agents.common.advantages import divisor
from agents.common.buffer import Transitions
from agents.common.losses import Metrics, score_function_loss
from agents.common.policy import DenoisingPolicy
from dpok_gym.utils.validation import check_integer, check_non_negative


class DDPO(PolicyGradient):
    """Policy gradient on the denoising steps, with rewards standardised for each prompt, and no regularisation.

    Two estimators of the gradient (Sec. 4.3 of the paper), over the images of an iteration,

        DDPO_IS:  E[ sum_t  grad rho_t  A ],      DDPO_SF:  E[ sum_t  grad log p_theta(x_{t-1} | x_t, z)  A ],

    where A = (r - mean_z) / std_z, with the statistics of the latest images of the same prompt z. The first has a
    clipped importance ratio rho_t, so an iteration can have several optimiser steps; the second holds for one only.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        score_function: DDPO_SF in place of DDPO_IS.
        statistics_size: number of latest rewards of each prompt that its mean and standard deviation are taken of, at
            least ``min_count``.
        min_count: number of rewards of a prompt below which those of the whole iteration stand in, at least 1.
        advantage_clip: largest advantage, in standard deviations, at least 0.

    Raises:
        ValueError: if an argument is out of range, or DDPO_SF is to take several steps in an iteration.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        score_function: bool = False,
        statistics_size: int = 32,
        min_count: int = 16,
        advantage_clip: float = 10.0,
        **kwargs: Any,
    ) -> None:
        if score_function and (kwargs.get("batch_size") is not None or kwargs.get("n_epochs", 1) > 1):
            raise ValueError(
                "the score function's gradient holds for the model that drew the images: with score_function=True, "
                "leave batch_size None and n_epochs 1, for one optimiser step in each iteration"
            )
        self.score_function = score_function
        self.statistics_size = check_integer("statistics_size", statistics_size)
        self.min_count = check_integer("min_count", min_count)
        if min_count > statistics_size:
            raise ValueError(
                f"min_count must be at most statistics_size, got {min_count} and {statistics_size}: no prompt would "
                "ever have rewards enough for statistics of its own"
            )
        self.advantage_clip = check_non_negative("advantage_clip", advantage_clip)
        self.latest_rewards: dict[str, list[float]] = {}
        super().__init__(policy, env, **kwargs)

    def loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """-A rho of each transition, clipped, or -A log p_theta, (B,)."""
        if not self.score_function:
            return super().loss(batch)
        mean, std = self.policy.transition(batch.state)
        loss = self.step_weights[batch.step] * score_function_loss(batch.actions, mean, std, batch.advantages)
        return batch.weight * loss / self.loss_scale, {}

    def image_advantages(self, rewards: Tensor, prompts: list[str], images: Tensor) -> Tensor:
        """(r - mean_z) / std_z of each image, (n,)."""
        # The new rewards count in their own statistics, as in the published code.
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            latest = [*self.latest_rewards.get(prompt, []), reward]
            self.latest_rewards[prompt] = latest[-self.statistics_size :]
        values = rewards.double()  # in float32, the mean of equal rewards is not exactly theirs
        means, stds = torch.zeros_like(values), torch.zeros_like(values)
        for index, prompt in enumerate(prompts):
            latest_of_prompt = torch.tensor(self.latest_rewards[prompt]).to(values)
            # A few rewards tell little about a prompt's mean and spread.
            known = latest_of_prompt if len(latest_of_prompt) >= self.min_count else values
            means[index], stds[index] = known.mean(), known.std(correction=0)
        advantages = (values - means) / divisor(stds, means)
        # One outlier must not decide the update.
        return advantages.clamp(-self.advantage_clip, self.advantage_clip).to(rewards)

    def algorithm_state(self) -> dict[str, Any]:
        """Adds the latest rewards of each prompt."""
        return super().algorithm_state() | {"latest_rewards": dict(self.latest_rewards)}

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with the latest rewards of each prompt."""
        super().load_algorithm_state(state)
        latest: dict[str, list[float]] = state["latest_rewards"]
        self.latest_rewards = {prompt: rewards[-self.statistics_size :] for prompt, rewards in latest.items()}
