"""DDPO: Denoising Diffusion Policy Optimization (Black et al., ICLR 2024)."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from agents.on_policy import Found
from agents.policy_gradient import PolicyGradient
from agents.rollout_buffer import Transitions
from dpok_gym.checks import integer, not_negative


class DDPO(PolicyGradient):
    """Policy gradient on the denoising steps, with rewards standardised for each prompt, and no regularisation.

    Two estimators of the gradient (Sec. 4.3 of the paper), over the pictures of a rollout,

        DDPO_IS:  E[ sum_t  grad rho_t  A ],      DDPO_SF:  E[ sum_t  grad log p_theta(x_{t-1} | x_t, z)  A ],

    A = (r - mean_z) / std_z with the statistics of the last pictures of the same prompt z. The first has a clipped
    importance ratio rho_t, so that a rollout serves for several optimiser steps; the second holds for one only.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`.
        score_function: DDPO_SF in place of DDPO_IS.
        statistics_size: last rewards of each prompt that its mean and standard deviation are taken of.
        min_count: rewards of a prompt below which those of the whole rollout stand in.
        advantage_clip: largest advantage, in standard deviations.
        **kwargs: further arguments of :class:`~agents.policy_gradient.PolicyGradient`.

    Raises:
        ValueError: if an argument is out of range, DDPO_SF is to take several steps on a rollout, or the environment
            is no denoising environment.
    """

    def __init__(
        self,
        policy: Any = "DenoisingPolicy",
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
                "the score function's gradient holds for the model that drew the pictures: with score_function=True, "
                "leave batch_size None and n_epochs 1, for one optimiser step in each rollout"
            )
        self.score_function = score_function
        self.statistics_size = integer("statistics_size", statistics_size)
        self.min_count = integer("min_count", min_count)
        if min_count > statistics_size:
            raise ValueError(
                f"min_count must be at most statistics_size, got {min_count} and {statistics_size}: no prompt would "
                "ever have rewards enough for statistics of its own"
            )
        self.advantage_clip = not_negative("advantage_clip", advantage_clip)
        self._latest_rewards: dict[str, deque[float]] = {}
        super().__init__(policy, env, **kwargs)

    def _loss(self, part: Transitions, reference: Any, found: Found) -> Tensor:
        if self.score_function:
            return part.weight * self._score_function_loss(part)
        return super()._loss(part, reference, found)

    def _advantages(self, rewards: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
        keys = [prompt.tobytes().hex() for prompt in prompts.cpu().numpy()]
        for key, reward in zip(keys, rewards.tolist(), strict=True):
            self._latest_rewards.setdefault(key, deque(maxlen=self.statistics_size)).append(reward)
        moments = {}
        for key in set(keys):
            latest = torch.tensor(self._latest_rewards[key]).to(rewards)
            known = latest if len(latest) >= self.min_count else rewards
            moments[key] = known.mean(), known.std(correction=0)
        mean, std = (torch.stack(values) for values in zip(*(moments[key] for key in keys), strict=True))
        return ((rewards - mean) / (std + 1e-6)).clamp(-self.advantage_clip, self.advantage_clip)
