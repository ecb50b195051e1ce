"""DiffusionNFT: negative-aware fine-tuning on the forward process (Zheng et al., ICLR 2026)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.algorithms.online_forward_process import OnlineForwardProcess
from agents.common.losses import Metrics
from agents.common.matching import NoisyImages
from agents.common.policy import DenoisingPolicy
from dpok_gym.diffusion import expand, reduce
from dpok_gym.samplers import Transition
from dpok_gym.samplers.transition_table import ErrorSpace
from dpok_gym.utils.validation import check_choice, check_positive


class DiffusionNFT(OnlineForwardProcess):
    """Pulls the denoiser to images that are better than the mean, and its mirror image to the worse ones.

    Minimises, over noisy versions of the old policy's images (Eq. 5 of arXiv 2509.16117),

        E[ r || v+ - target ||^2  +  (1 - r) || v- - target ||^2 ] / b,      r = (1 + A) / 2,
        v+ = v_old + b (v - v_old),      v- = v_old - b (v - v_old),

    where v is the denoiser's output, and A the advantage, clipped to [-1, 1]. Only finished images count, so any
    sampler may draw them. The output may be the noise, the velocity or x_0: these are the same loss up to a weight for
    each noise level, which ``space`` chooses.

    **Where it goes.** For the squared error the minimum is v = v_old + Cov_old(A, target | x_t) / b, to first order the
    denoiser of p_old exp(A / b), which becomes the next old policy. So each iteration tilts the images again, and
    without ``kl_coef`` there is no optimum to end at: the KL to the pre-trained model grows for as long as rewards
    differ. With ``kl_coef``, the squared error and ``space="output"`` it rests where v - v_pre is
    E[ A (target - v) | x_t ] / kl_coef. With Gaussian data and a linear reward this is the denoiser of
    p_pre exp(A / kl_coef), the optimum of a KL penalty; for other data it is that to first order only.

    The defaults are those of the published code's configuration for GenEval (github.com/NVlabs/DiffusionNFT,
    config/nft.py and scripts/train_nft_sd3.py): b = 1, advantages cut off at 5 standard deviations, eta from 0 by 0.001
    an iteration up to 0.5, images without guidance, errors of x_0 divided by their own mean. It has 24 images for each
    of 48 prompts in an iteration, and one optimiser step. For OCR, b = 0.1 and eta goes up to 0.999. Its loss is
    ``advantage_clip`` times this one, so its KL weight of 1e-4 is 2e-5 here.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        beta: b, above 0, usually 0.1 to 1; a smaller one aims further ahead of the old policy.
        space: what errors are measured in: "clean" for the x_0 that the output predicts (the published code),
            "velocity" for the velocity (Eq. 5), "output" for the output itself.
        normalize_errors: divide the squared error of each noisy image by its own mean absolute error, which is taken as
            a constant (the published code), so that all noise levels learn equally fast; False for Eq. 5 itself.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        beta: float = 1.0,
        space: ErrorSpace = "clean",
        normalize_errors: bool = True,
        **kwargs: Any,
    ) -> None:
        self.beta = check_positive("beta", beta)
        self.space: ErrorSpace = check_choice("space", space, "output", "clean", "velocity")
        self.normalize_errors = normalize_errors
        super().__init__(policy, env, **kwargs)

    @property
    def drawing_transition(self) -> Transition:
        """The old policy draws the images."""
        return self.policy.old_transition

    def loss(self, batch: NoisyImages) -> tuple[Tensor, Metrics]:
        """( r || v+ - target ||^2 + (1 - r) || v- - target ||^2 ) / b of each noisy image, (B,)."""
        old = self.old_output(batch)
        output = self.policy.predict_output(batch.state, guidance_scale=1.0)
        change = output - old
        positive = self.squared_error(batch, old + self.beta * change)
        negative = self.squared_error(batch, old - self.beta * change)
        r = (1 + batch.weight) / 2
        matching_loss = (r * positive + (1 - r) * negative) / self.beta
        penalty, metrics = self.reference_penalty(batch, output)
        metrics |= {
            "matching_loss": matching_loss.detach(),
            "distance_to_old": reduce(change.detach().square(), "mean"),
        }
        return matching_loss + penalty, metrics

    def squared_error(self, batch: NoisyImages, output: Tensor) -> Tensor:
        """|| output - target ||^2 in the space of errors, a mean over the dimensions, perhaps normalised, (B,)."""
        scale = self.process.table.error_scale(self.space)[batch.step]
        error = expand(scale, output) * (output - batch.target)
        squared = reduce(error.square(), "mean")
        if self.normalize_errors:
            squared = squared / reduce(error.detach().abs(), "mean").clamp(min=1e-5)
        return squared
