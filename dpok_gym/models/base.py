"""The interface of every text-to-image model.

Letters used for sizes: B images, N prompts, F features, C x h x w a latent, H x W an image.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dpok_gym.models.conditioning_cache import ConditioningCache
from dpok_gym.models.scheduler_configs import TimestepSpacing, with_spacing
from dpok_gym.utils.validation import check_choice, check_entries, check_non_negative

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Conditioning = dict[str, Tensor]
GuidanceGradient = Literal["both", "conditional"]
LongPrompts = Literal["error", "truncate"]

#: Most bytes of conditioning that a model keeps in the memory of the CPU. One prompt has 230 KiB with Stable Diffusion
#: 1.5 in float32 (77 x 768 numbers), so this is enough for about 1100 prompts.
CONDITIONING_CACHE_BYTES = 256 * 2**20
#: Prompts that are kept even if they take more. One has 4 MiB with FLUX.1 in bfloat16 (512 x 4096 numbers), and its
#: text encoders of 9 GB should not have to come back for it.
MIN_PROMPTS_KEPT = 512

#: The name of the model of a live pipeline that has no name of its own.
LIVE_PIPELINE = "pipeline"


def check_true_cfg_scale(scale: float) -> float:
    """Checks a scale of true classifier-free guidance: a finite number of at least 1.

    Raises:
        ValueError: if it is not.
    """
    if check_non_negative("true_cfg_scale", scale) < 1:
        raise ValueError(f"true_cfg_scale must be at least 1, which is none, got {scale}")
    return scale


class TextToImageModel(ABC):
    """A latent diffusion model, reduced to what denoising as a decision process needs.

    The networks are frozen and in evaluation mode, and everyone who loads the model shares them. So ``denoiser`` must
    always compute the pre-trained model: a learner switches its LoRA on for its own calls only, or trains a copy.

    A subclass sets the attributes, calls ``super().__init__()`` and implements the abstract methods; the others have
    defaults that suit a model of one image size without a text encoder.

    Attributes:
        name: what the model was loaded by: a registered name, a folder as it was given, or a hub id. A live pipeline
            has its ``name_or_path``, or "pipeline".
        options: the arguments of :func:`dpok_gym.models.load_model` that differ from their defaults, without name and
            device; plain values that JSON can keep.
        device: where the networks are.
        latent_shape: (C, h, w).
        image_shape: (H, W) in pixels.
        text_width: F, number of features of a prompt in :meth:`text_features`.
        denoiser: the network that is fine-tuned.
        scheduler_config: config of the diffusers scheduler that the model was trained with, which decides on the kind
            of its transitions; see :func:`dpok_gym.samplers.make_ddim_table` and ``make_flow_table``.
        sequence_length: tokens of an image in the transformer, where the scheduler shifts the noise levels by that;
            else None.
        long_prompts: what becomes of a prompt that is longer than the model reads: "error", or "truncate" to leave out
            its end, as diffusers' pipelines do.
        lora_layers: sets of layers for a LoRA: "attention" and "all", each a tuple of endings of layer names.
        pipeline_options: further arguments with which diffusers' pipeline draws as the model does.
        lora_prefix: name of the denoiser in a LoRA file, with a dot, as diffusers' ``load_lora_weights`` expects it.
        default_lora_rank: rank of the LoRA that fine-tuning trains by default; 0 means: train the whole denoiser.
    """

    name: str
    options: dict[str, Any]
    device: torch.device
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int]
    text_width: int
    denoiser: nn.Module
    scheduler_config: Mapping[str, Any]
    sequence_length: int | None = None
    lora_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    lora_prefix: str = ""
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    long_prompts: LongPrompts = "error"
    default_lora_rank: int = 8

    def __init__(self) -> None:
        self.options = {}
        self._conditioning = ConditioningCache(CONDITIONING_CACHE_BYTES, MIN_PROMPTS_KEPT)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextToImageModel:
        """Returns the model itself: everyone shares its networks. Gymnasium copies an environment's arguments often."""
        return self

    @classmethod
    def from_pipeline(
        cls,
        pipe: DiffusionPipeline,
        *,
        image_size: int | Sequence[int] | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float = 1.0,
        long_prompts: LongPrompts = "error",
        timestep_spacing: TimestepSpacing | None = None,
    ) -> TextToImageModel:
        """Makes a model of a live diffusers pipeline.

        The model uses the pipeline's own networks, where they are and in the precision that they have; nothing is
        copied. They are frozen and put into evaluation mode.

        Args:
            pipe: of one of the classes in :data:`dpok_gym.models.pipelines.FAMILIES`, with all its parts.
            image_size: pixels of a side, or (height, width); None for the size that the model was trained with.
            negative_prompt: what guidance leads away from; None for what the model was trained with.
            true_cfg_scale: see :meth:`with_options`.
            long_prompts: see :meth:`with_options`.
            timestep_spacing: see :meth:`with_options`.

        Raises:
            ValueError: if pipelines of this class are not supported, if a part is missing, if its networks are
                offloaded to another device between calls, or if a LoRA is active in it.
        """
        from dpok_gym.models.pipelines import model_from_pipeline

        model = model_from_pipeline(pipe)
        if not isinstance(model, cls):
            raise ValueError(
                f"a {type(pipe).__name__} is made into a {type(model).__name__}, not into a {cls.__name__}; call "
                "TextToImageModel.from_pipeline"
            )
        return model.with_options(
            image_size=image_size,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            long_prompts=long_prompts,
            timestep_spacing=timestep_spacing,
        )

    def configured(self, image_size: int | Sequence[int] | None, negative_prompt: str | None) -> TextToImageModel:
        """Returns a model with the same networks, not a copy of them, for other images.

        Args:
            image_size: pixels of a side, or (height, width); None for the size that the model was trained with.
            negative_prompt: what guidance leads away from; None for what the model was trained with.

        Raises:
            ValueError: if the model has no such images or takes no negative prompt.
        """
        if image_size is None and negative_prompt is None:
            return self
        raise ValueError(
            f"the model {self.name!r} draws images of one size, without a negative prompt: leave out image_size and "
            "negative_prompt"
        )

    def with_true_cfg(self, scale: float) -> TextToImageModel:
        """Returns a model with the same networks, not a copy of them, and this scale of true classifier-free guidance.

        Raises:
            ValueError: unless guidance is distilled into the model, so that the guidance scale is only an input of it.
        """
        raise ValueError(
            f"the model {self.name!r} takes no true_cfg_scale, which is for FLUX.1 alone: its classifier-free guidance "
            "is guidance_scale"
        )

    def without_true_cfg(self) -> TextToImageModel:
        """Returns a model with the same networks and no true classifier-free guidance: itself for most."""
        return self

    def with_options(
        self,
        *,
        image_size: int | Sequence[int] | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float = 1.0,
        long_prompts: LongPrompts = "error",
        timestep_spacing: TimestepSpacing | None = None,
    ) -> TextToImageModel:
        """Returns a model with the same networks, not a copy of them, and notes the arguments in its ``options``.

        What an earlier call has set stays, where an argument has its default.

        Args:
            image_size: as for :meth:`configured`.
            negative_prompt: as for :meth:`configured`.
            true_cfg_scale: scale of classifier-free guidance for a model into which guidance was distilled already, as
                FLUX.1: at least 1, with a second forward pass of the denoiser; 1 is none. Others have guidance_scale.
            long_prompts: what becomes of a prompt that is longer than the model reads: "error", or "truncate" to leave
                out its end, as diffusers' pipelines do.
            timestep_spacing: of the denoising steps: "leading", as in the published Stable Diffusion models, or
                "trailing", which begins at the last training timestep; None for that of the model's scheduler. A
                flow-matching model knows "trailing" alone, the noise levels 1, 1 - 1/T, ..., 1/T before their shift.

        Returns:
            A light copy; the model itself if all arguments have their defaults.

        Raises:
            ValueError: if the model has no such images or takes no negative prompt, or an argument has no such choice.
        """
        check_choice("long_prompts", long_prompts, "error", "truncate")
        size = list(image_size) if isinstance(image_size, Sequence) else image_size
        given: dict[str, Any] = {"image_size": size, "negative_prompt": negative_prompt}
        given["true_cfg_scale"] = None if check_true_cfg_scale(true_cfg_scale) == 1 else float(true_cfg_scale)
        given["long_prompts"] = None if long_prompts == "error" else long_prompts
        given["timestep_spacing"] = timestep_spacing
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return self
        model = copy.copy(self)
        model.options = self.options | given
        # A cache of its own: with another size XL's conditioning differs, and a prompt may be too long for one only.
        model._conditioning = ConditioningCache(CONDITIONING_CACHE_BYTES, MIN_PROMPTS_KEPT)
        model.long_prompts = model.options.get("long_prompts", "error")
        if timestep_spacing is not None:
            model.scheduler_config = with_spacing(self.scheduler_config, timestep_spacing)
        if true_cfg_scale != 1:
            model = model.with_true_cfg(true_cfg_scale)
        if image_size is not None or negative_prompt is not None:
            model = model.configured(image_size, model.options.get("negative_prompt"))
        return model

    def find_long(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yields the index of each prompt that is longer than the model reads, and a sentence that says so.

        It does not run the text encoder, and takes seconds for a million prompts.

        Args:
            prompts: N texts.
        """
        return iter(())

    def longest_prompt(self, prompts: Sequence[str]) -> tuple[int, int] | None:
        """Returns the tokens of the longest prompt, and the most that the model reads; None without a tokenizer.

        Args:
            prompts: N texts, at least one.
        """
        return None

    @abstractmethod
    def find_unreadable(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yields the index of each prompt that the model refuses, and a sentence that says why.

        They are those of :meth:`find_long`, unless the model truncates them, and those with unknown words.

        Args:
            prompts: N texts.
        """

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Checks that the model can read these prompts, without running its text encoder.

        Raises:
            ValueError: if prompts have too many tokens, or words that the model cannot read. The message says how many,
                and shows the first one.
        """
        check_entries(self.find_unreadable(prompts), len(prompts))

    # The result is kept for later callers, so the first caller's modes (inference, autocast) must not matter.
    @torch.inference_mode(False)
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Returns what the denoiser is told about each prompt: tensors with a leading axis of N, on the model's device.

        Each distinct prompt is encoded once, and kept as long as :data:`CONDITIONING_CACHE_BYTES` and
        :data:`MIN_PROMPTS_KEPT` allow.

        Args:
            prompts: N texts.

        Raises:
            ValueError: if there is no prompt, or one cannot be read.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"encode takes a list of at least one prompt, got {prompts!r}")
        conditioning: dict[str, Conditioning] = {}
        missing: list[str] = []
        for prompt in dict.fromkeys(prompts):
            known = self._conditioning.get(prompt)
            if known is None:
                missing.append(prompt)
            else:
                conditioning[prompt] = known
        if missing:
            self.check_prompts(missing)
        for prompt in missing:
            # One at a time: in a batch, its last bits would depend on the prompts beside it.
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                encoded = self._encode([prompt])
            conditioning[prompt] = {name: values[0].cpu() for name, values in encoded.items()}
            self._conditioning.add(prompt, conditioning[prompt])
        rows = [conditioning[prompt] for prompt in prompts]
        stacked: Conditioning = {}
        for name in rows[0]:
            stacked[name] = torch.stack([row[name] for row in rows]).to(self.device)
        return stacked

    @abstractmethod
    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """Runs the text encoder: tensors with a leading axis of N, on the model's device.

        Args:
            prompts: N distinct texts, which :meth:`check_prompts` has accepted.
        """

    def offload_text_encoder(self) -> None:  # noqa: B027 (a model without a text encoder has nothing to move)
        """Moves the text encoder to the CPU. From now on it is on the device only while prompts are encoded.

        The negative prompt is encoded first, because guidance always needs it. A pipeline takes the text encoder back.
        """

    @abstractmethod
    def text_features(self, conditioning: Conditioning) -> Tensor:
        """Returns one vector for each prompt, (N, F), for a critic to read."""

    @property
    def loads_lora_files(self) -> bool:
        """True if diffusers' pipeline of the model has ``load_lora_weights``."""
        return True

    def num_forward_passes(self, guidance_scale: float) -> int:
        """Returns the forward passes of the denoiser for one image in :meth:`predict`: 2 with guidance, else 1."""
        return 1 if guidance_scale == 1 else 2

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
        """Returns the denoiser's guided output.

        Args:
            latents: (B, C, h, w) x_t.
            timesteps: (B,) in the units of the model's training schedule: int64, or float32 for flow matching, where
                they are 1000 times the noise level.
            conditioning: of B prompts, from :meth:`encode`.
            guidance_scale: scale of classifier-free guidance (Ho & Salimans 2022); 1 means none.
            denoiser: a fine-tuned network to use in place of the model's own.
            guidance_gradient: "both" differentiates the guided output. "conditional" takes the unconditional output as
                a constant: the result is the same, but an update takes about two thirds of the time and half of the
                memory.

        Returns:
            (B, C, h, w) float32.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Returns the images of clean latents; differentiable.

        Args:
            latents: (B, C, h, w), on any device.

        Returns:
            (B, 3, H, W) float32 in [0, 1].
        """

    def encode_images(self, images: Tensor) -> Tensor:
        """Returns the clean latents of images: the mean of the autoencoder's Gaussian.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device.

        Returns:
            (B, C, h, w) float32.

        Raises:
            ValueError: if the images have another shape, or the model has no encoder for images.
        """
        raise ValueError(f"the model {self.name!r} has no encoder for images; use a model with an autoencoder")

    def to_pipeline(self, denoiser: nn.Module | None = None) -> DiffusionPipeline:
        """Returns a diffusers pipeline around the model's networks, with the scheduler of its family.

        Args:
            denoiser: a fine-tuned network to use in place of the model's own.

        Raises:
            ValueError: if diffusers has no pipeline for the model.
        """
        raise ValueError(f"diffusers has no pipeline for the model {self.name!r}; draw with a DenoisingProcess instead")

    def pipeline_call(self, latents: Tensor, guidance_scale: float) -> dict[str, Any]:
        """Returns the arguments with which that pipeline draws the model's images: all but prompts, steps and noise.

        Args:
            latents: (B, C, h, w) x_T.
            guidance_scale: as for :meth:`predict`.
        """
        height, width = self.image_shape
        call = {"latents": latents, "guidance_scale": guidance_scale, "height": height, "width": width}
        call |= self.pipeline_options
        negative = self.options.get("negative_prompt")
        return call if negative is None else call | {"negative_prompt": [negative] * len(latents)}
