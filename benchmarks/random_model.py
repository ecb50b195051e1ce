"""Published models at full size with random weights: speed and memory do not depend on the weights."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from diffusers import PNDMScheduler, SD3Transformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer

from dpok_gym.models.architecture import PUBLISHED, Architecture, default_dtype
from dpok_gym.shapes.pretrain import train_clip_tokenizer


def save_random_sd15(folder: Path) -> Path:
    """Writes the model in bfloat16 (2 GB), unless it is there; returns the folder.

    Its tokenizer reads lower-case letters, and a full stop.
    """
    if (folder / "model_index.json").exists():
        return folder
    tokenizer = _make_tokenizer()
    with default_dtype(torch.bfloat16), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _make_pipeline(tokenizer).save_pretrained(folder)
    return folder


def make_sd15_unet() -> UNet2DConditionModel:
    """Makes the denoiser of Stable Diffusion 1.5 with random weights."""
    network: UNet2DConditionModel = PUBLISHED["sd15"].make_network("unet")
    return network


def make_sd3_transformer() -> SD3Transformer2DModel:
    """Makes the denoiser of Stable Diffusion 3 medium with random weights."""
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )


def _make_tokenizer() -> CLIPTokenizer:
    # Each letter once as a whole word and once as the start of one.
    starts = [f"{letter}a" for letter in string.ascii_lowercase]
    return train_clip_tokenizer([*string.ascii_lowercase, *starts, "."], max_tokens=77)


def _make_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    published = PUBLISHED["sd15"]
    configs = {**published.configs, "text_encoder": {**published.configs["text_encoder"], **tokens}}
    architecture = Architecture(published.pipeline, configs)
    return StableDiffusionPipeline(
        **{part: architecture.make_network(part) for part in configs},
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
