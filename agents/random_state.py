"""All that decides an agent's next random numbers, to be saved with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv


def capture(env: VecEnv | None, begun: bool) -> dict[str, Any]:
    """The state of the generators of torch, NumPy and the environments, and the statistics of the latter's rewards.

    Args:
        env: the agent's, if it has one.
        begun: whether it was reset before; until then it may have no generators.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": np.random.get_state()}  # noqa: NPY002 (SB3's)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if env is not None and begun:
        state["envs"] = env.env_method("state_dict")
    return state


def restore(state: dict[str, Any], env: VecEnv) -> None:
    """Puts all of it back; what the state does not have, or other devices had, stays as it is."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 (SB3's)
    if torch.cuda.is_available() and len(state.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    for i, saved in zip(range(env.num_envs), state.get("envs", []), strict=False):
        env.env_method("load_state_dict", saved, indices=i)
