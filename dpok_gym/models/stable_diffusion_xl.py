"""Stable Diffusion XL, and every model of the same architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dpok_gym.models.base import Conditioning
from dpok_gym.models.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """The networks of a diffusers ``StableDiffusionXLPipeline`` (Podell et al. 2023).

    Its denoiser reads the last but one layer of two text encoders, each with its own tokenizer. It is also told the
    second encoder's pooled embedding and the image's size.

    Attributes:
        force_zeros_for_empty_prompt: whether zeros stand for a negative prompt that is not given.
    """

    pipeline = "StableDiffusionXLPipeline"
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
    networks: ClassVar[Mapping[str, Any]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
    }
    settings: ClassVar[Mapping[str, Any]] = {"force_zeros_for_empty_prompt": True}
    force_zeros_for_empty_prompt: bool
    text_encoder_2: Any
    tokenizer_2: Any

    def _count_text_features(self) -> int:
        return self.text_encoder_2.config.projection_dim

    def _prepare_vae(self, vae: Any) -> Any:
        return without_overflow(vae)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        # The two tokenizers may number their words differently, and they fill up short prompts with different tokens.
        tokens = self._tokenize(self.tokenizer, prompts)["input_ids"]
        tokens_2 = self._tokenize(self.tokenizer_2, prompts)["input_ids"]
        first = self.text_encoder.to(self.device)(tokens, output_hidden_states=True)
        second = self.text_encoder_2.to(self.device)(tokens_2, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        height, width = self.image_shape
        # The size before cropping, the corner of the crop, and the size to draw.
        size = torch.tensor([height, width, 0, 0, height, width], dtype=hidden.dtype, device=self.device)
        return {
            "encoder_hidden_states": hidden,
            "text_embeds": second.text_embeds,
            "time_ids": size.repeat(len(prompts), 1),
        }

    def _encode_negative(self) -> Conditioning:
        empty = super()._encode_negative()
        if self.negative_prompt is None and self.force_zeros_for_empty_prompt:
            empty |= {name: torch.zeros_like(empty[name]) for name in ("encoder_hidden_states", "text_embeds")}
        return empty

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: the pooled embedding of the second text encoder."""
        return conditioning["text_embeds"]

    def _denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning["encoder_hidden_states"]
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return denoiser(latents, timesteps, hidden, added_cond_kwargs=added).sample.float()

    def to_pipeline(self, denoiser: nn.Module | None = None) -> DiffusionPipeline:
        """See the base class."""
        pipe: Any = super().to_pipeline(denoiser)
        if self.dtype == torch.float16 and self.vae.dtype != self.dtype:
            # The pipeline converts it to float32 and back itself, and breaks on one that is not in float16.
            pipe.register_modules(vae=copy.deepcopy(self.vae).to(self.dtype))
        return pipe

    def _further_parts(self) -> dict[str, Any]:
        return {"add_watermarker": False}


def without_overflow(vae: AutoencoderKL) -> AutoencoderKL:
    """Returns the autoencoder, or a copy in float32 if its activations leave the range of its numbers.

    XL's do in float16. A copy, because the pipeline that it comes from expects its own in float16.
    """
    return copy.deepcopy(vae).float() if vae.dtype == torch.float16 and vae.config.force_upcast else vae
