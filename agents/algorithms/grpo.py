"""GRPO: group relative policy optimisation on the denoising steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.algorithms.policy_gradient import PolicyGradient
from agents.common.advantages import standardize_in_groups
from agents.common.buffer import Transitions
from agents.common.losses import Metrics
from agents.common.policy import DenoisingPolicy
from dpok_gym import diffusion
from dpok_gym.utils.validation import check_integer, check_non_negative


class GRPO(PolicyGradient):
    """Policy gradient with images compared in groups of the same prompt, and KL to the pre-trained model.

    Minimises, as DanceGRPO (Xue et al. 2025, Eq. 5 and 6) and Flow-GRPO (Liu et al. 2025, Eq. 4 and 5) do,

        E[ sum_t  -A rho_t  +  beta KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ],

    where rho_t is the clipped ratio of the new to the old density, and A = (r - mean) / std over the image's group.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        group_size: images of each prompt in an iteration, at least 2; it divides ``images_per_iteration``. More tell
            the prompt's mean and spread better, fewer leave room for more prompts.
        same_noise: whether the images of a group start from the same x_T, as in DanceGRPO; they differ less then.
        kl_coef: beta, weight of the KL to the pre-trained model, per nat, at least 0. 0 trains without it and saves the
            pre-trained model's pass.

    Raises:
        ValueError: if an argument is out of range, or an iteration has no whole number of groups.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        group_size: int = 16,
        same_noise: bool = False,
        kl_coef: float = 0.01,
        **kwargs: Any,
    ) -> None:
        self.group_size = check_integer("group_size (to compare an image with its group)", group_size, minimum=2)
        self.same_noise = same_noise
        self.kl_coef = check_non_negative("kl_coef", kl_coef)
        super().__init__(policy, env, **kwargs)

    def _setup_model(self) -> None:
        n_images = self.images_per_iteration or self.n_envs
        # Half a group would go on in the next iteration, with images of another policy.
        if n_images % self.group_size:
            raise ValueError(
                f"the {n_images} images of an iteration cannot be split into groups of {self.group_size}; choose a "
                "group_size that divides images_per_iteration (or n_envs, if that is None)"
            )
        super()._setup_model()

    def group_of(self, image: int) -> int:
        """Returns the group of an image of the run; the images of a group have the same prompt."""
        return image // self.group_size

    def initial_noise_of(self, images: range) -> list[int] | None:
        """With ``same_noise`` all images of a group start from the x_T of its first one."""
        if not self.same_noise:
            return None
        return [self.group_of(image) * self.group_size for image in images]

    def loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """-A rho + beta KL of each transition, (B,)."""
        mean, std = self.policy.transition(batch.state)
        policy_loss, metrics = self.policy_gradient_loss(batch, mean, std)
        loss = batch.step_weight * policy_loss
        # A weight of 0 needs no pre-trained model, which would cost a pass of the denoiser.
        if self.kl_coef:
            reference = self.reference_mean(batch.state)
            loss = loss + self.kl_coef * diffusion.kl_divergence(mean, reference, std, self.log_prob_reduction)
            metrics |= self.kl_metrics(batch, diffusion.kl_divergence(mean.detach(), reference, std))
        return batch.weight * loss, metrics

    def image_advantages(self, rewards: Tensor, prompts: list[str], images: Tensor) -> Tensor:
        """(r - mean) / std over each image's group, (n,)."""
        # Iterations hold whole groups, so the rows of a rollout give the groups too.
        return standardize_in_groups(rewards, images // self.group_size)

    def step_importance(self, weights: Tensor) -> Tensor:
        """Half for the reward, half for the KL, if there is one; it has the same weight at every step."""
        return (weights + 1) / 2 if self.kl_coef else weights
