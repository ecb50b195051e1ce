"""The ids, what can be done with their specs, what importing costs, and who may name the embedded worlds."""

import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium.envs.registration import EnvSpec

import agents
import dpok_gym
from dpok_gym.models import list_models
from dpok_gym.models.registry import list_local_models
from dpok_gym.prompts import list_prompt_sets, load_prompts
from dpok_gym.registration import (
    DEFAULT_ENVIRONMENT,
    ENVIRONMENTS,
    FIRST_TASKS,
    SUITABLE_PRESETS,
    TASKS,
    register_builtins,
)
from dpok_gym.rewards import list_rewards
from dpok_gym.worlds import WORLDS
from tests.support import SMALL_MODELS

ROOT = Path(dpok_gym.__file__).parents[1]

_FRESH_PROCESS = """
import sys
import gymnasium
import dpok_gym
early = {"torch", "diffusers", "transformers", "stable_baselines3", "agents"} & set(sys.modules)
assert not early, f"importing dpok_gym imports {early}"
env = gymnasium.make("DPOK-Shapes-v0", num_inference_steps=1)
env.reset(seed=0)
env.step(env.action_space.sample())
late = {"stable_baselines3", "agents"} & set(sys.modules)
assert not late, f"the environment imports {late}"
"""

_TORCH_FREE = """
import sys
import dpok_gym
from dpok_gym import list_prompt_sets, list_rewards, load_prompts, register_model, register_prompts, register_reward
from dpok_gym import World, register_world
from dpok_gym.models import list_models
assert {"shapes", "sd15"} <= set(list_models())
assert {"shapes-alignment", "image-reward"} <= set(list_rewards())
assert {"shapes", "dpok"} <= set(list_prompt_sets())
load_prompts("dpok")
register_model("mine", "my_module:factory")
register_reward("mine", "my_module:Reward")
register_prompts("mine", "my_module:prompts")
register_world("mine", "my_module:WORLD")
heavy = {"torch", "diffusers", "transformers", "stable_baselines3", "agents", "my_module"} & set(sys.modules)
assert not heavy, f"the tables import {heavy}"
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(_FRESH_PROCESS, id="environment", marks=pytest.mark.slow),
        pytest.param(_TORCH_FREE, id="tables"),
    ],
)
def test_a_fresh_process_imports_no_more_than_it_needs(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_spec_survives_json(env_id: str) -> None:
    spec = gymnasium.spec(env_id)
    assert EnvSpec.from_json(spec.to_json()) == spec
    assert spec.kwargs == ENVIRONMENTS[env_id]
    assert spec.reward_threshold == (TASKS[env_id].threshold if env_id in TASKS else None)
    assert spec.max_episode_steps is None  # the environment ends by itself, and never truncates


def test_registering_again_changes_nothing() -> None:
    before = dict(gymnasium.registry)
    tables = [list_models(), list_rewards(), list_prompt_sets(), WORLDS.names()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_builtins()
    assert gymnasium.registry == before
    assert [list_models(), list_rewards(), list_prompt_sets(), WORLDS.names()] == tables


def test_names_in_the_tables_are_registered() -> None:
    assert DEFAULT_ENVIRONMENT in ENVIRONMENTS
    assert FIRST_TASKS.keys() | SUITABLE_PRESETS.keys() <= ENVIRONMENTS.keys()
    assert set(SUITABLE_PRESETS.values()) <= agents.PRESETS.keys()
    known = set(inspect.signature(dpok_gym.DenoisingVectorEnv).parameters) - {"unknown"}
    for kwargs in ENVIRONMENTS.values():
        assert kwargs.keys() <= known
        assert kwargs["model"] in list_models()
        assert kwargs["reward"] in list_rewards()
        assert load_prompts(kwargs["prompts"]).train
    for kwargs in FIRST_TASKS.values():
        assert kwargs.keys() <= known


def test_built_in_prompts_can_be_loaded() -> None:
    for name in list_prompt_sets():
        assert load_prompts(name).train


def test_the_embedded_models_need_no_download() -> None:
    assert {"shapes", "shapes-flow", "mixture", "mixture-1d"} <= set(list_local_models())
    assert not SMALL_MODELS.keys() & set(list_local_models())


@pytest.mark.parametrize("env_id", TASKS)
def test_tasks_ask_for_an_improvement(env_id: str) -> None:
    task = TASKS[env_id]
    assert task.reference_score < task.threshold
    with gymnasium.make(env_id, device="cpu") as env:
        assert env.spec.reward_threshold == task.threshold
        assert list(env.unwrapped.prompts.train) == list(load_prompts(task.kwargs["prompts"]).train)  # type: ignore[attr-defined]


def test_tasks_are_those_of_the_comparison() -> None:
    """Those with one prompt that are in both; the comparison splits the prompts of "many" in its own way."""
    settings = yaml.safe_load((ROOT / "benchmarks" / "algorithms.yaml").read_text(encoding="utf-8"))
    for name in ("count", "location"):
        kwargs = TASKS[f"DPOK-Shapes-{name.capitalize()}-v0"].kwargs
        assert kwargs["prompts"] == settings["tasks"][name]["prompts"]
        assert kwargs["num_inference_steps"] == settings["common"]["num_inference_steps"]
        assert {kwargs["reward"]: 1.0} == settings["common"]["reward"]


@pytest.mark.parametrize("env_id", FIRST_TASKS)
def test_first_tasks_can_be_made(env_id: str) -> None:
    with gymnasium.make(env_id, device="cpu", **FIRST_TASKS[env_id]) as env:
        env.reset(seed=0)


@pytest.mark.slow
def test_module_form_of_the_id() -> None:
    with gymnasium.make("dpok_gym:DPOK-Shapes-v0", num_inference_steps=2) as env:
        assert isinstance(env.unwrapped, dpok_gym.DenoisingEnv)
        assert EnvSpec.from_json(env.spec.to_json()).kwargs["num_inference_steps"] == 2
    venv = gymnasium.make_vec("dpok_gym:DPOK-Shapes-v0", num_envs=2, num_inference_steps=2)
    assert isinstance(venv, dpok_gym.DenoisingVectorEnv)


@pytest.mark.parametrize("package", [dpok_gym, agents])
def test_public_names(package: ModuleType) -> None:
    assert len(package.__all__) > 15
    for name in package.__all__:
        assert getattr(getattr(package, name), "__name__", name) == name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'DenoisingEnvironment'"):
        _ = package.DenoisingEnvironment


@pytest.mark.parametrize("package", [dpok_gym, agents])
def test_type_checkers_see_every_public_name(package: ModuleType) -> None:
    assert package.__file__ is not None
    source = Path(package.__file__).read_text(encoding="utf-8")
    assert sorted(re.findall(r"^    from [\w.]+ import (\w+) as \1$", source, re.MULTILINE)) == sorted(package.__all__)


@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_misspelt_arguments_are_named(make: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'; did you mean 'guidance_scale'"):
        make("DPOK-Shapes-v0", guidance=3.0)


def test_stable_diffusion_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        gymnasium.make("DPOK-SD15-v0", device="cpu")
    for part in ("'sd15'", "hf download stable-diffusion-v1-5/stable-diffusion-v1-5", "HF_HOME", "model='shapes'"):
        assert part in str(caught.value)


def test_stable_diffusion_from_a_folder(tiny_sd_folder: Path) -> None:
    small = {"model": str(tiny_sd_folder), "num_inference_steps": 2, "reward": "jpeg-compressibility"}
    with gymnasium.make("DPOK-SD15-v0", **small) as env:
        inner: Any = env.unwrapped
        assert inner.batch.process.config.guidance_scale == 7.5
        _, info = env.reset(seed=0)
        assert info["prompt"] in inner.prompts.train
        assert "A dog on the moon." in inner.prompts.train
        for expected_end in (False, True):
            _, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
            assert (terminated, truncated) == (expected_end, False)
    assert info["image"].shape == (16, 16, 3)
    assert reward == info["rewards"]["jpeg-compressibility"] < 0


#: A world's name, or that of its model, rewards or environment, as code and documentation write it. "The letters used
#: for shapes" and "a mixture of Gaussians" are none.
_NAMES_A_WORLD = re.compile(
    r"""
    ["'`](?:shapes|mixture)(?:-[\w-]+)?["'`]      # "shapes", 'shapes-alignment', `mixture-1d`
    | \bdpok_gym\.(?:shapes|mixture)\b            # import dpok_gym.shapes
    | \bfrom\s+(?:dpok_gym|\.+)\s+import\b[^\n]*\b(?:shapes|mixture)\b
    | \bDPOK-(?:Shapes|Mixture)\b
    """,
    re.VERBOSE,
)


@pytest.mark.parametrize(
    "text",
    [
        'model="shapes"',
        "{'shapes-alignment': 1.0}",
        "the reward ``shapes-quality``",
        "from dpok_gym.mixture.data import MIXTURES",
        "from dpok_gym import shapes",
        'gymnasium.make("DPOK-Shapes-v0")',
    ],
)
def test_a_world_is_found_by_its_name(text: str) -> None:
    assert _NAMES_A_WORLD.search(text)


@pytest.mark.parametrize("text", ["Letters used for shapes: B", "tensors of other names or shapes", "a mixture of two"])
def test_other_uses_of_the_words_are_none(text: str) -> None:
    assert not _NAMES_A_WORLD.search(text)


def test_only_the_registration_names_the_worlds() -> None:
    """A world can be added or taken away without a change in the rest of the code."""
    found = []
    for package in ("dpok_gym", "agents"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(("dpok_gym/shapes/", "dpok_gym/mixture/")) or name == "dpok_gym/registration.py":
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if _NAMES_A_WORLD.search(line):
                    found.append(f"{name}:{number}: {line.strip()}")
    assert not found
