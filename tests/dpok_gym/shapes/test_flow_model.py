"""The embedded flow-matching model: its files, plain diffusers, and what it draws."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from agents.common.evaluation import sample_images
from dpok_gym.models import load_model
from dpok_gym.prompts import load_prompts
from dpok_gym.samplers import DenoisingProcess
from dpok_gym.shapes import FLOW_WEIGHTS
from dpok_gym.shapes.world import WORLD
from dpok_gym.worlds import find_world

ENVIRONMENT = "DPOK-ShapesFlow-v0"


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FLOW_WEIGHTS.rglob("*") if path.is_file()) < 12e6


def test_it_belongs_to_the_shapes_world() -> None:
    assert find_world("shapes-flow") is WORLD
    model = load_model("shapes-flow", "cpu")
    assert WORLD.can_judge(load_prompts("shapes").train, model.image_shape)
    with pytest.raises(ValueError, match="cannot read 'dog'"):
        model.check_prompts(["a red dog"])


def test_plain_diffusers_draws_the_same() -> None:
    """With 256 rows of zeros for T5, of which our model keeps one."""
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(FLOW_WEIGHTS, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["three green squares", "a red circle above a blue star"]
    latents = torch.randn(2, 4, 8, 8)
    theirs = pipe(
        prompts, height=64, width=64, latents=latents, num_inference_steps=5, guidance_scale=2.0, output_type="pt"
    ).images
    process = DenoisingProcess(load_model("shapes-flow", "cpu"), "ode", 5, guidance_scale=2.0)
    with torch.no_grad():
        *_, last = process.denoise(latents, process.encode(prompts), lambda _: torch.randn(latents.shape))
        ours = process.model.decode(last.next_latents)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_draws_what_it_is_asked_for() -> None:
    """The figures are those of ``python -m benchmarks.pretrained --env DPOK-ShapesFlow-v0``."""
    env: Any = gymnasium.make_vec(ENVIRONMENT, num_envs=48, reward=dict.fromkeys(WORLD.evaluation_rewards, 1.0))
    prompts = list(load_prompts("shapes").train)
    evaluation = sample_images(env.process, env, prompts, seed=0)
    assert 0.25 < evaluation.aligned.mean() < 0.8
    assert evaluation.mean_quality > 0.75
