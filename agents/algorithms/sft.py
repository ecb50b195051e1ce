"""Reward-weighted supervised fine-tuning, the arm that DPOK's paper compares with (Fan et al. 2023, Sec. 4.4)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from agents.algorithms.forward_process import ForwardProcess
from agents.common import losses
from agents.common.buffer import number_groups
from agents.common.losses import Metrics
from agents.common.matching import NoisyImages
from agents.common.policy import DenoisingPolicy
from dpok_gym.utils.validation import check_choice, check_non_negative


class RewardWeightedSFT(ForwardProcess):
    """Minimises E[ -r(x_0, z) log p_theta(x_0 | z) ] over images of the pre-trained model (Eq. 10).

    It is regularised towards the pre-trained model in one of two ways (Lemma 4.3 and below):

    - "KL-D" shifts every weight: E[ -(r + gamma) log p_theta ], as if images without reward were data too;
    - "KL-O" adds gamma || output_theta - output_pre ||^2, on the same noisy images, whatever their weight.

    Negative weights would push the model away from images without bound; they count as 0 (App. B). So rewards should be
    mostly positive, or gamma large enough. Of rewards whose zero means nothing, subtract the mean.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        regularization: "KL-D", "KL-O" or "none".
        gamma_kl: gamma, at least 0; more stays nearer to the pre-trained model. The paper tries 0.1, 1, 2 and 5.
        center_rewards: subtract the mean reward of each prompt's images first; for rewards learned from choices, whose
            zero differs between prompts. It is not in the paper, whose reward is standardised.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        regularization: Literal["KL-D", "KL-O", "none"] = "KL-D",
        gamma_kl: float = 1.0,
        center_rewards: bool = False,
        **kwargs: Any,
    ) -> None:
        self.regularization = check_choice("regularization", regularization, "KL-D", "KL-O", "none")
        self.gamma_kl = check_non_negative("gamma_kl", gamma_kl)
        self.center_rewards = center_rewards
        super().__init__(policy, env, **kwargs)

    def image_weights(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """r, or r + gamma with KL-D, and 0 where that is negative."""
        if self.center_rewards:
            groups = number_groups(prompts).to(rewards.device)
            rewards = rewards - (groups.bincount(rewards) / groups.bincount())[groups]
        shift = self.gamma_kl if self.regularization == "KL-D" else 0
        # A negative weight has no minimum: the loss could fall for ever.
        return (rewards + shift).clamp(min=0)

    def rows_to_fit(self, weights: Tensor) -> Tensor:
        """With KL-O all images: those without reward are not learned, but not to be forgotten either."""
        if self.regularization == "KL-O":
            return torch.arange(len(weights), device=weights.device)
        return super().rows_to_fit(weights)

    def loss(self, batch: NoisyImages) -> tuple[Tensor, Metrics]:
        """w || output - target ||^2, with KL-O + gamma || output - output_pre ||^2, (B,)."""
        output = self.policy.predict_output(batch.state, guidance_scale=1.0)
        loss, metrics = self.weighted_loss(batch, output)
        if self.regularization == "KL-O":
            # The pre-trained model is a fixed target.
            with torch.no_grad():
                reference = self.policy.predict_output(batch.state, reference=True, guidance_scale=1.0)
            loss = loss + self.gamma_kl * losses.denoising_loss(output, reference)
        return loss, metrics
