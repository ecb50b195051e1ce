"""Loading and its errors, prompts, guidance and decoding, with diffusers' own classes as the reference."""

import dataclasses
import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from dpok_gym.models import TextToImageModel, clear_model_cache, load_model
from dpok_gym.models.loading import ModelSpec
from dpok_gym.models.pipelines import model_from_source
from dpok_gym.models.registry import MODELS
from dpok_gym.models.token_counts import count_tokens
from dpok_gym.shapes import WEIGHTS
from dpok_gym.shapes.scenes import render, sample_scenes
from dpok_gym.testing import save_tiny_pipeline
from tests.support import real_clip_tokenizer

PROMPTS = ["a red circle", "a star", "two blue squares"]
TIMESTEPS = torch.tensor([981, 501, 1])


@pytest.fixture(scope="module")
def tiny(tiny_sd_folder: Path) -> TextToImageModel:
    return load_model(str(tiny_sd_folder), "cpu")


@pytest.fixture(scope="module")
def shapes() -> TextToImageModel:
    return load_model("shapes", "cpu")


@pytest.fixture
def fresh(tiny_sd_folder: Path) -> Any:
    """A copy of its own, with an empty cache."""
    return model_from_source("fresh", str(tiny_sd_folder), "cpu", torch.float32)


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
    assert load_model(tiny_sd_folder, "cpu", image_size=None, negative_prompt=None, config=None) is tiny
    larger = load_model(tiny_sd_folder, "cpu", image_size=32)
    assert larger is not tiny
    assert load_model(tiny_sd_folder, "cpu", image_size=np.int64(32)) is larger  # type: ignore[arg-type]
    assert load_model(tiny_sd_folder, "cpu", image_size=[16, 32]) is load_model(
        tiny_sd_folder, "cpu", image_size=(16, 32)
    )


def test_empty_cache(tiny_sd_folder: Path, fresh_models: Callable[[], None]) -> None:
    first, sized = load_model(tiny_sd_folder, "cpu"), load_model(tiny_sd_folder, "cpu", image_size=32)
    assert sized.denoiser is first.denoiser
    clear_model_cache()
    again = load_model(tiny_sd_folder, "cpu", image_size=32)
    assert again.denoiser is not first.denoiser
    assert again.denoiser is load_model(tiny_sd_folder, "cpu").denoiser
    assert torch.equal(again.denoiser.conv_in.weight, first.denoiser.conv_in.weight)


@pytest.mark.slow
def test_cache_keeps_no_memory_of_a_model(tiny_sd_folder: Path, fresh_models: Callable[[], None]) -> None:
    """Nothing of ours holds on to the networks once the cache is empty and the caller has forgotten them."""
    network = weakref.ref(load_model(tiny_sd_folder, "cpu").denoiser)
    load_model(tiny_sd_folder, "cpu", negative_prompt="dog").encode(["a"])
    assert network() is not None
    clear_model_cache()
    gc.collect()
    assert network() is None


def test_spec_tells_models_apart() -> None:
    spec = ModelSpec("name", "folder", "cpu")
    assert spec == ModelSpec("name", "folder", "cpu")
    changes: dict[str, Any] = {
        "name": "other",
        "source": "other",
        "device": "cuda:0",
        "dtype": "bfloat16",
        "image_size": (16, 32),
        "negative_prompt": "",
        "true_cfg_scale": 2.0,
        "long_prompts": "truncate",
        "timestep_spacing": "trailing",
        "revision": "v2",
        "variant": "fp16",
        "allow_pickle": True,
        "config": "folder",
        "vae": "folder",
        "without_t5": True,
        "vae_tiling": True,
        "compile": True,
        "shard": True,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(ModelSpec)}
    for name, value in changes.items():
        other = dataclasses.replace(spec, **{name: value})
        assert other != spec
        light = ("image_size", "negative_prompt", "true_cfg_scale", "long_prompts", "timestep_spacing")
        shares_networks = name in light
        assert (other.of_networks() == spec) == shares_networks
        # How the weights lie in memory is no matter of the model.
        assert other.options() == ({} if name in ("name", "source", "device", "shard") else {name: value})
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"  # type: ignore[misc]


def test_misspelt_arguments(tiny_sd_folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown argument of load_model 'negativ_prompt'; did you mean 'negative_pro"):
        load_model(tiny_sd_folder, "cpu", negativ_prompt="dog")
    with pytest.raises(ValueError, match=r"unknown argument of load_model 'size'; .*there are: allow_pickle, compile"):
        load_model(tiny_sd_folder, "cpu", size=16)


@pytest.mark.parametrize("name", ["negative_prompt", "revision", "variant"])
def test_arguments_that_are_texts(tiny_sd_folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a text or None, got \['dog'\]"):
        load_model(tiny_sd_folder, "cpu", **{name: ["dog"]})


@pytest.mark.slow
def test_what_a_model_says_of_itself(tiny: TextToImageModel, shapes: TextToImageModel) -> None:
    assert (tiny.latent_shape, tiny.image_shape) == ((4, 8, 8), (16, 16))
    assert (shapes.latent_shape, shapes.image_shape) == ((4, 8, 8), (64, 64))
    assert (shapes.name, MODELS.get("shapes")) == ("shapes", str(WEIGHTS))
    assert (shapes.options, shapes.lora_prefix, shapes.default_lora_rank) == ({}, "unet.", 8)
    assert set(shapes.lora_layers) == {"attention", "all"}
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
    with pytest.raises(ValueError, match="dtype must be one of 'float32', 'bfloat16', 'float16', got 'float64'"):
        load_model("shapes", "cpu", "float64")


@pytest.mark.parametrize("path", ["nothing.safetensors", "./nothing", "~/nothing", "a/b/c", "models/sd15", "here/"])
def test_paths_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """They are no hub ids: the hub is not in the message."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"there is no file or folder {path!r}; check the path")
    ) as caught:
        load_model(path, "cpu")
    assert "hf download" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder '/.*nothing'"):
        load_model(tmp_path / "nothing", "cpu")


def test_names_that_are_found_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpok_gym.models.pipelines.find_outage", lambda: "there is no network")
    with pytest.raises(FileNotFoundError, match=r"there is no network\)\. Did you mean 'shapes'\?"):
        load_model("shaps", "cpu")
    with pytest.raises(FileNotFoundError) as caught:
        load_model("sd15", "cpu")
    assert "could it be downloaded as 'stable-diffusion-v1-5/stable-diffusion-v1-5'" in str(caught.value)
    assert "pass model='/path/to/a/diffusers/folder' (--model)" in str(caught.value)
    assert "Did you mean" not in str(caught.value)


def test_the_hub_is_asked_if_it_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(source: str, file: str, **kwargs: Any) -> None:
        raise OSError(f"{source} {file} {kwargs}")

    monkeypatch.setattr("dpok_gym.models.pipelines.hf_hub_download", download)
    for outage, local in ((None, False), ("no network", True)):
        monkeypatch.setattr("dpok_gym.models.pipelines.find_outage", lambda outage=outage: outage)
        with pytest.raises(FileNotFoundError) as caught:
            load_model("a/b", "cpu", revision="v2")
        expected = f"a/b model_index.json {{'revision': 'v2', 'local_files_only': {local}}}"
        assert str(caught.value.__cause__) == expected
        assert ("no network" if local else expected) in str(caught.value)


def test_a_second_call_keeps_the_options_of_the_first(tiny_sd_folder: Path, fresh_models: Callable[[], None]) -> None:
    model: Any = load_model(str(tiny_sd_folder), "cpu", negative_prompt="ugly", long_prompts="truncate")
    other = model.with_options(image_size=32)
    assert other.options == {"negative_prompt": "ugly", "long_prompts": "truncate", "image_size": 32}
    assert (other.negative_prompt, other.long_prompts) == ("ugly", "truncate")
    assert other.with_options(negative_prompt="dark").image_shape == (32, 32)


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
    assert_cannot_be_loaded(broken, f"its {part}: there is no folder {broken / part}")


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


@pytest.mark.parametrize("named", [{}, {"_class_name": "MyScheduler"}, {"_class_name": "UNet2DConditionModel"}])
def test_scheduler_that_diffusers_does_not_have(broken: Path, named: dict[str, str]) -> None:
    path = broken / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["_class_name"]
    path.write_text(json.dumps(config | named))
    assert_cannot_be_loaded(broken, "scheduler_config.json names no scheduler of diffusers under _class_name")


def test_unsupported_pipeline(broken: Path) -> None:
    path = broken / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "QwenImagePipeline"}))
    assert_cannot_be_loaded(broken, "QwenImagePipeline", "StableDiffusionXLPipeline")


def test_prompts_that_can_be_read(tiny: TextToImageModel, shapes: TextToImageModel) -> None:
    for model in (tiny, shapes):
        model.check_prompts([*PROMPTS, ""])
    tiny.check_prompts(["a dragon"])  # the words that the embedded model knows are its own matter


def test_prompts_that_cannot_be_read(tiny: TextToImageModel, shapes: TextToImageModel) -> None:
    for read in (shapes.check_prompts, shapes.encode):
        with pytest.raises(ValueError, match="'shapes' cannot read 'big', 'dragon' in the prompt 'a big red dragon'"):
            read(["a red circle", "a big red dragon"])


@pytest.mark.parametrize("name", ["tiny", "shapes"])
def test_prompts_that_are_too_long(name: str, request: pytest.FixtureRequest) -> None:
    model: Any = request.getfixturevalue(name)
    most = model.tokenizer.model_max_length
    longest = "a " * (most - 2)
    model.check_prompts([longest])
    assert model.encode([longest])["encoder_hidden_states"].shape[:2] == (1, most)
    for read in (model.check_prompts, model.encode):
        with pytest.raises(
            ValueError, match=f"has {most + 1} tokens and the model .* at most {most} .*shorten it, or .*--long-prompts"
        ):
            read(["a star", "a " * (most - 1)])


@pytest.mark.parametrize("name", ["tiny", "shapes"])
def test_tokens_are_counted_by_words(name: str, request: pytest.FixtureRequest) -> None:
    """Equal to the tokenizer's own count, whatever the text."""
    tokenizer = request.getfixturevalue(name).tokenizer
    rng = np.random.default_rng(0)
    letters = list("ab c  d'\"sTé1.,-—!\t\n\u3000\x85\x1c猫🐈İ\u0301\u0958<|>")
    texts = ["".join(rng.choice(letters, rng.integers(0, 60))) for _ in range(500)]
    texts += ["", " ", "<|endoftext|>", "a<|startoftext|> b", "don't 12 x2"]
    assert list(count_tokens(tokenizer, texts)) == [len(ids) for ids in tokenizer(texts)["input_ids"]]


@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-xl"])
def test_truncated_prompts_equal_diffusers(family: Any, tmp_path: Path, fresh_models: Callable[[], None]) -> None:
    """With CLIP's real vocabulary; the cut may fall into a word, and the last token is the end of the text."""
    folder = save_tiny_pipeline(tmp_path, family, real_clip_tokenizer())
    long = "a photo of an extraordinarily picturesque Neuschwanstein, trending on artstation, " * 9
    texts = [long, "a photo of a dog", "a " * 200]
    model: Any = load_model(folder, "cpu", long_prompts="truncate", negative_prompt=long)
    assert model.options == {"long_prompts": "truncate", "negative_prompt": long}
    assert [index for index, _ in model.find_long(texts)] == [0, 2]
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    expected = pipe.encode_prompt(
        prompt=texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    told = model.encode(texts)
    torch.testing.assert_close(told["encoder_hidden_states"], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.unconditional()["encoder_hidden_states"][0], told["encoder_hidden_states"][0])
    if family == "stable-diffusion-xl":
        torch.testing.assert_close(told["text_embeds"], expected[2], rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"has \d+ tokens .*2 of 3 are wrong, with index 0, 2"
    ):  # the networks are shared
        load_model(folder, "cpu").encode(texts)


def test_checking_prompts_runs_no_network(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "text_encoder", None)
    fresh.check_prompts(PROMPTS)
    with pytest.raises(ValueError, match="shorten it"):
        fresh.check_prompts(["a " * 50])


def test_encode_equals_diffusers(tiny: TextToImageModel, tiny_sd_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    ours = tiny.encode(PROMPTS)["encoder_hidden_states"]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_kept_encodings_equal_separate_ones(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    separate = torch.cat([fresh._encode([prompt])["encoder_hidden_states"] for prompt in PROMPTS])
    room_for_two = 2 * separate[0].numel() * 4
    monkeypatch.setattr(fresh._conditioning, "max_bytes", room_for_two)
    monkeypatch.setattr(fresh._conditioning, "min_entries", 0)
    encoded: list[list[str]] = []
    plain = fresh._encode
    monkeypatch.setattr(fresh, "_encode", lambda prompts: encoded.append(list(prompts)) or plain(prompts))
    for order, expected in (([0], [0]), ([1, 0, 1, 0], [1]), ([2, 2, 0], [2]), ([2, 0], []), ([0, 1, 2], [1])):
        encoded.clear()
        conditioning = fresh.encode([PROMPTS[k] for k in order])["encoder_hidden_states"]
        torch.testing.assert_close(conditioning, separate[order], rtol=1e-5, atol=1e-5)
        assert encoded == [[PROMPTS[k]] for k in expected], order
        assert fresh._conditioning.num_bytes <= room_for_two


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 7.5])
def test_guidance(tiny: TextToImageModel, guidance_scale: float) -> None:
    conditioning = tiny.encode(PROMPTS)
    empty = tiny.encode([""] * 3)
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
        conditioning = tiny.encode(PROMPTS)
        ours = tiny.predict(latents(), TIMESTEPS, conditioning, denoiser=other)
        assert torch.equal(ours, other(latents(), TIMESTEPS, **conditioning).sample)
        assert not torch.allclose(ours, tiny.predict(latents(), TIMESTEPS, conditioning))


def test_decode(tiny: TextToImageModel, tiny_sd_folder: Path) -> None:
    images = tiny.decode(30 * latents())
    assert (images.shape, images.dtype) == ((3, 3, 16, 16), torch.float32)
    assert images.min() >= 0
    assert images.max() <= 1
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    with torch.no_grad():
        expected = pipeline.vae.decode(latents() / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(expected, output_type="pt")
    torch.testing.assert_close(tiny.decode(latents()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["shapes", "tiny"])
def test_encoded_images(name: str, request: pytest.FixtureRequest) -> None:
    model: Any = request.getfixturevalue(name)
    height, width = model.image_shape
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    encoded = model.encode_images(images)
    assert (encoded.shape, encoded.dtype) == ((2, *model.latent_shape), torch.float32)
    # As diffusers' own pipelines from images do it: without the sampling.
    with torch.no_grad():
        expected = model.vae.encode(2 * images - 1).latent_dist.mode() * model.vae.config.scaling_factor
    assert torch.equal(encoded, expected)
    for wrong in (images[0], images[:, :1], images[..., 1:], images.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=rf"must have the shape \(B, 3, {height}, {width}\), got"):
            model.encode_images(wrong)


def test_decode_undoes_encode_images(shapes: TextToImageModel) -> None:
    """For images that the autoencoder was trained on, and of which its latents have all that matters."""
    images = render(sample_scenes(8, torch.Generator().manual_seed(0)))
    again = shapes.decode(shapes.encode_images(images))
    error, other_error = (again - images).abs().mean(), (again - images.roll(1, 0)).abs().mean()
    assert error < 0.02
    assert other_error > 5 * error


def test_decode_is_differentiable(fresh: Any) -> None:
    fresh.vae.double()
    direction = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    weights = torch.randn(3, 3, 16, 16)  # of a reward that is linear in the images
    start = latents().double().requires_grad_()
    images = fresh.decode(start)
    (gradient,) = torch.autograd.grad((weights * images).sum(), start)
    with torch.no_grad():
        ahead, behind = (fresh.decode(start + step * direction) for step in (1e-3, -1e-3))
    slope = (weights * (ahead - behind)).sum().item() / 2e-3
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-2)
    assert all(value.grad is None for value in fresh.vae.parameters())


def test_decode_keeps_no_graph_for_plain_latents(tiny: TextToImageModel) -> None:
    assert torch.is_grad_enabled()
    images = tiny.decode(latents())
    assert not images.requires_grad
    assert images.grad_fn is None


def test_half_precision(tiny: TextToImageModel, tiny_sd_folder: Path) -> None:
    half = load_model(str(tiny_sd_folder), "cpu", "bfloat16")
    assert next(half.denoiser.parameters()).dtype == torch.bfloat16
    outputs, images = [], []
    for model in (tiny, half):
        conditioning = model.encode(PROMPTS)
        with torch.no_grad():
            outputs.append(model.predict(latents(), TIMESTEPS, conditioning, 3.0))
        images.append(model.decode(latents()))
    assert outputs[1].dtype == images[1].dtype == torch.float32
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.1, atol=0.1)
    torch.testing.assert_close(images[1], images[0], rtol=0.05, atol=0.05)


def test_shipped_model_is_a_plain_diffusers_pipeline() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(PROMPTS[:2], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 64, 64, 3)
    assert np.isfinite(images).all()


def test_code_in_a_model_folder_does_not_run(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """What Hugging Face's libraries would import with ``trust_remote_code``, or download as a kernel."""
    folder, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(tiny_sd_folder, folder)
    code = f"open({str(trace)!r}, 'w')\nclass Custom: pass\n"
    named = {"auto_map": {"AutoModel": "custom.Custom", "AutoTokenizer": ["custom.Custom", None]}}
    for path in [folder, *(part for part in folder.iterdir() if part.is_dir())]:
        (path / "custom.py").write_text(code)
        (path / "pipeline.py").write_text(code)
        for file in path.glob("*config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | named))
    text_config = folder / "text_encoder" / "config.json"
    kernel = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    text_config.write_text(json.dumps(json.loads(text_config.read_text()) | kernel))
    load_model(folder, "cpu")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["custom", "Custom"]}))
    clear_model_cache()
    load_model(folder, "cpu")
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Custom"]}))
    clear_model_cache()
    with pytest.raises(ValueError, match=r"names no pipeline of diffusers; code of a model's folder is never run"):
        load_model(folder, "cpu")
    assert not trace.exists()
