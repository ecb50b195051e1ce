"""Text-to-image models behind one interface: see :class:`~dpok_gym.models.base.TextToImageModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpok_gym.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dpok_gym.models.base import TextToImageModel
    from dpok_gym.models.loading import clear_model_cache, load_model
    from dpok_gym.models.registry import list_models, register_model

__getattr__, __dir__, _ = lazy_names(
    __name__,
    {
        "TextToImageModel": "base",
        "clear_model_cache": "loading",
        "list_models": "registry",
        "load_model": "loading",
        "register_model": "registry",
    },
)
__all__ = ["TextToImageModel", "clear_model_cache", "list_models", "load_model", "register_model"]
