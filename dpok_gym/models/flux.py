"""FLUX.1, dev and schnell, and every model of the same architecture.

Letters used for sizes: B images, N prompts, L tokens of a prompt, F features, C x h x w a latent.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from dpok_gym.models.base import Conditioning, GuidanceGradient
from dpok_gym.models.latent_diffusion import JOINT_ATTENTION, LatentDiffusion

#: The height and width of a patch of the latent, which is one token of the transformer.
PATCH = 2

#: Height and width of the latents of 1024 x 1024 pixels, which diffusers' pipeline draws.
_DEFAULT_LATENT_SIZE = (128, 128)

_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")


class Flux(LatentDiffusion):
    """The networks of a diffusers ``FluxPipeline`` (Black Forest Labs 2024).

    Its transformer reads patches of the latent, T5's tokens, and the pooled embedding of CLIP. Guidance was distilled
    into it. "dev" reads the guidance scale as one more input, so guidance costs no second forward pass; "schnell" knows
    no guidance. Classifier-free guidance, which a negative prompt needs, comes on top with :attr:`true_cfg_scale`.

    Attributes:
        true_cfg_scale: scale of classifier-free guidance; 1 is none.
        max_sequence_length: tokens that T5 reads, padding included: the default of diffusers' pipeline.
    """

    pipeline = "FluxPipeline"
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
    networks: ClassVar[Mapping[str, Any]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
    }
    flow_matching = True
    max_sequence_length: ClassVar[int] = 512
    #: The projections of every attention layer, in the blocks of two streams and of one; or the feed-forward layers and
    #: the last projection too.
    lora_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": JOINT_ATTENTION,
        "all": JOINT_ATTENTION + _FEED_FORWARD,
    }
    lora_prefix = "transformer."
    true_cfg_scale: float = 1.0
    text_encoder_2: Any
    tokenizer_2: Any

    @property
    def size_factor(self) -> int:
        """The sides of an image in pixels are multiples of it."""
        return PATCH * self.vae_scale_factor

    @property
    def denoiser_channels(self) -> int:
        """Channels of a patch."""
        return PATCH**2 * self.latent_channels

    def _count_text_features(self) -> int:
        return self.text_encoder.config.hidden_size

    def _read_scheduler_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # The pipeline gives its scheduler the noise levels before the shift: 1, 1 - 1/T, ..., 1/T.
        return super()._read_scheduler_config(config) | {"timestep_spacing": "trailing"}

    def _default_latent_size(self) -> tuple[int, int]:
        return _DEFAULT_LATENT_SIZE

    def _set_latent_size(self, height: int, width: int) -> None:
        super()._set_latent_size(height, width)
        self.sequence_length = (height // PATCH) * (width // PATCH)

    def with_true_cfg(self, scale: float) -> Flux:
        """See the base class."""
        other = copy.copy(self)
        other.true_cfg_scale = scale
        return other

    def without_true_cfg(self) -> Flux:
        """See the base class."""
        return self if self.true_cfg_scale == 1 else self.with_true_cfg(1.0)

    def configured(self, image_size: int | Sequence[int] | None, negative_prompt: str | None) -> LatentDiffusion:
        """See the base class.

        Raises:
            ValueError: also for a negative prompt without true classifier-free guidance.
        """
        if negative_prompt is not None and self.true_cfg_scale == 1:
            raise ValueError(
                f"the model {self.name!r} reads guidance_scale as a number, so a negative prompt has no effect: pass "
                "true_cfg_scale above 1 too (--model-kwargs true_cfg_scale=4), or leave out negative_prompt"
            )
        return super().configured(image_size, negative_prompt)

    def _readers(self) -> Mapping[str, int]:
        # CLIP gives the pooled embedding only, and may lose the end of a prompt, as in the pipeline.
        return {"tokenizer_2": self.max_sequence_length}

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self._tokenize(self.tokenizer, prompts)["input_ids"]
        tokens_2 = self._tokenize(self.tokenizer_2, prompts, self.max_sequence_length)["input_ids"]
        return {
            "encoder_hidden_states": self.text_encoder_2.to(self.device)(tokens_2).last_hidden_state,
            "pooled_projections": self.text_encoder.to(self.device)(tokens).pooler_output,
        }

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: the pooled embedding of CLIP."""
        return conditioning["pooled_projections"]

    def num_forward_passes(self, guidance_scale: float) -> int:
        """See the base class: 2 with true classifier-free guidance, else 1.

        Raises:
            ValueError: if the denoiser reads no guidance scale, and one is given.
        """
        if guidance_scale != 1 and not self.denoiser.config.guidance_embeds:
            raise ValueError(
                f"the model {self.name!r} is guidance-distilled and reads no guidance scale, as FLUX.1 schnell: use "
                f"guidance_scale=1, not {guidance_scale}; true_cfg_scale (--model-kwargs true_cfg_scale=2) guides it"
            )
        return 1 if self.true_cfg_scale == 1 else 2

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        denoiser: nn.Module | None = None,
        guidance_gradient: GuidanceGradient = "both",
    ) -> Tensor:
        """See the base class. The guidance scale is an input of the denoiser; 1 is none."""
        if self.denoiser.config.guidance_embeds:
            conditioning = conditioning | {"guidance": torch.full_like(timesteps, guidance_scale)}
        return super().predict(latents, timesteps, conditioning, self.true_cfg_scale, denoiser, guidance_gradient)

    def _denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows, columns = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
        velocity = denoiser(
            pack(latents),
            timestep=timesteps.to(latents.dtype) / 1000,  # the noise level, rounded as in the pipeline
            # The tokens of the text have no place; a patch has its row and column.
            txt_ids=latents.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3),
            img_ids=positions(1, rows, columns, like=latents),
            **conditioning,
        ).sample
        return unpack(velocity, rows, columns).float()

    def pipeline_call(self, latents: Tensor, guidance_scale: float) -> dict[str, Any]:
        """See the base class."""
        call = super().pipeline_call(pack(latents), guidance_scale) | {"true_cfg_scale": self.true_cfg_scale}
        if self.true_cfg_scale != 1:  # without a negative prompt, the pipeline would leave it out
            call["negative_prompt"] = [self.negative_prompt or ""] * len(latents)
        return call


def positions(*sizes: int, like: Tensor) -> Tensor:
    """Returns the coordinates of all places of a grid of these sizes, (places, axes) int64, on a tensor's device."""
    return torch.cartesian_prod(*(torch.arange(size, device=like.device) for size in sizes))


def pack(latents: Tensor) -> Tensor:
    """Returns the patches of latents (B, C, h, w), row by row, as tokens (B, h w / 4, 4 C)."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the latents (B, C, 2 rows, 2 columns) of tokens (B, rows columns, 4 C): the inverse of :func:`pack`."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), PATCH)
