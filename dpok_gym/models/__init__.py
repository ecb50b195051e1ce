"""One interface for every text-to-image model: see :class:`~dpok_gym.models.base.TextToImageModel`."""

from __future__ import annotations

import functools
import os

import torch

from dpok_gym.models.base import TextToImageModel
from dpok_gym.shapes import WEIGHTS

__all__ = ["MODELS", "TextToImageModel", "load_model"]

#: Registered names, and the folder or hub id that each stands for.
MODELS = {
    "shapes": str(WEIGHTS),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


def load_model(name_or_path: str | os.PathLike[str], device: str = "auto", dtype: str = "float32") -> TextToImageModel:
    """Loads a model once per process, so that environments and policies share one copy of its weights.

    Args:
        name_or_path: a registered name (:data:`MODELS`), a local diffusers folder, or a hub id.
        device: "auto" (a GPU if there is one), or any torch device.
        dtype: of the networks' weights: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: if the device, the dtype or the kind of pipeline is unknown, or the files are damaged.
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
    return _load(str(name_or_path), str(found), dtype)


@functools.cache
def _load(name: str, device: str, dtype: str) -> TextToImageModel:
    from dpok_gym.models.stable_diffusion import StableDiffusion

    return StableDiffusion.from_pretrained(name, MODELS.get(name, name), device, getattr(torch, dtype))
