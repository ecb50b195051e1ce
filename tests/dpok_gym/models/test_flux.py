"""What is special about FLUX.1: patches, guidance as an input, true classifier-free guidance, and its noise levels."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from dpok_gym import DenoisingVectorEnv
from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.flux import pack, unpack
from dpok_gym.samplers import DenoisingProcess, SamplerConfig
from dpok_gym.testing import save_tiny_pipeline
from tests.support import redness

PROMPTS = ["a green rabbit.", "dog"]
SIZE = (16, 24)
T = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("flux")
    return {name: save_tiny_pipeline(home / name, f"flux-{name}") for name in ("dev", "schnell")}


@pytest.fixture
def dev(folders: dict[str, Path]) -> Path:
    return folders["dev"]


@pytest.fixture
def schnell(folders: dict[str, Path]) -> Path:
    return folders["schnell"]


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pipeline: Any = FluxPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_with_diffusers(pipeline: Any, model: TextToImageModel, **call: Any) -> Tensor:
    """Draws from the same noise as :func:`draw`."""
    height, width = model.image_shape
    packed = pipeline._pack_latents(x_T(model), len(PROMPTS), *model.latent_shape)
    size = {"height": height, "width": width, "num_inference_steps": T}
    return pipeline(PROMPTS, latents=packed, output_type="pt", **size, **call).images


@torch.no_grad()
def draw(process: DenoisingProcess) -> Tensor:
    steps = list(process.denoise(x_T(process.model), process.encode(PROMPTS), lambda _: x_T(process.model)))
    return process.model.decode(steps[-1].next_latents)


def x_T(model: TextToImageModel) -> Tensor:
    return torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(0))


def inputs_of(denoiser: Any, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """Returns the arguments of each forward pass of a denoiser in a call."""
    inputs: list[dict[str, Any]] = []
    hook = denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(kwargs | {"hidden_states": kwargs.get("hidden_states", *args)}),
        with_kwargs=True,
    )
    call()
    hook.remove()
    return inputs


def test_patches_are_those_of_the_pipeline() -> None:
    latents = torch.randn(2, 3, 8, 12)
    packed = FluxPipeline._pack_latents(latents, 2, 3, 8, 12)
    assert pack(latents).equal(packed)
    assert unpack(packed, 4, 6).equal(latents)
    assert unpack(packed, 4, 6).equal(FluxPipeline._unpack_latents(packed, 64, 96, 8))


@pytest.mark.parametrize("name", ["dev", "schnell"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_denoiser_is_told_what_the_pipeline_tells_it(folders: dict[str, Path], name: str, dtype: str) -> None:
    """In bfloat16 the noise level is rounded in the same way."""
    scale = 3.5 if name == "dev" else 1.0
    model: Any = load_model(folders[name], "cpu", dtype, image_size=SIZE)
    pipeline = load_pipeline(folders[name], model.dtype)
    process = DenoisingProcess(model, "ode", T, guidance_scale=scale)
    ours = inputs_of(model.denoiser, lambda: draw(process))
    theirs = inputs_of(pipeline.transformer, lambda: draw_with_diffusers(pipeline, model, guidance_scale=scale))
    assert len(ours) == len(theirs) == T
    for told, expected in zip(ours, theirs, strict=True):
        assert ("guidance" in told) == (name == "dev") == (expected["guidance"] is not None)
        for key in set(told) - {"hidden_states"}:
            # The text's places are zeros, and the network reads all places in float32.
            torch.testing.assert_close(told[key].float(), expected[key].float(), rtol=0, atol=1e-6)
        assert told["hidden_states"].dtype == model.dtype
    torch.testing.assert_close(ours[0]["hidden_states"], theirs[0]["hidden_states"].to(model.dtype))


def test_guidance_is_an_input(dev: Path) -> None:
    model = load_model(dev, "cpu", image_size=SIZE)
    processes = [DenoisingProcess(model, "ode", T, guidance_scale=scale) for scale in (0.0, 1.0, 3.5)]
    first, second, third = map(draw, processes)
    assert [process.num_function_evaluations for process in processes] == [T * len(PROMPTS)] * 3
    assert not torch.allclose(first, second, atol=1e-4)
    assert not torch.allclose(second, third, atol=1e-4)


def test_schnell_refuses_guidance(schnell: Path) -> None:
    model = load_model(schnell, "cpu", image_size=SIZE)
    message = (
        f"the model {model.name!r} is guidance-distilled and reads no guidance scale, as FLUX.1 schnell: use "
        "guidance_scale=1, not 3.5"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        DenoisingProcess(model, num_inference_steps=T, guidance_scale=3.5)
    with pytest.raises(ValueError, match=re.escape(message)):
        DenoisingVectorEnv(model=model, prompts=PROMPTS, reward=redness, guidance_scale=3.5)


@pytest.mark.parametrize("name", ["dev", "schnell"])
@pytest.mark.parametrize("negative_prompt", [None, "", "a dog"])
def test_true_classifier_free_guidance(folders: dict[str, Path], name: str, negative_prompt: str | None) -> None:
    """The pipeline wants a negative prompt for it; here the empty one is what it leads away from by default."""
    scale = 2.0 if name == "dev" else 1.0
    options: Any = {"true_cfg_scale": 3.0, "negative_prompt": negative_prompt}
    model = load_model(folders[name], "cpu", image_size=SIZE, **options)
    process = DenoisingProcess(model, "ode", T, guidance_scale=scale)
    ours = draw(process)
    assert process.num_function_evaluations == 2 * T * len(PROMPTS)
    call = {"guidance_scale": scale, "true_cfg_scale": 3.0, "negative_prompt": [negative_prompt or ""] * len(PROMPTS)}
    theirs = draw_with_diffusers(load_pipeline(folders[name]), model, **call)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plain = load_model(folders[name], "cpu", image_size=SIZE)
    assert plain.denoiser is model.denoiser  # type: ignore[comparison-overlap]
    assert not torch.allclose(ours, draw(DenoisingProcess(plain, "ode", T, guidance_scale=scale)), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_losses_on_noisy_images_have_no_true_guidance(folders: dict[str, Path], name: str) -> None:
    """They ask for a guidance scale of 1; schnell's own scale is 1 as well, and keeps the true guidance."""
    scale = 3.5 if name == "dev" else 1.0
    guided, plain = (
        DenoisingProcess(load_model(folders[name], "cpu", image_size=SIZE, **options), "ode", T, guidance_scale=scale)
        for options in ({"true_cfg_scale": 3.0}, {})
    )
    state = guided.state(x_T(guided.model), 0, guided.encode(PROMPTS))
    torch.testing.assert_close(guided.predict(state, 1.0), plain.predict(state, 1.0), rtol=0, atol=0)
    assert guided.num_function_evaluations == len(PROMPTS)
    assert not torch.allclose(guided.predict(state), plain.predict(state), atol=1e-3)
    assert guided.num_function_evaluations == 3 * len(PROMPTS)


def test_a_negative_prompt_needs_true_guidance(dev: Path, schnell: Path) -> None:
    with pytest.raises(ValueError, match=r"so a negative prompt has no effect: pass true_cfg_scale above 1 too"):
        load_model(dev, "cpu", negative_prompt="dog")
    env = DenoisingVectorEnv(
        model=schnell,
        prompts=PROMPTS,
        reward=redness,
        device="cpu",
        image_size=SIZE,
        negative_prompt="dog",
        model_kwargs={"true_cfg_scale": 2.0},
    )
    assert env.model.num_forward_passes(1.0) == 2


@pytest.mark.parametrize("scale", [0.5, 0, -1.0])
def test_scales_below_one(dev: Path, scale: float) -> None:
    with pytest.raises(ValueError, match="true_cfg_scale must be"):
        load_model(dev, "cpu", true_cfg_scale=scale)
    with pytest.raises(ValueError, match="true_cfg_scale must be"):
        load_model(dev, "cpu").with_options(true_cfg_scale=scale)


def test_other_families_have_no_true_guidance(tiny_sd_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"takes no true_cfg_scale, .*its classifier-free guidance is guidance_scale"):
        load_model(tiny_sd_folder, "cpu", true_cfg_scale=2.0)


def test_the_scale_is_part_of_the_sampler(dev: Path) -> None:
    model = load_model(dev, "cpu", image_size=SIZE, true_cfg_scale=2, negative_prompt="dog")
    assert model.options == {"image_size": list(SIZE), "negative_prompt": "dog", "true_cfg_scale": 2.0}
    assert load_model(dev, "cpu", **model.options) is model
    live = TextToImageModel.from_pipeline(load_pipeline(dev), **model.options)
    assert live.options == model.options
    process = DenoisingProcess(model, num_inference_steps=T, guidance_scale=3.5)
    config = SamplerConfig.from_dict(json.loads(json.dumps(process.config.to_dict())))
    assert config == process.config
    again = DenoisingProcess.from_config(config, "cpu")
    assert again.model is model
    plain = DenoisingProcess(load_model(dev, "cpu", image_size=SIZE), num_inference_steps=T, guidance_scale=3.5)
    with pytest.raises(ValueError, match=r"true_cfg_scale 2.0 there, None here"):
        process.config.check_equal(plain.config)


@pytest.mark.parametrize("name", ["dev", "schnell"])
@pytest.mark.parametrize("size", [256, 512, (768, 1360), 1024, 2048])
@pytest.mark.parametrize("n_steps", [1, 4, 10, 28])
def test_the_noise_levels_are_those_of_the_pipeline(
    folders: dict[str, Path], name: str, size: Any, n_steps: int
) -> None:
    """As many tokens as the published models have; the small autoencoder draws a quarter of the pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    model = load_model(folders[name], "cpu", image_size=(height // 4, width // 4))
    assert model.sequence_length == (height // 16) * (width // 16)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(folders[name], subfolder="scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / n_steps, n_steps), mu=calculate_shift(model.sequence_length))
    table = DenoisingProcess(model, "ode", n_steps).table
    assert table.timesteps.equal(scheduler.timesteps)
    torch.testing.assert_close(table.noise, scheduler.sigmas[:-1], rtol=0, atol=1e-7)
    torch.testing.assert_close(table.output_coef, scheduler.sigmas.diff(), rtol=0, atol=1e-6)


def test_a_whole_call_of_the_pipeline_has_the_same_levels(dev: Path) -> None:
    model = load_model(dev, "cpu", image_size=SIZE)
    pipeline = load_pipeline(dev)
    draw_with_diffusers(pipeline, model)
    table = DenoisingProcess(model, "ode", T).table
    assert table.timesteps.equal(pipeline.scheduler.timesteps)
    assert table.noise.equal(pipeline.scheduler.sigmas[:-1])


def test_sizes(dev: Path) -> None:
    model: Any = load_model(dev, "cpu")
    assert model.latent_shape == (4, 128, 128)  # as the pipeline's: 1024 pixels for an autoencoder of 8 x 8
    assert model.latent_shape[1] == load_pipeline(dev).default_sample_size
    assert model.size_factor == 4
    with pytest.raises(ValueError, match=re.escape("multiples of 4 pixels, got (16, 18)")):
        load_model(dev, "cpu", image_size=(16, 18))


def test_prompts_are_encoded_as_in_the_pipeline(dev: Path) -> None:
    """CLIP may lose the end of a prompt, which T5 reads."""
    pipeline, model = load_pipeline(dev), load_model(dev, "cpu")
    prompts = [*PROMPTS, "", "a dog and a rabbit on the moon, " * 5]
    assert len(pipeline.tokenizer(prompts[-1])["input_ids"]) > pipeline.tokenizer.model_max_length
    with torch.no_grad():
        hidden, pooled, _ = pipeline.encode_prompt(prompts)
    ours = model.encode(prompts)
    assert ours["encoder_hidden_states"].shape == (4, 512, 48)
    torch.testing.assert_close(ours["encoder_hidden_states"], hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["pooled_projections"], pooled, rtol=1e-4, atol=1e-5)
    assert model.text_features(ours).shape == (4, model.text_width)


def test_models_that_read_another_image(dev: Path) -> None:
    pipeline = load_pipeline(dev)
    config = dict(pipeline.transformer.config) | {"in_channels": 32, "out_channels": 16}  # as FLUX.1 Depth and Canny
    pipeline.register_modules(transformer=FluxTransformer2DModel.from_config(config))
    with pytest.raises(ValueError, match=r"reads 32 channels and a latent has 16: models for inpainting, depth or ed"):
        TextToImageModel.from_pipeline(pipeline)
