"""Files of LoRAs, as this package and other tools write them.

Inside this package a LoRA is a mapping of tensors by peft's names, without the denoiser's prefix:
``<layer>.lora_A.weight`` (rank x inputs) and ``<layer>.lora_B.weight`` (outputs x rank). The change of a layer is
B A x, without a further scale. Files differ in names, in prefixes, and in where they note the scale alpha / rank: see
:mod:`dpok_gym.models.lora_names`.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dpok_gym.models.lora_names import PEFT, A, B, check_family, check_format, to_peft_names
from dpok_gym.utils.files import replacing, write_text
from dpok_gym.utils.reading import check_tensors, check_torch_file, parse_json, read_json
from dpok_gym.utils.validation import check_finite, check_mapping, check_path, shorten

#: The file that diffusers' ``load_lora_weights`` looks for.
FILE_NAME = "pytorch_lora_weights.safetensors"
#: The files of peft.
PEFT_FILE_NAME, PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
#: The key of a safetensors header under which diffusers keeps peft's settings.
_NOTES = "lora_adapter_metadata"

#: What is looked for in a folder, in this order.
_FILE_NAMES = (FILE_NAME, PEFT_FILE_NAME, "pytorch_lora_weights.bin", "adapter_model.bin")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

#: The largest rank: that of the widest layers of published denoisers, with which nothing is low-rank any more.
MAX_RANK = 5120

#: peft's settings that are used here, and those that do not change what a trained LoRA computes.
_USED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_WITHOUT_EFFECT = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
}
#: How A and B began. Other ways also change the weights of the model, which a file of a LoRA does not hold.
_BEGINNINGS = (True, False, "gaussian")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a LoRA's layers. Alpha is always the rank, since the scale is in B.

    Attributes:
        rank: the rank of most layers.
        others: the rank of each layer that has another one.
        layers: all layers, sorted.
    """

    rank: int
    others: dict[str, int]
    layers: tuple[str, ...]

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Ranks:
        """Reads the ranks off the tensors."""
        ranks = {key.removesuffix(A): len(value) for key, value in sorted(state.items()) if key.endswith(A)}
        rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
        others = {layer: own for layer, own in ranks.items() if own != rank}
        return cls(rank, others, tuple(ranks))

    def to_peft(self) -> dict[str, Any]:
        """Returns the arguments of peft's ``LoraConfig``."""
        pattern = {f"^{layer}": rank for layer, rank in self.others.items()}
        return {
            "r": self.rank,
            "lora_alpha": self.rank,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "target_modules": list(self.layers),
        }

    def __str__(self) -> str:
        """Returns "32 layers with rank 4", or with "ranks 4 to 16"."""
        ranks = {self.rank, *self.others.values()}
        text = f"rank {self.rank}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
        return f"{len(self.layers)} layers with {text}"


def find_lora_file(path: str | Path) -> Path:
    """Returns the file of a LoRA: the path itself, or the file in the folder that it names.

    Raises:
        FileNotFoundError: if there is none; the message says what was looked for.
        ValueError: if a folder has several files, none of which has a usual name.
    """
    path = check_path("the LoRA", path)
    if path.is_file():
        return path
    for name in _FILE_NAMES:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.safetensors"))
    if len(others) > 1:
        raise ValueError(f"{path} has {len(others)} .safetensors files: name one of them, such as {others[0]}")
    if not others:
        raise FileNotFoundError(
            f"there is no LoRA at {path}: expected a .safetensors file, or a folder with {FILE_NAME}, as save_lora() "
            f"writes it, or with {PEFT_FILE_NAME}; a LoRA of a hub has to be downloaded first (hf download)"
        )
    return others[0]


def read_lora(
    path: str | Path, network: nn.Module, prefix: str = "unet.", allow_pickle: bool = False
) -> dict[str, Tensor]:
    """Reads a LoRA file of any format that diffusers reads.

    Args:
        path: the file, or a folder that :func:`find_lora_file` finds one in.
        network: the denoiser that it is of.
        prefix: the model's ``lora_prefix``, such as "unet." or "transformer.".
        allow_pickle: whether a file that is no safetensors may be read.

    Returns:
        The tensors by peft's names, float32 on the CPU, with the scale in B.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is damaged, of a format that is not read, of another model, or changes a text encoder too.
    """
    file = find_lora_file(path)
    if file.suffix in _PICKLES and not allow_pickle:
        raise ValueError(
            f"the LoRA file {file} is a pickle, which may run code of its author's; get it as .safetensors, or, if you "
            "trust it, pass allow_pickle=True (dpok sample: --trust; dpok train: --model-kwargs allow_pickle=true)"
        )
    try:
        settings: Mapping[str, Any] = {}
        if file.suffix in _PICKLES:
            tensors = _read_pickle(file)
        else:
            tensors, settings, _ = _read_safetensors(file)
    except (SafetensorError, OSError, ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the LoRA file {file} cannot be read, or is damaged: {reason}") from error
    try:
        check_format(tensors)
        check_family(tensors, network)
        if any(key.startswith(PEFT) for key in tensors):
            settings = _read_peft_config(file)
        elif any(key.startswith(prefix) for key in tensors):  # a denoiser's own save_lora_adapter() writes no prefix
            settings = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        state = {key: value.float() for key, value in to_peft_names(tensors, network, prefix).items()}
        _check_pairs(state)
        _check_layers(state, network)
        _check_settings(settings)
        return _with_scale(state, settings) if settings else state
    except (ValueError, TypeError) as error:
        raise ValueError(f"the LoRA file {file} cannot be used: {error}") from error


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any], dict[str, str]]:
    """Returns the tensors, peft's settings, and the other notes of the header."""
    with safe_open(check_tensors(file), "pt") as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (it is no dict)
        notes = content.metadata() or {}
    settings = parse_json(notes.pop(_NOTES, None) or "{}", f"its note {_NOTES}")
    if not isinstance(settings, dict):
        raise ValueError(f"its note {_NOTES} is no mapping of names to values")
    return tensors, settings, notes


def _read_pickle(file: Path) -> dict[str, Tensor]:
    content = torch.load(check_torch_file(file), map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("it is no mapping of names to tensors")
    return content


def _read_peft_config(file: Path) -> Mapping[str, Any]:
    path = file.with_name(PEFT_CONFIG_NAME)
    if not path.is_file():
        raise ValueError(f"it is in peft's format, whose {PEFT_CONFIG_NAME} must be beside it: that has the strength")
    return check_mapping(f"the content of {path}", read_json(path))


def _with_scale(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors with the scale of peft's settings in B."""
    scaled, defaults = dict(state), LoraConfig()
    for key in [key for key in state if key.endswith(A)]:
        layer, rank = key.removesuffix(A), len(state[key])
        noted = _of_layer(settings, "rank_pattern", layer, settings.get("r", defaults.r))
        if noted != rank:
            raise ValueError(f"its settings note rank {shorten(noted)} for the layer {layer}, whose rank is {rank}")
        alpha = _of_layer(settings, "alpha_pattern", layer, settings.get("lora_alpha", defaults.lora_alpha))
        alpha = check_finite(f"its lora_alpha of the layer {layer}", alpha)
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        scaled[layer + B] = state[layer + B] * scale
    return scaled


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings of peft that would change the result in a way that is not known here."""
    defaults = LoraConfig().to_dict()
    for name, value in settings.items():
        if name in _USED or name in _WITHOUT_EFFECT:
            continue
        if name == "init_lora_weights":
            known = any(value is beginning or value == beginning for beginning in _BEGINNINGS)
        else:
            known = value in (None, False, "none", [], {}) or value == defaults.get(name)
        if not known:
            raise ValueError(f"its setting {name}={shorten(value)} of peft is not understood here")


def _of_layer(settings: Mapping[str, Any], name: str, layer: str, default: Any) -> Any:
    """Returns a layer's own rank or alpha, or the default.

    A pattern is the end of a layer's name; with "^" before it, the whole name. peft also takes any regular expression,
    but those that somebody else wrote can take forever.
    """
    for pattern, value in check_mapping(f"its {name}", settings.get(name) or {}).items():
        plain = pattern.removeprefix("^").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise ValueError(f"its setting {name} has the pattern {shorten(pattern)}, which is not understood here")
        if layer == plain or (not pattern.startswith("^") and layer.endswith(f".{plain}")):
            return value
    return default


def _check_pairs(state: Mapping[str, Tensor]) -> None:
    """Makes sure that there are two matrices for each layer, of the same rank, and nothing else."""
    for key, value in state.items():
        layer = key.removesuffix(A).removesuffix(B)
        if layer == key:
            raise ValueError(f"its {key} is not understood here")
        if not {layer + A, layer + B} <= state.keys():
            raise ValueError(f"its layer {layer} lacks one of its two matrices; the file is not whole")
        if value.dim() not in (2, 4):
            raise ValueError(f"its {key} has the shape {tuple(value.shape)} and is no matrix; the file is not whole")
        ranks = len(state[layer + A]), state[layer + B].shape[1:2].numel()
        if ranks[0] != ranks[1] or not 1 <= ranks[0] <= MAX_RANK:
            raise ValueError(
                f"the matrices of its layer {layer} have the ranks {ranks[0]} and {ranks[1]}, and not one from 1 to "
                f"{MAX_RANK:,}; the file is not whole"
            )


def _check_layers(state: Mapping[str, Tensor], network: nn.Module) -> None:
    """Makes sure that every matrix belongs to a layer of the network, and fits it."""
    modules = dict(network.named_modules())
    for key, value in state.items():
        layer, axis = (key.removesuffix(A), 1) if key.endswith(A) else (key.removesuffix(B), 0)
        module: Any = modules.get(layer)
        module = getattr(module, "base_layer", module)  # under the LoRAs that there are already
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            raise ValueError(f"it is of another model: there is no layer {layer!r} here")
        weight = module.weight.shape  # (outputs, inputs, and perhaps height and width)
        if value.dim() != len(weight) or value.shape[axis] != weight[axis]:
            raise ValueError(
                f"it is of another model: its {key} has the shape {tuple(value.shape)}, for a layer whose weight has "
                f"the shape {tuple(weight)} here"
            )


@dataclass(frozen=True)
class SavedLoRA:
    """A file of :func:`write_diffusers`.

    Attributes:
        state: the tensors by peft's names.
        prefix: the ``lora_prefix`` of its model.
        notes: the further entries of its header.
    """

    state: dict[str, Tensor]
    prefix: str
    notes: dict[str, str]


def read_saved(file: Path) -> SavedLoRA:
    """Reads what :func:`write_diffusers` wrote, without the network that it is of.

    Raises:
        ValueError: if the file is damaged, or was not written so.
    """
    try:
        tensors, settings, notes = _read_safetensors(file)
        check_format(tensors)
        prefix = next((name.removesuffix("r") for name in settings if name.endswith(".r")), None)
        if prefix is None or not all(key.startswith(prefix) for key in tensors):
            raise ValueError("save_lora() did not write it so")
        state = {key.removeprefix(prefix): value for key, value in tensors.items()}
        _check_pairs(state)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"the LoRA file {file} is damaged: {error}; write it again") from error
    return SavedLoRA(state, prefix, notes)


def write_diffusers(state: Mapping[str, Tensor], folder: Path, prefix: str, notes: Mapping[str, str]) -> Path:
    """Writes the file that diffusers' ``load_lora_weights(folder)`` reads.

    Args:
        state: the tensors by peft's names.
        folder: made if it is not there.
        prefix: the model's ``lora_prefix``, such as "unet.".
        notes: further entries of the file's header.

    Returns:
        The file's path.
    """
    settings = {prefix + name: value for name, value in Ranks.of(state).to_peft().items()}
    named = {prefix + key: value for key, value in state.items()}
    return _write(folder / FILE_NAME, named, {_NOTES: json.dumps(settings), **notes})


def write_kohya(state: Mapping[str, Tensor], file: Path, notes: Mapping[str, str]) -> Path:
    """Writes a LoRA of a UNet as kohya's scripts do, for ComfyUI, AUTOMATIC1111 and others; returns the file's path.

    Args:
        state: the tensors by peft's names.
        file: the ``.safetensors`` file; its folder is made if it is not there.
        notes: entries of the file's header.
    """
    ranks = Ranks.of(state)
    # One alpha for all layers, because diffusers leaves out those of single layers in attention. Where the rank is
    # another one, the second matrix makes up for it.
    scaled = {
        f"unet.{key}": value * (ranks.others.get(key.removesuffix(B), ranks.rank) / ranks.rank)
        for key, value in state.items()
    }
    named = convert_state_dict_to_kohya(scaled)
    alpha = torch.tensor(float(ranks.rank))
    named = {key: alpha.clone() if key.endswith(".alpha") else value for key, value in named.items()}
    of_network = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.rank),
        "ss_network_alpha": str(float(ranks.rank)),
    }
    return _write(file, named, {**of_network, **notes})


def write_peft(state: Mapping[str, Tensor], folder: Path, base_model: str | None, notes: Mapping[str, str]) -> Path:
    """Writes the two files that peft's ``PeftModel.from_pretrained(denoiser, folder)`` reads.

    Args:
        state: the tensors by peft's names.
        folder: made if it is not there.
        base_model: the model that it is of.
        notes: entries of the tensor file's header.

    Returns:
        The path of the file of tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(**Ranks.of(state).to_peft(), base_model_name_or_path=base_model, inference_mode=True)
    content = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    write_text(folder / PEFT_CONFIG_NAME, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return _write(folder / PEFT_FILE_NAME, {PEFT + key: value for key, value in state.items()}, notes)


def _write(file: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(file) as part:
        part.write_bytes(_with_sorted_header(save(on_cpu, {"format": "pt", **notes})))
    return file


def _with_sorted_header(content: bytes) -> bytes:
    """Returns a safetensors file whose notes are sorted: safetensors itself writes them in a random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
