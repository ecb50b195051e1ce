"""Small models for tests: pipelines of random weights that are made in a second, without a download.

    from dpok_gym.models import load_model
    from dpok_gym.testing import save_tiny_pipeline

    def test_mine(tmp_path):
        model = load_model(save_tiny_pipeline(tmp_path / "model"), "cpu")

They have all parts of the published models, tokenizers included. So code that works with one of them works with the
real model too, only slower. Their images are noise.
"""

from __future__ import annotations

import copy
import json
import string
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dpok_gym.utils.validation import check_choice

TinyFamily = Literal["stable-diffusion", "stable-diffusion-v", "stable-diffusion-xl"]

#: Tokens that a tiny model reads, start and end included.
MAX_TOKENS = 40

#: Features of a token. XL's second text encoder has more, so that a mix-up of the two is an error.
TEXT_WIDTH, TEXT_WIDTH_2 = 32, 48

#: Words that are one token each; all others are read letter by letter.
WORDS = ("green", "rabbit", "dog", "moon")

#: The noise schedule of all Stable Diffusion models.
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def save_tiny_pipeline(
    folder: Path, family: TinyFamily = "stable-diffusion", tokenizer: CLIPTokenizer | None = None
) -> Path:
    """Saves a diffusers pipeline of random weights, the same ones each time.

    It draws 16 x 16 images from 4 x 8 x 8 latents. The networks have about a million parameters and the layers of the
    real ones: attention, cross-attention and convolutions. Their own tokenizers read lower-case letters, digits and a
    little punctuation, at most 40 tokens.

    Args:
        folder: where the pipeline is written; made if it is not there.
        family: "stable-diffusion" is like version 1.5 and predicts the noise; "stable-diffusion-v" is the same but
            predicts the velocity, like version 2.1; "stable-diffusion-xl" has two text encoders, and tokenizers that
            fill up short prompts with different tokens.
        tokenizer: another CLIP tokenizer, such as a published model's; None for the small one.

    Returns:
        The folder, for :func:`dpok_gym.models.load_model` or ``DiffusionPipeline.from_pretrained``.

    Raises:
        ValueError: if the family is unknown.
    """
    check_choice("family", family, "stable-diffusion", "stable-diffusion-v", "stable-diffusion-xl")
    tokenizer = _make_tokenizer() if tokenizer is None else tokenizer
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay the same
        if family == "stable-diffusion-xl":
            torch.manual_seed(2)
            _make_xl(tokenizer).save_pretrained(folder)
            _add_to_scheduler_config(Path(folder), set_alpha_to_one=False)
        else:
            torch.manual_seed(1)
            prediction_type = "v_prediction" if family == "stable-diffusion-v" else "epsilon"
            _make_stable_diffusion(tokenizer, prediction_type).save_pretrained(folder)
    return Path(folder)


def _make_stable_diffusion(tokenizer: CLIPTokenizer, prediction_type: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        text_encoder=CLIPTextModel(_make_text_config(tokenizer)),
        unet=_make_unet(),
        vae=_make_vae(),
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
    second = _make_text_config(tokenizer, hidden_size=TEXT_WIDTH_2, projection_dim=TEXT_WIDTH_2)
    return StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(_make_text_config(tokenizer)),
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
        vae=_make_vae(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _add_to_scheduler_config(folder: Path, **settings: Any) -> None:
    # XL's published config has an entry that its scheduler class does not know, and so would not save.
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _make_tokenizer() -> CLIPTokenizer:
    """Returns a CLIP tokenizer of single characters and the words of :data:`WORDS`."""
    characters = [*string.ascii_lowercase, *string.digits, *".,!-"]
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
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


def _make_text_config(tokenizer: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
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


def _make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
