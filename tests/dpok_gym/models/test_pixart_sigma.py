"""PixArt-Sigma against diffusers' own pipeline, and what only this family has."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PixArtSigmaPipeline
from peft import PeftModel
from torch import Tensor

from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.lora import LoRA
from dpok_gym.models.lora_files import write_peft
from dpok_gym.models.pixart_sigma import MAX_TOKENS
from dpok_gym.samplers.process import DenoisingProcess
from dpok_gym.testing import save_tiny_pipeline
from tests.support import make_process

PROMPTS = ["  A Green Rabbit. ", "dog"]
T = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pixart-sigma", "pixart-sigma")


@pytest.fixture(autouse=True)
def _no_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline finds no beautifulsoup4, wherever the tests run."""
    monkeypatch.setattr("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma.is_bs4_available", lambda: False)


def make_pipeline(folder: Path) -> Any:
    pipe: Any = PixArtSigmaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def x_T(*size: int) -> Tensor:
    return torch.randn(2, *(size or (4, 8, 8)), generator=torch.Generator().manual_seed(0))


def our_images(process: DenoisingProcess, latents: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        steps = process.denoise(
            latents, process.encode(PROMPTS), lambda _: torch.randn(latents.shape, generator=generator)
        )
        return process.model.decode(list(steps)[-1].next_latents)


def their_images(pipe: Any, process: DenoisingProcess, latents: Tensor, **kwargs: Any) -> Tensor:
    """Draws with the pipeline, and leaves its own treatment of prompts as it is."""
    pipe.scheduler = DDIMScheduler.from_config(process.model.scheduler_config, clip_sample=False)
    height, width = process.model.image_shape
    return pipe(
        PROMPTS,
        latents=latents,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(5),
        eta=1.0,
        num_inference_steps=T,
        guidance_scale=process.config.guidance_scale,
        use_resolution_binning=False,
        output_type="pt",
        **kwargs,
    ).images


def test_prompts_are_encoded_as_in_the_pipeline(folder: Path) -> None:
    prompts = [*PROMPTS, "", "MOON " * MAX_TOKENS, "a moon, 3 dogs\tand é"]
    model: Any = load_model(folder, "cpu", negative_prompt="A Dog ", long_prompts="truncate")
    embeds, mask, negative, negative_mask = make_pipeline(folder).encode_prompt(prompts, negative_prompt="A Dog ")
    ours, empty = model.encode(prompts), model.unconditional()
    torch.testing.assert_close(ours["encoder_hidden_states"], embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(empty["encoder_hidden_states"], negative[:1], rtol=1e-4, atol=1e-4)
    assert torch.equal(ours["encoder_attention_mask"], mask)
    assert torch.equal(empty["encoder_attention_mask"], negative_mask[:1])
    assert mask.sum(dim=1)[2:4].tolist() == [1, MAX_TOKENS]


@pytest.mark.parametrize("negative_prompt", [None, "a dog"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_the_sampler_is_that_of_diffusers(folder: Path, guidance_scale: float, negative_prompt: str | None) -> None:
    process = make_process(folder, T, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    negative = {} if negative_prompt is None else {"negative_prompt": [negative_prompt] * 2}
    theirs = their_images(make_pipeline(folder), process, x_T(), **negative)
    torch.testing.assert_close(our_images(process, x_T()), theirs, rtol=1e-4, atol=1e-4)


def test_other_sizes(folder: Path) -> None:
    process = make_process(folder, T, image_size=(16, 24), guidance_scale=3.0)
    latents = x_T(*process.model.latent_shape)
    assert latents.shape == (2, 4, 8, 12)
    theirs = their_images(make_pipeline(folder), process, latents)
    torch.testing.assert_close(our_images(process, latents), theirs, rtol=1e-4, atol=1e-4)
    # The autoencoder could draw 18 pixels, but 9 rows of latents are no patches of 2.
    with pytest.raises(ValueError, match=r"multiples of 4 pixels, got 18"):
        load_model(folder, "cpu", image_size=18)


def test_to_pipeline(folder: Path) -> None:
    process = make_process(folder, T, guidance_scale=3.0)
    pipe: Any = process.model.to_pipeline()
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(their_images(pipe, process, x_T()), our_images(process, x_T()), rtol=1e-4, atol=1e-4)


def test_the_network_may_have_its_old_name(folder: Path, tmp_path: Path) -> None:
    """The published configs call the transformer by the class that it had when they were written."""
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    for file, name in (("model_index.json", "transformer"), ("transformer/config.json", "_class_name")):
        content = json.loads((copied / file).read_text())
        content[name] = ["diffusers", "Transformer2DModel"] if name == "transformer" else "Transformer2DModel"
        (copied / file).write_text(json.dumps(content))
    pipe = make_pipeline(copied)
    plain = load_model(folder, "cpu").denoiser.state_dict()
    for model in (load_model(copied, "cpu"), TextToImageModel.from_pipeline(pipe)):
        found = model.denoiser.state_dict()
        assert plain.keys() == found.keys()
        assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_text_features_leave_out_the_filling(folder: Path) -> None:
    model: Any = load_model(folder, "cpu")
    conditioning = model.encode(["a dog"])
    features = model.text_features(conditioning)
    n_tokens = int(conditioning["encoder_attention_mask"].sum())
    expected = conditioning["encoder_hidden_states"][:, :n_tokens].mean(dim=1)
    assert features.shape == (1, model.text_width)
    torch.testing.assert_close(features, expected)


def test_long_prompts(folder: Path) -> None:
    model = load_model(folder, "cpu")
    model.check_prompts(["MOON " * (MAX_TOKENS - 1)])
    with pytest.raises(ValueError, match=f"has {MAX_TOKENS + 1} tokens and the model .* at most {MAX_TOKENS} "):
        model.check_prompts(["MOON " * MAX_TOKENS])


def test_autoencoder_in_a_safe_precision(folder: Path) -> None:
    model: Any = load_model(folder, "cpu", "float16")
    assert (model.denoiser.dtype, model.vae.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_lora_goes_into_the_pipeline_through_peft(folder: Path, layers: str, tmp_path: Path) -> None:
    process = make_process(folder, T, guidance_scale=3.0)
    lora = LoRA(process.model.denoiser, 2, process.model.lora_layers[layers])
    with torch.no_grad():
        for value in lora.parameters.values():
            value.normal_(std=0.3)
    with lora.enabled():
        ours = our_images(process, x_T())
    assert not torch.allclose(ours, our_images(process, x_T()), atol=1e-3)
    write_peft(lora.state_dict(), tmp_path, None, {})
    pipe = make_pipeline(folder)
    assert not hasattr(pipe, "load_lora_weights")  # else documentation and exports should name it
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, tmp_path).merge_and_unload()
    torch.testing.assert_close(their_images(pipe, process, x_T()), ours, rtol=1e-4, atol=1e-4)


def test_schedulers_of_another_kind(folder: Path) -> None:
    pipe = make_pipeline(folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"PixArtSigmaPipeline was trained to predict noise"):
        TextToImageModel.from_pipeline(pipe)


def test_tokenizers_that_need_sentencepiece(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published model has its words in this format alone."""
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    (copied / "tokenizer" / "tokenizer.json").rename(copied / "tokenizer" / "spiece.model")
    monkeypatch.setattr("dpok_gym.models.pipelines.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"its tokenizer: its spiece\.model .*: pip install sentencepiece"):
        load_model(copied, "cpu")
