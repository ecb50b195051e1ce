"""Sana, and every model of the same architecture.

Letters used for sizes: B images, N prompts, L tokens of a prompt, F features, C x h x w a latent.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizer

from dpok_gym.models.base import Conditioning
from dpok_gym.models.latent_diffusion import ATTENTION
from dpok_gym.models.pixart_sigma import MAX_TOKENS, PixArtSigma, read_as
from dpok_gym.models.scheduler_configs import with_euler_steps

#: What the language model is told before each prompt. Its answer is not used, only what it thinks of the prompt.
_INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


class Sana(PixArtSigma):
    """The networks of a diffusers ``SanaPipeline`` (Xie et al. 2025).

    It grew out of PixArt: the tokens of a language model and their mask, but the velocity of a flow, and one latent for
    32 x 32 pixels. The language model reads an instruction before the prompt, as in ``pipe(prompt)``; the denoiser sees
    the tokens of the prompt only. A negative prompt has no instruction.
    """

    pipeline = "SanaPipeline"
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": GemmaTokenizer}
    networks: ClassVar[Mapping[str, Any]] = {
        "text_encoder": Gemma2Model,
        "transformer": SanaTransformer2DModel,
        "vae": AutoencoderDC,
    }
    flow_matching = True
    lora_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ATTENTION,
        # The feed-forward layers are convolutions. The one between these two has a group for each channel, for which
        # a low rank does not exist.
        "all": (*ATTENTION, "conv_inverted", "conv_point"),
    }

    @property
    def vae_scale_factor(self) -> int:
        """See the base class."""
        return 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)

    def _check_denoiser(self) -> None:
        if self.denoiser.config.guidance_embeds:
            raise ValueError(
                "its denoiser reads the guidance scale, as Sana-Sprint does: that model was distilled for another "
                "sampler, and is not supported; use the Sana model that it was distilled from"
            )
        super()._check_denoiser()

    def _prepare_vae(self, vae: Any) -> Any:
        return vae

    def _read_scheduler_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        self._own_scheduler_config = dict(config)
        return super()._read_scheduler_config(with_euler_steps(config))

    def _make_scheduler(self) -> Any:
        # The solver that it comes with takes the same noise levels, and Euler's steps in SanaPipeline would not.
        return getattr(diffusers, self._own_scheduler_config["_class_name"]).from_config(self._own_scheduler_config)

    def _count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> Iterator[int]:
        for prompt in read_as(prompts):
            text = f" {prompt}"  # the instruction ends with a space
            n_tokens = len(text.encode())  # at most: each has at least one byte
            if n_tokens >= MAX_TOKENS:
                n_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            yield 1 + n_tokens  # with the start

    def _tokenize(self, tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> dict[str, Tensor]:
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, padding_side="right"
        )
        return {name: torch.tensor(tokens[name], device=self.device) for name in ("input_ids", "attention_mask")}

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        # The last token of the instruction may be the first part of the prompt's first one.
        length = len(self.tokenizer(_INSTRUCTION)["input_ids"]) + MAX_TOKENS - 2
        texts = [_INSTRUCTION + prompt for prompt in read_as(prompts)]
        encoded = self._encode_tokens(**self._tokenize(self.tokenizer, texts, length))
        # The start, and then the prompt's own tokens.
        return {name: torch.cat([all_[:, :1], all_[:, 1 - MAX_TOKENS :]], dim=1) for name, all_ in encoded.items()}

    def _encode_negative(self) -> Conditioning:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return super()._encode([self.negative_prompt or ""])

    def _encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Conditioning:
        encoded = super()._encode_tokens(input_ids, attention_mask)
        if not encoded["encoder_hidden_states"].isfinite().all():
            raise ValueError(
                f"the text encoder of the model {self.name!r} leaves the range of {self.text_encoder.dtype}: load the "
                "model with dtype='bfloat16' (--dtype bfloat16)"
            )
        return encoded

    def _denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(
            latents,
            conditioning["encoder_hidden_states"].to(latents.dtype),
            timesteps * self.denoiser.config.timestep_scale,
            encoder_attention_mask=conditioning["encoder_attention_mask"],
        ).sample.float()

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent
