"""FLUX.2-klein, the base models and the distilled ones.

Letters used for sizes: B images, N prompts, L tokens of a prompt, F features, C x h x w a latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from dpok_gym.models.base import Conditioning
from dpok_gym.models.flux import PATCH, positions
from dpok_gym.models.latent_diffusion import JOINT_ATTENTION, LatentDiffusion

#: Height and width of the latents of 1024 x 1024 pixels, which diffusers' pipeline draws.
_DEFAULT_LATENT_SIZE = (64, 64)

#: Layers of the text encoder that the denoiser reads.
_TEXT_LAYERS = (9, 18, 27)

#: Prompts whose tokens are counted together.
_CHUNK = 10_000

#: In the blocks of one stream, the first layers of attention and feed-forward are one layer, and so are the last ones.
_ONE_STREAM = ("to_qkv_mlp_proj", "to_out")
_ATTENTION = (*JOINT_ATTENTION, *_ONE_STREAM)
_FEED_FORWARD = ("linear_in", "linear_out")


class Flux2Klein(LatentDiffusion):
    """The networks of a diffusers ``Flux2KleinPipeline`` (Black Forest Labs 2026).

    A latent holds the patches of 2 x 2 pixels of the autoencoder's latent in its channels, each with the mean and the
    variance of its batch normalization. The denoiser reads three layers of Qwen3, which is given the prompt as a chat.

    Attributes:
        is_distilled: whether the denoiser was distilled to few steps, and knows no guidance.
        max_sequence_length: tokens that the text encoder reads, padding included: the default of diffusers' pipeline.
    """

    pipeline = "Flux2KleinPipeline"
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": Qwen2TokenizerFast}
    networks: ClassVar[Mapping[str, Any]] = {
        "text_encoder": Qwen3ForCausalLM,
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
    }
    settings: ClassVar[Mapping[str, Any]] = {"is_distilled": False}
    flow_matching = True
    max_sequence_length: ClassVar[int] = 512
    lora_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention": _ATTENTION, "all": _ATTENTION + _FEED_FORWARD}
    lora_prefix = "transformer."
    is_distilled: bool

    @property
    def vae_scale_factor(self) -> int:
        """Pixels for each latent row and column."""
        return PATCH * super().vae_scale_factor

    @property
    def latent_channels(self) -> int:
        """C, the channels of a latent."""
        return PATCH**2 * super().latent_channels

    def _count_text_features(self) -> int:
        return len(_TEXT_LAYERS) * self.text_encoder.config.hidden_size

    def _read_scheduler_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # As in the pipeline: the noise levels before the shift are 1, 1 - 1/T, ..., 1/T, and the shift depends on T.
        read = super()._read_scheduler_config(config)
        return read | {"timestep_spacing": "trailing", "dynamic_shift": "empirical"}

    def _default_latent_size(self) -> tuple[int, int]:
        return _DEFAULT_LATENT_SIZE

    def _set_latent_size(self, height: int, width: int) -> None:
        super()._set_latent_size(height, width)
        self.sequence_length = height * width

    def _readers(self) -> Mapping[str, int]:
        return {"tokenizer": self.max_sequence_length}

    def _count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> Iterator[int]:
        for first in range(0, len(prompts), _CHUNK):
            yield from map(len, tokenizer(self._as_chats(prompts[first : first + _CHUNK]))["input_ids"])

    def _as_chats(self, prompts: Sequence[str]) -> list[str]:
        """Returns each prompt as the text of a chat, in which an assistant would answer without thinking."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return self.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            chats, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self._tokenize(self.tokenizer, self._as_chats(prompts), self.max_sequence_length)
        # Without the head, whose logits of all words nobody needs.
        encoder = self.text_encoder.to(self.device).model
        layers = encoder(**tokens, output_hidden_states=True, use_cache=False).hidden_states
        return {"encoder_hidden_states": torch.cat([layers[layer] for layer in _TEXT_LAYERS], dim=-1)}

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: the mean over the tokens."""
        return conditioning["encoder_hidden_states"].mean(dim=1)

    def num_forward_passes(self, guidance_scale: float) -> int:
        """See the base class.

        Raises:
            ValueError: if the denoiser is distilled, and a guidance scale is given.
        """
        if self.is_distilled and guidance_scale != 1:
            raise ValueError(
                f"the model {self.name!r} is guidance-distilled and knows no guidance: use guidance_scale=1, not "
                f"{guidance_scale}, or a base model, such as FLUX.2-klein-base"
            )
        return super().num_forward_passes(guidance_scale)

    def configured(self, image_size: int | Sequence[int] | None, negative_prompt: str | None) -> LatentDiffusion:
        """See the base class.

        Raises:
            ValueError: also for a negative prompt, if the denoiser is distilled.
        """
        if negative_prompt is not None and self.is_distilled:
            raise ValueError(
                f"the model {self.name!r} is guidance-distilled, so a negative prompt has no effect: leave out "
                "negative_prompt, or use a base model, such as FLUX.2-klein-base"
            )
        return super().configured(image_size, negative_prompt)

    def _denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows, columns = latents.shape[-2:]
        n_tokens = conditioning["encoder_hidden_states"].shape[1]
        velocity = denoiser(
            latents.flatten(2).transpose(1, 2),
            timestep=timesteps.to(latents.dtype) / 1000,  # the noise level, rounded as in the pipeline
            # The axes are those of images, rows, columns and words.
            txt_ids=positions(1, 1, 1, n_tokens, like=latents),
            img_ids=positions(1, rows, columns, 1, like=latents),
            **conditioning,
        ).sample
        return velocity.transpose(1, 2).unflatten(2, (rows, columns)).float()

    def pipeline_call(self, latents: Tensor, guidance_scale: float) -> dict[str, Any]:
        """See the base class. The pipeline takes a negative prompt only if it is encoded."""
        call = super().pipeline_call(latents, guidance_scale)
        if call.pop("negative_prompt", None) is not None:
            empty = self.unconditional()["encoder_hidden_states"]
            call["negative_prompt_embeds"] = empty.expand(len(latents), -1, -1)
        return call

    def _normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._moments(latents)
        return (pixel_unshuffle(latents, PATCH) - mean) / std

    def _denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._moments(latents)
        return pixel_shuffle(latents * std + mean, PATCH)

    def _moments(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of each channel of a latent, (C, 1, 1) each."""
        mean, variance = self.vae.bn.running_mean, self.vae.bn.running_var
        std = (variance + self.vae.config.batch_norm_eps).sqrt()
        return mean.to(latents)[:, None, None], std.to(latents)[:, None, None]
