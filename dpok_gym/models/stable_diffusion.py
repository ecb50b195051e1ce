"""Stable Diffusion 1.x, 2.x and XL, and everything of the same build, the embedded model included."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dpok_gym.models.base import Conditioning, GuidanceGradient, TextToImageModel


class StableDiffusion(TextToImageModel):
    """The networks of a diffusers ``StableDiffusionPipeline``.

    Args:
        name: how the model was asked for.
        tokenizer: a CLIP tokenizer. If its config has a list ``words``, prompts may use these words only.
        text_encoder: a CLIP text encoder.
        unet: the denoiser.
        vae: the autoencoder.
        scheduler_config: config of the diffusers scheduler that the model comes with.
        device: where the networks are put.

    Raises:
        ValueError: if the denoiser is none of a plain text-to-image model.
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
    ) -> None:
        super().__init__()
        if unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "its denoiser is told the guidance scale, as latent-consistency models are: their sampler does not "
                "take DDIM's Gaussian steps; use the model that it was distilled from"
            )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"its denoiser reads {unet.config.in_channels} channels and a latent has {vae.config.latent_channels}: "
                "models for inpainting, depth or editing are not supported"
            )
        self.name = name
        self.options = {}
        self.device = torch.device(device)
        self.dtype = unet.dtype
        self.tokenizer = tokenizer
        self.text_encoder, self.denoiser, self.vae = map(self._prepare, (text_encoder, unet, vae))
        self.scheduler_config = scheduler_config
        self.negative_prompt: str | None = None
        self._unconditional: Conditioning | None = None
        size = unet.config.sample_size
        self._set_latent_size(*((size, size) if isinstance(size, int) else size))
        self.text_width = text_encoder.config.hidden_size
        self.vocab_size = len(tokenizer)
        self.max_tokens = tokenizer.model_max_length

    def _prepare(self, network: Any) -> Any:
        # Convolutions with the channels last are faster on GPUs with tensor cores and on CPUs; nothing else changes.
        return network.to(self.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    @property
    def vae_factor(self) -> int:
        """Pixels for each latent row and column."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _set_latent_size(self, height: int, width: int) -> None:
        self.latent_shape = (self.vae.config.latent_channels, height, width)
        self.image_shape = (self.vae_factor * height, self.vae_factor * width)

    def configured(self, image_size: int | Sequence[int] | None, negative_prompt: str | None) -> StableDiffusion:
        """The same networks, not a copy of them, for another task.

        Args:
            image_size: pixels of a side, or (height, width); None for the size that the model was trained with.
            negative_prompt: what guidance leads away from; None for what the model was trained with.

        Raises:
            ValueError: if the size is none that the autoencoder can draw.
        """
        other = copy.copy(self)
        other._encoded = OrderedDict()  # what is told of a prompt may include the size
        other._unconditional = None
        other.negative_prompt = negative_prompt
        if image_size is not None:
            size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
            factor = self.vae_factor
            if len(size) != 2 or any(side < factor or side % factor for side in size):
                raise ValueError(
                    f"image_size must be one or two (height, width) multiples of {factor} pixels, got {image_size!r}"
                )
            other._set_latent_size(size[0] // factor, size[1] // factor)
        return other

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """See the base class."""
        words = self.tokenizer.init_kwargs.get("words")
        if words is not None:
            for prompt in prompts:
                unknown = [word for word in prompt.split() if word not in words]
                if unknown:
                    raise ValueError(
                        f"the model {self.name!r} cannot read {', '.join(map(repr, unknown))} in the prompt "
                        f"{prompt!r}; its words are: {' '.join(words)}"
                    )
        lists = self.tokenizer(list(prompts), padding="max_length")["input_ids"]
        for prompt, ids in zip(prompts, lists, strict=True):
            if len(ids) > self.max_tokens:
                raise ValueError(
                    f"a prompt has {len(ids)} tokens and the model {self.name!r} reads at most {self.max_tokens} "
                    f"(start and end included); shorten it: {prompt!r}"
                )
        return torch.tensor(lists, dtype=torch.int64)

    @torch.no_grad()
    def _encode(self, tokens: Tensor) -> Conditioning:
        return {"encoder_hidden_states": self.text_encoder.to(self.device)(tokens).last_hidden_state}

    def park_text_encoder(self) -> None:
        """See the base class."""
        self.unconditional()
        self.text_encoder.to("cpu")

    def unconditional(self) -> Conditioning:
        """What the denoiser is told of the negative prompt: tensors with a leading axis of 1."""
        if self._unconditional is None:
            self._unconditional = self._encode_negative()
        return self._unconditional

    def _encode_negative(self) -> Conditioning:
        return self.encode(self.tokenize([self.negative_prompt or ""]))

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: the mean over the tokens."""
        return conditioning["encoder_hidden_states"].mean(dim=1)

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        denoiser: nn.Module | None = None,
        guidance_gradient: GuidanceGradient = "both",
    ) -> Tensor:
        """See the base class."""
        denoiser = self.denoiser if denoiser is None else denoiser
        latents = latents.to(self.dtype)
        if guidance_scale == 1:
            return self._denoise(denoiser, latents, timesteps, conditioning)
        empty = {name: value.expand_as(conditioning[name]) for name, value in self.unconditional().items()}
        if guidance_gradient == "conditional" and torch.is_grad_enabled():
            with torch.no_grad():
                unconditional = self._denoise(denoiser, latents, timesteps, empty)
            conditional = self._denoise(denoiser, latents, timesteps, conditioning)
        else:
            both = {name: torch.cat([empty[name], told]) for name, told in conditioning.items()}
            output = self._denoise(denoiser, torch.cat([latents] * 2), torch.cat([timesteps] * 2), both)
            unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(latents, timesteps, **conditioning).sample.float()

    def decode(self, latents: Tensor) -> Tensor:
        """See the base class."""
        latents = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


class StableDiffusionXL(StableDiffusion):
    """The networks of a diffusers ``StableDiffusionXLPipeline`` (Podell et al. 2023).

    Its denoiser reads the last but one layer of two text encoders, and is also told the second one's pooled embedding
    and the picture's size. Both tokenizers share one vocabulary, so a prompt is observed as the first one's tokens.
    Only the second one's padding, "!" in the published model, would be read differently in a prompt that contains it.

    Args:
        name: how the model was asked for.
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
        ValueError: if the denoiser is none of a plain text-to-image model, or the tokenizers differ.
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
        if tokenizer.get_vocab() != tokenizer_2.get_vocab():
            raise ValueError("its two tokenizers have different vocabularies, so one list of tokens cannot serve both")
        if vae.config.force_upcast and vae.dtype == torch.float16:
            vae = vae.float()  # activations of SDXL's autoencoder are beyond the range of float16
        super().__init__(name, tokenizer, text_encoder, unet, vae, scheduler_config, device)
        self.tokenizer_2 = tokenizer_2
        self.text_encoder_2 = self._prepare(text_encoder_2)
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.text_width = text_encoder_2.config.projection_dim

    @torch.no_grad()
    def _encode(self, tokens: Tensor) -> Conditioning:
        # The tokenizers differ in what they fill up with, after the first end of text.
        ends = tokens == self.tokenizer.eos_token_id
        padding = (ends.cumsum(dim=1) - ends.long()) > 0
        tokens_2 = tokens.masked_fill(padding, self.tokenizer_2.pad_token_id)
        first = self.text_encoder.to(self.device)(tokens, output_hidden_states=True)
        second = self.text_encoder_2.to(self.device)(tokens_2, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        height, width = self.image_shape
        size = torch.tensor([height, width, 0, 0, height, width], dtype=hidden.dtype, device=self.device)
        return {
            "encoder_hidden_states": hidden,
            "text_embeds": second.text_embeds,
            "time_ids": size.repeat(len(tokens), 1),  # the original size, the corner of a crop, the size to draw
        }

    def park_text_encoder(self) -> None:
        """See the base class."""
        super().park_text_encoder()
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
