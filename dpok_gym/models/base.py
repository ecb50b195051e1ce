"""What the rest of the project knows of a text-to-image model.

Letters used for shapes: B pictures, N prompts, L tokens of a prompt, C x h x w a latent, H x W a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
GuidanceGradient = Literal["both", "conditional"]

#: Prompts whose conditioning is kept. 77 x 768 floats are 230 KiB, so this is at most about 115 MiB with Stable
#: Diffusion 1.5, and 308 MiB with XL.
CACHED_PROMPTS = 512

#: Prompts that a text encoder reads at a time.
_AT_A_TIME = 32


class TextToImageModel(ABC):
    """A latent diffusion model, reduced to what denoising as a decision process needs.

    The networks are frozen and in evaluation mode. A learner that changes the denoiser keeps its changes to itself:
    between calls ``denoiser`` computes the pre-trained model.

    Attributes:
        name: what :func:`dpok_gym.models.load_model` was called with.
        options: its further arguments but the device, those that differ from the defaults; plain JSON-able values.
        device: where the networks are.
        latent_shape: (C, h, w).
        image_shape: (H, W) in pixels.
        text_width: F, features of a prompt in :meth:`text_features`.
        vocab_size: number of different tokens.
        max_tokens: L, tokens of each prompt with start, end and padding.
        denoiser: the network that is fine-tuned.
        scheduler_config: the diffusers scheduler config that the model was trained with.
        default_lora_rank: of the LoRA that fine-tuning trains unless told otherwise; 0 for the whole denoiser, which
            suits a network too small to be adapted.
    """

    name: str
    options: dict[str, Any]
    device: torch.device
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int]
    text_width: int
    vocab_size: int
    max_tokens: int
    denoiser: nn.Module
    scheduler_config: Mapping[str, Any]
    default_lora_rank: int = 8

    def __init__(self) -> None:
        self._encoded: OrderedDict[bytes, Conditioning] = OrderedDict()

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, (N, L) int64 on the CPU.

        Raises:
            ValueError: if a prompt has too many tokens, or words that the model cannot read.
        """

    def encode(self, tokens: Tensor) -> Conditioning:
        """What the denoiser is told about each prompt: tensors with a leading axis of N.

        Each different prompt is encoded once and kept while it is among the last :data:`CACHED_PROMPTS` met.

        Args:
            tokens: (N, L) int64, on any device.
        """
        rows = tokens.to("cpu", torch.int64).contiguous()
        keys = [row.tobytes() for row in rows.numpy()]
        found = {key: self._encoded[key] for key in keys if key in self._encoded}
        missing = {key: index for index, key in enumerate(keys) if key not in found}
        for some in torch.tensor(list(missing.values()), dtype=torch.int64).split(_AT_A_TIME) if missing else ():
            with torch.autocast(self.device.type, enabled=False):  # they are kept, for whoever asks next
                encoded = self._encode(rows[some].to(self.device))
            for position, index in enumerate(some.tolist()):
                found[keys[index]] = {name: values[position].clone() for name, values in encoded.items()}
        for key in keys:
            self._encoded[key] = found[key]
            self._encoded.move_to_end(key)
        while len(self._encoded) > CACHED_PROMPTS:
            self._encoded.popitem(last=False)
        return {name: torch.stack([found[key][name] for key in keys]) for name in found[keys[0]]}

    @abstractmethod
    def _encode(self, tokens: Tensor) -> Conditioning:
        """Runs the text encoder on (N, L) tokens."""

    @abstractmethod
    def park_text_encoder(self) -> None:
        """Moves the text encoder to the CPU until a prompt has to be encoded that is not among those kept.

        What guidance leads away from is encoded before.
        """

    @abstractmethod
    def text_features(self, conditioning: Conditioning) -> Tensor:
        """One vector for each prompt, (N, F), for a critic to read."""

    @abstractmethod
    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        denoiser: nn.Module | None = None,
        guidance_gradient: GuidanceGradient = "both",
    ) -> Tensor:
        """The denoiser's output, guided.

        Args:
            latents: (B, C, h, w) x_t.
            timesteps: (B,) int64, in the units of the model's training schedule.
            conditioning: of B prompts, from :meth:`encode`.
            guidance_scale: of classifier-free guidance (Ho & Salimans 2022); 1 means none and costs one forward pass
                instead of a doubled one.
            denoiser: a fine-tuned network to use in place of the model's own.
            guidance_gradient: "both" differentiates the guided output; "conditional" takes the unconditional one as a
                constant: the same output, for about two thirds of the time and half of the memory of an update.

        Returns:
            (B, C, h, w) float32.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1], of clean latents (B, C, h, w); differentiable in these."""
