"""From a folder, a file, a hub id or a live diffusers pipeline to the networks of a text-to-image model."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import hf_hub_download
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers.utils.logging import disable_progress_bar

from dpok_gym.models.base import LIVE_PIPELINE
from dpok_gym.models.latent_diffusion import LatentDiffusion
from dpok_gym.models.registry import list_local_models, list_models
from dpok_gym.models.unsupported import describe_unsupported
from dpok_gym.utils.hub import NO_CODE, check_hub_id, describe_wrong_weights, find_outage, has_vocabulary
from dpok_gym.utils.reading import check_model_folder, check_tensors, check_torch_file, read_json
from dpok_gym.utils.registry import import_attribute
from dpok_gym.utils.sharding import shard
from dpok_gym.utils.validation import check_integer

#: The family of each of diffusers' pipelines, by the pipeline's name. A family is imported when it is needed: its text
#: encoders take seconds.
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "dpok_gym.models.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "dpok_gym.models.stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "dpok_gym.models.stable_diffusion_3:StableDiffusion3",
    "FluxPipeline": "dpok_gym.models.flux:Flux",
    "Flux2KleinPipeline": "dpok_gym.models.flux2:Flux2Klein",
    "PixArtSigmaPipeline": "dpok_gym.models.pixart_sigma:PixArtSigma",
    "SanaPipeline": "dpok_gym.models.sana:Sana",
}

#: Files of weights, perhaps one of many shards, and their variant.
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(?P<format>safetensors|bin)"
)

logger = logging.getLogger(__name__)

#: Parts of a pipeline that are not needed to draw: not loaded, and not downloaded.
_UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


def find_family(pipeline: str) -> type[LatentDiffusion]:
    """Returns the family of one of diffusers' pipelines.

    Raises:
        ValueError: if pipelines of this name are not supported.
    """
    if pipeline not in FAMILIES:
        raise ValueError(describe_unsupported(pipeline, FAMILIES))
    return import_attribute(f"family of {pipeline}", FAMILIES[pipeline])  # type: ignore[no-any-return]


def model_from_source(
    name: str,
    source: str,
    device: str,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    config: str | None = None,
    vae: str | None = None,
    without_t5: bool = False,
    spread: bool = False,
) -> LatentDiffusion:
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
        vae: a folder or hub id of another autoencoder.
        without_t5: whether to leave out the parts that a family can do without.
        spread: whether to spread the denoiser over the ranks.

    Raises:
        ValueError: if files are damaged, or the family of the model is not supported.
        FileNotFoundError: if the model is found nowhere; the message lists the ways to get it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        what, advice = f"the checkpoint {path}", "It must hold a whole model, in one file as its authors published it"
    else:
        path = _find_folder(name, source, revision, variant, allow_pickle, without_t5)
        what = f"the model folder {path}"
        advice = "It must be a whole diffusers pipeline (model_index.json, scheduler, and all tokenizers and networks)"
    disable_progress_bar()  # transformers shows one even for a file that loads in milliseconds
    try:
        with _quiet_diffusers():
            if path.is_file():
                family, parts, scheduler = _parts_of_file(path, dtype, allow_pickle, config, vae)
                find_left_out(family, without_t5)  # an error, as no family of single files can do without a part
            else:
                family, parts, scheduler = _parts_of_folder(path, dtype, variant, allow_pickle, vae, without_t5)
        if spread:  # before it is on the device, which could not hold it
            parts[family.denoiser_part] = shard(parts[family.denoiser_part], device)
        return family(name, parts, scheduler, device)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be loaded: {reason}. {advice}; if a file is damaged, get it again") from error


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Lets diffusers be silent about what is checked here, such as weights that are missing."""
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(verbosity)


def model_from_pipeline(pipe: DiffusionPipeline) -> LatentDiffusion:
    """Makes a model of a live pipeline; see :meth:`dpok_gym.models.TextToImageModel.from_pipeline`.

    Raises:
        ValueError: if pipelines of this class are not supported, or one of its parts cannot be used as it is.
    """
    family = _family_of(pipe)
    for part in ("scheduler", *family.tokenizers, *family.networks):
        _check_part(part, getattr(pipe, part), is_optional=part in family.optional)
    name = os.fspath(pipe.name_or_path or LIVE_PIPELINE)
    model = family(name, *_parts_of_pipeline(pipe, family), getattr(pipe, family.denoiser_part).device)
    if model.dtype != torch.float32:
        model.options["dtype"] = str(model.dtype).removeprefix("torch.")
    if any(getattr(pipe, part) is None for part in family.optional) and _has_optional_parts(name, family):
        model.options["without_t5"] = True
    return model


def _has_optional_parts(name: str, family: type[LatentDiffusion]) -> bool:
    """Returns whether loading by this name would also load the parts that a family can do without."""
    index = Path(name) / "model_index.json"
    if not index.is_file():
        return name != LIVE_PIPELINE  # those on the hub do
    entries = read_json(index)
    return any(any(entries.get(part) or ()) for part in family.optional)


def find_left_out(family: type[LatentDiffusion], without_t5: bool) -> frozenset[str]:
    """Returns the names of the parts that are not loaded, though the model may have them.

    Raises:
        ValueError: if the family can do without none.
    """
    if without_t5 and not family.optional:
        raise ValueError(f"a {family.pipeline} has no T5 that it can do without: leave out without_t5")
    return family.optional if without_t5 else frozenset()


def _family_of(pipe: DiffusionPipeline) -> type[LatentDiffusion]:
    # Through the base classes, so that a user's own subclass of a pipeline is known too.
    for pipeline_class in type(pipe).__mro__:
        if pipeline_class.__name__ in FAMILIES:
            return find_family(pipeline_class.__name__)
    raise ValueError(f"the pipeline cannot be used: {describe_unsupported(type(pipe).__name__, FAMILIES)}")


def _check_part(part: str, module: Any, is_optional: bool) -> None:
    """Checks that a live pipeline's part is there, on its device, and without a LoRA."""
    if module is None and not is_optional:
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


def _parts_of_pipeline(pipe: Any, family: type[LatentDiffusion]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parts of a pipeline, and the config of its scheduler."""
    parts = {name: getattr(pipe, name) for name in (*family.tokenizers, *family.networks)}
    parts |= {name: getattr(pipe.config, name, default) for name, default in family.settings.items()}
    # A scheduler's own config may lack its class, which tells what kind of diffusion it is.
    return parts, dict(pipe.scheduler.config) | {"_class_name": type(pipe.scheduler).__name__}


def _parts_of_folder(
    folder: Path, dtype: torch.dtype, variant: str | None, allow_pickle: bool, vae: str | None, without_t5: bool
) -> tuple[type[LatentDiffusion], dict[str, Any], dict[str, Any]]:
    """Returns the family, its parts, perhaps with another autoencoder, and the config of its scheduler."""
    check_model_folder(folder)
    index, kind = _read_index(folder / "model_index.json")
    family = find_family(kind)
    parts = {} if vae is None else {"vae": _load_vae(family.networks["vae"], vae, dtype, allow_pickle)}
    variants, left_out = set(), find_left_out(family, without_t5)
    for name in ["scheduler", *family.tokenizers, *family.networks]:
        # In the index a part that was left out is [null, null]: its library and its class.
        is_missing = name in family.optional and not any(index.get(name) or ())
        if name in parts or name in left_out or is_missing:
            continue
        try:
            if not (folder / name).is_dir():
                raise ValueError(f"there is no folder {folder / name}")
            if name == "scheduler":
                parts[name] = _load_scheduler_config(folder / name)
            elif name in family.tokenizers:
                parts[name] = _load_tokenizer(family.tokenizers[name], folder / name)
            else:
                variants.add(found := _find_variant(folder / name, variant, allow_pickle))
                network_class = family.networks[name]
                arguments = _load_arguments(network_class, dtype)
                parts[name] = _load_network(network_class, folder / name, found, allow_pickle, **arguments)
        except (ValueError, OSError) as error:
            raise ValueError(f"its {name}: {error}") from error
        except Exception as error:  # the libraries raise many kinds for damaged files
            raise ValueError(f"its {name} cannot be read ({type(error).__name__}: {error})") from error
    if other := variants - {variant}:
        logger.warning("%s has weights of the variant %s only; they are used", folder, ", ".join(map(str, other)))
    scheduler = parts.pop("scheduler")
    return family, parts | {name: index.get(name, default) for name, default in family.settings.items()}, scheduler


def _load_arguments(network_class: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments of ``from_pretrained`` for a network of diffusers or of transformers."""
    if issubclass(network_class, ModelMixin):
        return {"torch_dtype": dtype}
    # Gemma 2 cuts off large attention scores, which only the plain code can do.
    plain = {} if network_class._supports_sdpa else {"attn_implementation": "eager"}
    return {"dtype": dtype, **NO_CODE, **plain}


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


def _load_tokenizer(tokenizer_class: Any, folder: Path) -> Any:
    files = {path.suffix: path.name for path in folder.iterdir()}
    if ".model" in files and "tokenizer.json" not in files.values() and not find_spec("sentencepiece"):
        raise ValueError(f"its {files['.model']} is in the format of sentencepiece: pip install sentencepiece")
    tokenizer = tokenizer_class.from_pretrained(folder)
    if not has_vocabulary(tokenizer):
        raise ValueError("it has no vocabulary (vocab.json and merges.txt, or tokenizer.json)")
    # Without one, transformers takes 10^30; the model then takes the length of its text encoder.
    check_integer("its model_max_length in tokenizer_config.json", tokenizer.model_max_length, maximum=10**31)
    return tokenizer


def _load_scheduler_config(folder: Path) -> dict[str, Any]:
    config: Any = DDIMScheduler.load_config(folder)
    # An empty config would stand for the defaults of diffusers, which fit no published model.
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError("its scheduler_config.json names no scheduler of diffusers under _class_name")
    return config


def _load_network(
    network_class: Any, source: str | Path, variant: str | None, allow_pickle: bool, **kwargs: Any
) -> Any:
    """Loads a network of transformers or diffusers from a folder or the hub, and checks that it has all weights."""
    files = {"variant": variant, "use_safetensors": _use_safetensors(allow_pickle)}
    network, info = network_class.from_pretrained(source, output_loading_info=True, **files, **kwargs)
    if wrong := describe_wrong_weights(info):
        raise ValueError(f"it {wrong}")
    return network


def _find_variant(folder: Path, variant: str | None, allow_pickle: bool) -> str | None:
    """Returns the variant of a network's files to load: the given one, or the only one if there are no plain files.

    Raises:
        ValueError: if there are no such files; the message has the argument that helps.
    """
    matches = [match for path in folder.glob("*") if (match := _WEIGHTS.fullmatch(path.name))]
    variants = {match["variant"] for match in matches if allow_pickle or match["format"] == "safetensors"}
    if variant in variants:
        return variant
    if variant is None and len(variants) == 1:
        return variants.pop()
    asked = f" of the variant {variant!r}" if variant else ""
    if names := sorted(name for name in variants if name):
        way = f"there are {', '.join(names)}; choose one with {_in_both('variant', names[0])}"
    elif variants:
        way = "there are plain ones; leave out the variant"
    elif matches:
        trust = _in_both("allow_pickle", True)
        way = f"there are pickles, which may run code of their author's; if you trust them, pass {trust}"
    else:
        way = f"download them; if the model has a variant only, with {_in_both('variant', 'fp16')}"
    raise ValueError(f"there are no weights{asked} in {folder} as .safetensors: {way}")


def _in_both(name: str, value: str | bool) -> str:
    """Returns how an argument of ``load_model`` is written in Python, and as an option of the command line."""
    return f"{name}={value!r} (in an environment model_kwargs={{{name!r}: {value!r}}}, --model-kwargs {name}={value})"


def _parts_of_file(
    path: Path, dtype: torch.dtype, allow_pickle: bool, config: str | None, vae: str | None
) -> tuple[type[LatentDiffusion], dict[str, Any], dict[str, Any]]:
    """Returns what :func:`_parts_of_folder` does, of a single-file checkpoint in the layout of the model's authors."""
    if path.suffix == ".safetensors":
        with safe_open(check_tensors(path), "pt") as file:
            keys = list(file.keys())
    elif allow_pickle:
        content = torch.load(check_torch_file(path), map_location="meta", weights_only=True)
        keys = list(content.get("state_dict", content))
    else:
        raise ValueError(
            "it is no .safetensors file, and a pickle may run code of its author's; get the .safetensors of the same "
            f"model, or if you trust it pass {_in_both('allow_pickle', True)}"
        )
    is_xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    if not is_xl and not any(key.startswith("cond_stage_model.") for key in keys):
        raise ValueError("it holds no Stable Diffusion 1.x, 2.x or XL with its text encoders")
    kind = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    if vae is None and not any(key.startswith("first_stage_model.") for key in keys):
        raise ValueError(f"it holds no autoencoder: name the folder or hub id of one with {_in_both('vae', 'FOLDER')}")
    outage = None
    if config is None or not Path(config).expanduser().is_dir():
        check_hub_id("config", config or kind)
        outage = find_outage()
    settings: dict[str, Any] = {"torch_dtype": dtype, "config": config, "local_files_only": outage is not None}
    if vae is not None:
        settings["vae"] = _load_vae(AutoencoderKL, vae, dtype, allow_pickle)
    try:
        pipeline = getattr(diffusers, kind).from_single_file(str(path), **settings, **_UNUSED)
    except OSError as error:
        raise OSError(
            f"{outage or error} (a single file does not tell its architecture; where the hub cannot be reached, name "
            f"the diffusers folder of a model of the same architecture with {_in_both('config', 'FOLDER')})"
        ) from error
    except NotImplementedError as error:  # "Cannot copy out of meta tensor"
        raise ValueError(
            "it lacks weights of the denoiser or the autoencoder: it is cut, or of another architecture than config="
        ) from error
    family = find_family(kind)
    parts, scheduler = _parts_of_pipeline(pipeline, family)
    for name in [name for name, part in parts.items() if isinstance(part, nn.Module)]:
        if missing := [key for key, value in parts[name].named_parameters() if value.is_meta]:
            raise ValueError(f"its {name} {describe_wrong_weights({'missing_keys': missing, 'mismatched_keys': []})}")
    return family, parts, scheduler


def _load_vae(vae_class: Any, source: str, dtype: torch.dtype, allow_pickle: bool) -> Any:
    """Loads an autoencoder of a class from its own folder or hub id, or from that of a model that has one."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_model_folder(folder)
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        variant = _find_variant(folder, None, allow_pickle)
        _check_class(vae_class, vae_class.load_config(folder), source)
        return _load_network(vae_class, folder, variant, allow_pickle, torch_dtype=dtype)
    check_hub_id("the autoencoder", source)
    outage = find_outage()
    for subfolder in (None, "vae"):
        place: dict[str, Any] = {"subfolder": subfolder, "local_files_only": outage is not None}
        try:
            _check_class(vae_class, vae_class.load_config(source, **place), source)
            return _load_network(vae_class, source, None, allow_pickle, torch_dtype=dtype, **place)
        except OSError as error:  # there is no config
            reason = outage or str(error)
    check_hub_id("the autoencoder", source, is_unknown=True)
    raise FileNotFoundError(f"the autoencoder {source!r} is no folder, and not in the Hugging Face cache ({reason})")


def _check_class(vae_class: Any, config: Mapping[str, Any], source: str) -> None:
    kind = config.get("_class_name", vae_class.__name__)
    if kind != vae_class.__name__:
        raise ValueError(f"the autoencoder {source} is an {kind}, and the model has an {vae_class.__name__}")


def _find_folder(
    name: str, source: str, revision: str | None, variant: str | None, allow_pickle: bool, without_t5: bool
) -> Path:
    """Returns the local folder of a pipeline, downloaded from the hub if it is not there."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json")
        return folder
    check_hub_id(f"the model {name!r}", source)
    outage = find_outage()
    wanted: dict[str, Any] = {"revision": revision, "local_files_only": outage is not None}

    @contextmanager
    def downloading() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            check_hub_id(f"the model {name!r}", source, is_unknown=True)
            reason = outage or f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise FileNotFoundError(_describe_missing(name, source, revision, allow_pickle, reason)) from error

    with downloading():
        index = hf_hub_download(source, "model_index.json", **wanted)
    _, pipeline = _read_index(Path(index))
    if pipeline not in FAMILIES:
        raise ValueError(f"the model {source!r} cannot be loaded: {describe_unsupported(pipeline, FAMILIES)}")
    wanted |= {"variant": variant, "use_safetensors": _use_safetensors(allow_pickle)}
    left_out = dict.fromkeys(find_left_out(find_family(pipeline), without_t5))
    with downloading():
        return Path(DiffusionPipeline.download(source, **wanted, **_UNUSED, **left_out))


def _describe_missing(name: str, source: str, revision: str | None, allow_pickle: bool, reason: str) -> str:
    """Returns the message for a model that was found nowhere: what was tried, and the ways to get one."""
    close = difflib.get_close_matches(name, list_models(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close and name not in list_models() else ""
    version = f" at the revision {revision!r}" if revision else ""
    pickles = not allow_pickle and "safetensors" in reason
    trust = f"if it has pickles only and you trust them, pass {_in_both('allow_pickle', True)}; " if pickles else ""
    local = ", ".join(f"model={known!r}" for known in list_local_models())
    return (
        f"the model {name!r} is neither a local folder or file, nor in the Hugging Face cache, nor could it be "
        f"downloaded as {source!r}{version} ({reason}).{hint} Ways out: {trust}pass "
        f"model='/path/to/a/diffusers/folder' (--model); run `hf download {source}` where there is a network and set "
        f"HF_HOME to that cache; or use a model that needs no download ({local})"
    )
