"""What is special about Stable Diffusion 3: three text encoders, of which T5 may be left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.architecture import find_architecture
from dpok_gym.samplers import DenoisingProcess
from dpok_gym.testing import MAX_TOKENS
from tests.support import assert_same

WITHOUT_T5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("stable-diffusion-3")


def test_t5_is_left_out_of_a_folder_that_has_it(folder: Path) -> None:
    """As diffusers does, and with other images than with T5."""
    model = load_model(folder, "cpu", without_t5=True)
    assert model.options == {"without_t5": True}
    live = TextToImageModel.from_pipeline(DiffusionPipeline.from_pretrained(folder, **WITHOUT_T5))
    processes = [DenoisingProcess(each, "ode", 3) for each in (model, live)]
    assert processes[0].config == processes[1].config
    x, timesteps = torch.randn(1, *model.latent_shape), torch.tensor([900.0])
    ours, theirs = (each.predict(x, timesteps, each.encode(["a dog"])) for each in (model, live))
    assert_same(ours, theirs)
    whole = load_model(folder, "cpu")
    assert (whole.predict(x, timesteps, whole.encode(["a dog"])) - ours).abs().max() > 1e-3
    with pytest.raises(ValueError, match="without_t5"):
        processes[0].config.check_equal(DenoisingProcess(whole, "ode", 3).config)


def test_a_folder_without_t5_needs_no_option(tiny_folder: Callable[[str], Path]) -> None:
    """Nor has the model of a live pipeline one, so that it is the same model when it is loaded again."""
    folder = tiny_folder("stable-diffusion-3-no-t5")
    live = TextToImageModel.from_pipeline(DiffusionPipeline.from_pretrained(folder, **WITHOUT_T5))
    assert live.options == load_model(folder, "cpu").options == {}


def test_size_without_t5(folder: Path) -> None:
    assert "text_encoder_3" in find_architecture(str(folder)).configs
    assert "text_encoder_3" not in find_architecture(str(folder), without_t5=True).configs
    assert "text_encoder_3" not in find_architecture("sd35", without_t5=True).configs


@pytest.mark.parametrize("name", ["stable-diffusion", "flux-dev"])
def test_a_family_that_needs_its_text_encoders(name: str, tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="has no T5 that it can do without: leave out without_t5"):
        load_model(tiny_folder(name), "cpu", without_t5=True)
    with pytest.raises(ValueError, match="has no T5 that it can do without"):
        find_architecture(str(tiny_folder(name)), without_t5=True)


@pytest.mark.parametrize("family", ["stable-diffusion-3", "stable-diffusion-3-no-t5"])
def test_prompts_are_encoded_as_in_the_pipeline(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """The last row of a model without T5 stands for 256 equal ones."""
    folder = tiny_folder(family)
    model: Any = load_model(folder, "cpu", long_prompts="truncate")
    pipe: Any = DiffusionPipeline.from_pretrained(folder, **({} if model.text_encoder_3 else WITHOUT_T5))
    prompts = ["a green rabbit.", "", "dog " * MAX_TOKENS, "dog " * 300]
    ours = model.encode(prompts)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None)
    hidden = ours["encoder_hidden_states"]
    if model.text_encoder_3 is None:
        hidden = torch.cat([hidden[:, :-1], hidden[:, -1:].expand(-1, 256, -1)], dim=1)
    assert hidden.shape == (4, MAX_TOKENS + 256, model.denoiser.config.joint_attention_dim)
    torch.testing.assert_close(hidden, embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["pooled_projections"], pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.text_features(ours), pooled, rtol=1e-4, atol=1e-5)


def test_t5_reads_what_clip_leaves_out(tiny_folder: Callable[[str], Path]) -> None:
    prompt = "dog " * 255  # and an end
    model: Any = load_model(tiny_folder("stable-diffusion-3"), "cpu")
    model.check_prompts([prompt])
    with pytest.raises(ValueError, match=r"has 257 tokens and the model .* at most 256 "):
        model.check_prompts([prompt + "dog"])
    with pytest.raises(ValueError, match=rf"has 257 tokens and the model .* at most {MAX_TOKENS} "):
        load_model(tiny_folder("stable-diffusion-3-no-t5"), "cpu").check_prompts([prompt])


@pytest.mark.parametrize("size", [(16, 32), (64, 64)])
def test_noise_levels_that_depend_on_the_size(tiny_folder: Callable[[str], Path], size: tuple[int, int]) -> None:
    """The published schedulers have one shift for all sizes; with another one, the pipeline counts the patches."""
    pipe: Any = DiffusionPipeline.from_pretrained(tiny_folder("stable-diffusion-3-no-t5"), **WITHOUT_T5)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    model = TextToImageModel.from_pipeline(pipe, image_size=size)
    table = DenoisingProcess(model, "ode", 3).table
    pipe.set_progress_bar_config(disable=True)
    pipe("dog", height=size[0], width=size[1], num_inference_steps=3, output_type="latent")
    assert table.timesteps.equal(pipe.scheduler.timesteps)
    torch.testing.assert_close(table.noise, pipe.scheduler.sigmas[:-1], rtol=0, atol=1e-7)


def test_the_largest_image(folder: Path) -> None:
    """The denoiser has 16 x 16 positions, for patches of 4 pixels; the pipeline's own error is about these too."""
    model = load_model(folder, "cpu", image_size=64)
    process = DenoisingProcess(model, "ode", 1)
    x_T = torch.randn(1, *model.latent_shape)
    (step,) = process.denoise(x_T, process.encode(["dog"]), lambda _: torch.zeros_like(x_T))
    assert step.next_latents.shape == (1, 4, 32, 32)
    with pytest.raises(ValueError, match="multiples of 4 pixels, got 68; at most 64"):
        load_model(folder, "cpu", image_size=68)
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`"):
        pipe("dog", height=80, width=80, num_inference_steps=1)
