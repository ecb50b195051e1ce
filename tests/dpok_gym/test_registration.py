"""The ids, what can be done with their specs, and what importing the package costs."""

import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

import agents
import dpok_gym
from dpok_gym.registration import ENVIRONMENTS, register_envs

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


def test_a_fresh_process_imports_no_more_than_it_needs() -> None:
    root = Path(dpok_gym.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", _FRESH_PROCESS], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_spec_survives_json(env_id: str) -> None:
    spec = gymnasium.spec(env_id)
    assert EnvSpec.from_json(spec.to_json()) == spec
    assert spec.kwargs == ENVIRONMENTS[env_id]
    assert spec.max_episode_steps is None  # the environment ends by itself, and never truncates


def test_registering_again_changes_nothing() -> None:
    before = dict(gymnasium.registry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_envs()
        dpok_gym.register_envs()
    assert gymnasium.registry == before


def test_module_form_of_the_id() -> None:
    with gymnasium.make("dpok_gym:DPOK-Shapes-v0", num_inference_steps=2) as env:
        assert isinstance(env.unwrapped, dpok_gym.DenoisingEnv)
        assert EnvSpec.from_json(env.spec.to_json()).kwargs["num_inference_steps"] == 2
    venv = gymnasium.make_vec("dpok_gym:DPOK-Shapes-v0", num_envs=2, num_inference_steps=2)
    assert isinstance(venv, dpok_gym.DenoisingVectorEnv)


@pytest.mark.parametrize("package", [dpok_gym, agents])
def test_public_names(package) -> None:
    for name in package.__all__:
        assert getattr(getattr(package, name), "__name__", name) == name
        assert name in dir(package)
    assert set(package._HOMES) <= set(package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'DenoisingEnvironment'"):
        _ = package.DenoisingEnvironment


@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_unknown_keyword_is_named(make) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'guidance'"):
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
        assert env.unwrapped.sampler["guidance_scale"] == 7.5
        _, info = env.reset(seed=0)
        assert info["prompt"] in env.unwrapped.batch.prompts.train
        assert "A dog on the moon." in env.unwrapped.batch.prompts.train
        for expected_end in (False, True):
            _, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
            assert (terminated, truncated) == (expected_end, False)
    assert info["image"].shape == (16, 16, 3)
    assert reward == info["rewards"]["jpeg-compressibility"] < 0
