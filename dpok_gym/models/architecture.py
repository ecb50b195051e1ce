"""The architecture of a model: the configs of its networks, which say how large it is before any weight is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn

from dpok_gym.models.latent_diffusion import LatentDiffusion
from dpok_gym.models.pipelines import FAMILIES, find_family, find_left_out
from dpok_gym.models.registry import find_source, is_factory
from dpok_gym.models.scheduler_configs import with_density
from dpok_gym.utils.reading import check_tensors, read_json

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """The configs of a model's networks.

    Attributes:
        pipeline: name of diffusers' pipeline.
        configs: the config of each network by the pipeline's name of it, such as "transformer"; those that are left
            out are missing.
        settings: further arguments of the pipeline; those that are missing have the family's defaults.
        scheduler: the config of the scheduler; None for one of the family's kind.
    """

    pipeline: str
    configs: Mapping[str, Config]
    settings: Config = field(default_factory=dict)
    scheduler: Config | None = None

    @classmethod
    def of_model(cls, model: LatentDiffusion) -> Architecture:
        """Returns the architecture of a loaded model."""
        networks = {part: getattr(model, part) for part in model.text_encoders}
        networks |= {model.denoiser_part: model.denoiser, "vae": model.vae}
        configs = {part: _config_of(network) for part, network in networks.items() if network is not None}
        return cls(model.pipeline, configs)

    @property
    def family(self) -> type[LatentDiffusion]:
        """The family of models."""
        return find_family(self.pipeline)

    def make_network(self, part: str) -> Any:
        """Makes one of the networks with random weights, on the device and in the precision that torch makes them in.

        Args:
            part: the pipeline's name of it.
        """
        network_class, config = self.family.networks[part], dict(self.configs[part])
        if issubclass(network_class, ModelMixin):
            return network_class.from_config(config)
        # In some of transformers' networks a part would have the precision that the config names.
        config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
        return network_class(network_class.config_class.from_dict(config))

    def make(self, dtype: torch.dtype, name: str = "a model without weights") -> LatentDiffusion:
        """Returns the model without weights, on torch's device "meta": everything has a shape and no content.

        Args:
            dtype: of the weights.
            name: the model's name.
        """
        family = self.family
        parts: dict[str, Any] = {}
        with torch.device("meta"), default_dtype(dtype):
            for part in self.configs:
                # Some tables of positions are made in float32. The classes' own to() warns of what is loaded later.
                parts[part] = nn.Module.to(self.make_network(part), dtype)
        for part in family.tokenizers:
            if part.replace("tokenizer", "text_encoder") in parts:
                parts[part] = NoTokenizer()
        scheduler = self.scheduler
        if scheduler is None:
            scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"} if family.flow_matching else {}
        return family(name, parts | dict(self.settings), scheduler, "meta")


class NoTokenizer:
    """Stands for the tokenizer of a model without weights: every prompt is as long as the longest."""

    model_max_length = 10**30
    init_kwargs: Mapping[str, Any] = {}

    def __call__(self, texts: str | Sequence[str], max_length: int | None = None, **other: Any) -> dict[str, list[Any]]:
        """Returns token ids and attention masks; those of a single text have its usual length, four letters a token."""
        if isinstance(texts, str):
            return {"input_ids": [0] * (len(texts) // 4)}
        length = self.model_max_length if max_length is None else max_length
        return {"input_ids": [[0] * length for _ in texts], "attention_mask": [[1] * length for _ in texts]}

    def apply_chat_template(self, chats: Sequence[Any], **other: Any) -> list[str]:
        """Returns the texts of chats."""
        return [""] * len(chats)


def _config_of(network: nn.Module) -> Config:
    """Returns the config of a network of diffusers or of transformers."""
    config: Any = network.config
    return dict(config) if isinstance(network, ModelMixin) else config.to_dict()


_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_VAE_XL = _VAE | {"sample_size": 1024, "force_upcast": True}
_VAE_16 = _VAE | {"latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_OPEN_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_GEMMA_2_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
_DC_AE_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3

#: The published architectures, by the registered name of a model. What is not here has the defaults of diffusers.
PUBLISHED: dict[str, Architecture] = {
    "sd15": Architecture(
        "StableDiffusionPipeline",
        {"unet": {"sample_size": 64, "cross_attention_dim": 768}, "vae": _VAE, "text_encoder": _CLIP_L},
    ),
    "sd21": Architecture(
        "StableDiffusionPipeline",
        {
            "unet": {
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
            },
            "vae": _VAE | {"sample_size": 768},
            "text_encoder": _OPEN_CLIP_H,
        },
    ),
    "sdxl": Architecture(
        "StableDiffusionXLPipeline",
        {
            "unet": {
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
            "vae": _VAE_XL,
            "text_encoder": _CLIP_L,
            "text_encoder_2": _OPEN_CLIP_G,
        },
    ),
    "sd35": Architecture(
        "StableDiffusion3Pipeline",
        {
            "transformer": {
                "sample_size": 128,
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 384,
                "dual_attention_layers": list(range(13)),
                "qk_norm": "rms_norm",
            },
            "vae": _VAE_16,
            "text_encoder": _CLIP_L | {"projection_dim": 768},
            "text_encoder_2": _OPEN_CLIP_G,
            "text_encoder_3": _T5_XXL,
        },
    ),
    "flux": Architecture(
        "FluxPipeline",
        {
            "transformer": {"guidance_embeds": True},
            "vae": _VAE_16,
            "text_encoder": _CLIP_L,
            "text_encoder_2": _T5_XXL,
        },
    ),
    "pixart": Architecture(
        "PixArtSigmaPipeline",
        {
            "transformer": {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
            "vae": _VAE_XL,
            "text_encoder": _T5_XXL,
        },
    ),
    "sana": Architecture(
        "SanaPipeline",
        {
            "transformer": {},
            "vae": {
                "encoder_block_types": _DC_AE_BLOCKS,
                "decoder_block_types": _DC_AE_BLOCKS,
                "downsample_block_type": "conv",
                "upsample_block_type": "interpolate",
            },
            "text_encoder": _GEMMA_2_2B,
        },
    ),
}


def find_architecture(
    name_or_path: str,
    revision: str | None = None,
    config: str | None = None,
    without_t5: bool = False,
    **other: Any,
) -> Architecture:
    """Finds the architecture of a model, without its weights and without the network.

    Args:
        name_or_path: a registered name, a diffusers folder, a single file, or a hub id whose configs are in the cache.
        revision: of a hub id.
        config: for a single file, a diffusers folder of the same architecture.
        without_t5: whether to leave out the parts that a family can do without.
        other: further arguments of :func:`dpok_gym.models.load_model`, which do not matter.

    Raises:
        ValueError: if the architecture cannot be told; the message says how to get it.
    """
    found = _find_architecture(name_or_path, revision, config)
    if left_out := find_left_out(found.family, without_t5):
        found = replace(found, configs={part: own for part, own in found.configs.items() if part not in left_out})
    return found


def _find_architecture(name_or_path: str, revision: str | None = None, config: str | None = None) -> Architecture:
    source = find_source(name_or_path)
    if is_factory(source):
        raise ValueError(f"the model {name_or_path!r} is made by a function, whose networks are not known beforehand")
    path = Path(str(source)).expanduser()
    if path.is_file():
        return _find_architecture(config) if config else _of_file(path)
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
    entries = read_json(index)
    pipeline = entries.get("_class_name")
    if pipeline not in FAMILIES:
        raise ValueError(f"the model {name_or_path!r} is a {pipeline}, whose memory is not known")
    family, configs = find_family(pipeline), {}
    for part in family.networks:
        # In the index a part that was left out is [null, null]: its library and its class.
        if part in family.optional and not any(entries.get(part) or ()):
            continue
        file = _config_file(str(source), f"{part}/config.json", revision)
        if file is None:
            raise ValueError(f"the model {name_or_path!r} has no {part}/config.json; get it again")
        configs[part] = read_json(file)
    settings = {name: entries[name] for name in family.settings if name in entries}
    file = _config_file(str(source), "scheduler/scheduler_config.json", revision)
    # Already as it is used, so that nobody is told again of what is changed in it.
    scheduler = None if file is None else with_density(read_json(file))
    return Architecture(pipeline, configs, settings, scheduler)


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
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within its ``with`` block, torch makes floating-point tensors in another precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
