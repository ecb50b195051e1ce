"""PixArt-Sigma, and every model of the same architecture.

Letters used for sizes: B images, N prompts, L tokens of a prompt, F features, C x h x w a latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from dpok_gym.models.base import Conditioning
from dpok_gym.models.latent_diffusion import ATTENTION, LatentDiffusion
from dpok_gym.models.stable_diffusion_xl import without_overflow
from dpok_gym.models.token_counts import count_tokens

#: Tokens of a prompt that the pipelines of PixArt-Sigma and of Sana read, the special ones included.
MAX_TOKENS = 300


class PixArtSigma(LatentDiffusion):
    """The networks of a diffusers ``PixArtSigmaPipeline`` (Chen et al. 2024).

    Its denoiser predicts the noise, and a variance that no step needs here. It reads T5's tokens, and a mask that says
    which of them are text. Prompts are read in lower case, as the pipeline does where beautifulsoup4 is not installed;
    where that and ftfy are, ``pipe(prompt)`` also removes web addresses and some marks.
    """

    pipeline = "PixArtSigmaPipeline"
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": T5Tokenizer}
    networks: ClassVar[Mapping[str, Any]] = {
        "text_encoder": T5EncoderModel,
        "transformer": PixArtTransformer2DModel,
        "vae": AutoencoderKL,
    }
    flow_matching = False
    lora_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ATTENTION,
        "all": (*ATTENTION, "ff.net.0.proj", "ff.net.2"),
    }
    lora_prefix = "transformer."
    #: Any size, and the prompts as they are.
    pipeline_options: ClassVar[Mapping[str, Any]] = {"use_resolution_binning": False, "clean_caption": False}

    def _count_text_features(self) -> int:
        return self.text_encoder.config.hidden_size

    def _prepare_vae(self, vae: Any) -> Any:
        return without_overflow(vae)  # it is that of Stable Diffusion XL

    def _readers(self) -> Mapping[str, int]:
        return {"tokenizer": MAX_TOKENS}

    def _count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> Iterator[int]:
        return count_tokens(tokenizer, read_as(prompts))

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        return self._encode_tokens(**self._tokenize(self.tokenizer, read_as(prompts), MAX_TOKENS))

    def _encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Conditioning:
        """Returns what the denoiser is told about tokens, each argument (N, L) int64."""
        hidden = self.text_encoder.to(self.device)(input_ids, attention_mask=attention_mask).last_hidden_state
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": attention_mask}

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: the mean over the tokens of the text."""
        mask = conditioning["encoder_attention_mask"].unsqueeze(-1)
        return (conditioning["encoder_hidden_states"] * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def _denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # Alpha was told the image's size here, Sigma is not.
        added = {"resolution": None, "aspect_ratio": None}
        output = denoiser(
            latents,
            conditioning["encoder_hidden_states"].to(latents.dtype),
            timesteps,
            added_cond_kwargs=added,
            encoder_attention_mask=conditioning["encoder_attention_mask"],
        ).sample
        return output[:, : latents.shape[1]].float()  # the others are the learned variance


def read_as(prompts: Sequence[str]) -> list[str]:
    """Returns prompts as the pipelines of PixArt-Sigma and of Sana read them."""
    return [prompt.lower().strip() for prompt in prompts]
