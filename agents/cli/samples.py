"""Images of the same seeds through the training of a run: rows of images in its folder ``samples``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents.common import distributed
from agents.common.evaluation import denoise_seeds
from dpok_gym.models import TextToImageModel
from dpok_gym.utils.files import replacing
from dpok_gym.utils.images import to_uint8

#: Images in a row, and pixels of their longer side at most.
N_SHOWN, MAX_SIDE = 8, 256

#: 00010-640-images.png is of iteration 10, after 640 images.
_NAME = re.compile(r"(\d+)-(\d+)-(images|steps)\.png")


@dataclass(frozen=True)
class Sample:
    """A row of images.

    Attributes:
        path: its file.
        iteration: how many iterations the model had learned.
        progress: the same for people, such as "640 images" or "50 optimiser steps".
    """

    path: Path
    iteration: int
    progress: str


def list_samples(folder: Path) -> list[Sample]:
    """Returns the rows of images in a folder, the first ones first."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*.png")]
    samples = []
    for path, match in matches:
        if match is not None:
            unit = "images" if match[3] == "images" else "optimiser steps"
            samples.append(Sample(path, int(match[1]), f"{int(match[2]):,} {unit}"))
    return sorted(samples, key=lambda sample: sample.iteration)


def remove_samples(folder: Path, iteration: int) -> None:
    """Removes the rows that a resumed run draws again, and the last row of a run that is to go on further.

    Args:
        folder: of the rows.
        iteration: that the run goes on from.
    """
    for sample in list_samples(folder):
        if sample.iteration >= iteration:
            sample.path.unlink()


class SampleCallback(BaseCallback):
    """Draws a row of images every few iterations, before an iteration begins: the first one is of the untrained model.

    All ranks draw it, since they may have to call the model together; rank 0 writes.

    Args:
        folder: where the rows go; it is made with the first one.
        every: iterations between two rows.
        prompts: of the images.
        seeds: of the images, as for :func:`agents.common.evaluation.evaluate`.
        added: is called with each new row.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        prompts: Sequence[str],
        seeds: Sequence[int],
        added: Callable[[Sample], None] = lambda sample: None,
    ) -> None:
        super().__init__()
        self._folder, self._every, self._prompts, self._seeds, self._added = folder, every, prompts, seeds, added

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.model.iteration % self._every == 0:  # type: ignore[attr-defined]
            self.draw(self.model)

    @torch.no_grad()
    def draw(self, agent: Any) -> None:
        """Draws a row with an agent as it is, and writes it."""
        for step in denoise_seeds(agent.process, self._prompts, self._seeds, agent.policy.transition):
            latents = step.next_latents
        if not distributed.is_main():
            return
        n_fitted = getattr(agent, "n_fitted", 0)  # a fit draws no images
        done = f"{n_fitted}-steps" if n_fitted else f"{agent.images_drawn}-images"
        path = self._folder / f"{agent.iteration:05d}-{done}.png"
        self._folder.mkdir(exist_ok=True)
        with replacing(path) as part:
            Image.fromarray(np.concatenate(_shrink(decode(agent.process.model, latents)), axis=1)).save(part, "PNG")
        self._added(next(sample for sample in list_samples(self._folder) if sample.path == path))


@torch.no_grad()
def decode(model: TextToImageModel, latents: Tensor) -> NDArray[np.uint8]:
    """Returns the images (B, H, W, 3) of latents (B, C, h, w), decoded one by one, as large models need it."""
    return np.concatenate([to_uint8(model.decode(latent[None])) for latent in latents])


def _shrink(images: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Makes images (B, H, W, 3) smaller if they are larger than :data:`MAX_SIDE`."""
    height, width = images.shape[1:3]
    if max(height, width) <= MAX_SIDE:
        return list(images)
    scale = MAX_SIDE / max(height, width)
    size = round(scale * width), round(scale * height)
    return [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images]
