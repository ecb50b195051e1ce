"""From a folder, a file, a hub id or a live diffusers pipeline to the networks of a text-to-image model."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from dpok_gym.models.base import LIVE_PIPELINE
from dpok_gym.models.registry import list_local_models, list_models
from dpok_gym.models.stable_diffusion import StableDiffusion
from dpok_gym.models.stable_diffusion_xl import StableDiffusionXL
from dpok_gym.utils.hub import NO_CODE, describe_wrong_weights, has_vocabulary
from dpok_gym.utils.reading import check_model_folder, check_tensors, check_torch_file, read_json
from dpok_gym.utils.sharding import shard
from dpok_gym.utils.validation import check_integer

#: The family of each of diffusers' pipelines, by the pipeline's name: importing those classes takes time, and warns of
#: image processors that are not used here.
FAMILIES: dict[str, type[StableDiffusion]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}

#: Parts of a pipeline that are not needed to draw: not loaded, and not downloaded.
_UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


def model_from_source(
    name: str,
    source: str,
    device: str,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    config: str | None = None,
    spread: bool = False,
) -> StableDiffusion:
    """Loads the networks of a model; see :func:`dpok_gym.models.load_model`.

    Args:
        name: the model's name.
        source: the folder, file or hub id that the name stands for.
        device: where the networks are put.
        dtype: of the networks' weights.
        revision: branch, tag or commit of a hub id.
        variant: of the weight files.
        allow_pickle: whether weights that are no safetensors may be read.
        config: for a single file, a diffusers folder or hub id of the same architecture.
        spread: whether to spread the denoiser over the ranks.

    Raises:
        ValueError: if files are damaged, or the family of the model is not supported.
        FileNotFoundError: if the model is found nowhere; the message lists the ways to get it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        what, advice = f"the checkpoint {path}", "It must hold a whole model, in one file as its authors published it"
    else:
        path = _find_folder(name, source, revision, variant, allow_pickle)
        what = f"the model folder {path}"
        advice = (
            "It must be a whole diffusers pipeline (model_index.json, tokenizer, text_encoder, unet, vae, scheduler)"
        )
    disable_progress_bar()  # transformers shows one even for a file that loads in milliseconds
    try:
        if path.is_file():
            family, parts = _parts_of_file(path, dtype, allow_pickle, config)
        else:
            family, parts = _parts_of_folder(path, dtype, variant, allow_pickle)
        if spread:  # before it is on the device, which could not hold it
            parts["unet"] = shard(parts["unet"], device)
        return family(name, device=device, **parts)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be loaded: {reason}. {advice}; if a file is damaged, get it again") from error


def model_from_pipeline(pipe: DiffusionPipeline) -> StableDiffusion:
    """Makes a model of a live pipeline; see :meth:`dpok_gym.models.TextToImageModel.from_pipeline`.

    Raises:
        ValueError: if pipelines of this class are not supported, or one of its parts cannot be used as it is.
    """
    family = _family_of(pipe)
    if family is None:
        raise ValueError(f"the pipeline cannot be used: {_describe_unsupported(type(pipe).__name__)}")
    for part, module in pipe.components.items():
        if part not in _UNUSED:
            _check_part(part, module)
    name = os.fspath(pipe.name_or_path or LIVE_PIPELINE)
    model = family(name, device=pipe.unet.device, **_parts_of_pipeline(pipe, family))
    if model.dtype != torch.float32:
        model.options = {"dtype": str(model.dtype).removeprefix("torch.")}
    return model


def _family_of(pipe: DiffusionPipeline) -> type[StableDiffusion] | None:
    # Through the base classes, so that a user's own subclass of a pipeline is known too.
    for pipeline_class in type(pipe).__mro__:
        if pipeline_class.__name__ in FAMILIES:
            return FAMILIES[pipeline_class.__name__]
    return None


def _check_part(part: str, module: Any) -> None:
    """Checks that a live pipeline's part is there, on its device, and without a LoRA."""
    if module is None:
        raise ValueError(f"the pipeline has no {part}; load a whole pipeline with from_pretrained()")
    if not isinstance(module, nn.Module):
        return
    if hasattr(module, "_hf_hook"):
        raise ValueError(
            f"the pipeline moves its {part} between devices (enable_model_cpu_offload or a device_map): make it "
            "without, with pipe.to(device)"
        )
    for layer in module.modules():
        # The LoRAs of this package are off here. One of the user's that is on would be off whenever ours is on.
        if isinstance(layer, BaseTunerLayer) and layer.active_adapters and not layer.disable_adapters:
            raise ValueError(
                f"a LoRA is active in the pipeline's {part}: call pipe.fuse_lora() and then "
                "pipe.unload_lora_weights(), which makes it part of the weights"
            )


def _parts_of_pipeline(pipe: Any, family: type[StableDiffusion]) -> dict[str, Any]:
    """Returns the arguments of a family's class."""
    names = ["tokenizer", "text_encoder", "unet", "vae"]
    if family is StableDiffusionXL:
        names += ["tokenizer_2", "text_encoder_2"]
    parts: dict[str, Any] = {name: getattr(pipe, name) for name in names}
    # A scheduler's own config may lack its class, which tells what kind of diffusion it is.
    parts["scheduler_config"] = dict(pipe.scheduler.config) | {"_class_name": type(pipe.scheduler).__name__}
    if family is StableDiffusionXL:
        parts["force_zeros_for_empty_prompt"] = pipe.config.force_zeros_for_empty_prompt
    return parts


def _parts_of_folder(
    folder: Path, dtype: torch.dtype, variant: str | None, allow_pickle: bool
) -> tuple[type[StableDiffusion], dict[str, Any]]:
    check_model_folder(folder)
    index, kind = _read_index(folder / "model_index.json")
    if kind not in FAMILIES:
        raise ValueError(_describe_unsupported(kind))
    family = FAMILIES[kind]
    weights: dict[str, Any] = {"variant": variant, "use_safetensors": _use_safetensors(allow_pickle)}
    of_diffusers = {"torch_dtype": dtype, **weights}
    load: dict[str, Callable[[Path], Any]] = {
        "tokenizer": _load_tokenizer,
        "text_encoder": partial(_load_text_encoder, CLIPTextModel, dtype=dtype, **weights),
        "unet": partial(UNet2DConditionModel.from_pretrained, **of_diffusers),
        "vae": partial(AutoencoderKL.from_pretrained, **of_diffusers),
        "scheduler": _load_scheduler_config,
    }
    if family is StableDiffusionXL:
        load["tokenizer_2"] = _load_tokenizer
        load["text_encoder_2"] = partial(_load_text_encoder, CLIPTextModelWithProjection, dtype=dtype, **weights)
    parts = {}
    for name, function in load.items():
        try:
            parts[name] = function(folder / name)
        except (ValueError, OSError) as error:
            raise ValueError(f"its {name}: {error}") from error
        except Exception as error:  # the libraries raise many kinds for damaged files
            raise ValueError(f"its {name} cannot be read ({type(error).__name__}: {error})") from error
    parts["scheduler_config"] = parts.pop("scheduler")
    if family is StableDiffusionXL:
        parts["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    return family, parts


def _read_index(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the content of a model_index.json, and the name of its pipeline."""
    index = read_json(path)
    # A pipeline of somebody's own is a list: its module, which lies in the folder, and its class.
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{path} names no pipeline of diffusers; code of a model's folder is never run")
    return index, index["_class_name"]


def _use_safetensors(allow_pickle: bool) -> bool | None:
    """Returns the argument of that name in diffusers: None is "if there are any"."""
    return None if allow_pickle else True


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if not has_vocabulary(tokenizer):
        raise ValueError("it has no vocabulary (vocab.json and merges.txt, or tokenizer.json)")
    # Without tokenizer_config.json, transformers takes a length without end, and prompts would never be too long.
    check_integer("its model_max_length in tokenizer_config.json", tokenizer.model_max_length, maximum=10**6)
    return tokenizer


def _load_scheduler_config(folder: Path) -> dict[str, Any]:
    config: Any = DDIMScheduler.load_config(folder)
    # An empty config would stand for the defaults of diffusers, which fit no published model.
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError("its scheduler_config.json names no scheduler of diffusers under _class_name")
    return config


def _load_text_encoder(network_class: Any, folder: Path, **kwargs: Any) -> Any:
    text_encoder, info = network_class.from_pretrained(folder, output_loading_info=True, **NO_CODE, **kwargs)
    if wrong := describe_wrong_weights(info):
        raise ValueError(f"it {wrong}")
    return text_encoder


def _parts_of_file(
    path: Path, dtype: torch.dtype, allow_pickle: bool, config: str | None
) -> tuple[type[StableDiffusion], dict[str, Any]]:
    """Returns the parts of a single-file checkpoint, in the layout of the models' authors."""
    if path.suffix == ".safetensors":
        with safe_open(check_tensors(path), "pt") as file:
            keys = list(file.keys())
    elif allow_pickle:
        keys = list(torch.load(check_torch_file(path), map_location="meta", weights_only=True).get("state_dict", {}))
    else:
        raise ValueError(
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
            "architecture as config=, in an environment model_kwargs={'config': folder}, where the hub cannot be "
            "reached)"
        ) from error
    return FAMILIES[kind], _parts_of_pipeline(pipeline, FAMILIES[kind])


def _describe_unsupported(pipeline: str) -> str:
    reason = ""
    if pipeline.startswith("LatentConsistency"):
        reason = ": the sampler of latent-consistency models does not take DDIM's Gaussian steps"
    elif pipeline.startswith(("StableDiffusion3", "Flux")):
        reason = ": flow-matching transformers are not supported"
    return f"it is a {pipeline}, and only {' and '.join(FAMILIES)} are supported{reason}"


def _find_folder(name: str, source: str, revision: str | None, variant: str | None, allow_pickle: bool) -> Path:
    """Returns the local folder of a pipeline, downloaded from the hub if it is not there."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json")
        return folder
    wanted: Mapping[str, Any] = {
        "revision": revision,
        "variant": variant,
        "use_safetensors": _use_safetensors(allow_pickle),
    }
    try:
        index = Path(hf_hub_download(source, "model_index.json", revision=revision))
        _, pipeline = _read_index(index)
        if pipeline in FAMILIES:
            return Path(DiffusionPipeline.download(source, **wanted, **_UNUSED))
    except Exception as error:
        raise FileNotFoundError(_describe_missing(name, source, revision, allow_pickle, error)) from error
    raise ValueError(f"the model {source!r} cannot be loaded: {_describe_unsupported(pipeline)}")


def _describe_missing(name: str, source: str, revision: str | None, allow_pickle: bool, error: Exception) -> str:
    """Returns the message for a model that was found nowhere: what was tried, and the ways to get one."""
    close = difflib.get_close_matches(name, list_models(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close and name not in list_models() else ""
    version = f" at the revision {revision!r}" if revision else ""
    reason = " ".join(str(error).split())
    pickles = not allow_pickle and "safetensors" in str(error)
    trust = "if it has pickles only and you trust them, pass allow_pickle=True; " if pickles else ""
    local = ", ".join(f"model={known!r}" for known in list_local_models())
    return (
        f"the model {name!r} is neither a local folder or file, nor in the Hugging Face cache, nor could it be "
        f"downloaded as {source!r}{version} ({type(error).__name__}: {reason}).{hint} Ways out: {trust}pass "
        f"model='/path/to/a/diffusers/folder'; run `hf download {source}` where there is a network and set HF_HOME to "
        f"that cache; or use a model that needs no download ({local})"
    )
