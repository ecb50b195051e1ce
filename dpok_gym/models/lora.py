"""Low-rank adaptation of a denoiser (Hu et al. 2022), with peft."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dpok_gym.models.lora_files import MAX_RANK, Ranks, read_lora, write_diffusers
from dpok_gym.utils.validation import check_integer, check_path, shorten

_numbers = itertools.count()

#: For each network, the names of its LoRAs that nobody refers to any more. They are not removed at once, because the
#: garbage collector may run at any moment, even while a loop goes over the layers of the network.
_forgotten: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


class LoRA:
    """A trainable low-rank change of a frozen network, which is on for the length of a ``with`` block.

    Several LoRAs can be in one network. Each is on in its own blocks only; outside of all blocks the network computes
    what it did before. A LoRA that nobody refers to any more is removed from the network when the next one is added.

    The change of a layer is B A x. At first A is random and B is zero. There is no further scale. A and B are float32,
    whatever the precision of the network.

    Args:
        network: changed in place: its target layers become peft layers.
        rank: of the change; 4 to 16 is usual. Each target layer gets rank x (inputs + outputs) parameters.
        target_modules: endings of the names of the layers to change, such as ``("to_q", "to_v")``;
            :attr:`TextToImageModel.lora_layers` has the usual sets.
        other_ranks: the rank of each layer that has another one, by the layer's whole name.

    Attributes:
        parameters: the trainable parameters by name.

    Raises:
        ValueError: if the rank is not positive or no layer has such a name.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        target_modules: Sequence[str],
        other_ranks: Mapping[str, int] | None = None,
    ) -> None:
        self.rank = check_integer("the LoRA rank", rank, maximum=MAX_RANK)
        is_list = isinstance(target_modules, Sequence) and not isinstance(target_modules, str)
        if not (is_list and all(isinstance(name, str) for name in target_modules)):
            raise ValueError(
                f"target_modules must be a list of endings of layer names, got {shorten(target_modules)}; the usual "
                "lists are in model.lora_layers"
            )
        _remove_forgotten(network)
        self.name = f"lora{next(_numbers)}"
        self.target_modules = tuple(target_modules)
        ranks = Ranks(self.rank, dict(other_ranks or {}), self.target_modules)
        for layer, other in ranks.others.items():
            check_integer(f"the LoRA rank of the layer {layer}", other, maximum=MAX_RANK)
        config = LoraConfig(**ranks.to_peft(), exclude_modules=_not_to_change(network, self.target_modules) or None)
        before = [_state(layer) for layer in _layers(network)]
        trainable: list[nn.Parameter] = []  # of other LoRAs, which peft would freeze
        for layer in _layers(network):
            trainable += [value for value in layer.parameters() if value.requires_grad]
        _known_layers.pop(network, None)  # some layers will be new
        try:
            with warnings.catch_warnings():  # peft warns that there is another LoRA, which is intended here
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                inject_adapter_in_model(config, network, self.name)
        except Exception as error:
            _remove(network, self.name)  # peft may have changed some layers before it failed
            _switch(before)
            for value in trainable:
                value.requires_grad_(True)
            if not isinstance(error, ValueError):  # peft's own refusals are; memory may have run out
                raise
            endings = tuple(f".{name}" for name in target_modules)
            if any(f".{name}".endswith(endings) for name, _ in network.named_modules()):
                raise ValueError(f"a LoRA cannot change one of the layers {list(target_modules)}: {error}") from error
            raise ValueError(
                f"no layer of the denoiser ends in any of {list(target_modules)}; the usual lists are in "
                "model.lora_layers"
            ) from error
        self._network = network
        marker = f".{self.name}."
        self.parameters = {name: value for name, value in network.named_parameters() if marker in name}
        _switch([(layer, [self.name], False) for layer in _layers(network)])
        _switch(before)
        for value in self.parameters.values():
            value.data = value.data.float()  # a small step would be lost in the digits of a half-precision weight
        for value in [*trainable, *self.parameters.values()]:
            value.requires_grad_(True)
        weakref.finalize(self, _forgotten.setdefault(network, []).append, self.name)

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Switches this LoRA on, and all others off, within a ``with`` block. Its parameters stay trainable."""
        with _switched(self._network, [self.name], True):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switches all LoRAs off within a ``with`` block, which may be inside an :meth:`enabled` block."""
        with _switched(self._network, [self.name], False):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the parameters by the names that they have in a LoRA file, without the prefix.

        Unlike those of :attr:`parameters`, the names do not depend on how many LoRAs were made before. As with
        ``nn.Module.state_dict``, the tensors share the parameters' memory.
        """
        state = get_peft_model_state_dict(self._network, adapter_name=self.name)
        return {key: value.detach() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies what :meth:`state_dict` returned into the parameters.

        Raises:
            ValueError: if it is of another model, rank or choice of layers; the parameters are not changed then.
        """
        self._copy_from(state, "the LoRA")

    def _copy_from(self, state: Mapping[str, Tensor], what: str) -> None:
        expected = {key: value.shape for key, value in self.state_dict().items()}
        if {key: value.shape for key, value in state.items()} != expected:
            raise ValueError(
                f"{what} is of another model: it changes {Ranks.of(state)}, and not the same layers and sizes as here, "
                f"{Ranks.of(self.state_dict())}"
            )
        set_peft_model_state_dict(self._network, dict(state), adapter_name=self.name)

    def save(self, folder: str | Path, prefix: str, notes: Mapping[str, str] | None = None) -> Path:
        """Writes the file that diffusers' ``load_lora_weights(folder)`` reads.

        Args:
            folder: made if it is not there.
            prefix: the model's ``lora_prefix``, such as "unet.".
            notes: texts for the file's header, by name.

        Returns:
            The file's path.
        """
        return write_diffusers(self.state_dict(), check_path("the folder of the LoRA", folder), prefix, notes or {})

    def load(self, folder: str | Path, prefix: str) -> None:
        """Reads a file into the parameters.

        Args:
            folder: the folder, or the file itself.
            prefix: as in :meth:`save`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: as :func:`~dpok_gym.models.lora_files.read_lora`, or if it is of another rank or choice of
                layers.
        """
        self._copy_from(read_lora(folder, self._network, prefix), f"the LoRA in {folder}")

    @classmethod
    def from_folder(cls, network: nn.Module, folder: str | Path, prefix: str, allow_pickle: bool = False) -> LoRA:
        """Adds the LoRA that a file holds to a network; ranks and layers are taken from the file.

        Args:
            network: changed in place.
            folder: the folder, or the file itself, of any format that
                :func:`~dpok_gym.models.lora_files.read_lora` reads.
            prefix: as in :meth:`save`.
            allow_pickle: whether a file that is no safetensors may be read.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: as :func:`~dpok_gym.models.lora_files.read_lora`.
        """
        state = read_lora(folder, network, prefix, allow_pickle)
        ranks = Ranks.of(state)
        lora = cls(network, ranks.rank, ranks.layers, ranks.others)
        lora._copy_from(state, f"the LoRA in {folder}")
        return lora

    def merged_copy(self) -> nn.Module:
        """Returns a copy of the network with this change added to its weights, and no LoRA in it."""
        copied = copy.deepcopy(self._network)
        with torch.no_grad():
            for layer in _layers(copied):
                layer.merge(adapter_names=[self.name])
        return _without_adapters(copied)


def _not_to_change(network: nn.Module, endings: Sequence[str]) -> list[str]:
    """Returns the names with such an ending that a LoRA has no use for; a layer that is named in whole is not left out.

    An ending may also be that of a list of layers, such as "to_out" in the first blocks of FLUX.2. And in the last
    block of Stable Diffusion 3, no layer reads what becomes of the text, so the queries of its tokens have no gradient.
    """
    unread: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList):
            unread.append(name)
        elif getattr(module, "context_pre_only", None):  # an attention layer
            unread.append(f"{name}.add_q_proj")
    return [name for name in unread if name.endswith(tuple(f".{ending}" for ending in endings))]


def reference_view(network: nn.Module) -> nn.Module:
    """Returns the network without any LoRA that is in it: new modules around the same weights, which are not copied."""
    if not _layers(network):
        return network
    # deepcopy does not copy what its memo already has, so the weights are shared.
    shared = {id(value): value for value in [*network.parameters(), *network.buffers()]}
    return _without_adapters(copy.deepcopy(network, shared))


def reference_copy(network: nn.Module) -> nn.Module:
    """Returns a copy of the network, weights included, without any LoRA that is in it."""
    return copy.deepcopy(reference_view(network))


def _without_adapters(network: nn.Module) -> nn.Module:
    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            network.set_submodule(name, layer.get_base_layer())
    network.__dict__.pop("peft_config", None)
    _known_layers.pop(network, None)
    return network


def _remove_forgotten(network: nn.Module) -> None:
    names = _forgotten.get(network, [])
    while names:
        _remove(network, names.pop())


def _remove(network: nn.Module, name: str) -> None:
    """Deletes a LoRA from the layers of a network."""
    for layer in _layers(network):
        others = [active for active in layer.active_adapters if active != name]
        # Switched off first: peft would switch on another LoRA in place of one that it deletes.
        _switch([(layer, others, not layer.disable_adapters)])
        layer.delete_adapter(name)
    getattr(network, "peft_config", {}).pop(name, None)


#: A layer, the names of its active adapters, and whether they are on.
_State = tuple[Any, list[str], bool]  # Any: to mypy, peft's layers are no modules


#: The peft layers of each network. To look for them in every call of the denoiser would take longer than to switch.
_known_layers: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def _layers(network: nn.Module) -> list[Any]:
    layers = _known_layers.get(network)
    if layers is None:
        layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        _known_layers[network] = layers
    return layers


def _state(layer: Any) -> _State:
    return layer, list(layer.active_adapters), not layer.disable_adapters


@contextmanager
def _switched(network: nn.Module, names: list[str], on: bool) -> Iterator[None]:
    """Puts all layers of a network in a state for the length of the block, then back."""
    before = [_state(layer) for layer in _layers(network)]
    _switch([(layer, names, on) for layer, _, _ in before])
    try:
        yield
    finally:
        _switch(before)


def _switch(states: list[_State]) -> None:
    """Puts layers in these states.

    It sets peft's two flags and nothing else. The methods that peft has for this also freeze what they switch off, and
    a frozen parameter would miss a backward pass that is still to come; and they take much longer.
    """
    for layer, names, on in states:
        layer._active_adapter = names
        layer._disable_adapters = not on
