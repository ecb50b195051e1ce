"""Fixtures of the tests of bad input: small folders of every kind, which are copied before they are damaged."""

import pytest
import torch

from agents.cli.main import main
from dpok_gym.rewards.preference.network import PreferenceConfig, PreferenceNetwork
from dpok_gym.rewards.preference.reward import PreferenceReward


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def mixture_run(tmp_path_factory):
    """A run of one iteration that trains a whole denoiser and a critic."""
    folder = tmp_path_factory.mktemp("run") / "mixture"
    options = ["--images", "4", "--n-envs", "4", "--images-per-iteration", "4", "--eval-images", "2"]
    options += ["--num-inference-steps", "2", "--device", "cpu"]
    assert main(["train", "--env", "DPOK-Mixture-v0", "--out", str(folder), *options]) == 0
    return folder


@pytest.fixture(scope="session")
def shapes_run(tmp_path_factory):
    """A run of one iteration that trains a LoRA."""
    folder = tmp_path_factory.mktemp("run") / "shapes"
    options = ["--images", "2", "--images-per-iteration", "2", "--eval-images", "1", "--lora-rank", "2"]
    options += ["--num-inference-steps", "2", "--target-modules", "attention", "--device", "cpu"]
    assert main(["train", "--out", str(folder), *options]) == 0
    return folder


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory):
    """A small reward as dpok fit-reward writes it."""
    folder = tmp_path_factory.mktemp("reward") / "fitted"
    torch.manual_seed(0)
    PreferenceReward(PreferenceNetwork(PreferenceConfig(("a", "red"), 4, 16, 32, 1, 2)), "cpu").save(folder)
    return folder
