"""GRPO: group relative policy optimisation on the denoising steps."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from agents.algorithms.policy_gradient import PolicyGradient
from agents.common.advantages import standardize_in_groups
from agents.common.buffer import Transitions
from agents.common.losses import Metrics
from agents.common.policy import DenoisingPolicy
from dpok_gym.utils.validation import check_choice, check_integer, check_non_negative, check_positive


class GRPO(PolicyGradient):
    """Policy gradient with images compared in groups of the same prompt, and KL to the pre-trained model.

    Minimises, as DanceGRPO (Xue et al. 2025, Eq. 5 and 6) and Flow-GRPO (Liu et al. 2025, Eq. 4 and 5) do,

        E[ sum_t  -A rho_t  +  beta KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ],

    where rho_t is the clipped ratio of the new to the old density, and A = (r - mean) / std over the image's group.

    The two differ in details: ``PRESETS["dance-grpo"]`` and ``PRESETS["flow-grpo"]`` have the settings of their codes.
    The defaults here are those that both share, with the KL of Flow-GRPO.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        group_size: images of each prompt in an iteration, at least 2; it divides ``images_per_iteration``. More tell
            the prompt's mean and spread better, fewer leave room for more prompts. DanceGRPO has 16 (12 for FLUX),
            Flow-GRPO 24.
        same_noise: which images start from the same x_T: those of a "group" (DanceGRPO for FLUX), all of an "iteration"
            (DanceGRPO for Stable Diffusion), or "none" (Flow-GRPO). Such images differ less.
        std_over: images that the std is taken over, a "group" (the papers) or the whole "iteration" (Flow-GRPO's code).
            With the latter, prompts whose images are all alike count for less.
        advantage_clip: largest advantage, in standard deviations, above 0; 5 in both codes.
        kl_coef: beta, weight of the KL to the pre-trained model per nat, at least 0, beside advantages that are
            standardised; Flow-GRPO has 0.01 to 0.04, depending on the reward, and DanceGRPO 0. 0 saves the pre-trained
            model's pass.

    Raises:
        ValueError: if an argument is out of range, or an iteration has no whole number of groups.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        group_size: int = 16,
        same_noise: Literal["none", "group", "iteration"] = "none",
        std_over: Literal["group", "iteration"] = "group",
        advantage_clip: float = 5.0,
        kl_coef: float = 0.04,
        **kwargs: Any,
    ) -> None:
        self.group_size = check_integer("group_size (to compare an image with its group)", group_size, minimum=2)
        self.same_noise = check_choice("same_noise", same_noise, "none", "group", "iteration")
        self.std_over = check_choice("std_over", std_over, "group", "iteration")
        self.advantage_clip = check_positive("advantage_clip", advantage_clip)
        self.kl_coef = check_non_negative("kl_coef", kl_coef)
        super().__init__(policy, env, **kwargs)

    def check_setup(self) -> None:
        """Checks that an iteration has whole groups."""
        super().check_setup()
        self.check_whole_groups()

    def initial_noise_of(self, images: range) -> list[int] | None:
        """Images that share x_T start from that of the first one of them."""
        if self.same_noise == "none":
            return None
        size = self.group_size if self.same_noise == "group" else len(self.rollout_buffer)
        return [image // size * size for image in images]

    def loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """-A rho + beta KL of each transition, (B,)."""
        mean, std = self.policy.transition(batch.state)
        loss, metrics = self.policy_gradient_loss(batch, mean, std)
        # A weight of 0 needs no pre-trained model, which would cost a pass of the denoiser.
        if self.kl_coef:
            kl, kl_metrics = self.kl_loss(batch, mean, std)
            loss, metrics = loss + self.kl_coef * kl, metrics | kl_metrics
        return batch.weight * loss / self.loss_scale, metrics

    def image_advantages(self, rewards: Tensor, prompts: list[str], images: Tensor) -> Tensor:
        """(r - mean) / std of each image, clipped, (n,)."""
        # Iterations hold whole groups, so the rows of a rollout give the groups too.
        advantages = standardize_in_groups(rewards, images // self.group_size, self.std_over == "group")
        return advantages.clamp(-self.advantage_clip, self.advantage_clip)
