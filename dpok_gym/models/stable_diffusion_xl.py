"""Stable Diffusion XL, and every model of the same architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dpok_gym.models.base import Conditioning
from dpok_gym.models.stable_diffusion import StableDiffusion, bound_length, merge_by_index


class StableDiffusionXL(StableDiffusion):
    """The networks of a diffusers ``StableDiffusionXLPipeline`` (Podell et al. 2023).

    Its denoiser reads the last but one layer of two text encoders, each with its own tokenizer. It is also told the
    second encoder's pooled embedding and the image's size.

    Args:
        name: what the model was loaded by.
        tokenizer: of the first text encoder.
        text_encoder: the first one.
        unet: the denoiser.
        vae: the autoencoder.
        scheduler_config: config of the diffusers scheduler that the model comes with.
        device: where the networks are put.
        tokenizer_2: of the second text encoder.
        text_encoder_2: the second one.
        force_zeros_for_empty_prompt: whether zeros stand for a negative prompt that is not given.

    Raises:
        ValueError: if the denoiser does more than plain text-to-image.
    """

    def __init__(
        self,
        name: str,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler_config: Mapping[str, Any],
        device: str | torch.device = "cpu",
        *,
        tokenizer_2: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        if _overflows(vae):
            # A copy, because the pipeline that these networks come from expects its own in float16.
            vae = copy.deepcopy(vae).float()
        super().__init__(name, tokenizer, text_encoder, unet, vae, scheduler_config, device)
        self.tokenizer_2 = bound_length(tokenizer_2, text_encoder_2)
        self.text_encoder_2 = self._prepare(text_encoder_2)
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.text_width = text_encoder_2.config.projection_dim

    def find_long(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """See the base class."""
        return merge_by_index(super().find_long(prompts), self._find_long(self.tokenizer_2, prompts))

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        # The two tokenizers may number their words differently, and they fill up short prompts with different tokens.
        tokens = self._tokenize(self.tokenizer, prompts)
        tokens_2 = self._tokenize(self.tokenizer_2, prompts)
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

    def offload_text_encoder(self) -> None:
        """See the base class."""
        super().offload_text_encoder()
        self.text_encoder_2.to("cpu")

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
        from diffusers import StableDiffusionXLPipeline

        parts = self._pipeline_parts(denoiser)
        if self.dtype == torch.float16 and self.vae.dtype != self.dtype:
            # The pipeline converts it to float32 and back itself, and breaks on one that is not in float16.
            parts["vae"] = copy.deepcopy(self.vae).to(self.dtype)
        return StableDiffusionXLPipeline(
            **parts,
            tokenizer_2=self.tokenizer_2,
            text_encoder_2=self.text_encoder_2.to(self.device),
            force_zeros_for_empty_prompt=self.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )


def _overflows(vae: AutoencoderKL) -> bool:
    """Returns whether the activations of an autoencoder leave the range of its numbers: XL's do in float16."""
    return vae.dtype == torch.float16 and vae.config.force_upcast
