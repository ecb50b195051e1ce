"""The architecture of a model: the configs of its networks, which say how large it is before any weight is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dpok_gym.models.pipelines import FAMILIES
from dpok_gym.models.registry import find_source, is_factory
from dpok_gym.models.stable_diffusion import StableDiffusion
from dpok_gym.models.stable_diffusion_xl import StableDiffusionXL
from dpok_gym.utils.reading import check_tensors, read_json

#: The parts of a pipeline that have weights.
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Architecture:
    """The configs of a model's networks.

    Attributes:
        pipeline: name of diffusers' pipeline.
        unet: config of the denoiser.
        vae: config of the autoencoder.
        text_encoder: config of the text encoder.
        text_encoder_2: config of the second text encoder; empty if there is none.
    """

    pipeline: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any]

    @classmethod
    def of_model(cls, model: StableDiffusion) -> Architecture:
        """Returns the architecture of a loaded model."""
        is_xl = isinstance(model, StableDiffusionXL)
        return cls(
            "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline",
            dict(model.denoiser.config),
            dict(model.vae.config),
            model.text_encoder.config.to_dict(),
            model.text_encoder_2.config.to_dict() if is_xl else {},  # type: ignore[attr-defined]
        )

    def make(self, dtype: torch.dtype, name: str = "a model without weights") -> StableDiffusion:
        """Returns the model without weights, on torch's device "meta": everything has a shape and no content.

        Args:
            dtype: of the weights.
            name: the model's name.
        """
        # Prompts cannot be read without a vocabulary, but the model asks for their length.
        tokenizer = SimpleNamespace(model_max_length=0)
        parts: dict[str, Any] = {"tokenizer": tokenizer, "scheduler_config": {}, "device": "meta"}
        with torch.device("meta"), _default_dtype(dtype):
            parts["unet"] = UNet2DConditionModel.from_config(dict(self.unet))
            parts["vae"] = AutoencoderKL.from_config(dict(self.vae))
            parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**self.text_encoder))
            if self.text_encoder_2:
                parts["tokenizer_2"] = tokenizer
                parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**self.text_encoder_2))
        return FAMILIES[self.pipeline](name, **parts)


_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_OPEN_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}

#: The published architectures, by the registered name of a model. What is not here has the defaults of diffusers.
PUBLISHED: dict[str, Architecture] = {
    "sd15": Architecture("StableDiffusionPipeline", {"sample_size": 64, "cross_attention_dim": 768}, _VAE, _CLIP_L, {}),
    "sd21": Architecture(
        "StableDiffusionPipeline",
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        _VAE | {"sample_size": 768},
        _OPEN_CLIP_H,
        {},
    ),
    "sdxl": Architecture(
        "StableDiffusionXLPipeline",
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        _VAE | {"sample_size": 1024, "force_upcast": True},
        _CLIP_L,
        _OPEN_CLIP_G,
    ),
}


def find_architecture(
    name_or_path: str, revision: str | None = None, config: str | None = None, **other: Any
) -> Architecture:
    """Finds the architecture of a model, without its weights and without the network.

    Args:
        name_or_path: a registered name, a diffusers folder, a single file, or a hub id whose configs are in the cache.
        revision: of a hub id.
        config: for a single file, a diffusers folder of the same architecture.
        other: further arguments of :func:`dpok_gym.models.load_model`, which do not matter.

    Raises:
        ValueError: if the architecture cannot be told; the message says how to get it.
    """
    source = find_source(name_or_path)
    if is_factory(source):
        raise ValueError(f"the model {name_or_path!r} is made by a function, whose networks are not known beforehand")
    path = Path(str(source)).expanduser()
    if path.is_file():
        return find_architecture(config) if config else _of_file(path)
    index = _config_file(str(source), "model_index.json", revision)
    if index is None:
        if name_or_path in PUBLISHED:
            return PUBLISHED[name_or_path]
        if str(source).startswith(("/", ".", "~")):
            raise ValueError(f"there is no model at {source}; check the path")
        raise ValueError(
            f"the files of the model {name_or_path!r} are not here, so its size is not known; to get its configs "
            f"alone (some KB): hf download {source} --include '*.json'"
        )
    pipeline = read_json(index).get("_class_name")
    if pipeline not in FAMILIES:
        raise ValueError(f"the model {name_or_path!r} is a {pipeline}, whose memory is not known")
    configs = {}
    for part in _PARTS:
        file = _config_file(str(source), f"{part}/config.json", revision)
        configs[part] = read_json(file) if file else {}
    missing = [part for part in _PARTS[: 4 if "XL" in pipeline else 3] if not configs[part]]
    if missing:
        raise ValueError(f"the model {name_or_path!r} has no {missing[0]}/config.json; get it again")
    return Architecture(pipeline, **configs)


def _config_file(source: str, name: str, revision: str | None) -> Path | None:
    """Returns the path of a file of a model, in its folder or in the cache of the hub; None if it is not there."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        cached = try_to_load_from_cache(source, name, revision=revision)
    except ValueError:  # no hub id
        return None
    return Path(cached) if isinstance(cached, (str, os.PathLike)) else None


def _of_file(path: Path) -> Architecture:
    """Returns the published architecture that a single-file checkpoint has, by the names of its tensors."""
    try:
        with safe_open(check_tensors(path), "pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"the architecture in {path} cannot be told: {error}") from error
    # The names that the authors of the three gave to the text encoders.
    for beginning, name in {"conditioner.embedders.1.": "sdxl", "cond_stage_model.model.": "sd21"}.items():
        if any(key.startswith(beginning) for key in keys):
            return PUBLISHED[name]
    if any(key.startswith("cond_stage_model.") for key in keys):
        return PUBLISHED["sd15"]
    raise ValueError(f"{path} holds no Stable Diffusion 1.x, 2.x or XL, so its size is not known")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
