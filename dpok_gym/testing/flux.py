"""FLUX.1, small.

"flux-dev" reads the guidance scale, and shifts the noise levels by the image's size; "flux-schnell" does neither. Both
draw 256 x 256 images from 4 x 128 x 128 latents by default, in patches of 4 pixels: tests are faster with a smaller
``image_size``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from dpok_gym.testing.parts import (
    TEXT_WIDTH,
    TEXT_WIDTH_2,
    make_t5_encoder,
    make_t5_tokenizer,
    make_text_config,
    make_vae,
)

#: The scheduler of each, as published.
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "flux-dev": {"shift": 3.0, "use_dynamic_shifting": True},
    "flux-schnell": {"shift": 1.0},
}


def save(folder: Path, family: str, tokenizer: CLIPTokenizer) -> None:
    """Saves the pipeline; see :func:`dpok_gym.testing.save_tiny_pipeline`."""
    tokenizer_2 = make_t5_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**_SCHEDULERS[family]),
        vae=make_vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(make_text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=make_t5_encoder(tokenizer_2, TEXT_WIDTH_2),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=16,  # a patch of 2 x 2 latent pixels of 4 channels
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH_2,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=family == "flux-dev",
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipeline.save_pretrained(folder)
