"""The options of an environment's ``reset``: a prompt and a first latent of the caller's choice.

Letters used for shapes: n environments, C x h x w a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpok_gym.prompts import load_prompts
from dpok_gym.utils.validation import check_mapping


def read_reset_options(
    options: Mapping[str, Any] | None, latents_shape: tuple[int, ...]
) -> tuple[list[str] | None, NDArray[np.float32] | None]:
    """Reads ``{"prompt": text or n texts, "latent": x_T}``; both may be left out.

    Args:
        options: the options of ``reset``; None for none.
        latents_shape: (n, C, h, w).

    Returns:
        The n prompts, and x_T (n, C, h, w); None for what the options leave out.

    Raises:
        ValueError: if an option is unknown, a prompt is blank or missing, or x_T has another shape or is not finite.
    """
    given = {} if options is None else dict(check_mapping("options", options))
    prompts, latents = given.pop("prompt", None), given.pop("latent", None)
    if given:
        raise ValueError(f"unknown reset options {sorted(given)}; there are 'prompt' and 'latent'")
    if prompts is not None:
        prompts = _read_prompts(prompts, latents_shape[0])
    if latents is not None:
        latents = _read_latents(latents, latents_shape)
    return prompts, latents


def read_reset_mask(mask: Any, n: int) -> NDArray[np.bool_]:
    """Reads the option ``reset_mask`` of a vector environment.

    Args:
        mask: (n,) bool; None to reset all environments.
        n: number of environments.

    Raises:
        ValueError: if the mask has another type or shape, or is false everywhere.
    """
    if mask is None:
        return np.ones(n, bool)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (n,) or not mask.any():
        raise ValueError(
            f"the option 'reset_mask' takes a boolean array of shape ({n},) that is true at least once, got {mask!r}"
        )
    return mask


def _read_prompts(prompts: Any, n: int) -> list[str]:
    if not isinstance(prompts, (str, Sequence, np.ndarray)):
        raise ValueError(f"the option 'prompt' takes one text or {n}, got {prompts!r}")
    texts = [prompts] * n if isinstance(prompts, str) else list(prompts)
    if len(texts) != n:
        raise ValueError(f"the option 'prompt' takes one text or {n}, got {len(texts)}")
    return list(load_prompts(texts).train)  # raises an error if one is blank or no text


def _read_latents(latents: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        array = np.array(latents, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the option 'latent' takes an array of numbers: {error}") from error
    if array.shape not in (shape, shape[1:]) or not np.isfinite(array).all():
        raise ValueError(
            f"the option 'latent' takes finite numbers of shape {shape[1:]}, or {shape} for all environments, got "
            f"{array.shape}"
        )
    return np.broadcast_to(array, shape).copy()
