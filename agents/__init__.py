"""Stable-Baselines3 agents that fine-tune diffusion models with rewards."""

from agents.dpok import DPOK, PRESETS
from agents.policy import DenoisingPolicy
from agents.sb3_vec_env import GymVectorVecEnv

__all__ = ["DPOK", "PRESETS", "DenoisingPolicy", "GymVectorVecEnv"]
