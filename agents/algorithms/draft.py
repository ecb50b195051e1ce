"""DRaFT: direct reward fine-tuning (Clark et al., ICLR 2024).

Letters used for shapes: B images, K denoising steps, C x h x w a latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents.common import distributed
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.buffer import Batch, select, split_evenly, within
from agents.common.losses import Metrics
from agents.common.monitor import TrainingWarning
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import Purpose, make_generator
from dpok_gym import diffusion
from dpok_gym.models.base import Conditioning
from dpok_gym.utils.validation import check_integer, check_non_negative, check_positive


@dataclass
class TrajectoryEnds(Batch):
    """The last steps of trajectories.

    Attributes:
        latents: (B, C, h, w) K steps before x_0.
        noise: (B, K, C, h, w) of these steps.
        image: (B,) int64, row of the image among those of this rank.
        image_conditioning: of the images of this rank.
    """

    latents: Tensor
    noise: Tensor
    image: Tensor
    image_conditioning: Conditioning


class DRaFT(DenoisingAlgorithm):
    """Minimises -E[ r(x_0, z) ] by the gradient of the reward itself, through the last K denoising steps (DRaFT-K).

    It is an upper reference for rewards whose gradient is known: algorithms that see the rewards' values only cannot be
    expected to learn from fewer images. Nothing in it keeps the model near the pre-trained one, and a reward that is
    followed without bound ends in images that please it alone. ``kl_coef`` adds the KL to the loss, and ``max_kl`` ends
    the training in time.

    The end of each image is drawn again with the same noise, x_{t-1} = mean_theta(x_t) + std_t noise_t, now with
    gradients, from the state K steps before x_0; the image is decoded and rewarded with gradients too.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment whose reward is differentiable, as
            :class:`~dpok_gym.rewards.preference.reward.PreferenceReward` is.
        n_last_steps: K, from 1 to T. The late steps alone decide little of what an image shows; each more costs time
            and memory.
        kl_coef: weight of the KL to the pre-trained model over the last K steps, in reward per nat, at least 0. 0
            trains without it and saves the pre-trained model's pass.
        max_kl: nats of a whole image, above 0, that the policy may be away from the pre-trained model. Once an
            iteration's images are farther on average, the training ends with the weights of the iteration before; None
            for no limit. It costs a pass of the pre-trained model for each denoising step. Only steps that explore
            count, see :attr:`dpok_gym.samplers.TransitionTable.exploring`.
        micro_batch_size: images in a forward and backward pass, at least 1, which also holds what decoder and reward
            computed; smaller takes less memory. None for the batch, "auto" for as many as fit into memory.

    Raises:
        ValueError: if an argument is out of range, the reward is not differentiable, or ``normalize_rewards`` is asked
            for.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        n_last_steps: int = 1,
        kl_coef: float = 0.0,
        max_kl: float | None = None,
        micro_batch_size: int | Literal["auto"] | None = 16,
        **kwargs: Any,
    ) -> None:
        self.n_last_steps = check_integer("n_last_steps", n_last_steps)
        self.kl_coef = check_non_negative("kl_coef", kl_coef)
        self.max_kl = None if max_kl is None else check_positive("max_kl", max_kl)
        #: Whether the training has ended because the KL was above ``max_kl``.
        self.has_spent_kl = False
        if kwargs.get("normalize_rewards"):
            raise ValueError(
                "DRaFT follows the gradient of the reward itself, which running statistics would not change: leave "
                "normalize_rewards False, and give each reward a weight that suits its scale"
            )
        super().__init__(policy, env, micro_batch_size=micro_batch_size, **kwargs)

    def check_setup(self) -> None:
        """Checks that there are as many denoising steps as the gradient goes through."""
        super().check_setup()
        n_steps = self.process.num_inference_steps
        if self.n_last_steps > n_steps:
            raise ValueError(f"n_last_steps must be from 1 to the {n_steps} denoising steps, got {self.n_last_steps}")

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.kl_coef and self.policy.lora is not None and self.policy.gradient_checkpointing:
            # The backward pass would compute the pre-trained model's layers again, with the LoRA on.
            raise ValueError(
                "kl_coef needs a gradient through the pre-trained model, which gradient_checkpointing cannot give "
                "beside a LoRA: leave one of the two off, or limit the KL with max_kl"
            )
        if self.env is not None:
            self.denoising_env.reward.check_differentiable()

    @property
    def keep_old(self) -> bool:  # type: ignore[override]
        """The weights of the iteration before are what a training beyond its budget goes back to."""
        return self.max_kl is not None

    @property
    def records_reference_kl(self) -> bool:  # type: ignore[override]
        """The KL of a rollout is needed only to compare it with the budget."""
        return self.max_kl is not None

    def is_done(self, total_timesteps: int) -> bool:
        """Returns whether ``learn`` has nothing left to do for these denoising steps in all."""
        return super().is_done(total_timesteps) or self.has_spent_kl

    def _setup_learn(
        self, total_timesteps: int, callback: Any = None, reset_num_timesteps: bool = True, *args: Any
    ) -> Any:
        if reset_num_timesteps:
            self.has_spent_kl = False
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args)

    @property
    def first_step(self) -> int:
        """The first step that is drawn with a gradient, T - K."""
        return self.process.num_inference_steps - self.n_last_steps

    def train(self) -> None:
        """One update: a pass over the iteration's images, with an optimiser step for each batch."""
        buffer = self.rollout_buffer
        images = torch.nonzero(buffer.valid).flatten()
        if self.max_kl is not None and len(images) and not self._is_within_budget(self.max_kl):
            return
        rng = make_generator(self.run_seed, Purpose.BATCHES, self.iteration)
        images = images[torch.from_numpy(rng.permutation(len(images))).to(images.device)]
        for batch in split_evenly(images, self.batch_size):
            with self.optimizer_step():
                ends = self._ends(within(batch, buffer.own))
                self.backward(ends.as_share_of(len(batch), buffer.largest_share(batch)))

    def _ends(self, images: Tensor) -> TrajectoryEnds:
        """Returns the last K steps of some of this rank's images, (B,) int64."""
        buffer, noise = self.rollout_buffer, []
        # The trajectories give back the noise that they were drawn with, so the images are drawn again as they were.
        for index in range(self.first_step, self.process.num_inference_steps):
            std = self.process.table.std[index].expand(len(images))
            noise.append(diffusion.recover_noise(buffer.latents[images, index + 1], buffer.means[images, index], std))
        latents = buffer.latents[images, self.first_step]
        return TrajectoryEnds(latents, torch.stack(noise, dim=1), images, buffer.conditioning)

    def _is_within_budget(self, max_kl: float) -> bool:
        """Compares the KL of the iteration's images with the budget; above it, puts the weights before them back."""
        assert self.policy.old is not None
        kl = self.rollout_buffer.kl[self.rollout_buffer.valid][:, self.process.table.exploring].sum(dim=1)
        self.log_metrics({"kl_to_reference": kl})
        if kl.mean() <= max_kl:
            self.policy.old.follow(0)
            return True
        self.policy.old.restore()
        self.has_spent_kl = True
        if distributed.is_main():
            warnings.warn(
                f"the KL to the pre-trained model is {kl.mean():.3g} nats, above max_kl={max_kl:.3g}: training ends "
                "here, with the weights of the iteration before",
                TrainingWarning,
                stacklevel=2,
            )
        return False

    def loss(self, batch: TrajectoryEnds) -> tuple[Tensor, Metrics]:
        """-r(x_0, z) + beta sum KL of the last K steps of each image, (B,)."""
        conditioning = select(batch.image_conditioning, batch.image)
        noise = batch.noise.unbind(dim=1)
        latents, kl = batch.latents, torch.zeros(len(batch), device=batch.latents.device)
        for step in self.process.denoise(
            latents, conditioning, lambda index: noise[index - self.first_step], self.policy.transition, self.first_step
        ):
            latents = step.next_latents
            # A weight of 0 needs no pre-trained model, which would cost a pass of the denoiser.
            if self.kl_coef:
                # With a gradient too: the state depends on the steps before, and both means on the state.
                reference, _ = self.policy.transition(step.state, reference=True)
                kl = kl + diffusion.kl_divergence(step.mean, reference, step.std)
        prompts = [self.rollout_buffer.own_prompts[image] for image in batch.image.tolist()]
        images = self.process.model.decode(latents)
        # The rewards of the rollout have no gradient; here the reward is computed again, through the decoder.
        reward = self.denoising_env.reward.differentiable(images, prompts).to(latents.device)
        metrics = {"reward": reward.detach()}
        if self.kl_coef:
            metrics["kl_of_last_steps"] = kl.detach()
        return self.kl_coef * kl - reward, metrics

    def algorithm_state(self) -> dict[str, Any]:
        """Adds whether the KL's budget is spent."""
        return super().algorithm_state() | {"has_spent_kl": self.has_spent_kl}

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with whether the KL's budget is spent."""
        super().load_algorithm_state(state)
        self.has_spent_kl = state["has_spent_kl"]
