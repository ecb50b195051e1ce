"""Sana against diffusers' own pipeline, and what only this family has."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor

from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.pixart_sigma import MAX_TOKENS
from dpok_gym.samplers.process import DenoisingProcess
from tests.support import make_process

PROMPTS = ["  A Green Rabbit. ", "dog"]
T = 3


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("sana")


def make_pipeline(folder: Path) -> Any:
    pipe: Any = SanaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def x_T() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def our_images(process: DenoisingProcess, latents: Tensor) -> Tensor:
    with torch.no_grad():
        steps = process.denoise(latents, process.encode(PROMPTS), lambda _: torch.zeros_like(latents))
        return process.model.decode(list(steps)[-1].next_latents)


def their_images(pipe: Any, process: DenoisingProcess, latents: Tensor, **kwargs: Any) -> Tensor:
    height, width = process.model.image_shape
    return pipe(
        PROMPTS,
        latents=latents,
        height=height,
        width=width,
        num_inference_steps=T,
        guidance_scale=process.config.guidance_scale,
        use_resolution_binning=False,
        output_type="pt",
        **kwargs,
    ).images


def with_euler(pipe: Any) -> Any:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    return pipe


def test_prompts_are_encoded_as_in_the_pipeline(folder: Path) -> None:
    """With the instruction that ``pipe(prompt)`` puts before the prompt, but not before the negative one."""
    seen: dict[str, Tensor] = {}
    pipe = make_pipeline(folder)
    plain = pipe.encode_prompt

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        names = ("embeds", "mask", "negative", "negative_mask")
        seen.update(zip(names, encoded := plain(*args, **kwargs), strict=True))
        return encoded

    pipe.encode_prompt = encode_prompt
    prompts = [*PROMPTS, "", "moon " * MAX_TOKENS, "3 dogs\n é \U0001f430"]
    pipe(prompts, negative_prompt=["A Dog "] * len(prompts), height=32, width=32, num_inference_steps=1,
         use_resolution_binning=False, output_type="latent")  # fmt: skip
    model: Any = load_model(folder, "cpu", negative_prompt="A Dog ", long_prompts="truncate")
    ours, empty = model.encode(prompts), model.unconditional()
    torch.testing.assert_close(ours["encoder_hidden_states"], seen["embeds"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(empty["encoder_hidden_states"], seen["negative"][:1], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours["encoder_attention_mask"], seen["mask"])
    assert torch.equal(empty["encoder_attention_mask"], seen["negative_mask"][:1])
    assert seen["mask"].sum(dim=1)[2:4].tolist() == [2, MAX_TOKENS]


def test_a_pipeline_with_euler_steps(folder: Path) -> None:
    """The pipeline gives that scheduler no noise levels, so it takes its own."""
    pipe = make_pipeline(folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    process = DenoisingProcess(TextToImageModel.from_pipeline(pipe), "ode", T, guidance_scale=3.0)
    theirs = their_images(pipe, process, x_T())
    torch.testing.assert_close(our_images(process, x_T()), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_noise_levels_are_nearly_those_of_the_published_solver(folder: Path, steps: int) -> None:
    process = make_process(folder, steps, sampler="ode")
    solver = DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    solver.set_timesteps(steps)
    ours = process.table.noise
    assert ours[0] == 1
    torch.testing.assert_close(ours, solver.sigmas[:-1], rtol=0, atol=4e-4)
    # The solver tells the network the integer part.
    assert (process.table.timesteps - solver.timesteps).abs().max() <= 1.4


def test_to_pipeline_keeps_the_solver_that_the_model_came_with(folder: Path) -> None:
    process = make_process(folder, T, sampler="ode", guidance_scale=3.0)
    pipe: Any = process.model.to_pipeline()
    pipe.set_progress_bar_config(disable=True)
    solver = pipe.scheduler
    assert isinstance(solver, DPMSolverMultistepScheduler)
    theirs = their_images(make_pipeline(folder), process, x_T())
    torch.testing.assert_close(their_images(pipe, process, x_T()), theirs, rtol=0, atol=1e-5)  # sums in another order
    # Of order 1 it is Euler's method, at nearly the same levels. Those that the pipeline takes with diffusers' Euler
    # scheduler are further away: its smallest level is shifted twice.
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(solver.config, solver_order=1)
    same, ours = their_images(pipe, process, x_T()), our_images(process, x_T())
    other = their_images(with_euler(pipe), process, x_T())
    assert (same - ours).abs().mean() < 0.5 * (other - ours).abs().mean()


def test_timesteps_in_units_of_the_network(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    transformer.register_to_config(timestep_scale=0.001)
    transformer.save_pretrained(copied / "transformer")
    process = make_process(copied, T, sampler="ode")
    theirs = their_images(with_euler(make_pipeline(copied)), process, x_T(), sigmas=[1, 2 / 3, 1 / 3])
    torch.testing.assert_close(our_images(process, x_T()), theirs, rtol=1e-4, atol=1e-4)


def test_long_prompts(folder: Path) -> None:
    """The longest prompt that is read has its last word in it; one word more is refused."""
    model = load_model(folder, "cpu")
    words = ["moon"] * (MAX_TOKENS - 2)
    full, other = " ".join([*words, "moon"]), " ".join([*words, "dog"])
    encoded = model.encode([full, other])
    assert encoded["encoder_attention_mask"].sum(dim=1).tolist() == [MAX_TOKENS] * 2
    hidden = encoded["encoder_hidden_states"]
    assert not torch.equal(hidden[0, -1], hidden[1, -1])
    with pytest.raises(ValueError, match=f"has {MAX_TOKENS + 1} tokens and the model .* at most {MAX_TOKENS} "):
        model.check_prompts([f"{full} dog"])
    # Letters that are no tokens are read byte by byte, two each; the space and the start are one each.
    with pytest.raises(ValueError, match=f"has {2 + 2 * MAX_TOKENS} tokens"):
        model.check_prompts(["é" * MAX_TOKENS])


def test_what_is_refused(folder: Path) -> None:
    pipe = make_pipeline(folder)
    own = pipe.scheduler
    for scheduler, reason in (
        (DDIMScheduler(), "its scheduler is a DDIMScheduler, and a model of a SanaPipeline was trained with flow"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "supported is a FlowMatchEuler"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "its prediction_type is 'epsilon'"),
    ):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=reason):
            DenoisingProcess(TextToImageModel.from_pipeline(pipe), num_inference_steps=T)
    pipe.scheduler = own
    pipe.transformer = SanaTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True)
    with pytest.raises(ValueError, match="reads the guidance scale, as Sana-Sprint does"):
        TextToImageModel.from_pipeline(pipe)


def test_numbers_that_are_too_large_for_the_text_encoder(folder: Path) -> None:
    pipe = make_pipeline(folder)
    pipe.text_encoder.half()
    with torch.no_grad():
        pipe.text_encoder.norm.weight.fill_(60000)
    model = TextToImageModel.from_pipeline(pipe)
    with pytest.raises(ValueError, match=r"leaves the range of torch\.float16: load the model with dtype='bfloat16'"):
        model.encode(["a dog"])
