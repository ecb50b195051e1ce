"""The parts that several small pipelines have: tokenizers, text encoders and an autoencoder."""

from __future__ import annotations

import string
from typing import Any

from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

#: Tokens that a tiny model reads, start and end included.
MAX_TOKENS = 40

#: Features of a token. A second text encoder has more, so that a mix-up of the two is an error.
TEXT_WIDTH, TEXT_WIDTH_2 = 32, 48

#: Words that are one token each; all others are read letter by letter.
WORDS = ("green", "rabbit", "dog", "moon")

CHARACTERS = (*string.ascii_lowercase, *string.digits, *".,!-")


def make_tokenizer() -> CLIPTokenizer:
    """Returns a CLIP tokenizer of single characters and the words of :data:`WORDS`."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{character}</w>" for character in CHARACTERS)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        # Letters are joined from left to right: m + o, mo + o, moo + n</w>.
        start, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for letter in rest:
            merges.append((start, letter))
            start += letter
            tokens.append(start)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def make_text_config(tokenizer: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    """Returns the config of a small CLIP text tower of two layers, with some changes."""
    tiny: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**(tiny | changes))


def make_t5_tokenizer(max_tokens: int = MAX_TOKENS) -> T5Tokenizer:
    """Returns a T5 tokenizer of the same characters and words."""
    # A piece and its log-probability. The mark stands for a space; a longer piece is likelier than its letters.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    pieces += [(character, -4.0) for character in CHARACTERS]
    pieces += [(f"\u2581{word}", -5.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_tokens)


def make_t5_encoder(tokenizer: T5Tokenizer, width: int = TEXT_WIDTH) -> T5EncoderModel:
    """Returns a small T5 encoder of two layers.

    Args:
        tokenizer: its vocabulary decides on the number of embeddings.
        width: features of a token.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def make_vae(**changes: Any) -> AutoencoderKL:
    """Returns a small autoencoder of 16 x 16 images and 4 x 8 x 8 latents, with some changes."""
    tiny: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**(tiny | changes))
