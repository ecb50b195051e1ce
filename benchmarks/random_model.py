"""Published models at full size with random weights: speed and memory do not depend on the weights."""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTokenizer

from dpok_gym.models.architecture import PUBLISHED, default_dtype
from dpok_gym.models.latent_diffusion import LatentDiffusion
from dpok_gym.shapes.pretrain import train_clip_tokenizer
from dpok_gym.utils.device import find_device


def save_random(name: str, folder: Path) -> Path:
    """Writes a published model with random weights in bfloat16, unless it is there; returns the folder.

    Its tokenizers read lower-case letters, and a full stop. A GPU draws other weights than a processor, which changes
    neither speed nor memory.

    Args:
        name: "sd15" (2 GB) or "sdxl" (7 GB).
        folder: for the model.
    """
    if (folder / "model_index.json").exists():
        return folder
    device = find_device("auto")  # a GPU draws the weights of XL in seconds, a processor in minutes
    with device, default_dtype(torch.bfloat16), torch.random.fork_rng():
        torch.manual_seed(0)
        _make_model(name, device).to_pipeline().save_pretrained(folder)
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


def _make_model(name: str, device: torch.device) -> LatentDiffusion:
    published, tokenizer = PUBLISHED[name], _make_tokenizer()
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    encoders = {part: {**config, **tokens} for part, config in published.configs.items() if "text_encoder" in part}
    architecture = replace(published, configs={**published.configs, **encoders})
    parts = {part: architecture.make_network(part) for part in architecture.configs}
    parts |= dict.fromkeys(published.family.tokenizers, tokenizer)
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return published.family(name, parts, scheduler, str(device))
