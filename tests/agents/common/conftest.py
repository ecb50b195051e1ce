"""Fixtures of these tests: small environments, and agents on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents import DPOK
from agents.common.algorithm import DenoisingAlgorithm
from dpok_gym import DenoisingVectorEnv
from tests.agents.common.support import PROMPTS
from tests.support import redness


@pytest.fixture(autouse=True)
def _own_models(fresh_models: Callable[[], None]) -> None:
    """No test finds the LoRAs of another one in its model."""


@pytest.fixture
def settings(tiny_sd_folder: Path) -> dict[str, Any]:
    """Arguments of an environment with a tiny model and three denoising steps."""
    return {
        "model": str(tiny_sd_folder),
        "prompts": list(PROMPTS),
        "reward": redness,
        "num_inference_steps": 3,
        "device": "cpu",
    }


@pytest.fixture
def make_env(settings: dict[str, Any]) -> Callable[..., DenoisingVectorEnv]:
    """Makes ``num_envs`` such environments; other settings can be given."""

    def make(num_envs: int = 4, **changes: Any) -> DenoisingVectorEnv:
        return DenoisingVectorEnv(num_envs, **(settings | changes))

    return make


@pytest.fixture
def make_agent(make_env: Callable[..., DenoisingVectorEnv]) -> Callable[..., Any]:
    """Makes an agent, DPOK if no other algorithm is named, on an environment of its own if none is given."""

    def make(
        env: Any = None,
        algorithm: type[DenoisingAlgorithm] = DPOK,
        policy_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if env is None:
            env = make_env()
        network = {"lora_rank": 2, "critic_hidden": 16} | (policy_kwargs or {})
        return algorithm(
            env=env, **({"seed": 0, "device": "cpu", "learning_rate": 1e-2} | kwargs), policy_kwargs=network
        )

    return make
