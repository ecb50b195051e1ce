"""Stable-Baselines3 agents that fine-tune diffusion models with rewards."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.dpok import DPOK, PRESETS
    from agents.evaluation import Evaluation, evaluate
    from agents.policy import DenoisingPolicy
    from agents.sb3_vec_env import GymVectorVecEnv

_HOMES = {
    "DPOK": "dpok",
    "DenoisingPolicy": "policy",
    "Evaluation": "evaluation",
    "GymVectorVecEnv": "sb3_vec_env",
    "PRESETS": "dpok",
    "evaluate": "evaluation",
}

__all__ = ["DPOK", "PRESETS", "DenoisingPolicy", "Evaluation", "GymVectorVecEnv", "evaluate"]


def __getattr__(name: str) -> Any:
    # The command line's help must not wait for torch (PEP 562).
    if name in _HOMES:
        return getattr(importlib.import_module(f"agents.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")
