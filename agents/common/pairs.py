"""Pairs of images for the same prompt, of which one is better: what a preference is learned from.

Letters used for shapes: M images, N pairs of them, B pairs in a batch, C x h x w a latent, H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from agents.common.buffer import Batch, select
from agents.common.matching import encode_distinct
from dpok_gym.choices.records import read_choices
from dpok_gym.models.base import Conditioning, TextToImageModel
from dpok_gym.samplers import DenoisingProcess, State
from dpok_gym.utils.reading import read_image


@dataclass(frozen=True)
class Pairs:
    """Pairs of finished images.

    Attributes:
        latents: (M, C, h, w) x_0 of the images.
        rows: (N, 2) int64, rows of ``latents``: first the better image, the winner, then the other one, the loser.
        prompts: N texts.
        digest: of the images' pixels, the pairs and the prompts, in hexadecimal; "" for pairs that are in no file.
    """

    latents: Tensor
    rows: Tensor
    prompts: list[str]
    digest: str = ""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass
class NoisyPairs(Batch):
    """A batch of pairs to learn from. Both images of a pair have the same noise, of the same denoising step.

    Attributes:
        latents: (B, 2, C, h, w) x_0 of the winner and the loser.
        noisy: (B, 2, C, h, w) x_t.
        step: (B,) int64, the denoising step.
        target: (B, 2, C, h, w) the output of a perfect network for x_t.
        index: (B,) int64, row of the pair's prompt in the conditioning.
        conditioning: of the distinct prompts.
    """

    latents: Tensor
    noisy: Tensor
    step: Tensor
    target: Tensor
    index: Tensor
    conditioning: Conditioning

    @property
    def state(self) -> State:
        """The 2 B noisy images as states of the denoising, each loser after its winner."""
        conditioning = select(self.conditioning, self.index.repeat_interleave(2))
        return State(self.noisy.flatten(0, 1), self.step.repeat_interleave(2), conditioning)


def add_noise_to_pairs(
    process: DenoisingProcess, pairs: Pairs, chosen: Sequence[int], step: Tensor, noise: Tensor
) -> NoisyPairs:
    """Makes x_t = signal x_0 + noise eps of both images of some pairs.

    Args:
        process: the denoising process, whose steps the noise is that of.
        pairs: N pairs.
        chosen: B numbers of pairs.
        step: (B,) int64 in [0, T), the denoising step of each pair.
        noise: (B, C, h, w) eps of each pair.
    """
    rows = pairs.rows[torch.as_tensor(chosen, device=pairs.rows.device)]
    latents = pairs.latents[rows.to(pairs.latents.device)].to(noise.device)
    winners, losers = latents.unbind(dim=1)
    noisy = [process.table.add_noise(step, clean, noise) for clean in (winners, losers)]
    target = [process.table.target(step, *each) for each in zip((winners, losers), noisy, strict=True)]
    index, conditioning = encode_distinct(process, [pairs.prompts[number] for number in chosen])
    return NoisyPairs(latents, torch.stack(noisy, dim=1), step, torch.stack(target, dim=1), index, conditioning)


def best_and_worst(latents: Tensor, rewards: Tensor, valid: Tensor, prompts: Sequence[str], group_size: int) -> Pairs:
    """Pairs the image with the highest reward of each group with that of the lowest.

    Groups with fewer than two valid images, or whose rewards are all the same, give no pair.

    Args:
        latents: (M, C, h, w) x_0.
        rewards: (M,).
        valid: (M,) bool, whether an image may be in a pair.
        prompts: M texts, the same within a group.
        group_size: images in a row that are a group.
    """
    rows = []
    for group in torch.arange(len(rewards), device=rewards.device).split(group_size):
        images = group[valid[group]]
        if len(images) > 1:
            best, worst = images[rewards[images].argmax()], images[rewards[images].argmin()]
            if rewards[best] > rewards[worst]:
                rows.append([int(best), int(worst)])
    pairs = torch.tensor(rows, dtype=torch.int64, device=latents.device).reshape(-1, 2)
    return Pairs(latents, pairs, [prompts[best] for best, _ in rows])


@torch.no_grad()
def read_pairs(path: str | os.PathLike[str], model: TextToImageModel) -> Pairs:
    """Reads a file of choices, and encodes each of its images once. Choices of neither image are left out.

    An image of another size than the model's is scaled until it covers the model's, and its middle is taken.

    Args:
        path: the file, see :mod:`dpok_gym.choices.records`.
        model: the model whose latents the images become.

    Raises:
        FileNotFoundError: if the file or an image does not exist; the message has the number of the line.
        ValueError: if a line is malformed, an image cannot be read, or no choice prefers an image.
    """
    choices = [choice for choice in read_choices(path) if choice.preferred is not None]
    if not choices:
        raise ValueError(f"no choice in {str(path)!r} prefers an image, so there is nothing to learn from; choose more")
    row_of: dict[Path, int] = {}
    latents: list[Tensor] = []
    digest = hashlib.sha256()
    for choice in choices:
        for image in choice.images:
            if image not in row_of:
                try:
                    pixels = _read_pixels(image, model.image_shape)
                except ValueError as error:
                    raise ValueError(f"line {choice.line} of {str(path)!r}: {error}") from error
                row_of[image] = len(latents)
                latents.append(model.encode_images(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255))
                digest.update(pixels.tobytes())
    ordered = [choice.images[::-1] if choice.preferred else choice.images for choice in choices]  # the winner first
    rows = [[row_of[winner], row_of[loser]] for winner, loser in ordered]
    prompts = [choice.prompt for choice in choices]
    digest.update(repr((rows, prompts)).encode())
    return Pairs(torch.cat(latents), torch.tensor(rows), prompts, digest.hexdigest())


def _read_pixels(path: Path, shape: tuple[int, int]) -> NDArray[Any]:
    """Returns the pixels (H, W, 3) uint8 of an image."""
    height, width = shape
    return np.array(ImageOps.fit(read_image(path), (width, height), Image.Resampling.BICUBIC))
