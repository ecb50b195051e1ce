"""An estimate of the memory of a training, from the configs of the model's networks: no weights, and no computing.

The networks' own code runs, gradient checkpointing, guidance and LoRA included, on tensors that have a shape and no
content (torch's ``FakeTensorMode``). What is alive at each moment is added up. ``python -m benchmarks.memory`` compares
the result with the memory of a real update.

Not counted: what a GPU's driver and libraries take (at most 0.76 GiB on an H100), workspaces inside single operations,
holes between tensors, and what a CPU keeps in float32 beside bfloat16 (:mod:`agents.common.precision`).
:data:`MARGIN` and :data:`LIBRARIES` stand for these.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpok_gym.models.architecture import Architecture
from dpok_gym.models.base import Conditioning, GuidanceGradient
from dpok_gym.models.latent_diffusion import LatentDiffusion
from dpok_gym.models.lora import LoRA
from dpok_gym.samplers import DenoisingProcess, State

if TYPE_CHECKING:
    from agents.common.policy import DenoisingPolicy

#: Share of the sum that is added for what is not counted.
MARGIN = 0.1

#: Bytes that a GPU's driver and libraries take: at most 0.76 GiB on an H100, rounded up.
LIBRARIES = round(0.8 * 2**30)

#: Copies of the trained weights beside themselves: the gradient, and the two moments of Adam.
N_COPIES = 3


class LiveMemory(TorchDispatchMode):
    """Within its ``with`` block, adds up the tensors that are made, for as long as they live; views count once.

    Args:
        known: tensors that are there already, and are not counted.

    Attributes:
        now: bytes of what is alive.
        peak: the largest value of ``now`` so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        #: Of each storage, by its address: what notices its end.
        self._alive: dict[int, Any] = {}
        self._known = list(known)  # kept alive, so that no other storage gets the same address
        for tensor in self._known:
            self._alive[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)

            def remove(_: Any) -> None:
                self.now -= size
                del self._alive[address]

            self._alive[address] = weakref.ref(storage, remove)


class _NoContent(TorchDispatchMode):
    """Within its ``with`` block, code that asks what is in a tensor without content is told True."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Blocks:
    """A list of blocks of a denoiser, which are about as large as each other.

    Attributes:
        name: of the list in the denoiser.
        number: of blocks.
        parameters: of all of them.
        kept: bytes that all of them keep for the backward pass.
    """

    name: str
    number: int
    parameters: int
    kept: int


class Rehearsal:
    """A model without weights, on which a training's passes can be run for their memory.

    All results are bytes, without the weights themselves.

    Args:
        architecture: of the model.
        dtype: of the frozen weights, such as "bfloat16".
        image_size: as for :func:`dpok_gym.models.load_model`.
        vae_tiling: whether the autoencoder decodes in tiles.
        true_cfg_scale: as for :func:`dpok_gym.models.load_model`.
        lora_rank: 0 for training the whole denoiser.
        target_modules: of the LoRA: the name of a set, or endings of layer names.
        guidance_scale: of the denoising process.
        guidance_gradient: of the policy, as ``autocast`` is.
        autocast: whether the denoiser runs in bfloat16.

    Attributes:
        model: the model without weights.
        lora: its LoRA; None if the whole denoiser is trained.
        told: what the denoiser is told about one prompt, the longest: tensors without content.
    """

    def __init__(
        self,
        architecture: Architecture,
        dtype: str = "float32",
        image_size: int | Sequence[int] | None = None,
        *,
        vae_tiling: bool = False,
        true_cfg_scale: float = 1.0,
        lora_rank: int | None = None,
        target_modules: str | Sequence[str] = "attention",
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "both",
        autocast: bool = False,
    ) -> None:
        networks: Any = architecture.make(getattr(torch, dtype))
        if vae_tiling:
            networks.vae.enable_tiling()
        options: dict[str, Any] = {"image_size": image_size, "true_cfg_scale": true_cfg_scale}
        self.model: Any = networks.with_options(**options)
        model = self.model
        self._guidance_gradient, self._autocast = guidance_gradient, autocast
        rank = model.default_lora_rank if lora_rank is None else lora_rank
        self.lora: LoRA | None = None
        self._copy: Any = None
        if rank:
            layers = model.lora_layers[target_modules] if isinstance(target_modules, str) else target_modules
            self.lora = LoRA(model.denoiser, rank, layers)
        else:
            self._copy = architecture.make(getattr(torch, dtype)).denoiser.requires_grad_(True)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)  # the transition table has content
        with self._fake:
            for network in (model.denoiser, model.vae, self._copy, *self._text_encoders):
                if network is not None:
                    _without_content(network)
        model.device = torch.device("cpu")  # where the tensors claim to be
        self.told, self._encoding_bytes = self._encode()
        self._process = DenoisingProcess(model, guidance_scale=guidance_scale)

    @property
    def denoiser_bytes(self) -> int:
        """The frozen denoiser."""
        return size_of(value for value in _tensors(self.model.denoiser) if not value.requires_grad)

    @property
    def decoder_bytes(self) -> int:
        """The autoencoder."""
        return size_of(_tensors(self.model.vae))

    @property
    def text_encoder_bytes(self) -> int:
        """The text encoders."""
        return size_of(value for encoder in self._text_encoders for value in _tensors(encoder))

    @property
    def _text_encoders(self) -> list[nn.Module]:
        encoders = [getattr(self.model, name) for name in self.model.text_encoders]
        return [encoder for encoder in encoders if encoder is not None]

    @property
    def parameters(self) -> dict[str, int]:
        """The number of parameters of the denoiser, the autoencoder and the text encoders, without a LoRA."""
        networks = {"denoiser": [self.model.denoiser], "autoencoder": [self.model.vae]}
        networks["text encoders"] = self._text_encoders
        numbers = {}
        for name, parts in networks.items():
            frozen = [value for part in parts for value in part.parameters() if not value.requires_grad]
            numbers[name] = sum(value.numel() for value in frozen)
        return numbers

    @property
    def prompt_bytes(self) -> int:
        """The bytes of what the denoiser is told about one prompt."""
        return size_of(self.told.values())

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [value for value in self._trained_denoiser.parameters() if value.requires_grad]

    @property
    def _trained_denoiser(self) -> Any:
        return self._copy or self.model.denoiser

    def update(
        self,
        n: int,
        gradient_checkpointing: bool,
        *,
        guided: bool = True,
        n_steps: int = 1,
        decodes: bool = False,
    ) -> int:
        """The peak of a forward and backward pass of ``n`` elements, with the pre-trained model's pass beside it.

        Args:
            n: elements of the micro-batch.
            gradient_checkpointing: of the policy.
            guided: whether the trained output is the guided one.
            n_steps: denoising steps in a row that the gradient goes through.
            decodes: whether the gradient goes through the decoder too; what a reward adds is not known.
        """
        self._checkpoint(gradient_checkpointing)
        with self._fake:
            for value in self.trained:
                value.grad = torch.empty_like(value)  # counted with the optimiser
        with self._counted() as memory:
            latents = torch.empty(n, *self.model.latent_shape)
            with self._adapter(True):
                for _ in range(n_steps):
                    latents = latents + self._predict(latents, guided)
                    with torch.no_grad(), self._adapter(False):
                        self._predict(latents.detach(), guided, reference=True)
                result = self.model.decode(latents) if decodes else latents
                result.sum().backward()
        return memory.peak

    def blocks(self, n: int, gradient_checkpointing: bool, guided: bool = True) -> list[Blocks]:
        """Returns what the blocks of the denoiser keep for the backward pass of ``n`` elements; see :meth:`update`."""
        self._checkpoint(gradient_checkpointing)
        children = self._trained_denoiser.named_children()
        lists = [(name, blocks) for name, blocks in children if isinstance(blocks, nn.ModuleList)]
        before: dict[nn.Module, int] = {}
        kept: dict[nn.Module, int] = {}
        with self._counted() as memory, self._adapter(True), ExitStack() as hooks:

            def note(block: nn.Module, *_: Any) -> None:
                before[block] = memory.now

            def compare(block: nn.Module, *_: Any) -> None:
                kept[block] = memory.now - before[block]

            for block in (block for _, blocks in lists for block in blocks):
                hooks.callback(block.register_forward_pre_hook(note).remove)
                hooks.callback(block.register_forward_hook(compare).remove)
            self._predict(torch.empty(n, *self.model.latent_shape), guided)
        found = []
        for name, blocks in lists:
            if used := [block for block in blocks if block in kept]:
                parameters = sum(value.numel() for block in used for value in block.parameters())
                found.append(Blocks(name, len(used), parameters, sum(kept[block] for block in used)))
        return found

    def needs_checkpointing(self, n: int, free: int | None) -> bool:
        """Returns whether updates need gradient checkpointing to fit beside the networks.

        Half of the free memory is left for the images of the rollouts and for decoding.

        Args:
            n: states of a micro-batch.
            free: bytes; None if that is not known.
        """
        needed = self.update(n, False) + N_COPIES * size_of(self.trained)
        return free is None or 2 * needed > free

    @torch.no_grad()
    def rollout(self, n: int) -> int:
        """The peak of a call of the denoiser with ``n`` states, without a gradient."""
        with self._counted() as memory, self._adapter(True):
            self._predict(torch.empty(n, *self.model.latent_shape), guided=True)
        return memory.peak

    def encode(self) -> int:
        """The peak of encoding one prompt."""
        return self._encoding_bytes

    @torch.no_grad()
    def decode(self, n: int) -> int:
        """The peak of decoding ``n`` images at a time."""
        with self._counted() as memory:
            self.model.decode(torch.empty(n, *self.model.latent_shape))
        return memory.peak

    def _checkpoint(self, enabled: bool) -> None:
        denoiser = self._trained_denoiser
        (denoiser.enable_gradient_checkpointing if enabled else denoiser.disable_gradient_checkpointing)()

    def _predict(self, latents: Tensor, guided: bool, reference: bool = False) -> Tensor:
        state = State(latents, torch.zeros(len(latents), dtype=torch.int64), self._conditioning(len(latents)))
        self.model._unconditional = self._conditioning(1)
        scale, denoiser = None if guided else 1.0, None if reference else self._copy
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            return self._process.predict(state, scale, denoiser, self._guidance_gradient)

    @torch.no_grad()
    def _encode(self) -> tuple[Conditioning, int]:
        """Returns what the denoiser is told about the longest prompt, and the peak of encoding it."""
        known = [value for encoder in self._text_encoders for value in _tensors(encoder)]
        with self._fake, _NoContent(), LiveMemory(known) as memory:
            told = self.model._encode([""])
        return told, memory.peak

    def _conditioning(self, n: int) -> Conditioning:
        return {name: torch.cat([values] * n) for name, values in self.told.items()}

    @contextmanager
    def _counted(self) -> Iterator[LiveMemory]:
        known = [*_tensors(self.model.denoiser), *_tensors(self.model.vae), *self.trained]
        known += [value.grad for value in self.trained if value.grad is not None]
        with self._fake, LiveMemory(known) as memory:
            yield memory

    @contextmanager
    def _adapter(self, enabled: bool) -> Iterator[None]:
        if self.lora is None:
            yield
            return
        with self.lora.enabled() if enabled else self.lora.disabled():
            yield


def size_of(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that are free on a device; None if it does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type == "cpu" else None


def asks_for_checkpointing(policy: DenoisingPolicy) -> bool:
    """Returns whether the updates of a policy need gradient checkpointing to fit into the memory that is free.

    Args:
        policy: with its networks on their device. If they are no pipeline of diffusers, the answer is no.
    """
    model, settings = policy.model, policy._get_constructor_parameters()
    if not isinstance(model, LatentDiffusion):
        return False
    rehearsal = Rehearsal(
        Architecture.of_model(model),
        model.options.get("dtype", "float32"),
        model.image_shape,
        true_cfg_scale=model.options.get("true_cfg_scale", 1.0),
        lora_rank=settings["lora_rank"],
        target_modules=settings["target_modules"],
        guidance_scale=policy.process.config.guidance_scale,
        guidance_gradient=policy.guidance_gradient,
        autocast=policy.precision == "bfloat16",
    )
    return rehearsal.needs_checkpointing(settings["micro_batch_size"], free_memory(model.device))


def with_margin(counted: int, device: str) -> int:
    """Returns the bytes to have at hand for so many that were counted."""
    return round((1 + MARGIN) * counted) + (0 if device == "cpu" else LIBRARIES)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _without_content(network: Any) -> None:
    """Puts tensors without content, which claim to be on the CPU, in place of those on the device "meta"."""
    emptied: dict[Tensor, Tensor] = {}  # some layers share a parameter
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                if value not in emptied:
                    emptied[value] = nn.Parameter(_like(value), requires_grad=value.requires_grad)
                module._parameters[name] = emptied[value]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _like(buffer)
    # nn.Module.to() would swap the tensors even for the device where they are, which fake ones do not allow.
    network.to = lambda *where: network


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
