"""The base of the algorithms that learn from noise added to their own images: DiffusionNFT and AWM.

Letters used for shapes: N images of an iteration, n of them with a valid reward, B noisy images of a batch, C x h x w a
latent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.common import losses
from agents.common.advantages import divisor
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.buffer import number_groups, split_evenly, within
from agents.common.losses import Metrics
from agents.common.matching import NoisyImages, add_noise, choose_steps
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import Purpose, make_generator
from dpok_gym.utils.validation import check_fraction, check_integer, check_non_negative, check_positive


class OnlineForwardProcess(DenoisingAlgorithm):
    """Learns from fresh images of the policy, by losses on the denoiser's output for noisy versions of them.

    An iteration draws images and their rewards, adds noise to the finished images, takes optimiser steps on the noisy
    ones, and lets the old policy follow: theta_old <- eta theta_old + (1 - eta) theta. The steps in which the images
    were drawn do not matter, only what came out. There is no guidance in the loss, as diffusion models are trained.

    Subclasses write ``loss(batch)`` for a batch of :class:`~agents.common.matching.NoisyImages`, whose ``weight`` is
    the advantage of the image.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        group_size: images in a row that are drawn for the same prompt, at least 1. An image is compared with those of
            its prompt in the iteration, so one that is alone teaches nothing.
        advantage_clip: standard deviations of the reward at which an advantage is 1 or -1, above 0; advantages beyond
            are cut off. A smaller one learns faster, and tells very good images from good ones no more.
        steps_per_image: denoising steps whose noise is added to each image, different ones, at least 1 and at most T;
            None, or more than there are, for all T. More learn more from an image, and take longer.
        n_epochs: passes over the noisy images of an iteration, at least 1.
        old_decay: the largest eta, in [0, 1]; a larger one lets the old policy follow more slowly.
        old_decay_rate: eta in iteration i is ``old_decay_rate`` x i, at most ``old_decay``; at least 0. A small rate
            lets the first iterations learn fast.
        kl_coef: weight of || output - output_pre ||^2, the mean squared difference to the pre-trained model's output,
            at least 0. 0 trains without it and saves the pre-trained model's pass.

    Raises:
        ValueError: if an argument is out of range.
    """

    keep_old = True

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        group_size: int = 16,
        advantage_clip: float = 5.0,
        steps_per_image: int | None = None,
        n_epochs: int = 1,
        old_decay: float = 0.5,
        old_decay_rate: float = 0.001,
        kl_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.group_size = check_integer("group_size", group_size)
        self.advantage_clip = check_positive("advantage_clip", advantage_clip)
        self.steps_per_image = None if steps_per_image is None else check_integer("steps_per_image", steps_per_image)
        self.n_epochs = check_integer("n_epochs", n_epochs)
        self.old_decay = check_fraction("old_decay", old_decay)
        self.old_decay_rate = check_non_negative("old_decay_rate", old_decay_rate)
        self.kl_coef = check_non_negative("kl_coef", kl_coef)
        super().__init__(policy, env, **kwargs)

    def train(self) -> None:
        """One update: passes over the noisy images, with an optimiser step for each batch; then the old policy follows.

        All noise is drawn before the first step, so that the loss can compare with the policy as it is now.
        """
        if not self.rollout_buffer.valid.any():
            return  # no image had a valid reward
        # Every rank has the noisy images of its own images, and its share of every batch.
        own, noisy_images = self._own_elements(), self.noisy_images()
        image_of = torch.nonzero(self.rollout_buffer.valid).flatten().repeat_interleave(self._steps_of_an_image)
        for epoch in range(self.n_epochs):
            rng = make_generator(self.run_seed, Purpose.BATCHES, self.iteration, epoch)
            order = torch.from_numpy(rng.permutation(len(image_of))).to(noisy_images.noisy.device)
            for batch in split_evenly(order, self.batch_size):
                with self.optimizer_step():
                    largest = self.rollout_buffer.largest_share(image_of[batch])
                    self.backward(noisy_images.take(within(batch, own)).as_share_of(len(batch), largest))
        assert self.policy.old is not None
        self.policy.old.follow(min(self.old_decay, self.old_decay_rate * self.iteration))

    @property
    def _steps_of_an_image(self) -> int:
        n_steps = self.process.num_inference_steps
        return min(self.steps_per_image or n_steps, n_steps)

    def _own_elements(self) -> range:
        """Returns which noisy images belong to this rank, among those of all valid images."""
        buffer, per_image = self.rollout_buffer, self._steps_of_an_image
        before, end = int(buffer.valid[: buffer.own.start].sum()), int(buffer.valid[: buffer.own.stop].sum())
        return range(before * per_image, end * per_image)

    def noisy_images(self) -> NoisyImages:
        """Returns the noisy images of the iteration: each valid image at its steps, with its advantage."""
        buffer, n_steps, per_image = self.rollout_buffer, self.process.num_inference_steps, self._steps_of_an_image
        images = torch.nonzero(buffer.valid).flatten()
        prompts = [buffer.prompts[image] for image in images.tolist()]
        advantages = self.advantages(buffer.final_rewards[images], prompts)
        rng = make_generator(self.run_seed, Purpose.FIT, self.iteration)
        step = torch.from_numpy(choose_steps(len(images), per_image, n_steps, rng)).flatten()
        # The numbers of all images, so that an image gets the same ones with any number of ranks.
        noise = rng.standard_normal((len(step), *self.process.model.latent_shape), np.float32)
        own = self._own_elements()
        rows = torch.arange(own.start, own.stop, device=images.device) // per_image
        index = images[rows] - buffer.own.start
        of_own = slice(own.start, own.stop)
        return add_noise(
            self.process,
            buffer.latents[index, -1],
            step[of_own].to(images.device),
            torch.from_numpy(noise[of_own]).to(images.device),
            advantages[rows],
            index,
            buffer.conditioning,
        )

    def advantages(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """clip( (r - mean) / (c std), -1, 1 ): the mean is that of the prompt's images, the std that of all.

        Args:
            rewards: (n,).
            prompts: their n prompts.

        Returns:
            (n,) in [-1, 1].
        """
        groups, values = number_groups(prompts).to(rewards.device), rewards.double()
        centred = values - (groups.bincount(values) / groups.bincount())[groups]
        scale = self.advantage_clip * divisor(values.std(correction=0), values.mean())
        return (centred / scale).clamp(-1, 1).to(rewards)

    def reference_penalty(self, batch: NoisyImages, output: Tensor) -> tuple[Tensor, Metrics]:
        """kl_coef || output - output_pre ||^2 of an output (B, C, h, w), (B,); a weight of 0 costs no pass."""
        if not self.kl_coef:
            return torch.zeros_like(batch.weight), {}
        # The pre-trained model is a fixed target.
        with torch.no_grad():
            reference = self.policy.predict_output(batch.state, reference=True, guidance_scale=1.0)
        distance = losses.denoising_loss(output, reference)
        return self.kl_coef * distance, {"distance_to_reference": distance.detach()}

    def old_output(self, batch: NoisyImages) -> Tensor:
        """The old policy's output, (B, C, h, w)."""
        with self.policy.old_weights():
            return self.policy.predict_output(batch.state, guidance_scale=1.0)
