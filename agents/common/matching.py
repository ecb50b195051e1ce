"""Finished images with noise added to them: what the forward process is learned from.

A denoiser that is given x_t = signal x_0 + noise eps should answer with the target that x_0 and eps fix. Matching its
output to the target is the loss that diffusion models are trained with.

Letters used for shapes: B noisy images, C x h x w a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.common.buffer import Batch, select
from dpok_gym.models.base import Conditioning
from dpok_gym.samplers import DenoisingProcess, State


@dataclass
class NoisyImages(Batch):
    """A batch of noisy images to learn from.

    Attributes:
        latents: (B, C, h, w) x_0.
        noisy: (B, C, h, w) x_t, a sample of q(x_t | x_0).
        step: (B,) int64, the denoising step.
        target: (B, C, h, w) the output of a perfect network: the noise, the velocity or x_0, whichever the model
            predicts.
        weight: (B,) weight or advantage of the image.
        index: (B,) int64, row of the image's prompt in the conditioning.
        conditioning: of the distinct prompts.
    """

    latents: Tensor
    noisy: Tensor
    step: Tensor
    target: Tensor
    weight: Tensor
    index: Tensor
    conditioning: Conditioning

    @property
    def state(self) -> State:
        """The noisy images as states of the denoising."""
        return State(self.noisy, self.step, select(self.conditioning, self.index))


def add_noise(
    process: DenoisingProcess,
    latents: Tensor,
    step: Tensor,
    noise: Tensor,
    weight: Tensor,
    index: Tensor,
    conditioning: Conditioning,
) -> NoisyImages:
    """Makes x_t = signal x_0 + noise eps of finished images.

    Args:
        process: the denoising process, whose steps the noise is that of.
        latents: (B, C, h, w) x_0.
        step: (B,) int64 in [0, T), the denoising step whose noise level each image gets.
        noise: (B, C, h, w) eps.
        weight: (B,), handed on.
        index: (B,) int64, handed on, as is the conditioning.
        conditioning: of the prompts.
    """
    noisy = process.table.add_noise(step, latents, noise)
    target = process.table.target(step, latents, noisy)
    return NoisyImages(latents, noisy, step, target, weight, index, conditioning)


def encode_distinct(process: DenoisingProcess, prompts: Sequence[str]) -> tuple[Tensor, Conditioning]:
    """Encodes each prompt once, even if it comes many times.

    Returns:
        The row of each prompt in the conditioning, (B,) int64, and the conditioning of the distinct prompts.
    """
    distinct = list(dict.fromkeys(prompts))
    numbers = {prompt: number for number, prompt in enumerate(distinct)}
    index = torch.tensor([numbers[prompt] for prompt in prompts], device=process.model.device)
    return index, process.encode(distinct)


def choose_batch(n: int, batch_size: int | None, rng: np.random.Generator) -> list[int]:
    """Chooses ``batch_size`` of n elements, each at random; None for each element once, in random order."""
    return (rng.permutation(n) if batch_size is None else rng.integers(n, size=batch_size)).tolist()


def draw_noise(process: DenoisingProcess, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draws random denoising steps, all equally likely, (n,) int64, and eps ~ N(0, I), (n, C, h, w)."""
    step = rng.integers(len(process.table), size=n)
    noise = rng.standard_normal((n, *process.model.latent_shape), np.float32)
    return torch.from_numpy(step).to(process.model.device), torch.from_numpy(noise).to(process.model.device)


def choose_steps(n_images: int, per_image: int, n_steps: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Chooses different denoising steps for each image, all equally likely: (n_images, per_image) int64.

    Args:
        n_images: number of images.
        per_image: steps for each, from 1 to T.
        n_steps: T.
        rng: decides.
    """
    return rng.permuted(np.tile(np.arange(n_steps), (n_images, 1)), axis=1)[:, :per_image]
