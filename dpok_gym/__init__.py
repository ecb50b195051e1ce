"""Text-to-image diffusion as a Gymnasium environment.

Importing this package registers the environment ids of :data:`dpok_gym.registration.ENVIRONMENTS`. Torch and the models
are imported when the first environment is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpok_gym.registration import register_builtins
from dpok_gym.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dpok_gym.env import DenoisingEnv as DenoisingEnv
    from dpok_gym.models import TextToImageModel as TextToImageModel
    from dpok_gym.models import load_model as load_model
    from dpok_gym.models import register_model as register_model
    from dpok_gym.prompts import PromptSet as PromptSet
    from dpok_gym.prompts import list_prompt_sets as list_prompt_sets
    from dpok_gym.prompts import load_prompts as load_prompts
    from dpok_gym.prompts import register_prompts as register_prompts
    from dpok_gym.rewards import RemoteReward as RemoteReward
    from dpok_gym.rewards import list_rewards as list_rewards
    from dpok_gym.rewards import make_reward as make_reward
    from dpok_gym.rewards import register_reward as register_reward
    from dpok_gym.samplers import DenoisingProcess as DenoisingProcess
    from dpok_gym.samplers import SamplerConfig as SamplerConfig
    from dpok_gym.vector_env import DenoisingVectorEnv as DenoisingVectorEnv
    from dpok_gym.worlds import World as World
    from dpok_gym.worlds import register_world as register_world
    from dpok_gym.wrappers import CoarseLatent as CoarseLatent
    from dpok_gym.wrappers import NoiseAction as NoiseAction
    from dpok_gym.wrappers import TextFeatures as TextFeatures
    from dpok_gym.wrappers import VectorCoarseLatent as VectorCoarseLatent
    from dpok_gym.wrappers import VectorNoiseAction as VectorNoiseAction
    from dpok_gym.wrappers import VectorTextFeatures as VectorTextFeatures
    from dpok_gym.wrappers import reference_policy as reference_policy

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_names(
    "dpok_gym",
    {
        "CoarseLatent": "wrappers",
        "DenoisingEnv": "env",
        "DenoisingProcess": "samplers",
        "DenoisingVectorEnv": "vector_env",
        "NoiseAction": "wrappers",
        "PromptSet": "prompts",
        "RemoteReward": "rewards",
        "SamplerConfig": "samplers",
        "TextFeatures": "wrappers",
        "TextToImageModel": "models",
        "VectorCoarseLatent": "wrappers",
        "VectorNoiseAction": "wrappers",
        "VectorTextFeatures": "wrappers",
        "World": "worlds",
        "list_prompt_sets": "prompts",
        "list_rewards": "rewards",
        "load_model": "models",
        "load_prompts": "prompts",
        "make_reward": "rewards",
        "reference_policy": "wrappers",
        "register_model": "models",
        "register_prompts": "prompts",
        "register_reward": "rewards",
        "register_world": "worlds",
    },
)

register_builtins()
