"""PixArt-Sigma against diffusers' own pipeline, and what only this family has."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PixArtSigmaPipeline

from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.pixart_sigma import MAX_TOKENS
from tests.support import make_process

PROMPTS = ["  A Green Rabbit. ", "dog"]
T = 3


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("pixart-sigma")


@pytest.fixture(autouse=True)
def _no_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline finds no beautifulsoup4, wherever the tests run."""
    monkeypatch.setattr("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma.is_bs4_available", lambda: False)


def make_pipeline(folder: Path) -> Any:
    pipe: Any = PixArtSigmaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def test_the_image_is_that_of_a_plain_call(folder: Path) -> None:
    """With capitals and spaces in the prompts, and the pipeline's own treatment of them."""
    process = make_process(folder, T, guidance_scale=4.5)
    latents = torch.randn(2, 4, 8, 8)
    ours, theirs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    with torch.no_grad():
        steps = process.denoise(latents, process.encode(PROMPTS), lambda _: torch.randn(2, 4, 8, 8, generator=ours))
        images = process.model.decode(list(steps)[-1].next_latents)
    pipe = make_pipeline(folder)
    pipe.scheduler = DDIMScheduler.from_config(process.model.scheduler_config, clip_sample=False)
    # Its own sizes are those of the published models only.
    sizes = {"height": 16, "width": 16, "use_resolution_binning": False}
    drawn = pipe(
        PROMPTS, latents=latents, generator=theirs, eta=1.0, num_inference_steps=T, output_type="pt", **sizes
    ).images
    torch.testing.assert_close(images, drawn, rtol=1e-4, atol=1e-4)


def test_the_network_may_have_its_old_name(folder: Path, tmp_path: Path) -> None:
    """The published configs call the transformer by the class that it had when they were written."""
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    for file, name in (("model_index.json", "transformer"), ("transformer/config.json", "_class_name")):
        content = json.loads((copied / file).read_text())
        content[name] = ["diffusers", "Transformer2DModel"] if name == "transformer" else "Transformer2DModel"
        (copied / file).write_text(json.dumps(content))
    pipe = make_pipeline(copied)
    plain = make_pipeline(folder).transformer.state_dict()
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
