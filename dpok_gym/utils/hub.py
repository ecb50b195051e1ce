"""Models that transformers and diffusers load from the hub and from files of others, and checks of what was loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Arguments of transformers' ``from_pretrained``. A config may name another attention, which is downloaded and run.
NO_CODE: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": False}

#: Endings of files of weights.
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
#: Longer than any network that is there takes to connect, and short enough to wait for.
_CONNECT_SECONDS = 5


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


def find_outage() -> str | None:
    """Returns why the Hugging Face hub cannot be reached; None if it can.

    This is one request without retries. A caller that knows of the outage passes ``local_files_only=True`` to the
    libraries, which would ask for half a minute otherwise, and say so for every file.
    """
    from huggingface_hub import constants, get_session, is_offline_mode  # slow to import

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        # Seconds to connect, to read, to write and to wait for a connection. Any answer will do.
        get_session().head(constants.ENDPOINT, timeout=(_CONNECT_SECONDS, 10, 10, 10))
    except Exception as error:  # each version of huggingface_hub has another HTTP library
        return f"{type(error).__name__}: {error}"
    return None


def check_hub_id(what: str, source: str | os.PathLike[str], *, is_unknown: bool = False) -> None:
    """Checks that a text can be a hub id, and is no path of something that is not there.

    It is a path if it has more than one slash or a character that no hub id has, begins with a dot or a slash, or ends
    like a file of weights.

    Args:
        what: what is wanted, for the error message.
        source: a path at which nothing is, or a hub id.
        is_unknown: whether the hub and the cache have no such id. Then it also is a path if the folder before its slash
            is there.

    Raises:
        FileNotFoundError: if it is a path.
    """
    text = os.fspath(source)
    is_hub_id = _HUB_ID.fullmatch(text) and not text.endswith(WEIGHT_SUFFIXES)
    if not is_hub_id or (is_unknown and "/" in text and Path(text).parent.is_dir()):
        raise FileNotFoundError(
            f"{what}: there is no file or folder {text!r}; check the path and the working folder {str(Path.cwd())!r}"
        )
