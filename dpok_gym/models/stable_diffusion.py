"""Stable Diffusion 1.x and 2.x, and every model of the same architecture.

Letters used for sizes: B images, N prompts, L tokens of a prompt, F features, C x h x w a latent, H x W an image.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dpok_gym.models.base import Conditioning, GuidanceGradient, TextToImageModel
from dpok_gym.models.lora import reference_view
from dpok_gym.models.scheduler_configs import describe_changes, with_density
from dpok_gym.models.token_counts import count_tokens
from dpok_gym.utils.sharding import is_sharded
from dpok_gym.utils.validation import shorten

#: The largest height or width in pixels: four times that of Stable Diffusion XL.
MAX_SIDE = 4096

logger = logging.getLogger(__name__)

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")


class StableDiffusion(TextToImageModel):
    """The networks of a diffusers ``StableDiffusionPipeline``.

    Args:
        name: what the model was loaded by.
        tokenizer: a CLIP tokenizer. If its config has a list ``words``, prompts may use these words only.
        text_encoder: a CLIP text encoder.
        unet: the denoiser.
        vae: the autoencoder.
        scheduler_config: config of the diffusers scheduler that the model comes with.
        device: where the networks are put.

    Raises:
        ValueError: if the denoiser does more than plain text-to-image.
    """

    #: The projections of every attention layer of a diffusers UNet, as is usual for large models; or the feed-forward
    #: and convolutional layers of all its blocks too.
    lora_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "all": _ATTENTION + _FEED_FORWARD + _CONVOLUTIONS,
    }
    lora_prefix = "unet."
    denoiser: Any

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
                "its denoiser reads the guidance scale, as latent-consistency models do: their sampler does not take "
                "DDIM's Gaussian steps; use the model that it was distilled from"
            )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"its denoiser reads {unet.config.in_channels} channels and a latent has {vae.config.latent_channels}: "
                "models for inpainting, depth or editing are not supported"
            )
        self.name = name
        self.device = torch.device(device)
        self.dtype = unet.dtype
        self.tokenizer = bound_length(tokenizer, text_encoder)
        self.text_encoder, self.denoiser, self.vae = map(self._prepare, (text_encoder, unet, vae))
        self.scheduler_config = with_density(scheduler_config)
        if changes := describe_changes(scheduler_config, self.scheduler_config):
            logger.warning(
                "the scheduler of the model %s ends without noise, so its last step has no log-probability; it is used "
                "with %s (timestep_spacing or --timestep-spacing chooses how the steps are spaced)",
                name,
                changes,
            )
        self.negative_prompt: str | None = None
        self._unconditional: Conditioning | None = None
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self._set_latent_size(height, width)
        self.text_width = text_encoder.config.hidden_size

    def _prepare(self, network: Any) -> Any:
        # Convolutions with the channels last are faster on GPUs with tensor cores and on CPUs; nothing else changes.
        if not is_sharded(network):
            network = network.to(self.device).to(memory_format=torch.channels_last)
        network.eval()
        for name, value in network.named_parameters():
            if ".lora_" not in name:  # a LoRA in a live pipeline may belong to an agent that still learns
                value.requires_grad_(False)
        return network

    @property
    def vae_scale_factor(self) -> int:
        """Pixels for each latent row and column."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _set_latent_size(self, height: int, width: int) -> None:
        self.latent_shape = (self.vae.config.latent_channels, height, width)
        self.image_shape = (self.vae_scale_factor * height, self.vae_scale_factor * width)

    def configured(self, image_size: int | Sequence[int] | None, negative_prompt: str | None) -> StableDiffusion:
        """See the base class.

        Raises:
            ValueError: if the autoencoder cannot draw images of this size.
        """
        other = copy.copy(self)
        other._unconditional = None
        other.negative_prompt = negative_prompt
        if negative_prompt is not None:
            other.check_prompts([negative_prompt])
        if image_size is not None:
            factor = self.vae_scale_factor
            size: tuple[Any, ...] = (image_size, image_size)
            if isinstance(image_size, Sequence) and not isinstance(image_size, str):
                size = tuple(image_size)
            if len(size) != 2 or not all(_is_multiple(side, factor) for side in size):
                raise ValueError(
                    f"image_size must be one or two (height, width) multiples of {factor} pixels, got {image_size!r}; "
                    f"at most {MAX_SIDE}"
                )
            other._set_latent_size(size[0] // factor, size[1] // factor)
        return other

    def find_long(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """See the base class."""
        return self._find_long(self.tokenizer, prompts)

    def _find_long(self, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        max_tokens = tokenizer.model_max_length
        for index, n_tokens in enumerate(count_tokens(tokenizer, prompts)):
            if n_tokens > max_tokens:
                yield (
                    index,
                    f"a prompt has {n_tokens} tokens and the model {self.name!r} reads at most {max_tokens} (start and "
                    "end included); shorten it, or choose long_prompts='truncate' or, for an environment, 'skip' "
                    f"(--long-prompts): {shorten(prompts[index])}",
                )

    def find_unreadable(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """See the base class."""
        unknown = self._find_unknown_words(prompts)
        return unknown if self.long_prompts == "truncate" else merge_by_index(unknown, self.find_long(prompts))

    def _find_unknown_words(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        words = self.tokenizer.init_kwargs.get("words")
        if words is None:  # it reads any word
            return
        readable = frozenset(words)
        for index, prompt in enumerate(prompts):
            if not readable.issuperset(prompt.split()):
                unknown = [word for word in prompt.split() if word not in readable]
                yield (
                    index,
                    f"the model {self.name!r} cannot read {', '.join(map(repr, unknown))} in the prompt {prompt!r}; "
                    f"its words are: {' '.join(words)}",
                )

    def _tokenize(self, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
        """Returns the token ids of prompts, (N, L) int64 on the model's device. Long ones lose their end."""
        ids = tokenizer(list(prompts), padding="max_length", truncation=True)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self._tokenize(self.tokenizer, prompts)
        return {"encoder_hidden_states": self.text_encoder.to(self.device)(tokens).last_hidden_state}

    def offload_text_encoder(self) -> None:
        """See the base class."""
        self.unconditional()
        self.text_encoder.to("cpu")

    @torch.inference_mode(False)  # the result is kept, and a later caller may need gradients
    def unconditional(self) -> Conditioning:
        """Returns what the denoiser is told about the negative prompt: tensors with a leading axis of 1."""
        if self._unconditional is None:
            self._unconditional = self._encode_negative()
        return self._unconditional

    def _encode_negative(self) -> Conditioning:
        return self.encode([self.negative_prompt or ""])

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
            # One batch of twice the size is faster than two batches.
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

    def encode_images(self, images: Tensor) -> Tensor:
        """See the base class."""
        if images.dim() != 4 or images.shape[1:] != (3, *self.image_shape):
            raise ValueError(
                f"the images must have the shape (B, 3, {self.image_shape[0]}, {self.image_shape[1]}), got "
                f"{tuple(images.shape)}"
            )
        scaled = 2 * images.to(self.device, self.vae.dtype) - 1
        return (self.vae.encode(scaled).latent_dist.mean * self.vae.config.scaling_factor).float()

    def to_pipeline(self, denoiser: nn.Module | None = None) -> DiffusionPipeline:
        """See the base class. The networks are the model's own, not copies; a text encoder comes back to the device."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            **self._pipeline_parts(denoiser),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def _pipeline_parts(self, denoiser: nn.Module | None) -> dict[str, Any]:
        """Returns the components that the pipelines of all families have."""
        # The sampler of the environments never clips the predicted clean latent, so the pipeline's must not either.
        scheduler = DDIMScheduler.from_config(self.scheduler_config, clip_sample=False, thresholding=False)
        return {
            "tokenizer": self.tokenizer,
            "text_encoder": self.text_encoder.to(self.device),
            "unet": reference_view(self.denoiser) if denoiser is None else denoiser,
            "vae": self.vae,
            "scheduler": scheduler,
        }


def bound_length(tokenizer: CLIPTokenizer, text_encoder: Any) -> CLIPTokenizer:
    """Returns a tokenizer that reads no more tokens than its text encoder: itself, or a copy.

    Without a ``tokenizer_config.json``, transformers takes a length without end.
    """
    most = text_encoder.config.max_position_embeddings
    if tokenizer.model_max_length > most:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = most
    return tokenizer


def merge_by_index(*problems: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Merges what was found in prompts, each in ascending order; of several problems of a prompt, the first is kept."""
    by_index = operator.itemgetter(0)
    for _, same in itertools.groupby(heapq.merge(*problems, key=by_index), by_index):
        yield next(same)


def _is_multiple(side: Any, factor: int) -> bool:
    return isinstance(side, Integral) and factor <= int(side) <= MAX_SIDE and int(side) % factor == 0
