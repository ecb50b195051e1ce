"""Published checkpoint files: finding, reading and checking them.

Nothing is searched at import, and no code from a checkpoint is ever run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dpok_gym.utils.hub import check_hub_id, find_outage, has_vocabulary
from dpok_gym.utils.reading import check_model_folder, check_torch_file, read_tensors

StateDict = dict[str, Tensor]
PathLike = str | os.PathLike[str]
Loaded = TypeVar("Loaded")
Module = TypeVar("Module", bound=nn.Module)


def find_file(reward: str, checkpoint: PathLike | None, repository: str, filename: str) -> Path:
    """Returns the local path of a reward's file: the given one, or that in the Hugging Face cache or hub.

    Args:
        reward: the reward's name, for error messages.
        checkpoint: the file; None to take it from the repository.
        repository: its repository on the hub.
        filename: its name there.

    Raises:
        FileNotFoundError: if there is no such file; the message lists the ways to get it.
    """
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"the reward {reward!r} was given the checkpoint {str(path)!r}, which is no file")
        return path
    from huggingface_hub import hf_hub_download

    outage = find_outage()
    try:
        return Path(hf_hub_download(repository, filename, local_files_only=outage is not None))
    except Exception as error:
        raise FileNotFoundError(
            f"the reward {reward!r} needs {filename!r}, which is not in the Hugging Face cache and could not be "
            f"downloaded from {repository!r} ({outage or _reason(error)}). "
            f"{_ways_out(f'{repository} {filename}', 'checkpoint')}"
        ) from error


def from_hub(reward: str, what: str, source: PathLike, argument: str, load: Callable[..., Loaded]) -> Loaded:
    """Calls ``load`` (a ``from_pretrained``) with a local folder or hub id.

    Args:
        reward: the reward's name, for error messages.
        what: the loaded thing, such as "a CLIP model", for error messages.
        source: the folder or hub id.
        argument: the reward's keyword argument that ``source`` came from, for error messages.
        load: a function of the source that returns the loaded thing; it takes ``local_files_only``.

    Raises:
        FileNotFoundError: if the source is neither a folder, nor in the cache, nor can be downloaded.
        ValueError: if a folder cannot be loaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        try:
            check_model_folder(folder)
            return load(str(folder), local_files_only=True)
        except Exception as error:
            raise ValueError(
                f"the reward {reward!r} cannot load {what} from the folder {folder}: {error}. If a file is damaged or "
                "missing, get it again"
            ) from error
    whose = f"{what} of the reward {reward!r}"
    check_hub_id(whose, source)
    outage = find_outage()
    try:
        return load(str(source), local_files_only=outage is not None)
    except Exception as error:
        check_hub_id(whose, source, is_unknown=True)
        raise FileNotFoundError(
            f"the reward {reward!r} needs {what}, and {str(source)!r} is neither a local folder, nor in the Hugging "
            f"Face cache, nor could it be downloaded ({outage or _reason(error)}). {_ways_out(source, argument)}"
        ) from error


def _ways_out(download: PathLike, argument: str) -> str:
    return (
        f"Ways out: run `hf download {download}` where there is a network and set HF_HOME to that cache; or make the "
        f"reward yourself with {argument}='/path' and pass it instead of its name (--reward my_module:my_reward)"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load_tokenizer(reward: str, what: str, source: PathLike, tokenizer_class: Any) -> Any:
    """Loads a tokenizer of transformers from a folder or the hub.

    Args:
        reward: see :func:`from_hub`, also for the next two arguments.
        what: the kind of tokenizer, for error messages.
        source: the folder or hub id.
        tokenizer_class: its class in transformers.

    Raises:
        FileNotFoundError: see :func:`from_hub`.
        ValueError: if a folder cannot be loaded, or has no vocabulary.
    """

    def load(name: str, local_files_only: bool) -> Any:
        tokenizer = tokenizer_class.from_pretrained(name, local_files_only=local_files_only)
        if not has_vocabulary(tokenizer):
            raise ValueError("it has no vocabulary")
        return tokenizer

    return from_hub(reward, what, source, "tokenizer", load)


def read_state_dict(path: Path) -> StateDict:
    """Reads tensors, and nothing but tensors, from a ``.safetensors`` file or from what ``torch.save`` wrote.

    Raises:
        ValueError: if the file is damaged or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        content = torch.load(check_torch_file(path), map_location="cpu", weights_only=True)
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


def check_keys(path: Path, loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Checks that a state dict fits a network.

    Args:
        path: the file of the state dict, for error messages.
        loaded: the state dict.
        expected: the network's own state dict.

    Raises:
        ValueError: if keys are missing, left over, or of another shape; some are named.
    """
    problems: list[str] = []
    for kind, keys in (("missing", expected.keys() - loaded.keys()), ("unknown", loaded.keys() - expected.keys())):
        if keys:
            problems.append(f"{kind} keys {', '.join(sorted(keys)[:3])} ({len(keys)} in all)")
    common = [key for key in expected if key in loaded]
    misshapen = [key for key in common if loaded[key].shape != expected[key].shape]
    for key in misshapen[:3]:
        shape, expected_shape = tuple(loaded[key].shape), tuple(expected[key].shape)
        problems.append(f"{key} has the shape {shape} instead of {expected_shape}")
    if problems:
        raise ValueError(
            f"the checkpoint {path} does not fit the network: {'; '.join(problems)}. It must be the file that the "
            "reward's authors published, or one with the same layout (the keys above are named as in transformers)"
        )


def build(path: Path, make: Callable[[], Module], tensors: StateDict) -> Module:
    """Makes a network and fills in its weights, without the time and memory for random weights before.

    Args:
        path: the file of the tensors, for error messages.
        make: makes the network.
        tensors: its state dict; the network keeps their number format.

    Raises:
        ValueError: if the tensors do not fit, see :func:`check_keys`.
    """
    with torch.device("meta"):  # shapes only; the tensors become the weights
        network = make()
    check_keys(path, tensors, network.state_dict())
    network.load_state_dict(tensors, assign=True)
    for name, buffer in list(network.named_buffers()):  # they number the positions, and no checkpoint has them
        part = network.get_submodule(name.rpartition(".")[0])
        part.position_ids = torch.arange(buffer.shape[-1])[None]
    return network.eval().requires_grad_(False)


def rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Applies each rule, a regular expression and its replacement, in turn."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
