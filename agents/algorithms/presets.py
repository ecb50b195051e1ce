"""Named settings, the same for the command line and for Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dpok_gym.registration import DEFAULT_ENVIRONMENT, FIRST_TASKS, FLOW_ENVIRONMENT, SUITABLE_PRESETS


@dataclass(frozen=True)
class Preset:
    """Settings of a task and of the algorithms that learn it; what is not here has the constructors' defaults.

    Attributes:
        description: what the settings are for, in one line.
        images: budget of a training.
        run: further options of ``dpok train``: ``n_envs``, ``eval_images``, ``checkpointing_minutes``.
        env_kwargs: arguments of the environment.
        common: arguments of every algorithm, ``policy_kwargs`` included.
        algorithms: further arguments by the algorithm's name.
        only: the algorithms that the preset is for; empty for all.
    """

    description: str
    images: int
    run: Mapping[str, Any] = field(default_factory=dict)
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
            raise ValueError(
                f"this preset is for {', '.join(self.only)} only; choose another one, or none, for {algorithm}"
            )
        return {**self.common, **self.algorithms.get(algorithm, {})}


#: What the laptop's policy gradients have beside their authors' settings: their steps all explore.
_LAPTOP_POLICY_GRADIENT = {"batch_size": 64, "skip_last_steps": "auto"}

#: Two cores of a laptop and the embedded diffusion model: what plain ``dpok train`` uses.
_LAPTOP = Preset(
    description="the embedded model in minutes on two cores",
    images=2240,
    env_kwargs=FIRST_TASKS[DEFAULT_ENVIRONMENT],
    common={
        "images_per_iteration": 64,
        "learning_rate": 3e-3,
        "final_lr_fraction": 0.05,
        "warmup_fraction": 0.1,
        "policy_kwargs": {"lora_rank": 16, "target_modules": "all"},
    },
    algorithms={
        # Decoding and judging an image takes as long as four calls of this small denoiser, so looks are dear here.
        "dpok": {"use_critic": False},
        "ddpo": _LAPTOP_POLICY_GRADIENT | {"learning_rate": 1e-3},  # without a KL, a larger one ruins the images
        "grpo": _LAPTOP_POLICY_GRADIENT | {"kl_coef": 5e-3},
        "reinforce": _LAPTOP_POLICY_GRADIENT | {"images_per_iteration": 32, "batch_size": None},
        "rwr": {"temperature": 0.2},
        "draft": {"batch_size": 16, "n_last_steps": 2, "max_kl": 20.0},
        "diffusion-nft": {"batch_size": 64},
        "awm": {"batch_size": 64},
        # A latent has 256 dimensions, those of Stable Diffusion 64 times as many. Few steps on the few pairs of an
        # iteration: they are soon learned by heart, which ruins the images.
        "diffusion-dpo": {
            "beta": 80.0,
            "group_size": 4,
            "learning_rate": 1e-3,
            "batch_size": 16,
            "n_gradient_steps": 200,
            "steps_per_iteration": 5,
        },
    },
)

#: The same for the embedded flow-matching model. Its policy gradient is noisier. What helps: equal weights of the steps
#: at the output, layers of attention only, more images, and a larger price of the KL: most of what noise does to the
#: weights costs nats and brings no reward, so this price takes it back.
_LAPTOP_FLOW = replace(
    _LAPTOP,
    description="the embedded flow-matching model in minutes on two cores",
    images=6400,
    env_kwargs=FIRST_TASKS[FLOW_ENVIRONMENT],
    algorithms={
        **_LAPTOP.algorithms,
        "dpok": {
            "use_critic": False,
            "step_weighting": "output",
            "kl_coef": 0.01,
            "learning_rate": 6e-3,
            "policy_kwargs": {"lora_rank": 16, "target_modules": "attention"},
        },
    },
)

#: The gradient of the paper's Eq. 8 over the steps that explore, with large batches: noise keeps it from the optimum.
_EXACT_OBJECTIVE = Preset(
    description="the full gradient of DPOK's objective, for models whose optimum is known",
    images=15_360,
    common={"images_per_iteration": 256, "learning_rate": 3e-3, "final_lr_fraction": 0.05},
    algorithms={
        "dpok": {
            "batch_size": 256,
            "kl_placement": "reward",
            "kl_coef": 0.5,
            "critic_kind": "network",
            "vf_learning_rate": 3e-3,
            "policy_kwargs": {"critic_hidden": 64, "max_batch_size": None},
        },
    },
)

#: One element at a time, in rollouts as in updates. In half precision the last digits of a network's output depend on
#: how many elements it computes at a time, so the two must be equal for the first ratio to be exactly 1.
_ONE_BY_ONE: dict[str, Any] = {"max_batch_size": 1, "gradient_checkpointing": "auto"}

#: Denoising losses have one element for each noisy image, without guidance.
_FIT = {"batch_size": 32, "n_gradient_steps": 2000}

#: Stable Diffusion and any other published model on one GPU of 8 to 24 GB, in an evening. DPOK's training is 3.6e17
#: operations with Stable Diffusion 1.5 (70 TFLOP an image). An H100 takes 7 hours with one image at a time, and 1.5
#: with four (computed from short runs of :mod:`benchmarks.gpu_recipes`, without a reward).
#:
#: - The learning rate of a LoRA is 1e-5 in DPOK's code, 1e-4 in kvablack/ddpo-pytorch (config/base.py), 3e-4 in TRL's
#:   DDPOConfig and the codes of Flow-GRPO and AWM. The middle one is the one here.
#: - 20 denoising steps, of the ids' 50, as people draw with; half of them are learned from. Flow-GRPO and
#:   kvablack/ddpo-pytorch train with 10.
#: - Gradients go through both halves of guidance, as in DPOK's and DDPO's codes; the scale is the id's.
#: - The batches give 10 optimiser steps in an iteration, and 4 with DiffusionNFT and AWM, whose 6 noise levels for each
#:   image are those of AWM's code. REINFORCE may take one only, so its iterations are short.
#: - The weights of the KL: DPOK's paper has 0.01 beside a reward of weight 10; Flow-GRPO 0.01 for PickScore.
#: - The critic knows the mean of each prompt, and looks at no images: a look costs a decoding and a reward.
_PUBLISHED_MODEL = Preset(
    description="Stable Diffusion and other published models on one GPU of 8 to 24 GB, in an evening",
    images=5120,
    run={"n_envs": 8, "eval_images": 32, "checkpointing_minutes": 15.0},
    env_kwargs={"num_inference_steps": 20, "dtype": "bfloat16"},
    common={
        "images_per_iteration": 64,
        "learning_rate": 1e-4,
        "micro_batch_size": 1,
        "policy_kwargs": _ONE_BY_ONE | {"critic_kwargs": {"look_fraction": 0.0}},
    },
    algorithms={
        "dpok": {"batch_size": 64, "timestep_fraction": 0.5, "kl_coef": 1e-3},
        "ddpo": {"batch_size": 64, "timestep_fraction": 0.5, "skip_last_steps": "auto"},
        "grpo": {"batch_size": 64, "timestep_fraction": 0.5, "skip_last_steps": "auto", "kl_coef": 0.01},
        "reinforce": {"images_per_iteration": 16, "timestep_fraction": 0.5, "skip_last_steps": "auto"},
        "rwr": _FIT | {"temperature": 1.0},
        "sft": _FIT,
        "best-of-n": _FIT,
        # Its gradient also goes through the decoder, which keeps more than the denoiser.
        "draft": {"batch_size": 16, "policy_kwargs": _ONE_BY_ONE | {"gradient_checkpointing": True}},
        "diffusion-nft": {"batch_size": 96, "steps_per_image": 6},
        "awm": {"batch_size": 96, "steps_per_image": 6},
        "diffusion-dpo": _FIT | {"steps_per_iteration": 10},
    },
)

#: Dimensions of a latent at 512 pixels, of Stable Diffusion 1.x and 2.1-base, and of 3.5: the papers' limits are per
#: dimension, and ours in nats of the whole latent.
_SD_DIMENSIONS, _SD35_DIMENSIONS = 4 * 64 * 64, 16 * 64 * 64

#: Fan et al. 2023, single prompt, where the settings are known. Both this and the code's settings draw 10 images and
#: take 5 optimiser steps in an iteration. The code keeps the last two iterations in its buffer and draws each minibatch
#: anew; here each transition is used at most once, and then forgotten.
_PAPER = Preset(
    description="the settings of DPOK's paper for Stable Diffusion, where they are known",
    images=20_000,
    common={
        "images_per_iteration": 10,
        "learning_rate": 1e-5,
        "batch_size": 32,
        "timestep_fraction": 0.32,  # 5 batches of 32 out of 10 images with 50 steps
        "skip_last_steps": 0,
        "reward_weight": 10.0,
        "center_advantage": False,
        "normalize_loss": False,
        "ratio": "per-dimension",
        "clip_type": "ppo",
        "clip_range": 1e-4 * _SD_DIMENSIONS,
        "step_weighting": "likelihood",
        "kl_coef": 0.01,
        "kl_estimator": "exact",
        "kl_placement": "loss",
        "max_grad_norm": 0.1,
        "use_critic": True,
        "critic_kind": "network",
        "vf_learning_rate": 1e-4,
        "vf_batch_size": None,
        "vf_epochs": 1,
        "micro_batch_size": 1,
        "policy_kwargs": _ONE_BY_ONE | {"lora_rank": 4, "optimizer_kwargs": {"weight_decay": 0.0, "eps": 1e-8}},
    },
    only=("dpok",),
)

_OFFICIAL_CODE = Preset(
    description="the settings of DPOK's published code for Stable Diffusion, where they are known",
    images=20_000,
    common={
        **_PAPER.common,
        "batch_size": 48,
        "timestep_fraction": 0.48,  # 5 batches of 48
        "clip_type": "clamp",
        "kl_estimator": "output-mse",
    },
    only=("dpok",),
)

#: Black et al. 2024, App. D, DDPO_IS on Stable Diffusion 1.4; the statistics are those of their code (jannerm/ddpo).
_DDPO = Preset(
    description="the settings of DDPO's paper for Stable Diffusion",
    images=50_000,
    env_kwargs={"num_inference_steps": 50, "eta": 1.0, "guidance_scale": 5.0},
    common={
        "images_per_iteration": 256,
        "batch_size": 256 * 50 // 4,  # 4 optimiser steps in an iteration, each with all steps of 64 images
        "learning_rate": 1e-5,
        "clip_range": 1e-4 * _SD_DIMENSIONS,
        "statistics_size": 32,
        "min_count": 16,
        "advantage_clip": 10.0,
        "max_grad_norm": 1.0,
        "micro_batch_size": 1,
        "policy_kwargs": _ONE_BY_ONE | {"lora_rank": 0, "optimizer_kwargs": {"weight_decay": 1e-4, "eps": 1e-8}},
    },
    only=("ddpo",),
)

#: Xue et al. 2025: fastvideo/train_grpo_sd.py and config_sd/ of their code, the images of one of its eight GPUs.
_DANCE_GRPO = Preset(
    description="the settings of DanceGRPO's code for Stable Diffusion",
    images=19_200,
    env_kwargs={"num_inference_steps": 50, "eta": 1.0, "guidance_scale": 5.0},
    common={
        "images_per_iteration": 64,
        "group_size": 16,
        "same_noise": "iteration",
        "skip_last_steps": 1,
        "batch_size": 64 * 49 // 2,  # 2 optimiser steps in an iteration
        "learning_rate": 1e-5,
        "clip_range": 1e-4 * _SD_DIMENSIONS,
        "advantage_clip": 5.0,
        "kl_coef": 0.0,
        "max_grad_norm": 1.0,
        "micro_batch_size": 1,
        "policy_kwargs": _ONE_BY_ONE | {"lora_rank": 0, "optimizer_kwargs": {"weight_decay": 1e-4, "eps": 1e-8}},
    },
    only=("grpo",),
)

#: Liu et al. 2025: config/base.py and config/grpo.py (general_ocr_sd3) of their code, for Stable Diffusion 3.5 medium
#: at 512 pixels. A latent of another size needs a clip_range in proportion to it. Their timestep_fraction of 0.99
#: trains on the first 9 of 10 steps.
_FLOW_GRPO = Preset(
    description="the settings of Flow-GRPO's code for Stable Diffusion 3.5 at 512 pixels",
    images=115_200,
    env_kwargs={"num_inference_steps": 10, "guidance_scale": 4.5},
    common={
        "images_per_iteration": 48 * 24,
        "group_size": 24,
        "std_over": "iteration",
        "skip_last_steps": 1,
        "batch_size": 48 * 24 * 9 // 2,  # 2 optimiser steps in an iteration
        "learning_rate": 3e-4,
        "clip_range": 1e-4 * _SD35_DIMENSIONS,
        "advantage_clip": 5.0,
        "kl_coef": 0.04,
        "max_grad_norm": 1.0,
        "micro_batch_size": 1,
        "policy_kwargs": _ONE_BY_ONE | {"lora_rank": 32, "optimizer_kwargs": {"weight_decay": 1e-4, "eps": 1e-8}},
    },
    only=("grpo",),
)

PRESETS: dict[str, Preset] = {
    "laptop": _LAPTOP,
    "laptop-flow": _LAPTOP_FLOW,
    "exact-objective": _EXACT_OBJECTIVE,
    "published-model": _PUBLISHED_MODEL,
    "paper": _PAPER,
    "official-code": _OFFICIAL_CODE,
    "ddpo": _DDPO,
    "dance-grpo": _DANCE_GRPO,
    "flow-grpo": _FLOW_GRPO,
}


def default_preset(env_id: str) -> str:
    """Returns the name of the preset that suits an environment."""
    return SUITABLE_PRESETS.get(env_id.rpartition(":")[2], "published-model")


def default_algorithm(preset_name: str | None) -> str:
    """Returns the algorithm that a preset is for; "dpok" if it is for all, or there is no such preset."""
    preset = PRESETS.get(preset_name or "")
    return preset.only[0] if preset and preset.only else "dpok"
