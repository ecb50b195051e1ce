"""AWM: advantage weighted matching (Xue et al., ICML 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.algorithms.online_forward_process import OnlineForwardProcess
from agents.common import losses
from agents.common.losses import Metrics
from agents.common.matching import NoisyImages
from agents.common.policy import DenoisingPolicy
from dpok_gym.diffusion import reduce
from dpok_gym.samplers.transition_table import ErrorSpace
from dpok_gym.utils.validation import check_choice, check_non_negative, check_positive


@dataclass
class ScoredImages(NoisyImages):
    """Noisy images, with the old policy's score of them.

    Attributes:
        old_log_prob: (B,) of the policy that drew the images.
    """

    old_log_prob: Tensor


class AWM(OnlineForwardProcess):
    """GRPO's loss with the matching error in place of the log-probability.

    Minimises, over noisy versions of the policy's images (arXiv 2509.25050),

        E[ -A rho ] + ema_coef || v - v_ema ||^2 + kl_coef || v - v_pre ||^2,
        rho = exp(log p - log p_old),      log p = -|| v - target ||^2,

    where v is the denoiser's output, A the advantage, clipped to [-1, 1], rho is clipped, and p_old is the policy that
    drew the images, with the same noise. All squares are means over the dimensions. So the loss that the model was
    trained with is weighted by the advantage, which has less noise than the densities of the denoising steps.

    Where the mean advantage is negative, the matching error alone has no minimum: it could grow for ever. The clipped
    rho, or an ``ema_coef`` of at least 1, which outweighs every advantage, holds the policy. The published code sets
    the range so wide that only ``ema_coef`` holds it.

    **Where it goes.** At rest the policy and its average are the same. With ``space="output"`` it rests where
    kl_coef (v - v_pre) = E[ A (target - v) | x_t ] under its own images, as DiffusionNFT does. With Gaussian data and a
    linear reward this is the denoiser of p_pre exp(A / kl_coef), the optimum of a KL penalty; for other data it is that
    to first order only. Without ``kl_coef`` the policy moves for as long as rewards differ.

    The defaults are those of the published code's configuration for GenEval (github.com/scxue/
    advantage_weighted_matching, config/dgx_awm.py): advantages cut off at 5 standard deviations, a range of 1 (for rho;
    here for its logarithm), and ``ema_coef`` 1 with eta up to 0.3 by 0.001 a step. It has 24 images for each prompt, 6
    noise levels for each image, two optimiser steps in an iteration, a KL weight of 0.003 (0.0001 for PickScore) and a
    learning rate of 3e-4. Its log p is -4 t (|| v - target ||^2)^(1/4); the square here is the paper's.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        clip_range: largest change of log p that the loss still follows, above 0.
        ema_coef: weight of the distance to the old policy, whose weights follow slowly, at least 0; 0 saves a pass.
        space: what errors are measured in: "velocity" (the paper), "output" for the output itself, "clean" for the x_0
            that it predicts.
        old_decay: the largest eta with which the old policy follows, in [0, 1]; 0 makes it the policy that the
            iteration began with.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        clip_range: float = 1.0,
        ema_coef: float = 1.0,
        space: ErrorSpace = "velocity",
        old_decay: float = 0.3,
        **kwargs: Any,
    ) -> None:
        self.clip_range = check_positive("clip_range", clip_range)
        self.ema_coef = check_non_negative("ema_coef", ema_coef)
        self.space: ErrorSpace = check_choice("space", space, "output", "clean", "velocity")
        super().__init__(policy, env, old_decay=old_decay, **kwargs)

    def log_prob(self, batch: NoisyImages, output: Tensor) -> Tensor:
        """-|| output - target ||^2 in the space of errors, a mean over the dimensions, (B,)."""
        scale = self.process.table.error_scale(self.space)[batch.step]
        return -scale.square() * losses.denoising_loss(output, batch.target)

    @torch.no_grad()
    def noisy_images(self) -> NoisyImages:
        """Adds the score of the policy that drew the images, before any step is taken."""
        images, per_image = super().noisy_images(), self._steps_of_an_image
        # One step of each image at a time, so the encoded prompts are copied once, and not for every noisy image.
        parts = [images.take(slice(first, None, per_image)) for first in range(per_image)]
        scores = [self.log_prob(part, self.policy.predict_output(part.state, guidance_scale=1.0)) for part in parts]
        return ScoredImages(**vars(images), old_log_prob=torch.stack(scores, dim=1).flatten())

    def loss(self, batch: ScoredImages) -> tuple[Tensor, Metrics]:
        """-A rho + ema_coef || v - v_ema ||^2 + kl_coef || v - v_pre ||^2 of each noisy image, (B,)."""
        output = self.policy.predict_output(batch.state, guidance_scale=1.0)
        log_ratio = self.log_prob(batch, output) - batch.old_log_prob
        policy_loss = losses.clipped_surrogate(log_ratio, batch.weight, self.clip_range)
        penalty, metrics = self.reference_penalty(batch, output)
        if self.ema_coef:
            distance = reduce((output - self.old_output(batch)).square(), "mean")
            penalty = penalty + self.ema_coef * distance
            metrics["distance_to_old"] = distance.detach()
        log_ratio = log_ratio.detach()
        metrics |= {
            "policy_gradient_loss": policy_loss.detach(),
            "mean_ratio": losses.density_ratio(log_ratio),
            "clip_fraction": (log_ratio.abs() > self.clip_range).float(),
        }
        return policy_loss + penalty, metrics
