"""The rewards of the shapes world: the judge's two verdicts, and a reward learned from choices."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from dpok_gym.rewards.preference.reward import PreferenceReward
from dpok_gym.shapes import PREFERENCE
from dpok_gym.shapes.judge import Judgement, judge

# Two rewards of one sum ask about the same images. Several threads may judge chunks of a batch side by side, so each
# thread keeps its own latest verdict.
_latest = threading.local()


def _judge_once(images: Tensor, prompts: list[str]) -> Judgement:
    """Returns the judge's verdict; the latest one is kept for the next question about the same images."""
    images = images.to("cpu", torch.float32)
    # The content is compared, not the identity: a caller may have written other images into the same tensor.
    latest: tuple[Tensor, list[str], Judgement] | None = getattr(_latest, "value", None)
    if latest is None or prompts != latest[1] or not torch.equal(images, latest[0]):
        latest = images.clone(), list(prompts), judge(images, prompts)
        _latest.value = latest
    return latest[2]


class ShapesAlignment:
    """The share of its prompt that an image fulfils, in [0, 1]; see :func:`dpok_gym.shapes.judge.alignment`."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) for ``images`` (B, 3, 64, 64) and prompts that the shapes world can read."""
        return _judge_once(images, prompts).alignment


class ShapesQuality:
    """The cleanness of an image, in [0, 1]; the prompt does not matter; see :func:`dpok_gym.shapes.judge.quality`."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) for ``images`` (B, 3, 64, 64) and prompts that the shapes world can read."""
        return _judge_once(images, prompts).quality


def shapes_preference() -> PreferenceReward:
    """Loads the shipped reward: what a network has learned from a simulated person's choices, in log-odds.

    See :mod:`dpok_gym.shapes.choices`. It has a gradient.
    """
    return PreferenceReward.load(PREFERENCE)
