"""What transformers at most warns of: parts of a model that were not in its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe_wrong_weights(loading_info: Mapping[str, Any]) -> str:
    """Says how many weights did not come from the files, and some of their names; "" if all did.

    Args:
        loading_info: the second result of ``from_pretrained(..., output_loading_info=True)``.
    """
    mismatched = (key if isinstance(key, str) else key[0] for key in loading_info["mismatched_keys"])
    wrong = sorted([*loading_info["missing_keys"], *mismatched])
    return f"lacks {len(wrong)} weights or has them in another shape, such as {', '.join(wrong[:3])}" if wrong else ""


def has_vocabulary(tokenizer: Any) -> bool:
    """Whether a tokenizer knows any word: of a folder without a vocabulary one is made that knows none."""
    return tokenizer.vocab_size > len(set(tokenizer.all_special_ids))
