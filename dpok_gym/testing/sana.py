"""Sana, small: a Gemma 2 with its tokenizer, a deep-compression autoencoder, and a transformer of two blocks.

"sana" draws 32 x 32 images from 4 x 8 x 8 latents; the pipeline draws multiples of 32 pixels only. Unlike the other
small models it reads 300 tokens, as the pipeline always does, and any character: those that its tokenizer does not know
are read byte by byte, as in Gemma.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import CLIPTokenizer, Gemma2Config, Gemma2Model, GemmaTokenizer

from dpok_gym.testing.parts import CHARACTERS, TEXT_WIDTH, WORDS


def save(folder: Path, family: str, tokenizer: CLIPTokenizer) -> None:
    """Saves the pipeline; see :func:`dpok_gym.testing.save_tiny_pipeline`. It has no CLIP tokenizer."""
    gemma_tokenizer = _make_tokenizer()
    transformer = SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
    )
    SanaPipeline(
        tokenizer=gemma_tokenizer,
        text_encoder=_make_text_encoder(gemma_tokenizer),
        vae=_make_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
    ).save_pretrained(folder)


def _make_tokenizer() -> GemmaTokenizer:
    """Returns a Gemma tokenizer of bytes, single characters and the words of :data:`WORDS`."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *CHARACTERS]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        start = "\u2581"  # it stands for the space before the word
        for letter in word:
            merges.append((start, letter))
            start += letter
            tokens.append(start)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def _make_text_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Gemma2Model(config)


def _make_vae() -> AutoencoderDC:
    both: dict[str, Any] = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8, 16),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), (5,)),
    }
    parts = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in both.items()}
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
        **parts,
    )
