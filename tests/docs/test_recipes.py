"""The recipes of docs/recipes/ learn on the mixture world, and run on the shapes world."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from benchmarks.score import score_policy
from dpok_gym import reference_policy
from dpok_gym.wrappers import get_batch

FOLDER = Path(__file__).parents[2] / "docs" / "recipes"
#: Module, settings of its training, and images in which it learns on the mixture world.
RECIPES: list[Any] = [
    pytest.param("sb3_agents", {"algo": "ppo"}, 256, id="Stable-Baselines3, PPO"),
    pytest.param("sb3_agents", {"algo": "a2c"}, 768, id="Stable-Baselines3, A2C"),
    pytest.param("cleanrl_ppo", {}, 256, id="plain torch, PPO"),
    pytest.param("torchrl_ppo", {}, 256, id="TorchRL, PPO"),
    pytest.param("evolution", {}, 768, id="evolution strategy"),
]


def load(name: str) -> Any:
    if name == "torchrl_ppo":
        pytest.importorskip("torchrl", reason="TorchRL is not installed: pip install torchrl")
    return importlib.import_module(f"docs.recipes.{name}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings", "images"), RECIPES)
def test_it_learns_on_the_mixture_world(name: str, settings: dict[str, Any], images: int) -> None:
    recipe = load(name)
    env = recipe.make_env("DPOK-Mixture-v0")
    prompts = get_batch(env).prompts.train[:1] * 256
    policies = reference_policy(env, seed=0), recipe.train(env, images, seed=0, **settings)
    before, after = (score_policy(env, policy, prompts, seed=1_000_000).mean_reward for policy in policies)
    assert after > before + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings", "images"), RECIPES)
def test_it_runs_on_the_shapes_world(name: str, settings: dict[str, Any], images: int) -> None:
    recipe = load(name)
    env = recipe.make_env("DPOK-Shapes-Location-v0", num_envs=4, block_size=4)
    act = recipe.train(env, min(images, 4), seed=0, **settings)
    observation, _ = env.reset(seed=0)
    assert act(observation).shape == (4, 4, 2, 2)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_script_is_short_and_has_a_command_line(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    recipe = load(path.stem)
    given: list[Any] = []
    monkeypatch.setattr(recipe, "train", lambda env, *arguments: given.extend([env, *arguments]))
    monkeypatch.setattr(sys, "argv", [path.name, "--env", "DPOK-Mixture-v0", "--images", "7", "--seed", "3"])
    recipe.tyro.cli(recipe.main)
    assert isinstance(given[0], gymnasium.vector.VectorEnv)
    assert given[1:3] == [7, 3]


def test_torchrl_makes_an_environment_by_its_id() -> None:
    """It passes an argument that only Atari has, and leaves it out if the message has Python's own words."""
    torchrl = pytest.importorskip("torchrl.envs", reason="TorchRL is not installed: pip install torchrl")
    rollout = torchrl.GymEnv("DPOK-Mixture-v0").rollout(30)
    assert rollout.shape == (20,)
    assert rollout["next", "done"].flatten().tolist() == 19 * [False] + [True]
