"""Low-rank adaptation of a denoiser (Hu et al. 2022), with peft."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dpok_gym.checks import integer

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_REST = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj")

#: Layers by name: the projections of every attention layer of a diffusers UNet, as is usual for large models; or the
#: feed-forward and convolutional layers of all its blocks too.
LAYERS = {"attention": _ATTENTION, "all": _ATTENTION + _REST}

#: What diffusers' ``load_lora_weights`` looks for, and how it knows the part of the pipeline.
FILE_NAME, PREFIX = "pytorch_lora_weights.safetensors", "unet."

_numbers = itertools.count()

#: Names of LoRAs that nobody refers to any more. They are not removed at once: the garbage collector may come at any
#: moment, also while the layers of the network are being gone through.
_forgotten: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


class LoRA:
    """A trainable low-rank change of a frozen network, which is switched on for the length of a ``with`` block.

    Several can live in one network without knowing of each other; outside their blocks it computes what it always did.
    What nobody refers to any more leaves the network when the next one is added.
    The change is B A x with A random and B zero to begin with; there is no further scale. It is float32, whatever the
    network is.

    Args:
        network: changed in place: its target layers become peft layers.
        rank: of the change; 4 to 16 is usual. Each target layer gets rank x (inputs + outputs) parameters.
        target_modules: the layers to change: a key of :data:`LAYERS`, or ends of their names.

    Raises:
        ValueError: if the rank is not positive or no layer has such a name.
    """

    def __init__(self, network: nn.Module, rank: int, target_modules: str | Sequence[str] = "attention") -> None:
        self.rank = integer("the LoRA rank", rank)
        if isinstance(target_modules, str):
            if target_modules not in LAYERS:
                raise ValueError(f"there is no choice of layers {target_modules!r}; there are {', '.join(LAYERS)}")
            target_modules = LAYERS[target_modules]
        _remove_forgotten(network)
        self.name = f"lora{next(_numbers)}"
        self.target_modules = tuple(target_modules)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(target_modules))
        before = [_state(layer) for layer in _layers(network)]
        trainable = [value for layer in _layers(network) for value in layer.parameters() if value.requires_grad]
        try:
            with warnings.catch_warnings():  # that there is another LoRA already, which is meant
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                inject_adapter_in_model(config, network, self.name)
        except ValueError as error:
            raise ValueError(f"no layer of the denoiser ends in any of {list(target_modules)}") from error
        self._network = network
        marker = f".{self.name}."
        #: The trainable parameters by name.
        self.parameters = {name: value for name, value in network.named_parameters() if marker in name}
        _switch([(layer, [self.name], False) for layer in _layers(network)])
        _switch(before)
        for value in self.parameters.values():
            value.data = value.data.float()  # a small step would be lost in the digits of a half-precision weight
        for value in [*trainable, *self.parameters.values()]:
            value.requires_grad_(True)
        weakref.finalize(self, _forgotten.setdefault(network, []).append, self.name)

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Within the block, the network computes with this change, and with no other."""
        layers = _layers(self._network)
        before = [_state(layer) for layer in layers]
        _switch([(layer, [self.name], True) for layer in layers])
        try:
            yield
        finally:
            _switch(before)

    def save(self, folder: str | Path) -> Path:
        """Writes the file that diffusers' ``load_lora_weights(folder)`` reads; returns its path."""
        state = get_peft_model_state_dict(self._network, adapter_name=self.name)
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({PREFIX + key: value.detach().cpu().contiguous() for key, value in state.items()}, path)
        return path

    def load(self, folder: str | Path) -> None:
        """Reads such a file back.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or of another model, rank or choice of layers.
        """
        found = _read(folder)
        expected = {
            key: value.shape for key, value in get_peft_model_state_dict(self._network, adapter_name=self.name).items()
        }
        if {key: value.shape for key, value in found.items()} != expected:
            raise ValueError(
                f"the LoRA in {folder} is of another model: it changes {len(found) // 2} layers with rank "
                f"{_rank(found)}, and not the same layers and sizes as here, {len(expected) // 2} with rank {self.rank}"
            )
        set_peft_model_state_dict(self._network, found, adapter_name=self.name)

    @classmethod
    def from_folder(cls, network: nn.Module, folder: str | Path) -> LoRA:
        """Adds the LoRA that a file holds to a network; rank and layers are taken from the file."""
        found = _read(folder)
        targets = sorted({key.removesuffix(f".lora_{part}.weight") for key in found for part in "AB"})
        targets = [target for target in targets if not target.endswith(".weight")]
        names = {name for name, _ in network.named_modules()}
        missing = [target for target in targets if target not in names]
        if missing:
            raise ValueError(f"the LoRA in {folder} is of another model: there is no layer {missing[0]!r} here")
        lora = cls(network, _rank(found), targets)
        lora.load(folder)
        return lora


def pretrained_copy(network: nn.Module) -> nn.Module:
    """A copy of a network without any LoRA that is in it."""
    copied = copy.deepcopy(network)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            copied.set_submodule(name, layer.get_base_layer())
    copied.__dict__.pop("peft_config", None)
    return copied


def _remove_forgotten(network: nn.Module) -> None:
    names = _forgotten.get(network, [])
    while names:
        name = names.pop()
        for layer in _layers(network):
            others = [active for active in layer.active_adapters if active != name]
            _switch([(layer, others, not layer.disable_adapters)])  # else peft chooses another one in its place
            layer.delete_adapter(name)
        del network.peft_config[name]  # type: ignore[operator, union-attr]


#: A layer, the names of its active adapters, and whether they are switched on.
_State = tuple[Any, list[str], bool]  # Any: to mypy, peft's layers are no modules


def _layers(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def _state(layer: Any) -> _State:
    return layer, list(layer.active_adapters), not layer.disable_adapters


def _switch(states: list[_State]) -> None:
    """Puts layers in these states, whatever is trainable staying so.

    peft freezes what it switches off, and a frozen parameter would miss a backward pass that is still to come.
    """
    for layer, names, on in states:
        trainable = [(value, value.requires_grad) for value in layer.parameters()]
        layer.set_adapter(names)
        layer.enable_adapters(on)
        for value, flag in trainable:
            value.requires_grad_(flag)


def _read(folder: str | Path) -> dict:
    path = Path(folder)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA at {folder}: expected a file {FILE_NAME}, as save_lora() writes it")
    try:
        with safe_open(path, "pt") as file:
            found = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except SafetensorError as error:
        raise ValueError(f"the LoRA file {path} is damaged ({error}); write or copy it again") from error
    if not any(key.endswith(".lora_A.weight") for key in found):
        raise ValueError(f"the file {path} holds no LoRA weights")
    # What other tools write may be scaled by alpha / rank, as diffusers notes it; there is no scale here.
    scale = config.get(f"{PREFIX}lora_alpha", 1) / config.get(f"{PREFIX}r", 1)
    return {key: value * scale if key.endswith(".lora_B.weight") else value for key, value in found.items()}


def _rank(state: dict) -> int:
    return next(len(value) for key, value in state.items() if key.endswith(".lora_A.weight"))
