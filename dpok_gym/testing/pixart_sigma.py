"""PixArt-Sigma, small: a T5 encoder, and a transformer of two blocks that also predicts a variance.

"pixart-sigma" draws 16 x 16 images from 4 x 8 x 8 latents. Unlike the other small models it reads 300 tokens, as the
pipeline always does.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import CLIPTokenizer

from dpok_gym.testing.parts import TEXT_WIDTH, make_t5_encoder, make_t5_tokenizer, make_vae


def save(folder: Path, family: str, tokenizer: CLIPTokenizer) -> None:
    """Saves the pipeline; see :func:`dpok_gym.testing.save_tiny_pipeline`. It has no CLIP tokenizer."""
    t5_tokenizer = make_t5_tokenizer(300)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
    )
    PixArtSigmaPipeline(
        tokenizer=t5_tokenizer,
        text_encoder=make_t5_encoder(t5_tokenizer),
        vae=make_vae(scaling_factor=0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(folder)
