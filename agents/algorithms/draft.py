"""DRaFT: direct reward fine-tuning (Clark et al., ICLR 2024).

Letters used for shapes: B images, K denoising steps, C x h x w a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents.common.algorithm import DenoisingAlgorithm
from agents.common.buffer import Batch, select
from agents.common.losses import Metrics
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import Purpose, make_generator
from dpok_gym import diffusion
from dpok_gym.models.base import Conditioning
from dpok_gym.utils.validation import check_integer


@dataclass
class TrajectoryEnds(Batch):
    """The last steps of trajectories.

    Attributes:
        latents: (B, C, h, w) K steps before x_0.
        noise: (B, K, C, h, w) of these steps.
        image: (B,) int64, row of the image in the rollout.
        image_conditioning: of all images of the rollout.
    """

    latents: Tensor
    noise: Tensor
    image: Tensor
    image_conditioning: Conditioning


class DRaFT(DenoisingAlgorithm):
    """Minimises -E[ r(x_0, z) ] by the gradient of the reward itself, through the last K denoising steps (DRaFT-K).

    It is an upper reference for rewards whose gradient is known: algorithms that see the rewards' values only cannot be
    expected to learn from fewer images. Nothing keeps the model near the pre-trained one.

    The end of each image is drawn again with the same noise, x_{t-1} = mean_theta(x_t) + std_t noise_t, now with
    gradients, from the state K steps before x_0; the image is decoded and rewarded with gradients too.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment whose reward is differentiable, as
            :class:`~dpok_gym.rewards.preference.reward.PreferenceReward` is.
        n_last_steps: K, from 1 to T. The late steps alone decide little of what an image shows; each more costs time
            and memory.
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
        micro_batch_size: int | Literal["auto"] | None = 16,
        **kwargs: Any,
    ) -> None:
        self.n_last_steps = check_integer("n_last_steps", n_last_steps)
        if kwargs.get("normalize_rewards"):
            raise ValueError(
                "DRaFT follows the gradient of the reward itself, which running statistics would not change: leave "
                "normalize_rewards False, and give each reward a weight that suits its scale"
            )
        super().__init__(policy, env, micro_batch_size=micro_batch_size, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        n_steps = self.process.num_inference_steps
        if self.n_last_steps > n_steps:
            raise ValueError(f"n_last_steps must be from 1 to the {n_steps} denoising steps, got {self.n_last_steps}")
        if self.env is not None:
            self.denoising_env.reward.check_differentiable()

    @property
    def first_step(self) -> int:
        """The first step that is drawn with a gradient, T - K."""
        return self.process.num_inference_steps - self.n_last_steps

    def train(self) -> None:
        """One update: a pass over the iteration's images, with an optimiser step for each batch."""
        buffer = self.rollout_buffer
        images = torch.nonzero(buffer.valid).flatten()
        rng = make_generator(self.run_seed, Purpose.BATCHES, self.iteration)
        images = images[torch.from_numpy(rng.permutation(len(images))).to(images.device)]
        # The trajectories give back the noise that they were drawn with, so the images are drawn again as they were.
        noise = []
        for index in range(self.first_step, self.process.num_inference_steps):
            std = self.process.table.std[index].expand(len(images))
            noise.append(diffusion.recover_noise(buffer.latents[images, index + 1], buffer.means[images, index], std))
        latents = buffer.latents[images, self.first_step]
        ends = TrajectoryEnds(latents, torch.stack(noise, dim=1), images, buffer.conditioning)
        # No image had a valid reward: there is no gradient to follow.
        if not len(ends):
            return
        for batch in ends.split(self.batch_size):
            with self.optimizer_step():
                self.backward(batch)

    def loss(self, batch: TrajectoryEnds) -> tuple[Tensor, Metrics]:
        """-r(x_0, z) of each image, (B,)."""
        conditioning = select(batch.image_conditioning, batch.image)
        noise = batch.noise.unbind(dim=1)
        latents = batch.latents
        for step in self.process.denoise(
            latents, conditioning, lambda index: noise[index - self.first_step], self.policy.transition, self.first_step
        ):
            latents = step.next_latents
        prompts = [self.rollout_buffer.prompts[image] for image in batch.image.tolist()]
        images = self.process.model.decode(latents)
        # The rewards of the rollout have no gradient; here the reward is computed again, through the decoder.
        reward = self.denoising_env.reward.differentiable(images, prompts).to(latents.device)
        return -reward, {"reward": reward.detach()}
