"""Live diffusers pipelines made into models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor, nn

from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.lora import LoRA
from dpok_gym.models.stable_diffusion import StableDiffusion
from dpok_gym.models.stable_diffusion_xl import StableDiffusionXL
from dpok_gym.samplers.process import DenoisingProcess
from tests.support import assert_same

PROMPTS = ["a green rabbit.", "dog"]
T = 3


@pytest.fixture(params=["tiny_sd_folder", "tiny_v_folder", "tiny_xl_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def pipe(folder: Path) -> Any:
    return load_pipeline(folder)


def load_pipeline(folder: Path, **kwargs: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def networks(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def latents_of(model: TextToImageModel) -> Tensor:
    return torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def draw(model: TextToImageModel, guidance_scale: float = 3.0) -> Tensor:
    """Draws the prompts with our sampler, from fixed noise."""
    process = DenoisingProcess(model, num_inference_steps=T, guidance_scale=guidance_scale)
    generator = torch.Generator().manual_seed(5)
    latents = latents_of(model)
    with torch.no_grad():
        for step in process.denoise(  # noqa: B007 (the last one is wanted)
            latents, process.encode(PROMPTS), lambda _: torch.randn(latents.shape, generator=generator)
        ):
            pass
        return model.decode(step.next_latents)


def draw_with_diffusers(pipeline: Any, model: TextToImageModel, **kwargs: Any) -> Tensor:
    """Draws the same with a pipeline as it is, its scheduler included."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 3.0, "eta": 1.0, "num_inference_steps": T, "output_type": "pt"} | kwargs
    generator = torch.Generator().manual_seed(5)
    latents = latents_of(model).to(pipeline.unet.dtype)
    return pipeline(PROMPTS, latents=latents, generator=generator, **settings).images


# --- From a pipeline


@pytest.mark.slow
def test_a_live_pipeline_draws_as_its_folder(folder: Path, pipe: Any) -> None:
    model, loaded = TextToImageModel.from_pipeline(pipe), load_model(folder, "cpu")
    assert type(model) is type(loaded)
    assert (model.latent_shape, model.image_shape, model.text_width) == (
        loaded.latent_shape,
        loaded.image_shape,
        loaded.text_width,
    )
    assert (model.name, model.options, model.device) == (str(folder), {}, torch.device("cpu"))
    assert dict(model.scheduler_config) == dict(loaded.scheduler_config)
    assert_same(model.encode(PROMPTS), loaded.encode(PROMPTS))
    assert_same(draw(model), draw(loaded))


@pytest.mark.slow
def test_a_live_pipeline_shares_its_networks(pipe: Any) -> None:
    before = {name: copy.deepcopy(dict(part.state_dict())) for name, part in networks(pipe).items()}
    pointers = {
        name: {key: value.data_ptr() for key, value in part.named_parameters()} for name, part in networks(pipe).items()
    }
    model: Any = TextToImageModel.from_pipeline(pipe)
    assert model.denoiser is pipe.unet
    assert model.vae is pipe.vae
    assert model.text_encoder is pipe.text_encoder
    assert model.tokenizer is pipe.tokenizer
    if isinstance(model, StableDiffusionXL):
        assert (model.text_encoder_2, model.tokenizer_2) == (pipe.text_encoder_2, pipe.tokenizer_2)
    for name, part in networks(pipe).items():
        assert not part.training
        assert not any(value.requires_grad for value in part.parameters())
        assert_same(dict(part.state_dict()), before[name])
        # Four-dimensional weights move when their memory layout changes; all others are where they were.
        unmoved = {key: value.data_ptr() for key, value in part.named_parameters() if value.ndim != 4}
        assert unmoved.items() <= pointers[name].items()


def test_a_lora_that_learns_goes_on_learning(tiny_sd_folder: Path) -> None:
    """It is off in the pipeline between the calls of the agent that it belongs to."""
    pipe = load_pipeline(tiny_sd_folder)
    lora = LoRA(pipe.unet, 2, StableDiffusion.lora_layers["attention"])
    TextToImageModel.from_pipeline(pipe)
    assert all(value.requires_grad for value in lora.parameters.values())
    assert not any(value.requires_grad for name, value in pipe.unet.named_parameters() if ".lora_" not in name)


@pytest.mark.slow
def test_a_live_pipeline_goes_on_drawing(folder: Path, pipe: Any) -> None:
    model = load_model(folder, "cpu")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    expected = draw_with_diffusers(pipe, model)
    live = TextToImageModel.from_pipeline(pipe)
    lora = LoRA(live.denoiser, 2, live.lora_layers["all"])
    with torch.no_grad():
        for value in lora.parameters.values():
            value.normal_()
    with lora.enabled():
        draw(live)
    torch.testing.assert_close(draw_with_diffusers(pipe, model), expected, rtol=1e-4, atol=1e-5)
    TextToImageModel.from_pipeline(pipe)  # again: what training left in it is off


@pytest.mark.slow
def test_size_and_negative_prompt_of_a_live_pipeline(folder: Path, pipe: Any) -> None:
    model = TextToImageModel.from_pipeline(pipe, image_size=(16, 32), negative_prompt="a dog")
    loaded = load_model(folder, "cpu", image_size=(16, 32), negative_prompt="a dog")
    assert model.options == loaded.options == {"image_size": [16, 32], "negative_prompt": "a dog"}
    assert model.denoiser is pipe.unet
    assert_same(draw(model), draw(loaded))
    with pytest.raises(ValueError, match="multiples of 2 pixels, got 3"):
        TextToImageModel.from_pipeline(pipe, image_size=3)


@pytest.mark.slow
def test_precision_of_a_live_pipeline(folder: Path) -> None:
    pipe = load_pipeline(folder, torch_dtype=torch.bfloat16)
    model = TextToImageModel.from_pipeline(pipe)
    assert model.options == {"dtype": "bfloat16"}
    assert {part.dtype for part in networks(pipe).values()} == {torch.bfloat16}
    assert_same(draw(model), draw(load_model(folder, "cpu", "bfloat16")))


@pytest.mark.slow
def test_xl_in_float16_keeps_the_pipelines_autoencoder(tiny_xl_folder: Path) -> None:
    pipe = load_pipeline(tiny_xl_folder, torch_dtype=torch.float16)
    model: Any = TextToImageModel.from_pipeline(pipe)
    assert (model.vae.dtype, pipe.vae.dtype, model.options) == (torch.float32, torch.float16, {"dtype": "float16"})
    images = draw(model)
    assert images.isfinite().all()
    torch.testing.assert_close(draw_with_diffusers(model.to_pipeline(), model).float(), images, rtol=0.02, atol=0.02)
    pipe.scheduler = model.to_pipeline().scheduler
    torch.testing.assert_close(draw_with_diffusers(pipe, model).float(), images, rtol=0.02, atol=0.02)


def test_name_of_a_pipeline_that_was_never_saved(tiny_sd_folder: Path) -> None:
    parts = dict(load_pipeline(tiny_sd_folder).components)
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    assert TextToImageModel.from_pipeline(pipe).name == "pipeline"


@pytest.mark.slow
def test_subclasses_of_pipelines_and_models(tiny_sd_folder: Path, tiny_xl_folder: Path) -> None:
    class MyPipeline(StableDiffusionPipeline):
        pass

    parts = dict(load_pipeline(tiny_sd_folder).components)
    mine = MyPipeline(**parts, requires_safety_checker=False)
    assert type(TextToImageModel.from_pipeline(mine)) is StableDiffusion
    assert type(StableDiffusion.from_pipeline(mine)) is StableDiffusion
    xl = load_pipeline(tiny_xl_folder)
    assert type(StableDiffusionXL.from_pipeline(xl)) is StableDiffusionXL
    with pytest.raises(ValueError, match="a MyPipeline is made into a StableDiffusion, not into a StableDiffusionXL"):
        StableDiffusionXL.from_pipeline(mine)


def test_pipelines_that_are_not_supported(tiny_sd_folder: Path) -> None:
    parts = dict(load_pipeline(tiny_sd_folder).components)
    other = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="it is a StableDiffusionImg2ImgPipeline, and only StableDiff"):
        TextToImageModel.from_pipeline(other)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae", "scheduler"])
def test_pipelines_without_a_part(tiny_sd_folder: Path, part: str) -> None:
    pipe = load_pipeline(tiny_sd_folder)
    setattr(pipe, part, None)
    with pytest.raises(ValueError, match=f"the pipeline has no {part}"):
        TextToImageModel.from_pipeline(pipe)


def test_xl_without_its_first_text_encoder(tiny_xl_folder: Path) -> None:
    """As the refiner is published."""
    pipe = load_pipeline(tiny_xl_folder)
    pipe.text_encoder = pipe.tokenizer = None
    with pytest.raises(ValueError, match=r"the pipeline has no (text_encoder|tokenizer)"):
        TextToImageModel.from_pipeline(pipe)


def test_offloaded_pipelines(tiny_sd_folder: Path) -> None:
    from accelerate import cpu_offload_with_hook

    pipe = load_pipeline(tiny_sd_folder)
    cpu_offload_with_hook(pipe.unet, "cpu")  # what enable_model_cpu_offload does for each network
    with pytest.raises(ValueError, match=r"the pipeline moves its unet between devices .*make it without"):
        TextToImageModel.from_pipeline(pipe)


@pytest.mark.slow
def test_pipelines_with_an_active_lora(tiny_sd_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_sd_folder, "cpu")
    lora = LoRA(model.denoiser, 2, model.lora_layers["attention"])
    with torch.no_grad():
        for value in lora.parameters.values():
            value.normal_(std=0.3)
    with lora.enabled():
        expected = draw(model)
    lora.save(tmp_path, model.lora_prefix)
    pipe = load_pipeline(tiny_sd_folder)
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"a LoRA is active in the pipeline's unet: call pipe\.fuse_lora\(\)"):
        TextToImageModel.from_pipeline(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(TextToImageModel.from_pipeline(pipe)), expected, rtol=1e-4, atol=1e-4)


def test_scheduler_of_a_live_pipeline(tiny_sd_folder: Path) -> None:
    """A user's other sampler of the same diffusion changes nothing; one of another diffusion is refused."""
    pipe = load_pipeline(tiny_sd_folder)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert_same(draw(TextToImageModel.from_pipeline(pipe)), draw(load_model(tiny_sd_folder, "cpu")))
    pipe.scheduler = LCMScheduler()  # made by its class, its config has no class name
    with pytest.raises(ValueError, match="the model comes with a LCMScheduler, whose diffusion is not"):
        draw(TextToImageModel.from_pipeline(pipe))
