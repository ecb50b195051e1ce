"""The table of environment ids."""

from __future__ import annotations

from typing import Any

import gymnasium

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
    "DPOK-SD15-v0": {
        "model": "sd15",
        "prompts": "dpok",
        "reward": "image-reward",
        "num_inference_steps": 50,
        "eta": 1.0,
        "guidance_scale": 7.5,
    },
    "DPOK-SD21-v0": {
        "model": "sd21",
        "prompts": "dpok",
        "reward": "image-reward",
        "num_inference_steps": 50,
        "eta": 1.0,
        "guidance_scale": 7.5,
    },
    "DPOK-SDXL-v0": {
        "model": "sdxl",
        "prompts": "dpok",
        "reward": "image-reward",
        "num_inference_steps": 50,
        "eta": 1.0,
        "guidance_scale": 5.0,
    },
}


def register_envs() -> None:
    """Registers every id of :data:`ENVIRONMENTS` with Gymnasium, unless it is there already."""
    for env_id, kwargs in ENVIRONMENTS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(
                env_id,
                entry_point="dpok_gym.env:DenoisingEnv",
                vector_entry_point="dpok_gym.vector_env:DenoisingVectorEnv",
                kwargs=kwargs,
            )
