"""Text-to-image diffusion as a Gymnasium environment.

Importing this package registers the ids of :data:`dpok_gym.registration.ENVIRONMENTS`; torch and the models are
imported when the first environment is made.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dpok_gym.registration import register_envs

if TYPE_CHECKING:
    from dpok_gym.env import DenoisingEnv
    from dpok_gym.models import load_model
    from dpok_gym.prompts import PromptSet, list_prompt_sets, load_prompts
    from dpok_gym.rewards import RemoteReward, list_rewards, make_reward, register_reward
    from dpok_gym.vector_env import DenoisingVectorEnv
    from dpok_gym.wrappers import NoiseAction, VectorNoiseAction, pretrained_policy

_HOMES = {
    "DenoisingEnv": "env",
    "DenoisingVectorEnv": "vector_env",
    "NoiseAction": "wrappers",
    "PromptSet": "prompts",
    "RemoteReward": "rewards",
    "VectorNoiseAction": "wrappers",
    "list_prompt_sets": "prompts",
    "list_rewards": "rewards",
    "load_model": "models",
    "load_prompts": "prompts",
    "make_reward": "rewards",
    "pretrained_policy": "wrappers",
    "register_reward": "rewards",
}

__all__ = [
    "DenoisingEnv",
    "DenoisingVectorEnv",
    "NoiseAction",
    "PromptSet",
    "RemoteReward",
    "VectorNoiseAction",
    "list_prompt_sets",
    "list_rewards",
    "load_model",
    "load_prompts",
    "make_reward",
    "pretrained_policy",
    "register_envs",
    "register_reward",
]

register_envs()


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; someone who only lists environments should not wait for it (PEP 562).
    if name in _HOMES:
        return getattr(importlib.import_module(f"dpok_gym.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dpok_gym' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what completion shows
