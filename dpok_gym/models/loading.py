"""Loading of models by name, each once in a process."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

import torch

from dpok_gym.models.base import LongPrompts, TextToImageModel, check_true_cfg_scale
from dpok_gym.models.registry import ModelFactory, find_source, is_factory
from dpok_gym.models.scheduler_configs import TimestepSpacing
from dpok_gym.utils.device import find_device
from dpok_gym.utils.registry import import_attribute
from dpok_gym.utils.validation import check_bool, check_choice, check_mapping, check_names, check_path, shorten

#: Arguments of :func:`load_model` that make a light copy around the same networks.
_LIGHT_OPTIONS = ("image_size", "negative_prompt", "true_cfg_scale", "long_prompts", "timestep_spacing")

#: Those that say what is read from the model's files.
_FILE_OPTIONS = ("revision", "variant", "allow_pickle", "config", "vae", "without_t5")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that tells one loaded model from another: the key of the cache.

    The fields are the arguments of :func:`load_model`, with "auto" and the like resolved.

    Attributes:
        source: what the name stands for.
    """

    name: str
    source: str | ModelFactory
    device: str
    dtype: str = "float32"
    image_size: int | tuple[int, ...] | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    long_prompts: LongPrompts = "error"
    timestep_spacing: TimestepSpacing | None = None
    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    config: str | None = None
    vae: str | None = None
    without_t5: bool = False
    vae_tiling: bool = False
    compile: bool = False
    shard: bool = False

    def of_networks(self) -> ModelSpec:
        """Returns the spec of the model with the same networks, as it was published."""
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self) if field.name in _LIGHT_OPTIONS}
        return replace(self, **defaults)

    def light_options(self) -> dict[str, Any]:
        """Returns the arguments of :meth:`TextToImageModel.with_options`."""
        return {name: getattr(self, name) for name in _LIGHT_OPTIONS}

    def options(self) -> dict[str, Any]:
        """Returns the arguments of :func:`load_model` that are not defaults, without name and device."""
        options = {}
        for field in fields(self)[3:]:  # the first three are the name, its source and the device
            value = getattr(self, field.name)
            # How the weights lie in memory is no matter of the model: a single process may go on with it.
            if value != field.default and field.name != "shard":
                options[field.name] = value
        return options


def check_argument_names(names: Iterable[str]) -> None:
    """Checks that :func:`load_model` has arguments of these names.

    Raises:
        ValueError: for the first one that it lacks; the message has the nearest one.
    """
    check_names("argument of load_model", names, ["name_or_path", *(field.name for field in fields(ModelSpec)[2:])])


#: Every model that was loaded. Environments and policies share one copy of each model's weights.
_models: dict[ModelSpec, TextToImageModel] = {}


def load_model(
    name_or_path: str | os.PathLike[str],
    device: str = "auto",
    dtype: str = "float32",
    *,
    image_size: int | Sequence[int] | None = None,
    negative_prompt: str | None = None,
    true_cfg_scale: float = 1.0,
    long_prompts: LongPrompts = "error",
    timestep_spacing: TimestepSpacing | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    config: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    without_t5: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,  # noqa: A002 (as torch and diffusers call it)
    shard: bool = False,
    **unknown: Any,
) -> TextToImageModel:
    """Loads a model once per process, so that environments and policies share one copy of its weights.

    Models that differ in image size, prompts or timesteps only share their networks. :func:`clear_model_cache` forgets
    them all.

    Args:
        name_or_path: a registered name (:func:`dpok_gym.models.list_models`), a local diffusers folder, a single-file
            checkpoint (``.safetensors``), or a hub id; of Stable Diffusion 1.x, 2.x, XL or 3, FLUX.1, FLUX.2,
            PixArt-Sigma or Sana. ``"module:factory"`` is a function that makes a model, as in
            :func:`dpok_gym.models.register_model`; such a model takes an image size and a negative prompt if its class
            does, and none of the further arguments.
        device: "auto" (a GPU if there is one), or any torch device.
        dtype: of the networks' weights: "float32", "bfloat16" or "float16".
        image_size: pixels of a side, or (height, width); None for the size that the model was trained with.
        negative_prompt: what classifier-free guidance leads away from; None for nothing in particular.
        true_cfg_scale: scale of classifier-free guidance for FLUX.1, whose guidance_scale is only an input of the
            network: at least 1, with a second forward pass; 1 is none. A negative prompt needs it there.
        long_prompts: what becomes of a prompt with more tokens than the text encoder reads: "error", or "truncate" to
            leave out its end, as diffusers' pipelines do.
        timestep_spacing: of the denoising steps, see :meth:`TextToImageModel.with_options`.
        revision: branch, tag or commit of a hub id.
        variant: of the weight files, such as "fp16"; None takes the plain ones, or the only variant that a folder has.
        allow_pickle: whether weights that are no safetensors may be read.
        config: for a single file, a diffusers folder or hub id of the same architecture, which the file does not tell.
        vae: another autoencoder, or one for a single file that has none: a folder of diffusers or a hub id, of the
            autoencoder or of a whole model.
        without_t5: leave out T5, the third text encoder of Stable Diffusion 3: 9 GB less, and prompts of at most 77
            tokens.
        vae_tiling: decode large images in overlapping tiles: less memory, and slightly different images.
        compile: run the denoiser through ``torch.compile``: minutes at first, then faster on a GPU.
        shard: spread the denoiser's weights over the ranks of a training (FSDP2), for models that one GPU cannot hold;
            a single process keeps all.
        unknown: always empty: an unknown keyword argument is an error that names the nearest known one.

    Raises:
        TypeError: if a name or a switch is of another type.
        ValueError: if an argument's name, the device, the dtype, the image size or the family of the model is unknown,
            or if files are damaged.
        FileNotFoundError: if the model is found nowhere; the message lists the ways to get it.
        ImportError: if ``"module:factory"`` cannot be imported.
    """
    check_argument_names(unknown)
    check_choice("dtype", dtype, "float32", "bfloat16", "float16")
    check_true_cfg_scale(true_cfg_scale)
    check_choice("long_prompts", long_prompts, "error", "truncate")
    if timestep_spacing is not None:
        check_choice("timestep_spacing", timestep_spacing, "leading", "trailing")
    for name, text in {"negative_prompt": negative_prompt, "revision": revision, "variant": variant}.items():
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} must be a text or None, got {text!r}")
    for name, switch in {
        "allow_pickle": allow_pickle,
        "without_t5": without_t5,
        "vae_tiling": vae_tiling,
        "compile": compile,
        "shard": shard,
    }.items():
        check_bool(name, switch)
    if shard and compile:
        raise ValueError("a denoiser that is spread over the ranks cannot be compiled: leave out shard or compile")
    check_path("the model", name_or_path)
    name = os.fspath(name_or_path)
    for option, path in {"config": config, "vae": vae}.items():
        if path is not None:
            check_path(option, path)
    spec = ModelSpec(
        name,
        find_source(name),
        str(find_device(device)),
        dtype,
        _hashable_size(image_size),
        negative_prompt,
        true_cfg_scale,
        long_prompts,
        timestep_spacing,
        revision,
        variant,
        allow_pickle,
        None if config is None else os.fspath(config),
        None if vae is None else os.fspath(vae),
        without_t5,
        vae_tiling,
        compile,
        shard,
    )
    if spec not in _models:
        plain = spec.of_networks()
        if plain not in _models:
            _models[plain] = _load_networks(plain)
        _models[spec] = _models[plain].with_options(**spec.light_options())
    return _models[spec]


def find_model(
    model: str | os.PathLike[str] | TextToImageModel,
    device: str,
    dtype: str,
    own: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
) -> TextToImageModel:
    """Loads the model of an environment by its name, or returns a loaded one as it is.

    Args:
        model: a name for :func:`load_model`, or a loaded model.
        device: see :func:`load_model`; a loaded model stays where it is.
        dtype: see :func:`load_model`.
        own: the arguments of :func:`load_model` that the environment has too.
        model_kwargs: further arguments of :func:`load_model`.

    Raises:
        TypeError: if the model is neither, or ``model_kwargs`` no mapping.
        ValueError: if ``model_kwargs`` has an argument of the environment, or an argument or another device is given
            beside a loaded model; further errors as :func:`load_model`.
    """
    check_mapping("model_kwargs", model_kwargs)
    for name in model_kwargs:
        if name in (*own, "device", "dtype"):
            raise ValueError(f"{name} is an argument of the environment: leave it out of model_kwargs")
    options = {**own, **model_kwargs}
    if isinstance(model, (str, os.PathLike)):
        return load_model(model, device, dtype, **options)
    if not isinstance(model, TextToImageModel):
        raise TypeError(f"the model must be a name, a path or a loaded TextToImageModel, got {shorten(model)}")
    if device != "auto" and find_device(device) != model.device:
        raise ValueError(f"the loaded model is on {model.device}: leave out device={device!r}, or load it there")
    # The defaults, with which nothing was asked for.
    default = (None, False, "float32", "error")
    given = [name for name, value in (options | {"dtype": dtype}).items() if value not in default]
    if given:
        raise ValueError(
            f"a loaded model has its own {', '.join(given)}: give these to load_model() or from_pipeline() instead"
        )
    return model


def clear_model_cache() -> None:
    """Forgets every loaded model: the next :func:`load_model` reads the files again.

    The memory of a model is freed when nothing else refers to it. Existing environments and policies keep theirs.
    """
    _models.clear()


def _hashable_size(image_size: Any) -> Any:
    """Returns an integer or a tuple; what is neither is left for the model to refuse, unless it has no hash."""
    if isinstance(image_size, Integral):
        return int(image_size)
    image_size = tuple(image_size) if isinstance(image_size, list | tuple) else image_size
    try:
        hash(image_size)
    except TypeError:
        raise TypeError(f"image_size must be one or two numbers of pixels, got {shorten(image_size)}") from None
    return image_size


def _load_networks(spec: ModelSpec) -> TextToImageModel:
    """Makes the model of a spec without the options of :data:`_LIGHT_OPTIONS`."""
    if is_factory(spec.source):
        return _make_by_factory(spec)
    from dpok_gym.models.pipelines import model_from_source  # diffusers takes seconds to import

    files = {name: getattr(spec, name) for name in _FILE_OPTIONS}
    dtype = getattr(torch, spec.dtype)
    model = model_from_source(spec.name, str(spec.source), spec.device, dtype, **files, spread=spec.shard)
    if spec.vae_tiling:
        model.vae.enable_tiling()
    if spec.compile:
        model.denoiser.compile()
    model.options = spec.options()
    return model


def _make_by_factory(spec: ModelSpec) -> TextToImageModel:
    if options := [*spec.options(), *(["shard"] if spec.shard else [])]:
        raise ValueError(
            f"the model {spec.name!r} is made by {_describe(spec.source)}, in float32 and from no files: leave out "
            f"{', '.join(options)}"
        )
    factory: Any = spec.source
    if isinstance(factory, str):
        factory = import_attribute(f"model {spec.name!r}", factory)
    if not callable(factory):
        raise ValueError(
            f"the model {spec.name!r}: {_describe(spec.source)} must be a function, got {shorten(factory)}"
        )
    model = factory(spec.name, spec.device)
    if not isinstance(model, TextToImageModel):
        raise ValueError(
            f"the model {spec.name!r}: {_describe(spec.source)} must return a TextToImageModel, got {model!r}"
        )
    # The factory may return a model that is also used under another name; its networks are shared, its name is not.
    model = copy.copy(model)
    model.name, model.options = spec.name, {}
    return model


def _describe(source: str | ModelFactory) -> str:
    return repr(source) if isinstance(source, str) else f"the function {getattr(source, '__name__', source)!r}"
