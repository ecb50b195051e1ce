"""Text-to-image models behind one interface: see :class:`~dpok_gym.models.base.TextToImageModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpok_gym.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dpok_gym.models.base import TextToImageModel as TextToImageModel
    from dpok_gym.models.loading import clear_model_cache as clear_model_cache
    from dpok_gym.models.loading import load_model as load_model
    from dpok_gym.models.registry import list_models as list_models
    from dpok_gym.models.registry import register_model as register_model

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "TextToImageModel": "base",
        "clear_model_cache": "loading",
        "list_models": "registry",
        "load_model": "loading",
        "register_model": "registry",
    },
)
