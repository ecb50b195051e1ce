"""Stable Diffusion 3 and 3.5, small.

"stable-diffusion-3" is like version 3.5 medium: it normalises queries and keys, and one of its layers has a second
attention. "stable-diffusion-3-no-t5" is like version 3 medium without its largest text encoder. Both draw 16 x 16
images from 4 x 8 x 8 latents, and at most 64 x 64 images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dpok_gym.testing.parts import (
    TEXT_WIDTH,
    TEXT_WIDTH_2,
    make_t5_encoder,
    make_t5_tokenizer,
    make_text_config,
    make_vae,
)

#: Features of a token of T5: more than those of both CLIP text encoders, which are filled up with zeros.
_T5_WIDTH = TEXT_WIDTH + TEXT_WIDTH_2 + 16


def save(folder: Path, family: str, tokenizer: CLIPTokenizer) -> None:
    """Saves the pipeline; see :func:`dpok_gym.testing.save_tiny_pipeline`."""
    has_t5 = family == "stable-diffusion-3"
    settings: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if has_t5 else {}
    tokenizer_3 = make_t5_tokenizer() if has_t5 else None
    encoders = []
    for width in (TEXT_WIDTH, TEXT_WIDTH_2):
        config = make_text_config(tokenizer, hidden_size=width, projection_dim=width)
        encoders.append(CLIPTextModelWithProjection(config))
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=_T5_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=TEXT_WIDTH + TEXT_WIDTH_2,
            pos_embed_max_size=16,
            **settings,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=make_t5_encoder(tokenizer_3, _T5_WIDTH) if tokenizer_3 else None,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)
