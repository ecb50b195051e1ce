"""The base of all models that are a pipeline of diffusers: text encoders, a denoiser and an autoencoder.

Letters used for sizes: B images, N prompts, L tokens of a prompt, F features, C x h x w a latent, H x W an image.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import logging
import operator
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from dpok_gym.models.base import Conditioning, GuidanceGradient, TextToImageModel
from dpok_gym.models.lora import reference_view
from dpok_gym.models.scheduler_configs import describe_changes, for_diffusers, is_flow_matching, with_density
from dpok_gym.models.token_counts import count_tokens
from dpok_gym.utils.sharding import is_sharded
from dpok_gym.utils.validation import shorten

#: The largest height or width in pixels: four times that of Stable Diffusion XL.
MAX_SIDE = 4096

#: Endings of the names of an attention layer's projections, for ``lora_layers``. Where image and text attend to each
#: other, the text has projections of its own.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

logger = logging.getLogger(__name__)


class LatentDiffusion(TextToImageModel):
    """The networks of one of diffusers' pipelines.

    A family is a subclass. It sets the class attributes, encodes prompts in :meth:`_encode`, and calls its denoiser in
    :meth:`_denoise`. Each part is an attribute of the pipeline's name for it, such as ``text_encoder``.

    Args:
        name: what the model was loaded by.
        parts: the pipeline's parts by name: those of ``tokenizers`` and ``networks``, and perhaps of ``settings``.
        scheduler_config: config of the diffusers scheduler that the model comes with.
        device: where the denoiser and the autoencoder are put; the text encoders go there when a prompt is encoded.

    Attributes:
        pipeline: name of diffusers' pipeline.
        denoiser_part: the pipeline's name of its denoiser.
        tokenizers: the class of each tokenizer, by the pipeline's name of it.
        networks: the class of each network, by the pipeline's name of it.
        optional: names of the parts that may be missing; they are None then.
        settings: further arguments of the pipeline and their defaults.
        size_factor: the sides of an image in pixels are multiples of it.
        max_side: the largest height or width in pixels.
        dtype: of the denoiser's weights.

    Raises:
        ValueError: if the denoiser does more than plain text-to-image, or the scheduler is of another kind.
    """

    pipeline: ClassVar[str]
    denoiser_part: ClassVar[str] = "transformer"
    tokenizers: ClassVar[Mapping[str, Any]]
    networks: ClassVar[Mapping[str, Any]]
    optional: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[Mapping[str, Any]] = {}
    #: Whether the family was trained with flow matching; None if it may be either.
    flow_matching: ClassVar[bool | None] = None
    denoiser: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Any],
        scheduler_config: Mapping[str, Any],
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.name = name
        self.device = torch.device(device)
        self.denoiser, self.vae = parts[self.denoiser_part], parts["vae"]
        self.dtype = self.denoiser.dtype
        for setting, default in self.settings.items():
            setattr(self, setting, parts.get(setting, default))
        self._check_denoiser()
        self.denoiser, self.vae = self._prepare(self.denoiser), self._prepare(self._prepare_vae(self.vae))
        for part in self.text_encoders:
            encoder = parts.get(part)
            setattr(self, part, None if encoder is None else _freeze(encoder))
        for part in self.tokenizers:
            setattr(self, part, self._prepare_tokenizer(part, parts.get(part)))
        self.scheduler_config = self._read_scheduler_config(scheduler_config)
        self.negative_prompt: str | None = None
        self._unconditional: Conditioning | None = None
        self._is_offloaded = False
        self.text_width = self._count_text_features()
        self._set_latent_size(*self._default_latent_size())

    @property
    def text_encoders(self) -> list[str]:
        """Names of the text encoders."""
        return [name for name in self.networks if name not in (self.denoiser_part, "vae")]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels for each latent row and column."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def loads_lora_files(self) -> bool:
        """See the base class."""
        return hasattr(getattr(diffusers, self.pipeline), "load_lora_weights")

    @property
    def size_factor(self) -> int:
        """The sides of an image in pixels are multiples of it: latents, and patches of a transformer, are whole."""
        return self.vae_scale_factor * getattr(self.denoiser.config, "patch_size", 1)

    @property
    def max_side(self) -> int:
        """The largest height or width in pixels."""
        return MAX_SIDE

    @property
    def latent_channels(self) -> int:
        """C, the channels of a latent."""
        return self.vae.config.latent_channels

    @property
    def denoiser_channels(self) -> int:
        """Channels of a latent as the denoiser reads it; it has more if it is told about another image too."""
        return self.latent_channels

    @abstractmethod
    def _count_text_features(self) -> int:
        """Returns F, the width of :meth:`text_features`."""

    def _check_denoiser(self) -> None:
        """Raises an error if the denoiser does more than plain text-to-image."""
        if self.denoiser.config.in_channels != self.denoiser_channels:
            raise ValueError(
                f"its denoiser reads {self.denoiser.config.in_channels} channels and a latent has "
                f"{self.denoiser_channels}: models for inpainting, depth or editing are not supported"
            )

    def _prepare_vae(self, vae: Any) -> Any:
        """Returns the autoencoder, perhaps in another precision."""
        return vae

    def _prepare(self, network: Any) -> Any:
        # Convolutions with the channels last are faster on GPUs with tensor cores and on CPUs; nothing else changes.
        if not is_sharded(network):
            network = network.to(self.device).to(memory_format=torch.channels_last)
        return _freeze(network)

    def _prepare_tokenizer(self, part: str, tokenizer: Any) -> Any:
        """Returns a tokenizer that reads no more tokens than its text encoder: itself, or a copy.

        Without a ``tokenizer_config.json``, transformers takes a length without end.
        """
        encoder_part = part.replace("tokenizer", "text_encoder")
        encoder = getattr(self, encoder_part)
        if (encoder is None) != (tokenizer is None):
            there, missing = (encoder_part, part) if tokenizer is None else (part, encoder_part)
            raise ValueError(f"it has a {there}, but no {missing}; leave out both, or neither")
        most = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if tokenizer is not None and most is not None and tokenizer.model_max_length > most:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.model_max_length = most
        return tokenizer

    def _read_scheduler_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config of the scheduler, with which the steps have a density."""
        if self.flow_matching is not None and is_flow_matching(config) != self.flow_matching:
            kind = "with flow matching" if self.flow_matching else "to predict noise"
            raise ValueError(
                f"its scheduler is a {config.get('_class_name')}, and a model of a {self.pipeline} was trained {kind}; "
                "take the scheduler that the model came with"
            )
        read = with_density(config)
        if changes := describe_changes(config, read):
            logger.warning(
                "the scheduler of the model %s ends without noise, so its last step has no log-probability; it is used "
                "with %s (timestep_spacing or --timestep-spacing chooses how the steps are spaced)",
                self.name,
                changes,
            )
        return read

    def _default_latent_size(self) -> tuple[int, int]:
        """Returns the height and width of the latents that the denoiser was trained with."""
        size = self.denoiser.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _set_latent_size(self, height: int, width: int) -> None:
        self.latent_shape = (self.latent_channels, height, width)
        self.image_shape = (self.vae_scale_factor * height, self.vae_scale_factor * width)

    def configured(self, image_size: int | Sequence[int] | None, negative_prompt: str | None) -> LatentDiffusion:
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
            factor, most = self.size_factor, self.max_side
            size: tuple[Any, ...] = (image_size, image_size)
            if isinstance(image_size, Sequence) and not isinstance(image_size, str):
                size = tuple(image_size)
            if len(size) != 2 or not all(_is_multiple(side, factor, most) for side in size):
                raise ValueError(
                    f"image_size must be one or two (height, width) multiples of {factor} pixels, got {image_size!r}; "
                    f"at most {most}"
                )
            other._set_latent_size(size[0] // self.vae_scale_factor, size[1] // self.vae_scale_factor)
        return other

    def _readers(self) -> Mapping[str, int]:
        """Returns the names of the tokenizers that must read the whole of a prompt, and their greatest lengths."""
        return {name: getattr(self, name).model_max_length for name in self.tokenizers if getattr(self, name)}

    def find_long(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """See the base class."""
        readers = self._readers().items()
        return merge_by_index(*(self._find_long(getattr(self, name), most, prompts) for name, most in readers))

    def longest_prompt(self, prompts: Sequence[str]) -> tuple[int, int]:
        """See the base class: of the tokenizer that comes nearest to its limit."""
        pairs = [
            (max(self._count_tokens(getattr(self, name), prompts)), most) for name, most in self._readers().items()
        ]
        return max(pairs, key=lambda pair: pair[0] / pair[1])

    def _find_long(self, tokenizer: Any, max_tokens: int, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        for index, n_tokens in enumerate(self._count_tokens(tokenizer, prompts)):
            if n_tokens > max_tokens:
                yield (
                    index,
                    f"a prompt has {n_tokens} tokens and the model {self.name!r} reads at most {max_tokens} (start and "
                    "end included); shorten it, or choose long_prompts='truncate' or, for an environment, 'skip' "
                    f"(--long-prompts): {shorten(prompts[index])}",
                )

    def _count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> Iterator[int]:
        """Yields the number of tokens of each prompt; one that is short enough may get a larger number."""
        return count_tokens(tokenizer, prompts)

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

    def _tokenize(self, tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> dict[str, Tensor]:
        """Returns the token ids and the attention mask of prompts, (N, L) int64 on the model's device.

        Args:
            tokenizer: one of the model's.
            prompts: N texts. Long ones lose their end.
            length: L; None for the most that the tokenizer reads.
        """
        tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
        names = ("input_ids", "attention_mask")
        return {name: torch.tensor(tokens[name], dtype=torch.int64, device=self.device) for name in names}

    def offload_text_encoder(self) -> None:
        """See the base class."""
        self.unconditional()
        self._is_offloaded = True
        self._leave_device()

    def _leave_device(self) -> None:
        """Moves text encoders to the CPU, if they are to stay there until a prompt has to be encoded."""
        for name in self.text_encoders if self._is_offloaded else ():
            encoder = getattr(self, name)
            if encoder is not None and next(encoder.parameters()).device.type != "cpu":
                encoder.to("cpu")

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See the base class. Text encoders that have been offloaded leave the device again."""
        conditioning = super().encode(prompts)
        self._leave_device()
        return conditioning

    @torch.inference_mode(False)  # the result is kept, and a later caller may need gradients
    def unconditional(self) -> Conditioning:
        """Returns what the denoiser is told about the negative prompt: tensors with a leading axis of 1."""
        if self._unconditional is None:
            self._unconditional = self._encode_negative()
            self._leave_device()
        return self._unconditional

    def _encode_negative(self) -> Conditioning:
        return self.encode([self.negative_prompt or ""])

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
        # What the negative prompt does not change stays.
        empty = conditioning | {
            name: value.expand_as(conditioning[name]) for name, value in self.unconditional().items()
        }
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

    @abstractmethod
    def _denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the denoiser's output (B, C, h, w) float32.

        Args:
            denoiser: the model's own one, or a fine-tuned one.
            latents: (B, C, h, w) in the denoiser's precision.
            timesteps: (B,), as for :meth:`predict`.
            conditioning: of B prompts.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """See the base class."""
        latents = self._denormalize(latents.to(self.device, self.vae.dtype))
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """See the base class."""
        if images.dim() != 4 or images.shape[1:] != (3, *self.image_shape):
            raise ValueError(
                f"the images must have the shape (B, 3, {self.image_shape[0]}, {self.image_shape[1]}), got "
                f"{tuple(images.shape)}"
            )
        return self._normalize(self._encode_pixels(2 * images.to(self.device, self.vae.dtype) - 1)).float()

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Returns the autoencoder's latents of pixels (B, 3, H, W) in [-1, 1]."""
        return self.vae.encode(pixels).latent_dist.mean

    def _normalize(self, latents: Tensor) -> Tensor:
        """Returns the autoencoder's latents as the denoiser reads them: with a standard deviation of about 1."""
        return (latents - _shift(self.vae.config)) * self.vae.config.scaling_factor

    def _denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`_normalize`."""
        return latents / self.vae.config.scaling_factor + _shift(self.vae.config)

    def to_pipeline(self, denoiser: nn.Module | None = None) -> DiffusionPipeline:
        """See the base class. The networks are the model's own, not copies; text encoders come back to the device."""
        self._is_offloaded = False
        parts: dict[str, Any] = {name: getattr(self, name) for name in self.tokenizers}
        for name in self.text_encoders:
            encoder = getattr(self, name)
            parts[name] = None if encoder is None else encoder.to(self.device)
        parts |= {name: getattr(self, name) for name in self.settings}
        parts |= {"vae": self.vae, "scheduler": self._make_scheduler()}
        parts[self.denoiser_part] = reference_view(self.denoiser) if denoiser is None else denoiser
        return getattr(diffusers, self.pipeline)(**parts, **self._further_parts())

    def _make_scheduler(self) -> Any:
        if is_flow_matching(self.scheduler_config):
            return FlowMatchEulerDiscreteScheduler.from_config(for_diffusers(self.scheduler_config))
        # The sampler of the environments never clips the predicted clean latent, so the pipeline's must not either.
        return DDIMScheduler.from_config(self.scheduler_config, clip_sample=False, thresholding=False)

    def _further_parts(self) -> dict[str, Any]:
        """Returns arguments of the pipeline for what is not used here."""
        return {}


def merge_by_index(*problems: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Merges what was found in prompts, each in ascending order; of several problems of a prompt, the first is kept."""
    by_index = operator.itemgetter(0)
    for _, same in itertools.groupby(heapq.merge(*problems, key=by_index), by_index):
        yield next(same)


def _freeze(network: Any) -> Any:
    """Returns a network in evaluation mode, whose weights do not learn."""
    network.eval()
    for name, value in network.named_parameters():
        if ".lora_" not in name:  # a LoRA in a live pipeline may belong to an agent that still learns
            value.requires_grad_(False)
    return network


def _shift(vae_config: Any) -> float:
    """Returns what an autoencoder's latents are shifted by before they are scaled: 0 for most."""
    return getattr(vae_config, "shift_factor", None) or 0.0


def _is_multiple(side: Any, factor: int, most: int) -> bool:
    return isinstance(side, Integral) and factor <= int(side) <= most and int(side) % factor == 0
