"""Stable Diffusion 1.x and 2.x, and every model of the same architecture.

Letters used for sizes: B images, N prompts, L tokens of a prompt, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dpok_gym.models.base import Conditioning
from dpok_gym.models.latent_diffusion import ATTENTION, LatentDiffusion

_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")


class StableDiffusion(LatentDiffusion):
    """The networks of a diffusers ``StableDiffusionPipeline`` (Rombach et al. 2022).

    If the config of its tokenizer has a list ``words``, prompts may use these words only.
    """

    pipeline = "StableDiffusionPipeline"
    denoiser_part = "unet"
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": CLIPTokenizer}
    networks: ClassVar[Mapping[str, Any]] = {
        "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
    }
    #: The projections of every attention layer of a diffusers UNet, as is usual for large models; or the feed-forward
    #: and convolutional layers of all its blocks too.
    lora_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ATTENTION,
        "all": ATTENTION + _FEED_FORWARD + _CONVOLUTIONS,
    }
    lora_prefix = "unet."

    def _count_text_features(self) -> int:
        return self.text_encoder.config.hidden_size

    def _check_denoiser(self) -> None:
        if self.denoiser.config.time_cond_proj_dim is not None:
            raise ValueError(
                "its denoiser reads the guidance scale, as latent-consistency models do: their sampler does not take "
                "DDIM's Gaussian steps; use the model that it was distilled from"
            )
        super()._check_denoiser()

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self._tokenize(self.tokenizer, prompts)["input_ids"]
        return {"encoder_hidden_states": self.text_encoder.to(self.device)(tokens).last_hidden_state}

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: the mean over the tokens."""
        return conditioning["encoder_hidden_states"].mean(dim=1)

    def _denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(latents, timesteps, **conditioning).sample.float()

    def _further_parts(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
