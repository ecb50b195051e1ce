"""Loading and its errors, prompts, guidance and decoding, with diffusers' own classes as the reference."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dpok_gym.models import MODELS, TextToImageModel, load_model
from dpok_gym.models.loading import load_networks
from dpok_gym.models.stable_diffusion import StableDiffusion
from dpok_gym.shapes import WEIGHTS

PROMPTS = ["a red circle", "a star", "two blue squares"]
TIMESTEPS = torch.tensor([981, 501, 1])


@pytest.fixture(scope="module")
def tiny(tiny_sd_folder: Path) -> TextToImageModel:
    return load_model(str(tiny_sd_folder), "cpu")


@pytest.fixture(scope="module")
def shapes() -> TextToImageModel:
    return load_model("shapes", "cpu")


@pytest.fixture
def fresh(tiny_sd_folder: Path) -> StableDiffusion:
    """A copy of its own, with an empty cache."""
    return load_networks("fresh", str(tiny_sd_folder), "cpu", torch.float32, None, None, False, None)


@pytest.fixture
def broken(tiny_sd_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be broken."""
    return shutil.copytree(tiny_sd_folder, tmp_path / "model")


def latents(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_loaded_once(tiny: TextToImageModel, tiny_sd_folder: Path) -> None:
    assert load_model(str(tiny_sd_folder), "cpu") is tiny
    assert load_model(tiny_sd_folder, "cpu", "float32") is tiny
    assert load_model(tiny_sd_folder, "cpu", "bfloat16") is not tiny
    if not torch.cuda.is_available():
        assert load_model(tiny_sd_folder) is tiny


def test_what_a_model_says_of_itself(tiny: TextToImageModel, shapes: TextToImageModel) -> None:
    assert (tiny.latent_shape, tiny.image_shape) == ((4, 8, 8), (16, 16))
    assert (shapes.latent_shape, shapes.image_shape) == ((4, 8, 8), (64, 64))
    assert (shapes.name, MODELS["shapes"]) == ("shapes", str(WEIGHTS))
    for model in (tiny, shapes):
        assert isinstance(model.denoiser, UNet2DConditionModel)
        own = [value for name, value in model.denoiser.named_parameters() if "lora" not in name]  # of other tests
        assert not any(value.requires_grad for value in own)
        assert not model.denoiser.training
        assert model.device == torch.device("cpu")


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
        load_model("shapes", device)


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got 'float64'"):
        load_model("shapes", "cpu", "float64")


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a local folder.*hf download.*model='shapes'"):
        load_model(str(tmp_path / "nothing"), "cpu")


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no diffusers pipeline: it has no model_index\.json") as caught:
        load_model(str(tmp_path), "cpu")
    assert str(tmp_path) in str(caught.value)


def assert_cannot_be_loaded(folder: Path, *parts: str) -> None:
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_model(str(folder), "cpu")
    for part in (str(folder), "whole diffusers pipeline", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "unet", "vae", "scheduler"])
def test_missing_part(broken: Path, part: str) -> None:
    shutil.rmtree(broken / part)
    assert_cannot_be_loaded(broken)


@pytest.mark.parametrize(
    "file",
    [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_truncated_weights(broken: Path, file: str, kept: float) -> None:
    path = broken / file
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert_cannot_be_loaded(broken)


@pytest.mark.parametrize("file", ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"])
def test_missing_weights(broken: Path, file: str) -> None:
    path = broken / f"{file}.safetensors"
    weights = load_file(path)
    del weights[min(weights)]
    save_file(weights, path, {"format": "pt"})
    assert_cannot_be_loaded(broken)


def test_weights_of_another_size(broken: Path) -> None:
    path = broken / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 48}))
    assert_cannot_be_loaded(broken)


def test_tokenizer_without_a_vocabulary(broken: Path) -> None:
    folder = broken / "tokenizer"
    words = json.loads((folder / "tokenizer_config.json").read_text())
    for file in folder.iterdir():
        file.unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    assert_cannot_be_loaded(broken, "vocabulary")


@pytest.mark.parametrize("content", ["", "{}", "[1"])
def test_damaged_index(broken: Path, content: str) -> None:
    (broken / "model_index.json").write_text(content)
    assert_cannot_be_loaded(broken)


def test_unsupported_pipeline(broken: Path) -> None:
    path = broken / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "FluxPipeline"}))
    supported = "only StableDiffusionPipeline and StableDiffusionXLPipeline are supported"
    assert_cannot_be_loaded(broken, "FluxPipeline", supported)


def test_tokenize(tiny: TextToImageModel, shapes: TextToImageModel) -> None:
    for model in (tiny, shapes):
        tokens = model.tokenize([*PROMPTS, ""])
        assert (tokens.shape, tokens.dtype) == ((4, model.max_tokens), torch.int64)
        assert tokens.min() >= 0
        assert tokens.max() < model.vocab_size
        assert len(torch.unique(tokens, dim=0)) == 4
    assert tiny.tokenize(["a dragon"]).shape == (1, tiny.max_tokens)  # the embedded model's words are its own matter


def test_prompts_that_cannot_be_read(tiny: TextToImageModel, shapes: TextToImageModel) -> None:
    with pytest.raises(ValueError, match="'shapes' cannot read 'big', 'dragon' in the prompt 'a big red dragon'"):
        shapes.tokenize(["a red circle", "a big red dragon"])
    longest = "a " * (shapes.max_tokens - 2)
    assert shapes.tokenize([longest]).shape == (1, shapes.max_tokens)
    for model in (tiny, shapes):
        n_words = model.max_tokens - 1
        with pytest.raises(ValueError, match=f"{n_words + 2} tokens and the model .* reads at most {n_words + 1} "):
            model.tokenize(["a star", "a " * n_words])


def test_encode_equals_diffusers(tiny: TextToImageModel, tiny_sd_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    ours = tiny.encode(tiny.tokenize(PROMPTS))["encoder_hidden_states"]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_encode_keeps_what_was_met_last(fresh: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpok_gym.models.base.CACHED_PROMPTS", 2)
    encoded: list[int] = []
    plain = fresh._encode
    monkeypatch.setattr(fresh, "_encode", lambda tokens: encoded.append(len(tokens)) or plain(tokens))
    tokens = fresh.tokenize(PROMPTS)
    separate = torch.stack([plain(row[None])["encoder_hidden_states"][0] for row in tokens])

    for order, n_encoded in (
        ([0], 1),
        ([0, 0], None),  # known
        ([1, 0, 1, 0], 1),  # only the new one, once
        ([2, 2, 0], 1),
        ([2, 0], None),
        ([1], 1),  # had to go
        ([0, 1, 2], 1),  # more at a time than are kept
    ):
        encoded.clear()
        conditioning = fresh.encode(tokens[order])["encoder_hidden_states"]
        torch.testing.assert_close(conditioning, separate[order], rtol=1e-5, atol=1e-5)
        assert encoded == ([] if n_encoded is None else [n_encoded]), order
        assert len(fresh._encoded) <= 2


def test_encoding_is_the_callers_own(fresh: StableDiffusion) -> None:
    tokens = fresh.tokenize(PROMPTS)
    first = fresh.encode(tokens)["encoder_hidden_states"]
    kept = first.clone()
    first.zero_()
    assert torch.equal(fresh.encode(tokens)["encoder_hidden_states"], kept)


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 7.5])
def test_guidance(tiny: TextToImageModel, guidance_scale: float) -> None:
    conditioning = tiny.encode(tiny.tokenize(PROMPTS))
    empty = tiny.encode(tiny.tokenize([""] * 3))
    with torch.no_grad():
        ours = tiny.predict(latents(), TIMESTEPS, conditioning, guidance_scale)
        told = tiny.denoiser(latents(), TIMESTEPS, **conditioning).sample
        untold = tiny.denoiser(latents(), TIMESTEPS, **empty).sample
    if guidance_scale == 1:
        assert torch.equal(ours, told)
    torch.testing.assert_close(ours, untold + guidance_scale * (told - untold), rtol=1e-4, atol=3e-5)
    assert not torch.allclose(told, untold, atol=1e-4)  # otherwise there would be nothing to see


def test_predict_with_another_denoiser(tiny: TextToImageModel, tiny_v_folder: Path) -> None:
    other = UNet2DConditionModel.from_pretrained(tiny_v_folder, subfolder="unet")
    with torch.no_grad():
        other.conv_out.weight.mul_(2)
        conditioning = tiny.encode(tiny.tokenize(PROMPTS))
        ours = tiny.predict(latents(), TIMESTEPS, conditioning, denoiser=other)
        assert torch.equal(ours, other(latents(), TIMESTEPS, **conditioning).sample)
        assert not torch.allclose(ours, tiny.predict(latents(), TIMESTEPS, conditioning))


def test_decode(tiny: TextToImageModel, tiny_sd_folder: Path) -> None:
    pictures = tiny.decode(30 * latents())
    assert (pictures.shape, pictures.dtype) == ((3, 3, 16, 16), torch.float32)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    with torch.no_grad():
        expected = pipeline.vae.decode(latents() / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(expected, output_type="pt")
    torch.testing.assert_close(tiny.decode(latents()), expected, rtol=1e-4, atol=1e-5)


def test_decode_is_differentiable(fresh: StableDiffusion) -> None:
    fresh.vae.double()
    direction = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    weights = torch.randn(3, 3, 16, 16)  # of a reward that is linear in the pictures
    start = latents().double().requires_grad_()
    pictures = fresh.decode(start)
    (gradient,) = torch.autograd.grad((weights * pictures).sum(), start)
    with torch.no_grad():
        ahead, behind = (fresh.decode(start + step * direction) for step in (1e-3, -1e-3))
    slope = (weights * (ahead - behind)).sum().item() / 2e-3
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-2)
    assert all(value.grad is None for value in fresh.vae.parameters())


def test_decode_keeps_no_graph_for_plain_latents(tiny: TextToImageModel) -> None:
    assert torch.is_grad_enabled()
    pictures = tiny.decode(latents())
    assert not pictures.requires_grad
    assert pictures.grad_fn is None


def test_half_precision(tiny: TextToImageModel, tiny_sd_folder: Path) -> None:
    half = load_model(str(tiny_sd_folder), "cpu", "bfloat16")
    assert next(half.denoiser.parameters()).dtype == torch.bfloat16
    outputs, pictures = [], []
    for model in (tiny, half):
        conditioning = model.encode(model.tokenize(PROMPTS))
        with torch.no_grad():
            outputs.append(model.predict(latents(), TIMESTEPS, conditioning, 3.0))
        pictures.append(model.decode(latents()))
    assert outputs[1].dtype == pictures[1].dtype == torch.float32
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.1, atol=0.1)
    torch.testing.assert_close(pictures[1], pictures[0], rtol=0.05, atol=0.05)


def test_shipped_model_is_a_plain_diffusers_pipeline() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(PROMPTS[:2], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 64, 64, 3)
    assert np.isfinite(images).all()
