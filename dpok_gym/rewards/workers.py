"""Judging finished pictures in several threads while the next ones are still being decoded.

Threads suit rewards that wait (for a server) or compute outside of Python (torch, Pillow). One that needs processes of
its own, for Python code or another environment, has them as ``dpok serve-reward``, by any number of addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from dpok_gym.rewards.base import Components, Reward, RewardBatch


def judge_chunks(
    reward: Reward, chunks: Iterable[tuple[Tensor, list[str]]], executor: Executor | None = None
) -> tuple[Tensor, RewardBatch]:
    """Judges pictures that come in chunks, and puts them together in their order.

    What has state, the running normalisation, waits for the whole batch and sees it in order: only the reward functions
    themselves run in the workers. So the result is that of one call with everything, as long as what a function says of
    a picture does not depend on the others in its batch.

    Args:
        reward: its functions must bear being called by several threads, if there are any.
        chunks: pictures (b, 3, H, W) and their b prompts; each is handed on as soon as it has come.
        executor: computes the chunks; None for this thread.

    Returns:
        All pictures (B, 3, H, W), and what they are worth.

    Raises:
        ValueError: if a function has other components for one chunk than for another. Errors of the reward surface
            here, the first by the order of the pictures; what has not begun by then is called off.
    """
    pictures: list[Tensor] = []
    prompts: list[str] = []
    pending: list[Future[Components]] = []
    found: list[Components] = []
    try:
        for images, texts in chunks:
            pictures.append(images)
            prompts += texts
            if executor is None:
                found.append(reward.components(images, texts))
            else:
                pending.append(executor.submit(reward.components, images, texts))
        found += [future.result() for future in pending]
    finally:
        for future in pending:
            future.cancel()
    return torch.cat(pictures), reward.combine(_concatenate(found), prompts)


def _concatenate(found: Sequence[Components]) -> Components:
    names = {name: list(components) for name, components in found[0].items()}
    for other in found[1:]:
        for name, components in other.items():
            if components.keys() != found[0][name].keys():
                raise ValueError(
                    f"the reward {name!r} must have the same components for all pictures, but has {names[name]} for "
                    f"some and {list(components)} for others"
                )
    return {
        name: {component: torch.cat([part[name][component] for part in found]) for component in components}
        for name, components in names.items()
    }
