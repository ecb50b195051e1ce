"""How an environment samples, and whether that is how an agent learned to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from stable_baselines3.common.vec_env import VecEnv


def sampler_of(env: VecEnv) -> dict[str, Any]:
    """What the environment's ``sampler`` says; a ValueError if it is no denoising environment."""
    try:
        return env.get_attr("sampler")[0]
    except AttributeError:
        raise ValueError(
            f"a denoising policy needs a denoising environment such as DPOK-Shapes-v0, got {env}; make a vector of "
            "them with gymnasium.make_vec, without vectorization_mode"
        ) from None


def check_same_sampler(known: Mapping[str, Any] | None, found: Mapping[str, Any]) -> None:
    """Refuses an environment that does not denoise as the agent learned to."""
    if known is None:
        return
    known, found = _drawn_with(known), _drawn_with(found)
    different = [name for name in known if known[name] != found[name]]
    if _is_same_model(known["model"], found["model"]):
        different = [name for name in different if name != "model"]
    if different:
        details = ", ".join(f"{name} {known[name]!r} there, {found.get(name)!r} here" for name in different)
        raise ValueError(
            f"the agent was made for another sampler ({details}); make the environment with the agent's settings"
        )


def _drawn_with(sampler: Mapping[str, Any]) -> dict[str, Any]:
    """What tells two samplers apart, whatever the model is computed with."""
    options = {name: sampler["model_kwargs"].get(name) for name in ("image_size", "negative_prompt", "revision")}
    return {**sampler, "model_kwargs": options}


def _is_same_model(known: str, found: str) -> bool:
    """Whether two names are of one model; one that is no longer where it was may have been moved with its own name."""
    if os.path.exists(known):
        return os.path.realpath(known) == os.path.realpath(found)
    return os.path.basename(known) == os.path.basename(found)
