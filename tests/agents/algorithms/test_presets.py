"""Presets: what they hold is known to the constructors, and has an effect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch

from agents import DPOK, GRPO, PRESETS
from agents.algorithms.presets import default_algorithm, default_preset
from agents.algorithms.registry import load_algorithm
from agents.cli.config import default_config
from agents.cli.dry_run import count_update_passes
from agents.common import losses
from agents.common.arguments import describe_arguments
from agents.common.buffer import even_sizes
from agents.common.policy import DenoisingPolicy
from dpok_gym import DenoisingVectorEnv
from dpok_gym.registration import ENVIRONMENTS
from tests.agents.algorithms.support import BUILT_IN, T, is_same, weights
from tests.support import SMALL_MODELS

MakeEnv = Callable[..., DenoisingVectorEnv]

CHOICES = [(preset, name) for preset in PRESETS for name in (PRESETS[preset].only or BUILT_IN)]


def test_names() -> None:
    tasks, published = ["laptop", "laptop-flow", "exact-objective", "published-model"], ["paper", "official-code"]
    assert list(PRESETS) == [*tasks, *published, "ddpo", "dance-grpo", "flow-grpo"]
    assert all(preset.description and "\n" not in preset.description for preset in PRESETS.values())
    assert all(preset.images > 0 for preset in PRESETS.values())


@pytest.mark.parametrize(("preset", "name"), CHOICES)
def test_arguments_are_those_of_the_constructors(preset: str, name: str) -> None:
    kwargs = PRESETS[preset].algorithm_kwargs(name)
    assert kwargs.keys() <= describe_arguments(load_algorithm(name)).keys() - {"policy", "env"}
    assert kwargs.get("policy_kwargs", {}).keys() <= describe_arguments(DenoisingPolicy).keys() - {"process"}
    assert PRESETS[preset].env_kwargs.keys() <= describe_arguments(DenoisingVectorEnv).keys()
    assert set(PRESETS[preset].algorithms) <= set(BUILT_IN)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "name"), [choice for choice in CHOICES if choice[1] != "draft"])
def test_an_agent_takes_them(preset: str, name: str, make_env: MakeEnv) -> None:
    """The number of environments is the environment's: it is a matter of memory."""
    kwargs = PRESETS[preset].algorithm_kwargs(name)
    assert "n_envs" not in kwargs
    env = make_env(3, num_inference_steps=max(T, kwargs.get("steps_per_image", 0)))
    agent: Any = load_algorithm(name)(env=env, seed=0, device="cpu", **kwargs)
    assert agent.n_envs == 3
    assert len(agent.rollout_buffer) == kwargs["images_per_iteration"]
    for argument, value in kwargs.items():
        assert getattr(agent, argument) == value
    assert PRESETS[preset].run.keys() <= {"n_envs", "eval_images", "checkpointing_minutes"}


def test_an_algorithms_own_settings_come_last() -> None:
    common, of_grpo = {"batch_size": 1, "seed": 2}, {"grpo": {"batch_size": 3}}
    preset = dataclasses.replace(PRESETS["laptop"], common=common, algorithms=of_grpo)
    assert preset.algorithm_kwargs("grpo") == {"batch_size": 3, "seed": 2}
    assert preset.algorithm_kwargs("dpok") == common
    assert PRESETS["laptop"].algorithm_kwargs("reinforce")["images_per_iteration"] == 32


def test_what_is_returned_can_be_changed() -> None:
    kwargs = PRESETS["laptop"].algorithm_kwargs("dpok")
    kwargs["images_per_iteration"] = 1
    assert PRESETS["laptop"].algorithm_kwargs("dpok")["images_per_iteration"] == 64


@pytest.mark.parametrize(
    ("preset", "only"),
    [("paper", "dpok"), ("official-code", "dpok"), ("ddpo", "ddpo"), ("dance-grpo", "grpo"), ("flow-grpo", "grpo")],
)
def test_published_settings_are_for_their_algorithm(preset: str, only: str) -> None:
    with pytest.raises(ValueError, match=f"this preset is for {only} only; choose another one, or none, for reinforce"):
        PRESETS[preset].algorithm_kwargs("reinforce")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "official-code"])
def test_settings_of_the_paper(preset: str, make_env: MakeEnv) -> None:
    kwargs = PRESETS[preset].algorithm_kwargs("dpok")
    agent = DPOK(env=make_env(4), seed=0, device="cpu", **kwargs)
    before = weights(agent)
    agent.learn(10 * T)
    assert agent.images_drawn == 10
    assert agent._n_updates == 1
    assert not is_same(weights(agent), before)
    # Fifty denoising steps, as in the paper: five optimiser steps.
    assert math.ceil(kwargs["timestep_fraction"] * 10 * 50 / kwargs["batch_size"]) == 5


@pytest.mark.parametrize(
    ("preset", "name", "updates", "dimensions"),
    [("ddpo", "ddpo", 4, 16_384), ("dance-grpo", "grpo", 2, 16_384), ("flow-grpo", "grpo", 2, 65_536)],
)
def test_optimiser_steps_of_the_published_codes(preset: str, name: str, updates: int, dimensions: int) -> None:
    kwargs = PRESETS[preset].algorithm_kwargs(name)
    trained = PRESETS[preset].env_kwargs["num_inference_steps"] - kwargs.get("skip_last_steps", 0)
    transitions = kwargs["images_per_iteration"] * trained
    assert even_sizes(transitions, kwargs["batch_size"]) == [transitions // updates] * updates
    assert kwargs["images_per_iteration"] % kwargs.get("group_size", 1) == 0
    # 1e-4 in each dimension of a latent at 512 pixels, of Stable Diffusion 1.4 or 3.5.
    assert kwargs["clip_range"] == pytest.approx(1e-4 * dimensions)


#: The learning rate of a LoRA in public codes is 1e-5 (DPOK) to 3e-4 (TRL's DDPO, Flow-GRPO, AWM).
LEARNING_RATES = (1e-5, 3e-4)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("env_id", [e for e, kwargs in ENVIRONMENTS.items() if kwargs["model"] in SMALL_MODELS])
def test_defaults_of_published_models(env_id: str, name: str) -> None:
    config = default_config(env_id, name)
    assert LEARNING_RATES[0] <= config.algo_kwargs["learning_rate"] <= LEARNING_RATES[1]
    assert config.env_kwargs["dtype"] == "bfloat16"
    assert config.env_kwargs["decode_batch_size"] == config.algo_kwargs["micro_batch_size"] == 1
    assert config.policy_kwargs["max_batch_size"] == 1  # as in updates, so that the first ratio is exactly 1
    assert config.policy_kwargs["gradient_checkpointing"] in ("auto", True)
    assert config.policy_kwargs["lora_rank"] != 0
    assert config.checkpointing_minutes == 15
    passes = count_update_passes(config)
    assert passes is not None
    assert passes.optimizer_steps >= (1 if name == "reinforce" else 4)
    # The two evaluations take less than a tenth of what training does.
    assert 3 * config.eval_images < 0.1 * config.images


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
@pytest.mark.parametrize("name", ["dpok", "ddpo", "grpo"])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_the_first_ratios_are_exactly_1_in_half_precision(
    name: str, family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the KL is exactly 0: rollouts and updates call the denoiser with equally many."""
    ratios: list[Any] = []
    loss_of = losses.policy_gradient_loss

    def noted(*args: Any) -> Any:
        loss, metrics = loss_of(*args)
        ratios.append(metrics["mean_ratio"])
        return loss, metrics

    monkeypatch.setattr(losses, "policy_gradient_loss", noted)
    config = default_config("DPOK-SD15-v0", name)
    env = config.make_env(
        config.n_envs,
        model=str(request.getfixturevalue(f"tiny_{family}_folder")),
        prompts=["a dog", "a green rabbit"],
        reward="jpeg-compressibility",
        num_inference_steps=4,
        device="cpu",
    )
    n = 16 if name == "grpo" else 8  # a group of GRPO has 16 images
    few = {"images_per_iteration": n, "batch_size": None}
    agent: Any = dataclasses.replace(config, algo_kwargs=config.algo_kwargs | few).make_agent(env, "cpu")
    assert agent.process.model.dtype == torch.bfloat16
    agent.learn(n * 4)
    assert agent._n_updates == 1
    # Half of the steps, of which those that explore have a ratio; without a KL, half of those that explore.
    found = torch.cat(ratios).tolist()
    assert found == [1.0] * len(found)
    assert len(found) == n or (name != "ddpo" and n / 2 < len(found) < 2 * n)
    assert agent.latest_metrics.get("kl_to_reference", 0.0) == 0
    assert agent.latest_metrics["clip_fraction"] == 0
    assert agent.latest_metrics["grad_norm"] > 0


def test_the_preset_of_an_environment() -> None:
    assert default_preset("DPOK-Shapes-v0") == "laptop"
    assert default_preset("DPOK-ShapesFlow-v0") == "laptop-flow"
    assert default_preset("DPOK-Mixture-v0") == "exact-objective"
    assert default_preset("DPOK-SD15-v0") == "published-model"
    assert default_preset("my_module:Mine-v0") == "published-model"
    assert default_preset("my_module:DPOK-Shapes-v0") == "laptop"
    assert {default_preset(env_id) for env_id in ENVIRONMENTS} <= PRESETS.keys()


def test_the_laptops_task_is_the_default_environments() -> None:
    """As in the README: environment and agent come from one preset."""
    preset = PRESETS["laptop"]
    env = gymnasium.make_vec("DPOK-Shapes-v0", num_envs=16, **preset.env_kwargs)
    agent = GRPO(env=env, seed=0, device="cpu", **preset.algorithm_kwargs("grpo"))
    assert agent.denoising_env.prompts.train == (preset.env_kwargs["prompts"],)
    assert agent.process.num_inference_steps == preset.env_kwargs["num_inference_steps"]
    assert len(agent.rollout_buffer) == 64
    assert agent.policy.lora is not None
    assert agent.policy.lora.rank == preset.common["policy_kwargs"]["lora_rank"]


def test_the_algorithm_of_a_preset() -> None:
    assert default_algorithm("dance-grpo") == "grpo"
    assert default_algorithm("ddpo") == "ddpo"
    assert {default_algorithm(name) for name in ("paper", "laptop", None, "no such preset")} == {"dpok"}
