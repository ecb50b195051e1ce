"""From a name, a folder, a file or a hub id to the networks of a text-to-image model."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from dpok_gym.completeness import describe_wrong_weights, has_vocabulary
from dpok_gym.models.stable_diffusion import StableDiffusion, StableDiffusionXL

#: What reads the parts of each of diffusers' pipelines, by its name: importing those takes time, and warns of image
#: processors that nobody needs.
FAMILIES: dict[str, type[StableDiffusion]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}

#: Parts of a pipeline that are not needed to draw: not loaded, and not downloaded.
_UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


def load_networks(
    name: str,
    source: str,
    device: str,
    dtype: torch.dtype,
    revision: str | None,
    variant: str | None,
    allow_pickle: bool,
    config: str | None,
) -> StableDiffusion:
    """Does what :func:`dpok_gym.models.load_model` says; ``source`` is what the name stands for."""
    path = Path(source).expanduser()
    if path.is_file():
        what, advice = f"the checkpoint {path}", "It must hold a whole model, in one file as its authors published it"
    else:
        path = _find_folder(name, source, revision, variant, allow_pickle)
        what = f"the model folder {path}"
        advice = (
            "It must be a whole diffusers pipeline (model_index.json, tokenizer, text_encoder, unet, vae, scheduler)"
        )
    disable_progress_bar()  # of transformers, for a file that loads in no time
    try:
        if path.is_file():
            family, parts = _parts_of_file(path, dtype, allow_pickle, config)
        else:
            family, parts = _parts_of_folder(path, dtype, variant, allow_pickle)
        return family(name, device=device, **parts)
    except Exception as error:
        raise ValueError(f"{what} cannot be loaded: {error}. {advice}; if a file is damaged, get it again") from error


def _parts_of_folder(
    folder: Path, dtype: torch.dtype, variant: str | None, allow_pickle: bool
) -> tuple[type[StableDiffusion], dict[str, Any]]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index["_class_name"] not in FAMILIES:
        raise ValueError(_unsupported(index["_class_name"]))
    family = FAMILIES[index["_class_name"]]
    weights: dict[str, Any] = {"variant": variant, "use_safetensors": None if allow_pickle else True}
    parts = {
        "tokenizer": _load_tokenizer(folder / "tokenizer"),
        "text_encoder": _load_text_encoder(CLIPTextModel, folder / "text_encoder", dtype=dtype, **weights),
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, **weights),
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, **weights),
        "scheduler_config": DDIMScheduler.load_config(folder, subfolder="scheduler"),
    }
    if family is StableDiffusionXL:
        second = folder / "text_encoder_2"
        parts["tokenizer_2"] = _load_tokenizer(folder / "tokenizer_2")
        parts["text_encoder_2"] = _load_text_encoder(CLIPTextModelWithProjection, second, dtype=dtype, **weights)
        parts["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    return family, parts


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if not has_vocabulary(tokenizer):
        raise ValueError(f"its {folder.name} has no vocabulary")
    return tokenizer


def _load_text_encoder(network_class: Any, folder: Path, **kwargs: Any) -> Any:
    text_encoder, info = network_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    if wrong := describe_wrong_weights(info):
        raise ValueError(f"its {folder.name} {wrong}")
    return text_encoder


def _parts_of_file(
    path: Path, dtype: torch.dtype, allow_pickle: bool, config: str | None
) -> tuple[type[StableDiffusion], dict[str, Any]]:
    """The parts of a single-file checkpoint, in the layout of the models' authors."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    elif allow_pickle:
        keys = list(torch.load(path, map_location="meta", weights_only=True).get("state_dict", {}))
    else:
        raise pickle.UnpicklingError(
            "it is no .safetensors file, and a pickle may run code of its author's; get the .safetensors of the same "
            "model, or pass allow_pickle=True (in an environment, model_kwargs={'allow_pickle': True}) if you trust it"
        )
    is_xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    if not is_xl and not any(key.startswith("cond_stage_model.") for key in keys):
        raise ValueError("it holds no Stable Diffusion 1.x, 2.x or XL with its text encoders")
    kind = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    try:
        pipeline = getattr(diffusers, kind).from_single_file(str(path), torch_dtype=dtype, config=config, **_UNUSED)
    except OSError as error:
        raise OSError(
            f"{error} (a single file does not tell its architecture: pass the diffusers folder of a model of the same "
            "build as config=, in an environment model_kwargs={'config': folder}, where the hub cannot be reached)"
        ) from error
    parts = {key: part for key, part in pipeline.components.items() if key not in _UNUSED}
    parts["scheduler_config"] = parts.pop("scheduler").config
    if is_xl:
        parts["force_zeros_for_empty_prompt"] = pipeline.config.force_zeros_for_empty_prompt
    return FAMILIES[kind], parts


def _unsupported(pipeline: str) -> str:
    reason = ""
    if pipeline.startswith("LatentConsistency"):
        reason = ": the sampler of latent-consistency models does not take DDIM's Gaussian steps"
    elif pipeline.startswith(("StableDiffusion3", "Flux")):
        reason = ": flow-matching transformers are not supported"
    return f"it is a {pipeline}, and only {' and '.join(FAMILIES)} are supported{reason}"


def _find_folder(name: str, source: str, revision: str | None, variant: str | None, allow_pickle: bool) -> Path:
    """The local folder of a pipeline, from the hub or its cache if need be."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json")
        return folder
    wanted: Mapping[str, Any] = {
        "revision": revision,
        "variant": variant,
        "use_safetensors": None if allow_pickle else True,
    }
    try:
        index = Path(hf_hub_download(source, "model_index.json", revision=revision))
        pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        if pipeline in FAMILIES:
            return Path(DiffusionPipeline.download(source, **wanted, **_UNUSED))
    except Exception as error:
        version = f" at the revision {revision!r}" if revision else ""
        reason = " ".join(str(error).split())
        pickles = not allow_pickle and "safetensors" in str(error)
        trust = "if it has pickles only and you trust them, pass allow_pickle=True; " if pickles else ""
        raise FileNotFoundError(
            f"the model {name!r} is neither a local folder or file, nor in the Hugging Face cache, nor could it be "
            f"downloaded as {source!r}{version} ({type(error).__name__}: {reason}). Ways out: {trust}pass "
            f"model='/path/to/a/diffusers/folder'; run `hf download {source}` where there is a network and set HF_HOME "
            "to that cache; or use the embedded model, model='shapes', which needs no download"
        ) from error
    raise ValueError(f"the model {source!r} cannot be loaded: {_unsupported(pipeline)}")
