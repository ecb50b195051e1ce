"""Names of algorithms, and algorithms of one's own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agents import DPOK, PolicyGradient, list_algorithms, register_algorithm
from agents.algorithms.registry import ALGORITHMS, load_algorithm
from agents.common.arguments import describe_arguments
from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import BUILT_IN, UPDATE, N, flat_weights

MakeEnv = Callable[..., DenoisingVectorEnv]

MODULE = '''
"""An algorithm of a user."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents import PolicyGradient


class Mine(PolicyGradient):
    """Policy gradient with the best reward as the baseline.

    Args:
        policy: the policy.
        env: the environment.
        margin: how much better than the best an image must be, at least 0.
    """

    def __init__(self, policy: Any = "DenoisingPolicy", env: Any = None, *, margin: float = 0.5, **kwargs: Any) -> None:
        self.margin = margin
        super().__init__(policy, env, **kwargs)

    def image_advantages(self, rewards: Tensor, prompts: list[str], images: Tensor) -> Tensor:
        return rewards - rewards.max() - self.margin


not_an_algorithm = 3
'''


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with an algorithm in it."""
    (tmp_path / "my_algorithms.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_algorithms"
    sys.modules.pop("my_algorithms", None)


@pytest.fixture(autouse=True)
def _forget_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ALGORITHMS, "_entries", dict(ALGORITHMS._entries))


def test_built_in_names() -> None:
    assert list_algorithms() == sorted(BUILT_IN)
    assert {name: load_algorithm(name) for name in list_algorithms()} == BUILT_IN


@pytest.mark.slow
def test_an_algorithm_of_ones_own(my_module: str, make_env: MakeEnv) -> None:
    """By its place it is loaded, learns, and goes on from a state."""
    cls: Any = load_algorithm(f"{my_module}:Mine")
    assert cls.__module__ == my_module
    agent = cls(env=make_env(), margin=2.0, seed=0, device="cpu", learning_rate=1e-2, policy_kwargs={"lora_rank": 2})
    before = flat_weights(agent)
    agent.learn(UPDATE)
    assert not (flat_weights(agent) == before).all()
    buffer = agent.rollout_buffer
    rewards = buffer.final_rewards
    expected = (rewards - rewards.max() - 2.0)[:, None].expand_as(buffer.advantages)
    assert (buffer.advantages == expected).all()
    other = cls(env=make_env(N), seed=1, device="cpu", policy_kwargs={"lora_rank": 2})
    other.load_state_dict(agent.state_dict())
    assert (flat_weights(other) == flat_weights(agent)).all()


def test_its_signature_shows_inherited_arguments(my_module: str) -> None:
    cls: Any = load_algorithm(f"{my_module}:Mine")
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:3] == ["policy", "env", "margin"]
    assert {"n_epochs", "clip_range", "learning_rate", "seed"} <= parameters.keys()
    assert parameters["margin"].default == 0.5
    assert parameters["n_epochs"].default == 1
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert "n_epochs: passes over the images of an iteration" in cls.__doc__
    assert cls.__doc__.count("margin: how much better") == 1
    arguments = describe_arguments(cls)
    assert list(arguments) == list(parameters)
    assert arguments["margin"].doc == "how much better than the best an image must be, at least 0."
    assert arguments["margin"].annotation is float
    assert arguments["seed"].annotation == int | None
    with pytest.raises(TypeError, match=r"Mine has no argument 'magrin'; .*margin"):
        cls(magrin=1.0)


def test_a_registered_place_is_imported_when_it_is_used(my_module: str) -> None:
    register_algorithm("mine", f"{my_module}:Mine")
    assert "mine" in list_algorithms()
    assert my_module not in sys.modules
    assert load_algorithm("mine").__name__ == "Mine"
    assert my_module in sys.modules


def test_a_registered_class() -> None:
    class Mine(PolicyGradient):
        pass

    register_algorithm("mine", Mine)
    assert load_algorithm("mine") is Mine
    assert inspect.signature(Mine).parameters.keys() == inspect.signature(PolicyGradient).parameters.keys()
    register_algorithm("mine", Mine)  # as a notebook's cell does when it runs again
    with pytest.raises(ValueError, match="the algorithm 'mine' is already registered"):
        register_algorithm("mine", DPOK)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown algorithm 'dpko'; .*dpok.*register_algorithm.*my_module:Mine"):
        load_algorithm("dpko")
    with pytest.raises(ValueError, match="the name of an algorithm must be a text that is not blank"):
        register_algorithm(" ", DPOK)


def test_places_that_are_not_there(my_module: str) -> None:
    for place in (f"{my_module}:Yours", "no_such_module:Mine"):
        with pytest.raises(ImportError, match=f"the algorithm '{place}' cannot be imported"):
            load_algorithm(place)
    with pytest.raises(TypeError, match="must be a subclass of DenoisingAlgorithm, not 3"):
        load_algorithm(f"{my_module}:not_an_algorithm")
    with pytest.raises(TypeError, match="must be a subclass of DenoisingAlgorithm"):
        load_algorithm("pathlib:Path")
