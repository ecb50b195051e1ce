"""Published checkpoint files: where they are found, how they are read and checked.

Nothing is looked for at import, and no code of a checkpoint's author is ever run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dpok_gym.completeness import has_vocabulary

StateDict = dict[str, Tensor]
PathLike = str | os.PathLike[str]
Loaded = TypeVar("Loaded")
Module = TypeVar("Module", bound=nn.Module)


def find_file(reward: str, checkpoint: PathLike | None, repository: str, filename: str) -> Path:
    """The local path of a reward's file: the one given, or from the Hugging Face cache or hub.

    Raises:
        FileNotFoundError: if there is none; the message lists the ways to get it.
    """
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"the reward {reward!r} was given the checkpoint {str(path)!r}, which is no file")
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename))
    except Exception as error:
        raise FileNotFoundError(
            f"the reward {reward!r} needs {filename!r}, which is not in the Hugging Face cache and could not be "
            f"downloaded from {repository!r} ({type(error).__name__}: {error}). Ways out: run `hf download "
            f"{repository} {filename}` where there is a network and set HF_HOME to that cache; or make the reward "
            "yourself with checkpoint='/path/to/the/file' and pass it instead of its name"
        ) from error


def from_hub(reward: str, what: str, source: PathLike, argument: str, load: Callable[[str], Loaded]) -> Loaded:
    """Calls ``load`` (a ``from_pretrained``) with a local folder or hub id.

    Args:
        reward: its name, for errors.
        what: what is loaded, for errors.
        source: the folder or hub id.
        argument: the reward's keyword argument that ``source`` came from, for errors.
        load: takes the source.

    Raises:
        FileNotFoundError: if the source is neither a folder, nor in the cache, nor can be downloaded.
        ValueError: if a folder cannot be loaded.
    """
    folder = Path(source).expanduser()
    try:
        return load(str(folder if folder.is_dir() else source))
    except Exception as error:
        if folder.is_dir():
            raise ValueError(
                f"the reward {reward!r} cannot load {what} from the folder {folder}: {error}. If a file is damaged or "
                "missing, get it again"
            ) from error
        raise FileNotFoundError(
            f"the reward {reward!r} needs {what}, and {str(source)!r} is neither a local folder, nor in the Hugging "
            f"Face cache, nor could it be downloaded ({type(error).__name__}: {error}). Ways out: run `hf download "
            f"{source}` where there is a network and set HF_HOME to that cache; or make the reward yourself with "
            f"{argument}='/path/to/a/folder' and pass it instead of its name"
        ) from error


def load_tokenizer(reward: str, what: str, source: PathLike, tokenizer_class: Any) -> Any:
    """Loads a tokenizer of transformers from a folder or the hub; arguments and errors as in :func:`from_hub`."""

    def load(name: str) -> Any:
        tokenizer = tokenizer_class.from_pretrained(name)
        if not has_vocabulary(tokenizer):
            raise ValueError("it has no vocabulary")
        return tokenizer

    return from_hub(reward, what, source, "tokenizer", load)


def read_state_dict(path: Path) -> StateDict:
    """Reads tensors, and nothing but tensors, from a ``.safetensors`` file or from what ``torch.save`` wrote.

    Raises:
        ValueError: if the file is damaged or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(
            f"the checkpoint {path} cannot be read ({reason}). It must be a .safetensors file or one that torch.load "
            "reads with weights_only=True, since other pickles may run code of their author's; if it is damaged, get "
            "it again"
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not (isinstance(tensors, Mapping) and all(isinstance(value, Tensor) for value in tensors.values())):
        raise ValueError(f"the checkpoint {path} holds no state dict, a mapping of names to tensors; get another file")
    return dict(tensors)


def check_keys(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compares a state dict with the one of the network that it is for.

    Raises:
        ValueError: if keys are missing, left over, or of another shape; some are named.
    """
    problems = [
        f"{kind} keys {', '.join(sorted(keys)[:3])} ({len(keys)} in all)"
        for kind, keys in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys()))
        if keys
    ]
    problems += [
        f"{key} has the shape {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ][:3]
    if problems:
        raise ValueError(
            f"the checkpoint {path} does not fit the network: {'; '.join(problems)}. It must be the file that the "
            "reward's authors published, or one of the same build (keys are called as in transformers)"
        )


def build(path: Path, make: Callable[[], Module], tensors: StateDict) -> Module:
    """Makes a network and fills it, without ever drawing random weights for it.

    Args:
        path: where the tensors come from, for errors.
        make: makes the network.
        tensors: its state dict; the network keeps their number format.

    Raises:
        ValueError: as :func:`check_keys`.
    """
    with torch.device("meta"):
        network = make()
    check_keys(path, tensors, network.state_dict())
    network.load_state_dict(tensors, assign=True)
    for name, buffer in list(network.named_buffers()):  # all there are number positions; no checkpoint has them
        part = network.get_submodule(name.rpartition(".")[0])
        part.position_ids = torch.arange(buffer.shape[-1])[None]
    return network.eval().requires_grad_(False)


def rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Applies each rule, a regular expression and its replacement, in turn."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
