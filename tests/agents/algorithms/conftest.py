"""Fixtures for the tests of the algorithms: agents on a tiny Stable Diffusion, of version 1.5 or 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import ALGORITHMS, DIFFUSIONS, PROMPTS, Brightness, MakeAgent, N, T


@pytest.fixture
def model_folder(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Path:
    """The model of the agents: the UNet, or the one of a test that is for both kinds of diffusion."""
    return tiny_folder(DIFFUSIONS[getattr(request, "param", "vp")])


@pytest.fixture
def make_env(model_folder: Path, fresh_models: Callable[[], None]) -> Callable[..., DenoisingVectorEnv]:
    """``make_env(num_envs, **changes)``: an environment of the tiny model."""

    def make(num_envs: int = N, **changes: Any) -> DenoisingVectorEnv:
        settings: dict[str, Any] = {
            "model": str(model_folder),
            "prompts": PROMPTS,
            "reward": Brightness(),
            "num_inference_steps": T,
            "device": "cpu",
        }
        return DenoisingVectorEnv(num_envs, **settings | changes)

    return make


@pytest.fixture
def make_agent(make_env: Callable[..., DenoisingVectorEnv]) -> MakeAgent:
    """``make_agent(name, env, **changes)``: an agent of the table ``ALGORITHMS``, with other arguments."""

    def make(name: str, env: Any = None, policy_kwargs: dict[str, Any] | None = None, **changes: Any) -> Any:
        cls, kwargs = ALGORITHMS[name]
        network = {"lora_rank": 2, "critic_hidden": 16} | (policy_kwargs or {})
        common = {"learning_rate": 1e-2, "seed": 0, "device": "cpu", "policy_kwargs": network}
        return cls(env=make_env() if env is None else env, **common | kwargs | changes)

    return make
