"""Stable Diffusion 3 and 3.5, and every model of the same architecture.

Letters used for sizes: B images, N prompts, L tokens of a prompt, F features, C x h x w a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from dpok_gym.models.base import Conditioning
from dpok_gym.models.latent_diffusion import JOINT_ATTENTION, LatentDiffusion
from dpok_gym.models.repeated_token import give_processor

_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

#: Tokens of a prompt that T5 reads, as in the pipeline.
T5_TOKENS = 256


class StableDiffusion3(LatentDiffusion):
    """The networks of a diffusers ``StableDiffusion3Pipeline`` (Esser et al. 2024).

    Its denoiser reads two CLIP text encoders and T5. T5 has 4.7 billion parameters, and may be left out. Zeros stand
    for its tokens then; only one of them is kept, and attention counts it as often.

    A prompt may have as many tokens as T5 reads, 256. The CLIP text encoders leave out its end after 77 tokens, as in
    the pipeline. Without T5, a prompt must fit into these 77 tokens.
    """

    pipeline = "StableDiffusion3Pipeline"
    tokenizers: ClassVar[Mapping[str, Any]] = {
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": T5TokenizerFast,
    }
    networks: ClassVar[Mapping[str, Any]] = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
    }
    optional: ClassVar[frozenset[str]] = frozenset({"tokenizer_3", "text_encoder_3"})
    flow_matching = True
    #: The projections of every attention layer, of the image and of the text; or the feed-forward layers too.
    lora_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": JOINT_ATTENTION,
        "all": JOINT_ATTENTION + _FEED_FORWARD,
    }
    lora_prefix = "transformer."
    text_encoder_2: Any
    text_encoder_3: Any
    tokenizer_2: Any
    tokenizer_3: Any

    @property
    def max_side(self) -> int:
        """See the base class: the denoiser has as many positions."""
        return min(super().max_side, self.size_factor * self.denoiser.config.pos_embed_max_size)

    def _set_latent_size(self, height: int, width: int) -> None:
        super()._set_latent_size(height, width)
        self.sequence_length = height * width // self.denoiser.config.patch_size**2

    def _count_text_features(self) -> int:
        return self.text_encoder.config.projection_dim + self.text_encoder_2.config.projection_dim

    def _readers(self) -> Mapping[str, int]:
        return super()._readers() if self.text_encoder_3 is None else {"tokenizer_3": T5_TOKENS}

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        length = self.tokenizer.model_max_length
        read = []
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            tokens = self._tokenize(tokenizer, prompts, length)["input_ids"]
            read.append(encoder.to(self.device)(tokens, output_hidden_states=True))
        hidden = torch.cat([each.hidden_states[-2] for each in read], dim=-1)
        width = self.denoiser.config.joint_attention_dim
        if self.text_encoder_3 is None:
            hidden_3 = hidden.new_zeros(len(prompts), 1, width)  # this row counts as often as T5 has tokens
        else:
            tokens = self._tokenize(self.tokenizer_3, prompts, T5_TOKENS)["input_ids"]
            hidden_3 = self.text_encoder_3.to(self.device)(tokens).last_hidden_state
        return {
            "encoder_hidden_states": torch.cat([F.pad(hidden, (0, width - hidden.shape[-1])), hidden_3], dim=1),
            "pooled_projections": torch.cat([each.text_embeds for each in read], dim=-1),
        }

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: the pooled embeddings of the CLIP text encoders."""
        return conditioning["pooled_projections"]

    def _denoise(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden, pooled = (conditioning[name] for name in ("encoder_hidden_states", "pooled_projections"))
        attention_kwargs = None
        if self.text_encoder_3 is None:
            # Asked each time, because a trained copy of the denoiser may have diffusers' own attention again.
            if give_processor(denoiser):
                attention_kwargs = {"num_repeats": T5_TOKENS}
            else:
                hidden = torch.cat([hidden[:, :-1], hidden[:, -1:].expand(-1, T5_TOKENS, -1)], dim=1)
        output = denoiser(latents, hidden, pooled, timesteps, joint_attention_kwargs=attention_kwargs)
        return output.sample.float()  # type: ignore[no-any-return]
