"""Models that transformers and diffusers load from files of others: what is read, and checks of what was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Arguments of transformers' ``from_pretrained``. A config may name another attention, which is downloaded and run.
NO_CODE: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": False}


def describe_wrong_weights(loading_info: Mapping[str, Any]) -> str:
    """Returns how many weights did not come from the files, with some of their names; "" if all did.

    transformers itself only warns of them.

    Args:
        loading_info: the second result of ``from_pretrained(..., output_loading_info=True)``.
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in loading_info["mismatched_keys"]]
    wrong = sorted([*loading_info["missing_keys"], *mismatched])
    if not wrong:
        return ""
    return f"lacks {len(wrong)} weights or has them in another shape, such as {', '.join(wrong[:3])}"


def has_vocabulary(tokenizer: Any) -> bool:
    """Returns whether a tokenizer knows any word: transformers makes an empty one of a folder without a vocabulary."""
    return tokenizer.vocab_size > len(set(tokenizer.all_special_ids))
