"""Stable Diffusion 1.5, 2.1 and XL, small.

"stable-diffusion" is like version 1.5 and predicts the noise; "stable-diffusion-v" is the same but predicts the
velocity, like version 2.1; "stable-diffusion-xl" has two text encoders, and tokenizers that fill up short prompts with
different tokens. All draw 16 x 16 images from 4 x 8 x 8 latents.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dpok_gym.testing.parts import TEXT_WIDTH, TEXT_WIDTH_2, make_text_config, make_vae

#: The noise schedule of all Stable Diffusion models.
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def save(folder: Path, family: str, tokenizer: CLIPTokenizer) -> None:
    """Saves the pipeline; see :func:`dpok_gym.testing.save_tiny_pipeline`."""
    if family == "stable-diffusion-xl":
        torch.manual_seed(2)
        _make_xl(tokenizer).save_pretrained(folder)
        _add_to_scheduler_config(folder, set_alpha_to_one=False)
    else:
        prediction_type = "v_prediction" if family == "stable-diffusion-v" else "epsilon"
        _make_stable_diffusion(tokenizer, prediction_type).save_pretrained(folder)


def _make_stable_diffusion(tokenizer: CLIPTokenizer, prediction_type: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        text_encoder=CLIPTextModel(make_text_config(tokenizer)),
        unet=_make_unet(),
        vae=make_vae(),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            **_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _make_xl(tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    tokenizer_2 = copy.deepcopy(tokenizer)
    tokenizer_2.pad_token = "z"  # as in the real one: another than the first tokenizer's
    second = make_text_config(tokenizer, hidden_size=TEXT_WIDTH_2, projection_dim=TEXT_WIDTH_2)
    return StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(make_text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        unet=_make_unet(
            cross_attention_dim=TEXT_WIDTH + TEXT_WIDTH_2,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            # The pooled text, and six numbers for the size of the image.
            projection_class_embeddings_input_dim=TEXT_WIDTH_2 + 6 * 8,
        ),
        vae=make_vae(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _add_to_scheduler_config(folder: Path, **settings: Any) -> None:
    # XL's published config has an entry that its scheduler class does not know, and so would not save.
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _make_unet(**changes: Any) -> UNet2DConditionModel:
    tiny: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**(tiny | changes))
