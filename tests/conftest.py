"""What several test modules share: small models of random weights, seeds, and the list of warnings that may be."""

import copy
import json
import re
import string
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import dpok_gym.models

MAX_TOKENS, TEXT_WIDTH = 40, 32
WIDER = 48  # of the second text encoder, by which the two are told apart

#: What Gymnasium's checker says of an observed latent, which is a sample of a Gaussian.
GYMNASIUM_ADVICE = (
    "A Box observation space minimum value is -infinity",
    "A Box observation space maximum value is infinity",
)
#: What Stable-Baselines3's checker says: every array of three axes is a picture to it, and actions lie in [-1, 1].
SB3_ADVICE = (
    "It seems that your observation latent is an image but its `dtype` is",
    "It seems that your observation space latent is an image but the upper and lower bounds",
    "The minimal resolution for an image is 36x36",
    "We recommend you to use a symmetric and normalized Box action space",
)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (it is the generator that libraries use)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The networks are so small that more threads wait for each other.
    torch.set_num_threads(1)


@pytest.fixture
def fresh_models() -> Callable[[], None]:
    """Models that no other test has: agents leave their LoRA in the network. Called, it makes them fresh again."""

    def forget() -> None:
        dpok_gym.models._load.cache_clear()
        dpok_gym.models._load_networks.cache_clear()

    forget()
    return forget


@contextmanager
def _only(*allowed: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in allowed:
            warnings.filterwarnings("ignore", message=f".*{re.escape(text)}")  # Gymnasium puts a colour code before it
        yield


@pytest.fixture
def only_warnings() -> Callable[..., AbstractContextManager[None]]:
    """``with only_warnings(text, ...)``: a warning that does not begin with one of the texts is an error."""
    return _only


def _make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of lower-case letters and a few whole words; it reads anything."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>", show_progress=False
    )
    letters = string.ascii_lowercase
    words = [*letters, ".", *(letter + "z" for letter in letters), "green", "rabbit", "dog", "moon"]
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def _text_config(tokenizer: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    tiny: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**(tiny | changes))


def _unet(**changes: Any) -> UNet2DConditionModel:
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


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


#: The noise schedule of all Stable Diffusion models.
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _save_tiny_pipeline(folder: Path, prediction_type: str) -> Path:
    torch.manual_seed(1)
    tokenizer = _make_tokenizer()
    pipeline = StableDiffusionPipeline(
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        unet=_unet(),
        vae=_vae(),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            **_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of random weights with 4x8x8 latents and 16x16 pictures, made like version 1.5."""
    return _save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "epsilon", "epsilon")


@pytest.fixture(scope="session")
def tiny_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, predicting the velocity."""
    return _save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "velocity", "v_prediction")


@pytest.fixture(scope="session")
def tiny_xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL of random weights with 4x8x8 latents and 16x16 pictures."""
    torch.manual_seed(2)
    tokenizer = _make_tokenizer()
    tokenizer_2 = copy.deepcopy(tokenizer)  # made anew, it would number its tokens differently
    tokenizer_2.pad_token = "z"  # as in the real one: another than the first tokenizer's
    pipeline = StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, hidden_size=WIDER, projection_dim=WIDER)),
        unet=_unet(
            cross_attention_dim=TEXT_WIDTH + WIDER,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDER + 6 * 8,
        ),
        vae=_vae(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("tiny") / "xl"
    pipeline.save_pretrained(folder)
    # The published config says so too, though the class does not know it.
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"set_alpha_to_one": False}))
    return folder
