"""Random numbers as a function of (seed, purpose, index): there is no generator state that could be lost.

The noise of image k of a run does not depend on how many images are drawn side by side, on micro-batches, on ranks or
on a resume. The order of batches depends on the iteration only.

Letters used for shapes: B images, C x h x w a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """The purposes of random numbers. The values are part of every run: changing one changes its images."""

    PROMPT = 0  # by group of images
    INITIAL_NOISE = 1  # x_T, by image
    ACTION_NOISE = 2  # the noise of the denoising steps, by image
    BATCHES = 3  # order and choice of transitions, by iteration and epoch
    WEIGHTS = 4  # of new networks
    FIT = 5  # batches and noise of the forward process, by optimiser step or iteration
    EVALUATION_INITIAL_NOISE = 6  # by image
    EVALUATION_ACTION_NOISE = 7  # by image
    STEERING = 8  # the choice among an image's particles, by image and denoising step
    ANCHOR = 9  # prompt and noise of the anchor's images, by image
    ANCHOR_BATCHES = 10  # their batches and the noise added to them, by optimiser step
    DRIFT = 11  # the deterministic steps whose drift is logged, by iteration


def make_generator(seed: int, purpose: Purpose, *index: int) -> np.random.Generator:
    """Makes the generator of a purpose.

    Args:
        seed: of the run, at least 0.
        purpose: what the numbers are for.
        *index: of the image, the iteration or the step, at least 0.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(purpose), *index)))


class ImageNoise:
    """The noise of B images: x_T, then that of each denoising step, in this order.

    Args:
        initial: B generators of x_T.
        actions: B generators of the steps' noise.
        latent_shape: (C, h, w).
        device: where the tensors are put. The numbers are drawn on the CPU, so they are the same for all devices.
    """

    def __init__(
        self,
        initial: Sequence[np.random.Generator],
        actions: Sequence[np.random.Generator],
        latent_shape: tuple[int, ...],
        device: torch.device | str,
    ) -> None:
        self._initial, self._actions = initial, actions
        self._shape, self._device = latent_shape, device

    @classmethod
    def for_training(
        cls,
        seed: int,
        images: Sequence[int],
        latent_shape: tuple[int, ...],
        device: torch.device | str,
        initial_images: Sequence[int] | None = None,
    ) -> ImageNoise:
        """The noise of images of a run.

        Args:
            seed: of the run.
            images: number of each image in the run.
            latent_shape: (C, h, w).
            device: where the tensors are put.
            initial_images: number of the image whose x_T each image gets; None for its own.
        """
        starts = images if initial_images is None else initial_images
        initial = [make_generator(seed, Purpose.INITIAL_NOISE, image) for image in starts]
        actions = [make_generator(seed, Purpose.ACTION_NOISE, image) for image in images]
        return cls(initial, actions, latent_shape, device)

    @classmethod
    def for_evaluation(
        cls,
        seeds: Sequence[int],
        latent_shape: tuple[int, ...],
        device: torch.device | str,
        n_particles: int = 1,
    ) -> ImageNoise:
        """The noise of evaluation images, one for each seed; never that of training images.

        Args:
            seeds: of the images.
            latent_shape: (C, h, w).
            device: where the tensors are put.
            n_particles: k, each image is drawn so many times. The batch has the k particles of the first image, then
                those of the next one.
        """
        # The first particle has the noise of the image that is drawn alone, and k particles are the first of more.
        keys = [(seed, (particle,) if particle else ()) for seed in seeds for particle in range(n_particles)]
        initial = [make_generator(seed, Purpose.EVALUATION_INITIAL_NOISE, *particle) for seed, particle in keys]
        actions = [make_generator(seed, Purpose.EVALUATION_ACTION_NOISE, *particle) for seed, particle in keys]
        return cls(initial, actions, latent_shape, device)

    def initial_latents(self) -> Tensor:
        """Draws x_T, (B, C, h, w)."""
        return self._draw(self._initial)

    def __call__(self, step: int) -> Tensor:
        """Draws the noise of the next denoising step, (B, C, h, w); the steps must be asked for in their order."""
        return self._draw(self._actions)

    def _draw(self, generators: Sequence[np.random.Generator]) -> Tensor:
        noise = np.stack([generator.standard_normal(self._shape, np.float32) for generator in generators])
        return torch.from_numpy(noise).to(self._device)
