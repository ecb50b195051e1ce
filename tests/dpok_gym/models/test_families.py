"""What is special about families of models, the ways to name a model, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.pipelines import model_from_source
from dpok_gym.testing import MAX_TOKENS
from dpok_gym.vector_env import DenoisingVectorEnv
from tests.support import assert_same, make_process, redness

FOLDERS = ["tiny_sd_folder", "tiny_v_folder", "tiny_xl_folder"]
PROMPTS = ["a green rabbit.", "dog"]


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_xl_autoencoder_in_a_safe_precision(tiny_xl_folder: Path) -> None:
    model: Any = load_model(tiny_xl_folder, "cpu", "float16")
    assert (model.denoiser.dtype, model.vae.dtype) == (torch.float16, torch.float32)
    assert load_model(tiny_xl_folder, "cpu", "bfloat16").vae.dtype == torch.bfloat16  # type: ignore[attr-defined]


XL_PROMPTS = [*PROMPTS, "", "a z zebra", "zz top!", "moon - 3"]


def test_xl_encodes_as_diffusers(tiny_xl_folder: Path) -> None:
    """Prompts that contain the second tokenizer's padding, "z", included."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_xl_folder)
    assert pipeline.tokenizer_2.pad_token == "z" != pipeline.tokenizer.pad_token
    expected, _, pooled, _ = pipeline.encode_prompt(XL_PROMPTS, do_classifier_free_guidance=False)
    ours = load_model(tiny_xl_folder, "cpu").encode(XL_PROMPTS)
    torch.testing.assert_close(ours["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["text_embeds"], pooled, rtol=1e-4, atol=1e-5)
    assert ours["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * len(XL_PROMPTS)


@pytest.fixture
def other_words_folder(tiny_xl_folder: Path, tmp_path: Path) -> Path:
    """An XL whose second tokenizer numbers its words differently, and reads fewer of them as one token."""
    copied = Path(shutil.copytree(tiny_xl_folder, tmp_path / "model"))
    tokenizer = CLIPTokenizer.from_pretrained(copied / "tokenizer")
    vocabulary = tokenizer.get_vocab()
    words = [token for token in sorted(vocabulary, key=vocabulary.__getitem__)[2:] if not token.startswith("ra")]
    other = {token: 2 + index for index, token in enumerate(reversed(words))}
    special = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges = json.loads((copied / "tokenizer" / "tokenizer.json").read_text())["model"]["merges"]
    kept = [tuple(pair) for pair in merges if "".join(pair) in other]
    CLIPTokenizer(vocab=special | other, merges=kept, model_max_length=MAX_TOKENS).save_pretrained(
        copied / "tokenizer_2"
    )
    return copied


@pytest.mark.slow
def test_xl_with_two_vocabularies(other_words_folder: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(other_words_folder)
    first, second = pipeline.tokenizer(PROMPTS)["input_ids"], pipeline.tokenizer_2(PROMPTS)["input_ids"]
    assert [len(ids) for ids in first] != [len(ids) for ids in second]
    expected, _, pooled, _ = pipeline.encode_prompt(XL_PROMPTS, do_classifier_free_guidance=False)
    model = load_model(other_words_folder, "cpu")
    ours = model.encode(XL_PROMPTS)
    torch.testing.assert_close(ours["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["text_embeds"], pooled, rtol=1e-4, atol=1e-5)
    # Ten rabbits are ten tokens of the first tokenizer and sixty of the second, which can read no more than forty.
    with pytest.raises(ValueError, match="has 62 tokens and the model"):
        model.check_prompts(["rabbit " * 10])


def test_an_environment_uses_a_loaded_model(tiny_sd_folder: Path) -> None:
    settings: dict[str, Any] = {"prompts": ["dog"], "reward": redness, "num_inference_steps": 2, "device": "cpu"}
    model = load_model(tiny_sd_folder, "cpu", image_size=32)
    env = DenoisingVectorEnv(1, model=model, **settings)
    assert env.process.model is model
    assert env.process.config.to_dict()["model_kwargs"] == {"image_size": 32}
    by_name = DenoisingVectorEnv(1, model=str(tiny_sd_folder), image_size=32, **settings)
    assert by_name.process.model is model
    assert by_name.process.config == env.process.config
    for given in ({"image_size": 16}, {"dtype": "bfloat16"}, {"model_kwargs": {"revision": "main"}}):
        name = next(iter(given.get("model_kwargs", given)))
        with pytest.raises(ValueError, match=f"a loaded model has its own {name}"):
            DenoisingVectorEnv(1, model=model, **settings | given)


@pytest.mark.slow
def test_an_environment_uses_a_live_pipeline(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    settings: dict[str, Any] = {"prompts": PROMPTS, "reward": redness, "num_inference_steps": 2, "device": "cpu"}
    live = DenoisingVectorEnv(2, model=TextToImageModel.from_pipeline(pipe), **settings)
    assert live.process.model.denoiser is pipe.unet
    loaded = DenoisingVectorEnv(2, model=str(folder), **settings)
    for env in (live, loaded):
        env.reset(seed=3)
        env.step(torch.zeros(2, 4, 8, 8).numpy())
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    (_, ours, *_), (_, theirs, *_) = live.step(latents), loaded.step(latents)
    assert_same(ours, theirs)


def broken_copy(folder: Path, tmp_path: Path, file: str, **changes: Any) -> Path:
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copied


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("QwenImagePipeline", "its guidance rescales each token"),
        ("WanPipeline", "it draws videos"),
        ("LatentConsistencyModelPipeline", "does not take DDIM's Gaussian steps"),
        ("StableDiffusionInpaintPipeline", "it is a StableDiffusionInpaintPipeline, and only"),
    ],
)
def test_families_that_are_not_supported(tiny_sd_folder: Path, tmp_path: Path, pipeline: str, reason: str) -> None:
    copied = broken_copy(tiny_sd_folder, tmp_path, "model_index.json", _class_name=pipeline)
    with pytest.raises(ValueError, match=reason):
        load_model(copied, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("LCMScheduler", "whose diffusion is not"),
        ("EDMEulerScheduler", "whose diffusion is not"),
        (
            "FlowMatchEulerDiscreteScheduler",
            "for networks that predict the flow's velocity, but its prediction_type is",
        ),
    ],
)
def test_schedulers_of_other_diffusions(tiny_sd_folder: Path, tmp_path: Path, kind: str, reason: str) -> None:
    copied = broken_copy(tiny_sd_folder, tmp_path, "scheduler/scheduler_config.json", _class_name=kind)
    with pytest.raises(ValueError, match=f"the model comes with a {kind}, {reason}"):
        make_process(copied)


@pytest.mark.slow
def test_denoisers_that_are_not_plain(tiny_sd_folder: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    for changes, reason in (({"in_channels": 9}, "inpainting"), ({"time_cond_proj_dim": 8}, "latent-consistency")):
        folder = tmp_path / reason
        pipeline.save_pretrained(folder)
        unet = type(pipeline.unet).from_config({**pipeline.unet.config, **changes})
        unet.save_pretrained(folder / "unet")
        with pytest.raises(ValueError, match=reason):
            load_model(folder, "cpu")


def test_pickles_only_for_those_who_insist(tiny_sd_folder: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    copied = Path(shutil.copytree(tiny_sd_folder, tmp_path / "model"))
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(pipeline.unet.state_dict(), copied / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(copied, "cpu")
    model: Any = load_model(copied, "cpu", allow_pickle=True)
    assert torch.equal(model.denoiser.conv_in.weight, pipeline.unet.conv_in.weight)


def test_variants(tiny_sd_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.add_(1)
    pipeline.save_pretrained(tmp_path, variant="other")
    for variant in ("other", None):
        model: Any = load_model(tmp_path, "cpu", variant=variant)
        assert torch.equal(model.denoiser.conv_in.weight, pipeline.unet.conv_in.weight)
    (message,) = caplog.messages  # of the second one
    assert message == f"{tmp_path} has weights of the variant other only; they are used"
    with pytest.raises(ValueError, match=r"no weights of the variant 'fp16' .*there are other.*variant=other"):
        load_model(tmp_path, "cpu", variant="fp16")
    with pytest.raises(ValueError, match=r"no weights of the variant 'fp16' .*leave out the variant"):
        load_model(tiny_sd_folder, "cpu", variant="fp16")
    pipeline.save_pretrained(tmp_path, variant="more", max_shard_size="1MB")
    with pytest.raises(ValueError, match=r"there are more, other; choose one with variant='more'"):
        model_from_source("fresh", str(tmp_path), "cpu", torch.float32)


def test_messages_about_weights(tiny_sd_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_sd_folder, tmp_path / "model"))
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"its unet: it lacks 1 weights .* such as conv_in\.weight"):
        load_model(copied, "cpu")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"there are pickles.*allow_pickle=True .*--model-kwargs allow_pickle=True"):
        load_model(copied, "cpu")
    path.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match=r"download them; .*--model-kwargs variant=fp16"):
        load_model(copied, "cpu")


@pytest.mark.parametrize("family", ["tiny_sd_folder", "tiny_xl_folder"])
def test_tokenizers_without_a_length(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    copied = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "model"))
    for path in copied.glob("tokenizer*/tokenizer_config.json"):
        settings = json.loads(path.read_text())
        del settings["model_max_length"]
        path.write_text(json.dumps(settings))
    live = DiffusionPipeline.from_pretrained(copied)
    for model in (load_model(copied, "cpu"), TextToImageModel.from_pipeline(live)):
        assert model.encode(["a dog"])["encoder_hidden_states"].shape[1] == MAX_TOKENS
        with pytest.raises(ValueError, match=f"reads at most {MAX_TOKENS}"):
            model.check_prompts(["a " * MAX_TOKENS])
    assert live.tokenizer.model_max_length > 10**6  # the user's own is as it was


def single_file(pipeline: Any) -> dict[str, Tensor]:
    """The weights under the names that the models' authors published them with."""
    n_down, per_block = len(pipeline.unet.down_blocks), pipeline.unet.config.layers_per_block + 1
    with_attention = ["CrossAttn" in kind for kind in pipeline.unet.config.up_block_types]

    def unet(key: str) -> str:
        def block(match: re.Match[str]) -> str:
            where, number, part, layer = match[1], int(match[2]), match[3], int(match[4])
            if where == "down":
                position = 1 + number * per_block + (per_block - 1 if part == "downsamplers" else layer)
                return f"input_blocks.{position}." + {"resnets": "0", "attentions": "1", "downsamplers": "0"}[part]
            position = number * per_block + (per_block - 1 if part == "upsamplers" else layer)
            after = "2" if with_attention[number] else "1"
            return f"output_blocks.{position}." + {"resnets": "0", "attentions": "1", "upsamplers": after}[part]

        key = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", block, key)
        key = key.replace(".0.conv.", ".0.op.") if key.startswith("input_blocks") else key
        for theirs, published in {
            "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2",
            "add_embedding.linear_1": "label_emb.0.0",
            "add_embedding.linear_2": "label_emb.0.2",
            "conv_norm_out": "out.0",
            "conv_out": "out.2",
            "mid_block.resnets.0": "middle_block.0",
            "mid_block.attentions.0": "middle_block.1",
            "mid_block.resnets.1": "middle_block.2",
        }.items():
            key = re.sub(rf"^{re.escape(theirs)}\b", published, key)
        key = re.sub(r"^conv_in\b", "input_blocks.0.0", key)
        if "transformer_blocks" not in key:
            for theirs, published in {
                ".norm1": ".in_layers.0",
                ".conv1": ".in_layers.2",
                ".norm2": ".out_layers.0",
                ".conv2": ".out_layers.3",
                ".time_emb_proj": ".emb_layers.1",
                ".conv_shortcut": ".skip_connection",
            }.items():
                key = key.replace(theirs, published)
        return "model.diffusion_model." + key

    def vae(key: str) -> str:
        key = re.sub(r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{1 - int(m[1])}", key)  # two blocks
        key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        for theirs, published in {
            "encoder.down_blocks": "encoder.down",
            ".resnets.": ".block.",
            ".downsamplers.0": ".downsample",
            ".upsamplers.0": ".upsample",
            "mid_block.attentions.0": "mid.attn_1",
            "conv_norm_out": "norm_out",
            "conv_shortcut": "nin_shortcut",
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out.0": "proj_out",
        }.items():
            key = key.replace(theirs, published)
        return "first_stage_model." + key

    is_xl = hasattr(pipeline, "text_encoder_2")

    def text(key: str) -> str:
        home = "conditioner.embedders.0.transformer" if is_xl else "cond_stage_model.transformer"
        return f"{home}.text_model.{key.removeprefix('text_model.')}"

    assert n_down == 2
    parts = {unet: pipeline.unet, vae: pipeline.vae, text: pipeline.text_encoder}
    found = {rename(key): value for rename, part in parts.items() for key, value in part.state_dict().items()}
    return found | (open_clip(pipeline.text_encoder_2.state_dict()) if is_xl else {})


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder under OpenCLIP's names, where queries, keys and values are one matrix."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        for theirs, published in {
            "text_model.embeddings.token_embedding": "token_embedding",
            "text_model.embeddings.position_embedding.weight": "positional_embedding",
            "text_model.final_layer_norm": "ln_final",
            "text_model.encoder.layers": "transformer.resblocks",
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "self_attn": "attn",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }.items():
            key = key.replace(theirs, published)
        if match := re.fullmatch(r"(.*)\.([qkv])_proj\.(weight|bias)", key):
            key = f"{match[1]}.in_proj_{match[3]}"
            names = [f"{match[1]}.{letter}_proj.{match[3]}" for letter in "qkv"]
            found.setdefault(key, torch.empty(3, *value.shape))[[f".{match[2]}_" in name for name in names]] = value
        else:
            found[key] = value
    found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    return {
        f"conditioner.embedders.1.model.{key}": value.flatten(0, 1) if "in_proj" in key else value
        for key, value in found.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "pipeline"), [("tiny_sd_folder", StableDiffusionPipeline), ("tiny_xl_folder", StableDiffusionXLPipeline)]
)
def test_single_file(folder: str, pipeline: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config: Path = request.getfixturevalue(folder)
    path = tmp_path / "model.safetensors"
    save_file(single_file(pipeline.from_pretrained(config)), path)
    model: Any = load_model(path, "cpu", config=config)
    expected: Any = load_model(config, "cpu")
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([501, 1])
    told, expected_told = (each.encode(PROMPTS) for each in (model, expected))
    with torch.no_grad():
        torch.testing.assert_close(
            model.predict(latents, timesteps, told), expected.predict(latents, timesteps, expected_told)
        )
    torch.testing.assert_close(model.decode(latents), expected.decode(latents))
    assert model.scheduler_config["beta_end"] == expected.scheduler_config["beta_end"]
    assert model.options == {"config": str(config)}


@pytest.mark.slow
def test_single_files_that_lack_something(tiny_sd_folder: Path, tmp_path: Path) -> None:
    weights = single_file(StableDiffusionPipeline.from_pretrained(tiny_sd_folder))
    expected: Any = load_model(tiny_sd_folder, "cpu")

    def save(lacking: str) -> Path:
        path = tmp_path / f"{lacking.replace('.', '-')}.safetensors"
        save_file({key: value for key, value in weights.items() if lacking not in key}, path)
        return path

    path = save("first_stage_model")
    with pytest.raises(ValueError, match=r"holds no autoencoder: .*vae='FOLDER' .*--model-kwargs vae=FOLDER"):
        load_model(path, "cpu", config=tiny_sd_folder)
    for vae in (tiny_sd_folder, tiny_sd_folder / "vae"):
        model: Any = load_model(path, "cpu", config=tiny_sd_folder, vae=vae)
        latents = torch.randn(1, 4, 8, 8)
        torch.testing.assert_close(model.decode(latents), expected.decode(latents))
    with pytest.raises(ValueError, match=r"there is no file or folder './vae'"):
        load_model(path, "cpu", config=tiny_sd_folder, vae="./vae")
    with pytest.raises(ValueError, match=r"there is no file or folder './config'"):
        load_model(save("nothing"), "cpu", config="./config")
    with pytest.raises(ValueError, match="it lacks weights of the denoiser or the autoencoder"):
        load_model(save("input_blocks.0.0.weight"), "cpu", config=tiny_sd_folder)
    with pytest.raises(ValueError, match=r"its text_encoder lacks 1 weights .* final_layer_norm\.weight"):
        load_model(save("final_layer_norm.weight"), "cpu", config=tiny_sd_folder)
    for name, content in (("plain.ckpt", weights), ("nested.ckpt", {"state_dict": weights, "epoch": 1})):
        torch.save(content, tmp_path / name)
        model = load_model(tmp_path / name, "cpu", allow_pickle=True, config=tiny_sd_folder)
        assert torch.equal(model.denoiser.conv_in.weight, expected.denoiser.conv_in.weight)


def test_another_autoencoder_for_a_folder(tiny_sd_folder: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_sd_folder / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1)
    vae.save_pretrained(tmp_path)
    model: Any = load_model(tiny_sd_folder, "cpu", vae=tmp_path)
    assert torch.equal(model.vae.decoder.conv_out.bias, vae.decoder.conv_out.bias)
    assert model.options == {"vae": str(tmp_path)}


def test_files_that_are_no_checkpoints(tmp_path: Path, tiny_sd_folder: Path) -> None:
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, pickled)
    with pytest.raises(ValueError, match="a pickle may run code of its author's"):
        load_model(pickled, "cpu")
    with pytest.raises(ValueError, match="holds no Stable Diffusion"):
        load_model(pickled, "cpu", allow_pickle=True)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="holds no Stable Diffusion"):
        load_model(other, "cpu")
    content = other.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"the checkpoint .*cut\.safetensors cannot be loaded"):
        load_model(tmp_path / "cut.safetensors", "cpu")


@pytest.mark.slow
def test_hub_cache_and_revision_offline(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """A hub id is found in the cache without a network, at the revision that was asked for, and the error is clear."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    commits = {"main": "0" * 40, "v2": "1" * 40}
    for name, commit in commits.items():
        shutil.copytree(tiny_sd_folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    path = repository / "snapshots" / commits["v2"] / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    large = tmp_path / "hub" / "models--someone--large"  # of which nothing but the index was ever downloaded
    for file, content in {
        "refs/main": "2" * 40,
        f"snapshots/{'2' * 40}/model_index.json": '{"_class_name": "QwenImagePipeline"}',
    }.items():
        (large / file).parent.mkdir(parents=True)
        (large / file).write_text(content)
    code = """
from dpok_gym.models import load_model
print(load_model("someone/tiny", "cpu").scheduler_config["prediction_type"])
print(load_model("someone/tiny", "cpu", revision="v2").scheduler_config["prediction_type"])
print(load_model("someone/tiny", "cpu", vae="someone/tiny").options)
try:
    load_model("someone/tiny", "cpu", revision="v3")
except FileNotFoundError as error:
    print(" ".join(str(error).split()))
for name, options in (("large", {}), ("tiny", {"without_t5": True})):
    try:
        load_model(f"someone/{name}", "cpu", **options)
    except ValueError as error:
        print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second, options, message, refused, needed = found.stdout.splitlines()
    assert options == "{'vae': 'someone/tiny'}"
    assert (first, second) == ("epsilon", "v_prediction")
    assert "nor could it be downloaded as 'someone/tiny' at the revision 'v3'" in message
    assert "it is a QwenImagePipeline" in refused
    assert "its guidance rescales each token" in refused
    assert "has no T5 that it can do without: leave out without_t5" in needed
