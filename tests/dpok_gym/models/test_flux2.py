"""What is special about FLUX.2-klein: a chat as the prompt, normalized patches, and a shift that depends on T."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from dpok_gym import DenoisingVectorEnv
from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.samplers import DenoisingProcess
from dpok_gym.testing import save_tiny_pipeline
from tests.support import redness

PROMPTS = ["a green rabbit.", "dog"]
SIZE = (16, 24)
T = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("flux2") / "klein", "flux2-klein")


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pipeline: Any = Flux2KleinPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(folder: Path) -> Any:
    return load_pipeline(folder)


def draw_with_diffusers(pipeline: Any, model: TextToImageModel, **call: Any) -> Tensor:
    """Draws from the same noise as :func:`draw`."""
    height, width = model.image_shape
    size = {"height": height, "width": width, "num_inference_steps": T}
    return pipeline(prompt=PROMPTS, latents=x_T(model), output_type="pt", **size, **call).images


@torch.no_grad()
def draw(process: DenoisingProcess) -> Tensor:
    steps = list(process.denoise(x_T(process.model), process.encode(PROMPTS), lambda _: x_T(process.model)))
    return process.model.decode(steps[-1].next_latents)


def x_T(model: TextToImageModel) -> Tensor:
    return torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(0))


def inputs_of(denoiser: Any) -> list[dict[str, Any]]:
    """Returns a list that gets the arguments of each forward pass of a denoiser."""
    inputs: list[dict[str, Any]] = []
    denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(kwargs | {"hidden_states": kwargs.get("hidden_states", *args)}),
        with_kwargs=True,
    )
    return inputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_denoiser_is_told_what_the_pipeline_tells_it(folder: Path, dtype: str) -> None:
    """In bfloat16 the noise level is rounded in the same way."""
    theirs = load_pipeline(folder, getattr(torch, dtype))
    ours = load_pipeline(folder, getattr(torch, dtype))
    model: Any = TextToImageModel.from_pipeline(ours, image_size=SIZE)
    told, expected = inputs_of(model.denoiser), inputs_of(theirs.transformer)
    draw(DenoisingProcess(model, "ode", T))
    draw_with_diffusers(theirs, model, guidance_scale=1.0)
    assert len(told) == len(expected) == T
    for mine, other in zip(told, expected, strict=True):
        assert other["guidance"] is None
        for key in ("txt_ids", "img_ids"):  # the same for all images
            assert all(places.equal(mine[key]) for places in other[key])
        for key in ("timestep", "encoder_hidden_states"):
            torch.testing.assert_close(mine[key], other[key])
        assert mine["hidden_states"].dtype == model.dtype
    torch.testing.assert_close(told[0]["hidden_states"], expected[0]["hidden_states"])


def test_prompts_are_encoded_as_in_the_pipeline(folder: Path, pipeline: Any) -> None:
    prompts = [*PROMPTS, "", " two  spaces\nand a line", "Crème brûlée 你好", "<|im_end|>"]
    model = load_model(folder, "cpu")
    ours = model.encode(prompts)
    with torch.no_grad():
        hidden, _ = pipeline.encode_prompt(prompts)
    assert ours["encoder_hidden_states"].shape == (6, 512, model.text_width)
    torch.testing.assert_close(ours["encoder_hidden_states"], hidden, rtol=1e-4, atol=1e-5)
    assert model.text_features(ours).shape == (6, model.text_width)


def test_the_longest_prompt(folder: Path, pipeline: Any) -> None:
    """The chat around a prompt counts too."""
    model: Any = load_model(folder, "cpu")
    (n_around,) = model._count_tokens(model.tokenizer, [""])
    longest = "x" * (512 - n_around)
    ((index, problem),) = model.find_long(["a dog", longest, longest + "x", ""])
    assert index == 2
    assert problem.startswith(f"a prompt has 513 tokens and the model {model.name!r} reads at most 512 ")
    cut = load_model(folder, "cpu", long_prompts="truncate").encode([longest + "xyz"])
    with torch.no_grad():
        hidden, _ = pipeline.encode_prompt(longest + "xyz")
    torch.testing.assert_close(cut["encoder_hidden_states"], hidden, rtol=1e-4, atol=1e-5)


def test_latents_are_the_normalized_patches_of_the_pipeline(folder: Path, pipeline: Any) -> None:
    model: Any = load_model(folder, "cpu", image_size=SIZE)
    assert (model.latent_shape, model.image_shape, model.size_factor) == ((16, 4, 6), SIZE, 4)
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        latents = model.encode_images(images)
        expected = pipeline._encode_vae_image(2 * images - 1, generator=None)
        decoded = model.decode(latents)
        plain = pipeline.vae(2 * images - 1).sample  # the autoencoder's mean, decoded
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded, (plain / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 24), (32, 32)])
@pytest.mark.parametrize("n_steps", [1, 4, 9])
def test_the_noise_levels_are_those_of_the_pipeline(
    folder: Path, pipeline: Any, size: tuple[int, int], n_steps: int
) -> None:
    model = load_model(folder, "cpu", image_size=size)
    pipeline(prompt="dog", height=size[0], width=size[1], num_inference_steps=n_steps, output_type="latent")
    table = DenoisingProcess(model, "ode", n_steps).table
    assert table.timesteps.equal(pipeline.scheduler.timesteps)
    assert table.noise.equal(pipeline.scheduler.sigmas[:-1])


@pytest.mark.parametrize(("n_steps", "mu"), [(10, 2.256), (50, 2.023)])
def test_the_shift_of_the_default_size(folder: Path, n_steps: int, mu: float) -> None:
    """1024 x 1024 pixels have 4096 tokens."""
    model = load_model(folder, "cpu")
    assert (model.latent_shape, model.sequence_length) == ((16, 64, 64), 4096)
    before = np.linspace(1, 1 / n_steps, n_steps)
    expected = torch.from_numpy(np.exp(mu) / (np.exp(mu) + 1 / before - 1)).float()
    torch.testing.assert_close(DenoisingProcess(model, "ode", n_steps).table.noise, expected, rtol=0, atol=2e-4)


def test_another_autoencoder(folder: Path, tiny_sd_folder: Path) -> None:
    """Of its own class, which has the moments of the latents."""
    model: Any = load_model(folder, "cpu", vae=folder, image_size=SIZE)
    plain = load_model(folder, "cpu", image_size=SIZE)
    latents = x_T(model)
    with torch.no_grad():
        assert model.decode(latents).equal(plain.decode(latents))
    message = f"the autoencoder {tiny_sd_folder} is an AutoencoderKL, and the model has an AutoencoderKLFlux2"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(folder, "cpu", vae=tiny_sd_folder)


def test_a_distilled_model_refuses_guidance(folder: Path, pipeline: Any) -> None:
    pipeline.register_to_config(is_distilled=True)
    model: Any = TextToImageModel.from_pipeline(pipeline, image_size=SIZE)
    assert model.to_pipeline().config.is_distilled
    message = "is guidance-distilled and knows no guidance: use guidance_scale=1, not 4.0, or a base model"
    with pytest.raises(ValueError, match=re.escape(message)):
        DenoisingProcess(model, num_inference_steps=T, guidance_scale=4.0)
    with pytest.raises(ValueError, match=re.escape(message)):
        DenoisingVectorEnv(model=model, prompts=PROMPTS, reward=redness, guidance_scale=4.0)
    with pytest.raises(ValueError, match="is guidance-distilled, so a negative prompt has no effect: leave out"):
        model.with_options(negative_prompt="a dog")
    ours = draw(DenoisingProcess(model, "ode", T))
    # The pipeline ignores a scale.
    torch.testing.assert_close(ours, draw_with_diffusers(pipeline, model, guidance_scale=4.0), rtol=1e-4, atol=1e-4)
