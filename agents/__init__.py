"""Stable-Baselines3 agents that fine-tune diffusion models with rewards."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.best_of_n import BestOfN
    from agents.ddpo import DDPO
    from agents.dpok import DPOK, PRESETS
    from agents.draft import DRaFT
    from agents.evaluation import Evaluation, evaluate
    from agents.grpo import GRPO
    from agents.policy import DenoisingPolicy
    from agents.reinforce import REINFORCE
    from agents.rwr import RWR
    from agents.sb3_vec_env import GymVectorVecEnv
    from agents.sft import RewardWeightedSFT

_HOMES = {
    "BestOfN": "best_of_n",
    "DDPO": "ddpo",
    "DPOK": "dpok",
    "DRaFT": "draft",
    "DenoisingPolicy": "policy",
    "Evaluation": "evaluation",
    "GRPO": "grpo",
    "GymVectorVecEnv": "sb3_vec_env",
    "PRESETS": "dpok",
    "REINFORCE": "reinforce",
    "RWR": "rwr",
    "RewardWeightedSFT": "sft",
    "evaluate": "evaluation",
}

__all__ = [
    "DDPO",
    "DPOK",
    "GRPO",
    "PRESETS",
    "REINFORCE",
    "RWR",
    "BestOfN",
    "DRaFT",
    "DenoisingPolicy",
    "Evaluation",
    "GymVectorVecEnv",
    "RewardWeightedSFT",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    # The command line's help must not wait for torch (PEP 562).
    if name in _HOMES:
        return getattr(importlib.import_module(f"agents.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what completion shows
