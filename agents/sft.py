"""Reward-weighted supervised fine-tuning, the arm that DPOK's paper compares with (Fan et al. 2023, Sec. 4.4)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from agents import losses
from agents.on_policy import Found
from agents.supervised import NoisyPictures, Supervised, same_prompt
from dpok_gym.checks import not_negative, one_of


class RewardWeightedSFT(Supervised):
    """Minimises E[ -r(x_0, z) log p_theta(x_0 | z) ] over pictures of the pre-trained model (Eq. 10).

    Regularised towards the pre-trained model in one of two ways (Lemma 4.3 and below):

    - "KL-D" shifts every weight: E[ -(r + gamma) log p_theta ], as if pictures without reward were data too;
    - "KL-O" adds gamma || output_theta - output_pre ||^2, on the same noisy pictures, whatever their weight.

    Negative weights, which would push the model away from pictures without bound, count as 0 (App. B). So rewards
    should be mostly positive, or gamma large enough; of those whose zero means nothing, the mean can be taken off.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`.
        regularization: "KL-D", "KL-O" or "none".
        gamma_kl: gamma; the paper tries 0.1, 1, 2 and 5.
        center_rewards: subtract the mean reward of each prompt's pictures first. For rewards learned from choices,
            whose zero is another one for each prompt; not in the paper, whose reward is standardised.
        **kwargs: further arguments of :class:`~agents.supervised.Supervised`.

    Raises:
        ValueError: if an argument is out of range, or the environment is no denoising environment.
    """

    def __init__(
        self,
        policy: Any = "DenoisingPolicy",
        env: Any = None,
        *,
        regularization: Literal["KL-D", "KL-O", "none"] = "KL-D",
        gamma_kl: float = 1.0,
        center_rewards: bool = False,
        **kwargs: Any,
    ) -> None:
        self.regularization = one_of("regularization", regularization, "KL-D", "KL-O", "none")
        self.gamma_kl = not_negative("gamma_kl", gamma_kl)
        self.center_rewards = center_rewards
        super().__init__(policy, env, **kwargs)

    def picture_weights(self, rewards: Tensor, prompts: Tensor) -> Tensor:
        """r, or r + gamma with KL-D, and 0 where that is negative; r perhaps less its prompt's mean."""
        if self.center_rewards:
            groups = same_prompt(prompts)
            rewards = rewards - (groups.bincount(rewards) / groups.bincount())[groups]
        return (rewards + (self.gamma_kl if self.regularization == "KL-D" else 0)).clamp(min=0)

    def _rows(self, weights: Tensor) -> Tensor:
        """With KL-O all of them: those without reward are not learned, but not to be forgotten either."""
        if self.regularization == "KL-O":
            return torch.arange(len(weights), device=weights.device)
        return super()._rows(weights)

    def _loss(self, part: NoisyPictures, reference: Any, found: Found) -> Tensor:
        """w || output - target ||^2, with KL-O + gamma || output - output_pre ||^2, (B,)."""
        output = self.policy.denoise(part.observation)
        loss = self._weighted_loss(part, output, found)
        return loss if reference is None else loss + self.gamma_kl * losses.denoising_loss(output, reference)

    @torch.no_grad()
    def _reference(self, part: NoisyPictures) -> Tensor | None:
        return self.policy.denoise(part.observation, reference=True) if self.regularization == "KL-O" else None
