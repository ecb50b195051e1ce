"""Checks of an environment's prompts, all of them, before anything is drawn."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from dpok_gym.models import TextToImageModel
from dpok_gym.prompts import PromptSet, find_unobservable
from dpok_gym.utils.validation import check_entries, name_places

logger = logging.getLogger(__name__)


def skip_long_prompts(prompts: PromptSet, model: TextToImageModel, max_bytes: int) -> PromptSet:
    """Returns the prompts that the model reads to their end and that an observation can hold, and says how many.

    Args:
        prompts: the set.
        model: the model.
        max_bytes: bytes of UTF-8 that an observation can hold.

    Raises:
        ValueError: if all prompts of ``train`` are too long.
    """

    def find_long(texts: Sequence[str]) -> list[int]:
        long = {index for index, _ in model.find_long(texts)}
        return sorted(long | {i for i, text in enumerate(texts) if len(text.encode("utf-8", "replace")) > max_bytes})

    train, held_out = find_long(prompts.train), find_long(prompts.held_out)
    if len(train) == len(prompts.train):
        raise ValueError(f"all {len(train)} prompts of {prompts.name!r} are too long for the model {model.name!r}")
    if train or held_out:
        unseen = f", and {len(held_out)} of {len(prompts.held_out)} unseen ones" if held_out else ""
        where = f" ({name_places(train, prompts.lines)})" if train else ""
        _warn_once(
            f"{len(train)} of {len(prompts.train)} prompts of {prompts.name!r}{where} are too long for the model "
            f"{model.name} and are left out{unseen}"
        )
    return prompts.without(set(train), set(held_out))


def check_prompts(prompts: PromptSet, model: TextToImageModel, max_bytes: int) -> None:
    """Checks all prompts: an error now is better than one in the middle of a long run.

    If the model truncates long prompts, it says how many there are.

    Args:
        prompts: the set.
        model: the model.
        max_bytes: bytes of UTF-8 that an observation can hold.

    Raises:
        ValueError: if the model refuses a prompt, or an observation cannot hold it; the message says how many there
            are, and has the places of the first ones.
    """
    for texts, lines in ((prompts.train, prompts.lines), (prompts.held_out, ())):
        check_entries(model.find_unreadable(texts), len(texts), lines)
        check_entries(find_unobservable(texts, max_bytes), len(texts), lines)
    if model.long_prompts == "truncate" and (long := [index for index, _ in model.find_long(prompts.train)]):
        _warn_once(
            f"{len(long)} of {len(prompts.train)} prompts of {prompts.name!r} ({name_places(long, prompts.lines)}) are "
            f"too long for the model {model.name}, which does not read their end"
        )


@functools.cache
def _warn_once(message: str) -> None:
    """Says something once in a process, though each environment is checked."""
    logger.warning(message)
