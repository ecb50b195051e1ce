"""Scoring of finished images in threads, while the next images are still being decoded.

Threads suit rewards that wait (for a server) or compute outside of Python (torch, Pillow). A reward that needs
processes of its own, for Python code or for another environment, runs behind ``dpok serve-reward``, on any number of
machines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from dpok_gym.rewards.base import Components, Reward, RewardBatch


def judge_chunks(
    reward: Reward, chunks: Iterable[tuple[Tensor, list[str]]], executor: Executor | None = None
) -> RewardBatch:
    """Scores images that come in chunks, and concatenates the results in the order of the chunks.

    The result equals that of one call with all images, as long as a function's score of an image does not depend on
    the other images in its batch.

    Args:
        reward: several threads call its functions if the executor has several.
        chunks: images (b, 3, H, W) and their b prompts; each chunk is submitted as soon as it has come.
        executor: runs the reward functions; None for this thread.

    Returns:
        The rewards of all images.

    Raises:
        ValueError: if a function has other components for one chunk than for another. An error of a reward function is
            raised here too, the first in the order of the images; chunks that have not begun by then are cancelled.
    """
    prompts: list[str] = []
    pending: list[Future[Components]] = []
    scores: list[Components] = []
    try:
        for images, chunk_prompts in chunks:
            prompts += chunk_prompts
            # The executor works on this chunk while the caller decodes the next one.
            if executor is None:
                scores.append(reward.components(images, chunk_prompts))
            else:
                pending.append(executor.submit(reward.components, images, chunk_prompts))
        scores += [future.result() for future in pending]
    finally:
        for future in pending:
            future.cancel()
    return reward.combine(_concatenate(scores), prompts)


def check_same_components(batches: Iterable[Iterable[str]], reward: str = "the reward") -> None:
    """Makes sure that all images have rewards of the same names.

    Args:
        batches: the names of the components of each batch of images.
        reward: what the reward is, for the error message.

    Raises:
        ValueError: if they differ.
    """
    first, *others = [sorted(names) for names in batches]
    for other in others:
        if other != first:
            raise ValueError(
                f"{reward} must have the same components for all images, but has {first} for some and {other} for "
                "others; fix the reward"
            )


def _concatenate(scores: Sequence[Components]) -> Components:
    first = scores[0]
    for name in first:
        check_same_components([part[name] for part in scores], f"the reward {name!r}")
    whole: Components = {}
    for name, components in first.items():
        whole[name] = {}
        for component in components:
            whole[name][component] = torch.cat([part[name][component] for part in scores])
    return whole
