"""The held-out reward: a second opinion on the training's images, which nothing is learned from.

Letters used for shapes: N images of an iteration, n of them on this rank, H x W pixels, K rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.common.monitor import HELD_OUT
from agents.common.rollouts import shorten_names
from dpok_gym.judging import MAX_PIXELS
from dpok_gym.rewards import Reward, make_reward
from dpok_gym.vector_env import DenoisingVectorEnv

#: Most images of an iteration that get the held-out reward, so that it costs little.
MAX_IMAGES = 16

_CLIP = "openai/clip-vit-large-patch14"


class HeldOutReward:
    """A reward that is logged and not trained on.

    Args:
        spec: "auto" for one that suits the environment, see :func:`choose`; None for none; else anything that
            :func:`dpok_gym.rewards.make_reward` takes.
        env: the environment, whose reward is trained on.

    Attributes:
        names: the rewards in it, K of them.
        columns: of the log, for the mean of each.
        unwanted: those of the columns whose weight is not above 0: a fall of these is no bad sign.
        description: one line for people: which rewards these are, or why there is none.

    Raises:
        ValueError: if there is no such reward; further errors as :func:`dpok_gym.rewards.make_reward`.
    """

    def __init__(self, spec: Any, env: DenoisingVectorEnv) -> None:
        chosen, why_none = choose(env) if isinstance(spec, str) and spec == "auto" else (spec, "")
        self._reward: Reward | None = None if chosen is None else make_reward(chosen, "mask")
        self.names = [] if self._reward is None else self._reward.names
        self.columns = [f"{HELD_OUT}{name}" for name in shorten_names(self.names)]
        weights = {} if self._reward is None else self._reward.weights
        self.unwanted = {column for column, name in zip(self.columns, self.names, strict=True) if not weights[name] > 0}
        alignment = env.world.alignment_reward if env.world is not None else None
        self._alignment = alignment if alignment in self.names and alignment not in env.reward.names else None
        self.description = f"held-out reward: {', '.join(self.names) or 'none' + why_none}"

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[str], rows: Sequence[int], n_all: int) -> Tensor:
        """Scores the images of a batch that are among the chosen ones of the iteration.

        Args:
            images: (n, H, W, 3) uint8.
            prompts: their n prompts.
            rows: n numbers, of each image in the iteration.
            n_all: N.

        Returns:
            (n, K) float64, see :meth:`score`; nan for images that were not chosen, or whose reward is not finite.
        """
        scores = torch.full((len(images), len(self.names)), math.nan, dtype=torch.float64)
        if self._reward is None:
            return scores
        chosen = chosen_images(n_all)
        here = [index for index, row in enumerate(rows) if row in chosen]
        if here:
            scores[here] = self.score(images[here], [prompts[index] for index in here])
        return scores

    def score(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> Tensor:
        """Returns the rewards of images, (n, K) float64, raw: before normalisation and weighting.

        A reward of several components counts with their sum.

        Args:
            images: (n, H, W, 3) uint8; there may be none.
            prompts: their n prompts.
        """
        parts = [torch.zeros(0, len(self.names), dtype=torch.float64)]
        # In full precision, all images of an evaluation would need gigabytes.
        size = max(1, MAX_PIXELS // math.prod(images.shape[1:3]))
        for first in range(0, len(images), size):
            rows = slice(first, first + size)
            parts.append(self._score(images[rows], list(prompts[rows])))
        return torch.cat(parts)

    def _score(self, images: NDArray[np.uint8], prompts: list[str]) -> Tensor:
        if self._reward is None:
            return torch.zeros(len(images), 0, dtype=torch.float64)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        by_name = self._reward.components(pixels, prompts)
        parts = [torch.stack(list(by_name[name].values())).double().sum(dim=0) for name in self.names]
        return torch.stack(parts, dim=1)

    def total(self, scores: Tensor) -> Tensor:
        """Returns the weighted sum of raw rewards (N, K), (N,)."""
        assert self._reward is not None
        by_name = {name: {name: values} for name, values in zip(self.names, scores.T, strict=True)}
        return torch.stack(list(self._reward.weigh(by_name).values())).sum(dim=0)

    def aligned_share(self, scores: Tensor) -> float | None:
        """Returns the share of fully aligned images among scored ones; None if the judge is none of these rewards.

        Args:
            scores: (N, K), what a call returned.
        """
        if self._alignment is None:
            return None
        return (scores[:, self.names.index(self._alignment)] == 1).double().mean().item()


def chosen_images(n: int) -> set[int]:
    """Returns which of the n images of an iteration are scored: evenly spaced ones, as groups lie side by side."""
    count = min(n, MAX_IMAGES)
    return {number * n // count for number in range(count)}


def choose(env: DenoisingVectorEnv) -> tuple[Any, str]:
    """Returns a reward that an environment does not train on, or None; and why there is none.

    In an embedded world that is all that the judge says; or the learned preference, if the judge is trained on. For
    other models it is the CLIP score, if its files are here: nothing is downloaded.
    """
    trained, world = env.reward.names, env.world
    if world is not None:
        is_judged = any(name in trained for name in world.evaluation_rewards)
        candidates = world.held_out_rewards if is_judged else world.evaluation_rewards
        others = dict.fromkeys((name for name in candidates if name not in trained), 1.0)
        return (others, "") if others else (None, " (this world has no other reward); image statistics are logged")
    folder = find_clip()
    if folder is None or "clip-score" in trained:
        reason = "is not on this disk" if folder is None else "is trained on"
        return None, f" (the CLIP score {reason}); image statistics are logged; choose one with --held-out-reward"
    from dpok_gym.rewards.networks.clip_score import ClipScore

    return ClipScore(folder, folder), ""


def find_clip() -> Path | None:
    """Returns the folder of CLIP in the cache of the hub, if all of its files are there."""
    from huggingface_hub import try_to_load_from_cache

    def find(name: str) -> Path | None:
        path = try_to_load_from_cache(_CLIP, name)
        return Path(path) if isinstance(path, str) else None

    config, weights = find("config.json"), find("model.safetensors")
    return config.parent if config and weights and (find("tokenizer.json") or find("vocab.json")) else None
