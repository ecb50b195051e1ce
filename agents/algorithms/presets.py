"""Named settings, the same for the command line and for Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpok_gym.registration import DEFAULT_ENVIRONMENT, FIRST_TASKS, SUITABLE_PRESETS


@dataclass(frozen=True)
class Preset:
    """Settings of a task and of the algorithms that learn it; what is not here has the constructors' defaults.

    Attributes:
        description: what the settings are for, in one line.
        images: budget of a training.
        env_kwargs: arguments of the environment.
        common: arguments of every algorithm, ``n_envs`` and ``policy_kwargs`` included.
        algorithms: further arguments by the algorithm's name.
        only: the algorithms that the preset is for; empty for all.
    """

    description: str
    images: int
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    algorithms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    only: tuple[str, ...] = ()

    def algorithm_kwargs(self, algorithm: str) -> dict[str, Any]:
        """Returns the arguments of an algorithm, by its registered name.

        Raises:
            ValueError: if the preset is for other algorithms.
        """
        if self.only and algorithm not in self.only:
            raise ValueError(f"this preset is for {', '.join(self.only)} only; leave it out for {algorithm}")
        return {**self.common, **self.algorithms.get(algorithm, {})}


#: Two cores of a laptop and the embedded diffusion model: what plain ``dpok train`` uses.
_LAPTOP = Preset(
    description="the embedded model in minutes on two cores",
    images=2240,
    env_kwargs=FIRST_TASKS[DEFAULT_ENVIRONMENT],
    common={
        "images_per_iteration": 64,
        "n_envs": 64,
        "learning_rate": 3e-3,
        "final_lr_fraction": 0.05,
        "policy_kwargs": {"lora_rank": 16, "target_modules": "all"},
    },
    algorithms={
        # For one prompt, the mean of the iteration's rewards is a better baseline than a critic.
        "dpok": {"batch_size": 64, "use_critic": False},
        "ddpo": {"batch_size": 64},
        "grpo": {"batch_size": 64},
        "reinforce": {"images_per_iteration": 32},
        "draft": {"batch_size": 16, "n_last_steps": 2},
    },
)

#: The whole objective as the paper's Eq. 8 has it, unscaled, and its full gradient. It is not clipped: a clipped
#: gradient leads elsewhere if its noise is lopsided.
_EXACT_OBJECTIVE = Preset(
    description="DPOK's objective as it is written, for models whose optimum is known",
    images=15_360,
    common={"images_per_iteration": 256, "n_envs": 256, "learning_rate": 1e-2, "final_lr_fraction": 0.02},
    algorithms={
        "dpok": {
            "step_weighting": "likelihood",
            "normalize_advantage": False,
            "kl_placement": "reward",
            "kl_coef": 0.5,
            "max_grad_norm": 100.0,
            "critic_kind": "network",
            "vf_learning_rate": 3e-3,
            "policy_kwargs": {"critic_hidden": 64, "max_batch_size": None},
        },
    },
)

#: Any other model, with the paper's budget for one prompt.
_PUBLISHED_MODEL = Preset(
    description="the constructors' defaults and the paper's budget for one prompt",
    images=20_000,
    common={"images_per_iteration": 64},
)

#: Fan et al. 2023, single prompt, where the settings are known. Both this and the code's settings draw 10 images and
#: take 5 optimiser steps in an iteration. The code keeps the last two iterations in its buffer and draws each minibatch
#: anew; here each transition is used at most once, and then forgotten.
_PAPER = Preset(
    description="the settings of DPOK's paper for Stable Diffusion, where they are known",
    images=20_000,
    common={
        "images_per_iteration": 10,
        "n_envs": 10,
        "learning_rate": 1e-5,
        "batch_size": 32,
        "timestep_fraction": 0.32,  # 5 batches of 32 out of 10 images with 50 steps
        "reward_weight": 10.0,
        "normalize_advantage": False,
        "log_prob_reduction": "sum",
        "step_weighting": "likelihood",
        "clip_type": "ppo",
        "kl_coef": 0.01,
        "kl_estimator": "exact",
        "kl_placement": "loss",
        "max_grad_norm": 0.1,
        "critic_kind": "network",
        "vf_learning_rate": 1e-4,
        "vf_batch_size": None,
        "vf_epochs": 1,
        "policy_kwargs": {"lora_rank": 4},
    },
    only=("dpok",),
)

_OFFICIAL_CODE = Preset(
    description="the settings of DPOK's published code for Stable Diffusion, where they are known",
    images=20_000,
    common={
        **_PAPER.common,
        "batch_size": 48,
        "micro_batch_size": 4,
        "timestep_fraction": 0.48,  # 5 batches of 48
        "log_prob_reduction": "mean",
        "clip_type": "clamp",
        "kl_estimator": "output-mse",
    },
    only=("dpok",),
)

PRESETS: dict[str, Preset] = {
    "laptop": _LAPTOP,
    "exact-objective": _EXACT_OBJECTIVE,
    "published-model": _PUBLISHED_MODEL,
    "paper": _PAPER,
    "official-code": _OFFICIAL_CODE,
}


def default_preset(env_id: str) -> str:
    """Returns the name of the preset that suits an environment."""
    return SUITABLE_PRESETS.get(env_id.rpartition(":")[2], "published-model")
