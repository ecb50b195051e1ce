"""Checks of prompts and of rewards, on made ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.common.doctor.inputs import check_pipeline, check_prompts, check_reward
from dpok_gym.models import load_model
from dpok_gym.rewards import make_reward
from dpok_gym.samplers import DenoisingProcess

PROMPTS = ["a rabbit"] * 4 + ["the moon"] * 4
IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("prompts", "status", "measured"),
    [
        (["a rabbit", "the moon"], "ok", "2, the longest with 6 of 40 tokens; 0 too long; 0 refused; 0 copies"),
        (["a rabbit"] * 3, "warning", "2 copies"),
        (["a rabbit", "x" * 60], "failed", "1 too long; 1 refused"),
        (["a rabbit", "a\0rabbit"], "failed", "0 too long; 1 refused"),
    ],
)
def test_prompts(prompts: list[str], status: str, measured: str, make_env: Callable[..., Any]) -> None:
    finding = check_prompts(make_env().model, prompts, 512)
    assert finding.status == status
    assert measured in finding.measured


def variation(rewards: list[float]) -> str:
    def reward(images: Tensor, prompts: list[str]) -> list[float]:
        return rewards

    (finding,) = [each for each in check_reward(make_reward(reward), IMAGES, PROMPTS) if "varies" in each.name]
    return finding.status


@pytest.mark.parametrize(
    ("rewards", "status"),
    [
        ([1.0, 2, 3, 4, 2, 3, 4, 5], "ok"),
        ([0.0, 0, 0, 1, 1, 1, 1, 1], "ok"),  # one of the two prompts teaches something
        ([1.0, 1.01, 1, 1, 5, 5, 5, 5.01], "warning"),  # nearly all of it lies between the prompts
        ([1.0, 1, 1, 1, 5, 5, 5, 5], "failed"),
    ],
)
def test_rewards_within_a_prompt(rewards: list[float], status: str) -> None:
    assert variation(rewards) == status


def test_one_image_for_each_prompt() -> None:
    reward = make_reward(lambda images, prompts: images.mean((1, 2, 3)))
    findings = check_reward(reward, IMAGES[:2], ["a rabbit", "the moon"])
    assert [finding.status for finding in findings] == ["ok", "ok", "ok", "not checked"]


def test_a_sum_of_rewards_names_its_parts() -> None:
    reward = make_reward({"jpeg-compressibility": 1.0, _red: -2.0})
    finding = check_reward(reward, IMAGES, PROMPTS)[0]
    assert "jpeg-compressibility" in finding.measured
    assert "_red" in finding.measured


def _red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


@pytest.mark.parametrize(
    "changes", [{}, {"guidance_scale": 5.0, "negative_prompt": "moon"}, {"dtype": "bfloat16"}, {"sampler": "ode"}]
)
def test_the_pipeline_draws_the_same(changes: dict[str, Any], make_env: Callable[..., Any]) -> None:
    assert check_pipeline(make_env(**changes).process, ["a rabbit", "the moon"], 0).status == "ok"


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "stable-diffusion-3": {"negative_prompt": "moon", "timestep_spacing": "trailing"},
    "flux-dev": {"image_size": 16, "true_cfg_scale": 2.0},
    "flux-schnell": {"image_size": 16},
    "flux2-klein": {"image_size": 16, "negative_prompt": "moon"},
    "pixart-sigma": {"negative_prompt": "moon"},
    "sana": {},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_pipelines_of_transformers_draw_the_same(name: str, tiny_folder: Callable[[str], Path]) -> None:
    """Without noise, if they were trained with flow matching, whatever noise a training adds."""
    model = load_model(tiny_folder(name), "cpu", **TRANSFORMERS[name])
    scale = 1.0 if name == "flux-schnell" else 3.0
    process = DenoisingProcess(model, "ddim", 2, guidance_scale=scale)
    assert check_pipeline(process, ["a rabbit", "the moon"], 0).status == "ok"
    assert process.config.sampler == "ddim"


def test_another_amount_of_noise_is_not_the_pipeline(make_env: Callable[..., Any]) -> None:
    process = make_env().process
    process.table = make_env(eta=0.3).process.table
    assert check_pipeline(process, ["a rabbit"], 0).status == "failed"


def test_a_pipeline_has_no_window_of_stochastic_steps(make_env: Callable[..., Any]) -> None:
    finding = check_pipeline(make_env(sde_steps=(0, 1)).process, ["a rabbit"], 0)
    assert (finding.status, finding.measured) == (
        "not checked",
        "diffusers' pipelines add noise in all steps, not in sde_steps only",
    )
