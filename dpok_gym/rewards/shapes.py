"""The opinion of the embedded world's judge, one reward for each of its two questions."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from dpok_gym.shapes.judge import Judgement, judge

_latest = threading.local()  # chunks of a batch may be judged side by side


def _judgement(images: Tensor, prompts: list[str]) -> Judgement:
    """Asks the judge; about the pictures that it has just seen, which two rewards in one sum are, only once."""
    images = images.to("cpu", torch.float32)
    # By content and not by identity: a caller may have painted something else into the same tensor.
    latest: tuple[Tensor, list[str], Judgement] | None = getattr(_latest, "value", None)
    if latest is None or prompts != latest[1] or not torch.equal(images, latest[0]):
        _latest.value = latest = images.clone(), list(prompts), judge(images, prompts)
    return latest[2]


class ShapesAlignment:
    """How well the judge finds what the prompt asks for in the picture, see :mod:`dpok_gym.shapes.judge`."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) for ``images`` (B, 3, 64, 64) and prompts that the shapes world can read."""
        return _judgement(images, prompts).alignment


class ShapesQuality:
    """How clean the judge finds the picture, whatever the prompt, see :mod:`dpok_gym.shapes.judge`."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) for ``images`` (B, 3, 64, 64) and prompts that the shapes world can read."""
        return _judgement(images, prompts).quality
