"""The rewards that are networks, against what their own packages say: see data/make_fixtures.py."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizerFast, BlipConfig, CLIPConfig, CLIPModel, CLIPTokenizerFast

from dpok_gym.rewards import list_rewards, make_reward
from dpok_gym.rewards.networks.aesthetic import Aesthetic
from dpok_gym.rewards.networks.base import Head
from dpok_gym.rewards.networks.checkpoints import build, read_state_dict
from dpok_gym.rewards.networks.clip import PromptEncoder, from_open_clip
from dpok_gym.rewards.networks.clip_score import ClipScore
from dpok_gym.rewards.networks.hpsv2 import HPSv2, HPSv21, vit_h_14
from dpok_gym.rewards.networks.image_reward import ImageReward, _from_published, _Network, blip_large
from dpok_gym.rewards.networks.pickscore import PickScore
from dpok_gym.rewards.networks.preprocessing import clean_prompt, normalize, resize_with_pillow, resize_with_torch
from tests.dpok_gym.rewards.networks.data.random_parts import random_image, random_state_dict, sample

FIXTURES = json.loads((Path(__file__).parent / "data" / "fixtures.json").read_text())
PROMPTS: list[str] = FIXTURES["prompts"]
NAMES = ["image-reward", "pickscore", "hpsv2", "clip-score", "aesthetic"]

#: Four to ten times the difference that float32 makes; PickScore's are a hundred times the others' cosines.
TOLERANCE = {"image-reward": 5e-6, "pickscore": 2e-4, "hpsv2": 5e-6, "clip-score": 5e-6, "aesthetic": 5e-6}


def vision_config(width: int, heads: int, act: str) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": heads}
    return {**sizes, "patch_size": 14, "image_size": 224, "hidden_act": act}


def text_config(width: int, act: str) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "vocab_size": 49408, "hidden_act": act, "bos_token_id": 49406, "eos_token_id": 49407}


SMALL_H = CLIPConfig(vision_config=vision_config(64, 4, "gelu"), text_config=text_config(48, "gelu"), projection_dim=40)
SMALL_L = CLIPConfig(
    vision_config=vision_config(128, 2, "quick_gelu"), text_config=text_config(64, "quick_gelu"), projection_dim=768
)
SMALL_BLIP = BlipConfig(
    vision_config={
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    text_config={
        "vocab_size": len(FIXTURES["bert_vocabulary"]) + 2,
        "encoder_hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "max_position_embeddings": 48,
        "bos_token_id": None,
        "sep_token_id": None,
    },
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints that the originals had, as their authors lay them out, and the tokenizers."""
    folder = tmp_path_factory.mktemp("rewards")
    merges = [tuple(pair.split()) for pair in FIXTURES["clip_merges"]]
    CLIPTokenizerFast(vocab=clip_vocabulary(), merges=merges).save_pretrained(folder / "clip_tokenizer")
    (folder / "bert_tokenizer").mkdir()
    (folder / "bert_tokenizer" / "vocab.txt").write_text("\n".join(FIXTURES["bert_vocabulary"]))
    weights = {name: random_state_dict(FIXTURES[name]["shapes"]) for name in NAMES}
    torch.save(weights["image-reward"], folder / "ImageReward.pt")
    torch.save({"state_dict": weights["hpsv2"]}, folder / "hpsv2.pt")
    torch.save(weights["aesthetic"], folder / "aesthetic.pth")
    here = Path("the fixtures")
    build(here, lambda: CLIPModel(SMALL_L), from_open_clip(weights["clip-score"])).save_pretrained(folder / "clip")
    build(here, lambda: CLIPModel(SMALL_H), weights["pickscore"]).save_pretrained(folder / "pickscore")
    return folder


def clip_vocabulary() -> dict[str, int]:
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {names.get(token, token): number for token, number in FIXTURES["clip_vocabulary"].items()}


def load(name: str, files: Path, **options: Any) -> Any:
    """The small reward of that name."""
    clip, bert = files / "clip_tokenizer", files / "bert_tokenizer"
    makers: dict[str, Any] = {
        "image-reward": lambda **o: ImageReward(files / "ImageReward.pt", bert, config=SMALL_BLIP, **o),
        "pickscore": lambda **o: PickScore(files / "pickscore", clip, **o),
        "hpsv2": lambda **o: HPSv2(files / "hpsv2.pt", clip, config=SMALL_H, **o),
        "clip-score": lambda **o: ClipScore(files / "clip", clip, **o),
        "aesthetic": lambda **o: Aesthetic(files / "aesthetic.pth", files / "clip", **o),
    }
    return makers[name](**{"device": "cpu"} | options)


@pytest.fixture(scope="module")
def rewards(files: Path) -> dict[str, Any]:
    return {name: load(name, files) for name in NAMES}


def make_image(height: int, width: int) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(random_image(height, width)).permute(2, 0, 1) / 255


def scores(reward: Any, fixtures: dict[str, Any] = FIXTURES) -> torch.Tensor:
    """(images, prompts), as in the fixtures."""
    prompts = fixtures["prompts"]
    batches = [make_image(*size).expand(len(prompts), -1, -1, -1) for size in fixtures["sizes"]]
    return torch.stack([make_reward(reward)(images, prompts).total for images in batches])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_originals(name: str, rewards: dict[str, Any]) -> None:
    expected = torch.tensor(FIXTURES[name]["scores"])
    torch.testing.assert_close(scores(rewards[name]), expected, rtol=0, atol=TOLERANCE[name])
    # It is no wonder if numbers agree that are all the same.
    assert expected.std(0).min() > 100 * TOLERANCE[name]
    if name != "aesthetic":
        assert expected.std(1).min() > 100 * TOLERANCE[name]


@pytest.mark.parametrize(
    ("name", "resize"),
    [
        ("image-reward", resize_with_pillow),
        ("clip-score", resize_with_pillow),
        ("pickscore", lambda images, side: resize_with_pillow(images, side, crop="transformers")),
        ("hpsv2", resize_with_torch),
    ],
)
def test_pixels_equal_the_originals(name: str, resize: Any) -> None:
    squares = [normalize(resize(make_image(*size)[None], 224))[0] for size in FIXTURES["sizes"]]
    assert all(pixels.shape == (3, 224, 224) for pixels in squares)
    expected = torch.tensor(FIXTURES[name]["pixels"])
    torch.testing.assert_close(torch.tensor(sample([p.numpy() for p in squares])), expected, rtol=0, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hpsv2", "clip-score", "pickscore"])
def test_clip_tokens_equal_the_originals(name: str, files: Path) -> None:
    model = CLIPModel(SMALL_H)
    encode = PromptEncoder(name, files / "clip_tokenizer", model)
    prompts = PROMPTS if name == "pickscore" else [clean_prompt(prompt) for prompt in PROMPTS]
    for prompt, expected in zip(prompts, FIXTURES[name]["tokens"], strict=True):
        end = expected.index(49407)
        assert encode([prompt])[0].tolist() == expected[: end + 1]
    assert encode(prompts).shape == (len(PROMPTS), 77)  # the longest is cut, the others are filled up


def test_bert_tokens_equal_the_originals(rewards: dict[str, Any]) -> None:
    tokens = rewards["image-reward"]._tokenizer(PROMPTS, truncation=True, max_length=35)["input_ids"]
    assert tokens == FIXTURES["image-reward"]["tokens"]
    assert max(map(len, tokens)) == 35
    assert len(FIXTURES["bert_vocabulary"]) + 1 in tokens[2]  # the prompt that contains [ENC]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_batches(name: str, rewards: dict[str, Any], files: Path) -> None:
    images = torch.stack([make_image(60, 50 + i)[:, :, :50] for i in range(5)])
    prompts = [PROMPTS[i] for i in (0, 1, 0, 3, 4)]
    together = rewards[name](images, prompts)
    assert (together.shape, together.dtype, together.requires_grad) == ((5,), torch.float32, False)
    alone = torch.cat([rewards[name](images[i : i + 1], [prompts[i]]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE[name])
    in_parts = load(name, files, batch_size=2)(images, prompts)
    torch.testing.assert_close(together, in_parts, rtol=0, atol=TOLERANCE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_close(name: str, rewards: dict[str, Any], files: Path) -> None:
    images, expected = make_image(100, 80)[None].expand(4, -1, -1, -1), torch.tensor(FIXTURES[name]["scores"])
    half = load(name, files, dtype="bfloat16")(images, PROMPTS[:4])
    assert half.dtype == torch.float32
    assert (half - rewards[name](images, PROMPTS[:4])).abs().max() < 0.15 * expected.std()


def test_images_of_any_format(rewards: dict[str, Any]) -> None:
    images = make_image(64, 64)[None]
    expected = rewards["clip-score"](images, PROMPTS[:1])
    for other in (images.double(), images.clone().requires_grad_(), images + 1e-4):  # the last rounds to the same
        torch.testing.assert_close(rewards["clip-score"](other, PROMPTS[:1]), expected, rtol=0, atol=0)
    white, brighter = (make_reward(rewards["hpsv2"])(torch.full((1, 3, 9, 9), v), [""]).total for v in (1.0, 1.5))
    assert white == brighter


@pytest.mark.slow
def test_threads(rewards: dict[str, Any], files: Path) -> None:
    images = make_image(64, 64)[None].expand(4, -1, -1, -1)
    for name in ("image-reward", "clip-score"):
        expected, reward = rewards[name](images, PROMPTS[:4]), load(name, files)
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(reward, [images] * 8, [PROMPTS[:4]] * 8))
        for scored in together:
            torch.testing.assert_close(scored, expected, rtol=0, atol=TOLERANCE[name])


def test_names_and_sums(rewards: dict[str, Any]) -> None:
    assert {*NAMES, "hpsv2.1"} <= set(list_rewards())
    assert (HPSv21.filename, HPSv2.filename) == ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt")
    batch = make_reward({rewards["image-reward"]: 1.0, rewards["aesthetic"]: 0.5})(
        make_image(64, 64)[None], PROMPTS[:1]
    )
    assert list(batch.components) == ["ImageReward", "Aesthetic"]
    torch.testing.assert_close(batch.total, batch.components["ImageReward"] + 0.5 * batch.components["Aesthetic"])


# The published files


@pytest.mark.parametrize(
    ("name", "published", "make"),
    [
        ("image-reward", _from_published, lambda: _Network(blip_large())),
        ("hpsv2", from_open_clip, lambda: CLIPModel(vit_h_14())),
        ("aesthetic", dict, lambda: Head(768)),
    ],
)
def test_published_sizes(name: str, published: Any, make: Any) -> None:
    shapes = FIXTURES["full_size"][name]["shapes"]
    with torch.device("meta"):
        tensors = published({key: torch.empty(shape) for key, shape in shapes.items()})
        network = make().state_dict()
    assert {key: value.shape for key, value in tensors.items()} == {key: value.shape for key, value in network.items()}


@pytest.mark.skipif(
    "DPOK_FULL_SIZE" not in os.environ, reason="needs 10 GB of memory and ten minutes; set DPOK_FULL_SIZE"
)
@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_originals_at_full_size(name: str, tmp_path: Path) -> None:
    full = FIXTURES["full_size"]
    merges = [tuple(pair.split()) for pair in FIXTURES["clip_merges"]]
    CLIPTokenizerFast(vocab=clip_vocabulary(), merges=merges).save_pretrained(tmp_path / "clip")
    words = FIXTURES["bert_vocabulary"]
    words = [*words, *(f"[unused{number}]" for number in range(30522 - len(words)))]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    file, clip, bert, model = (tmp_path / part for part in ("checkpoint.pt", "clip", "bert", "model"))
    torch.save({"state_dict": random_state_dict(full[name]["shapes"])}, file)
    reward: Any
    if name == "image-reward":
        reward = ImageReward(file, bert, device="cpu")
    elif name == "hpsv2":
        reward = HPSv2(file, clip, device="cpu")
    elif name == "pickscore":
        build(file, lambda: CLIPModel(vit_h_14()), read_state_dict(file)).save_pretrained(model)
        reward = PickScore(model, clip, device="cpu")
    else:
        sizes = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        narrow = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        config = CLIPConfig(
            vision_config=vision_config(1024, 16, "quick_gelu") | sizes,
            text_config=text_config(768, "quick_gelu") | narrow,
            projection_dim=768,
        )
        weights = from_open_clip(random_state_dict(full["clip-score"]["shapes"]))
        build(file, lambda: CLIPModel(config), weights).save_pretrained(model)
        reward = ClipScore(model, clip, device="cpu") if name == "clip-score" else Aesthetic(file, model, device="cpu")
    expected = torch.tensor(full[name]["scores"])
    torch.testing.assert_close(scores(reward, full), expected, rtol=0, atol=1e-4)
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep


def test_files_as_old_as_the_published_ones(files: Path, tmp_path: Path, rewards: dict[str, Any]) -> None:
    """OpenAI's and LAION's files have an end token of 2 in their config, and position ids among the weights."""
    shutil.copytree(files / "clip", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    images = make_image(64, 64)[None].expand(len(PROMPTS), -1, -1, -1)
    old = ClipScore(tmp_path, files / "clip_tokenizer", device="cpu")
    torch.testing.assert_close(old(images, PROMPTS), rewards["clip-score"](images, PROMPTS), rtol=0, atol=0)


# Bad input


def test_checkpoint_as_safetensors(files: Path, tmp_path: Path, rewards: dict[str, Any]) -> None:
    save_file(torch.load(files / "aesthetic.pth"), tmp_path / "aesthetic.safetensors")
    reward = Aesthetic(tmp_path / "aesthetic.safetensors", files / "clip", device="cpu")
    images = make_image(64, 64)[None]
    assert reward(images, [""]) == rewards["aesthetic"](images, [""])


def test_missing_and_extra_keys(files: Path, tmp_path: Path) -> None:
    tensors = read_state_dict(files / "ImageReward.pt")
    del tensors["mlp.layers.7.bias"], tensors["blip.visual_encoder.blocks.1.attn.qkv.weight"]
    tensors["blip.itm_head.weight"] = torch.zeros(2)
    tensors["mlp.layers.0.bias"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="does not fit the network") as caught:
        ImageReward(tmp_path / "broken.pt", files / "bert_tokenizer", device="cpu", config=SMALL_BLIP)
    for part in (
        str(tmp_path / "broken.pt"),
        "missing keys mlp.layers.7.bias, vision.encoder.layers.1.self_attn.qkv.weight (2 in all)",
        "unknown keys blip.itm_head.weight (1 in all)",
        "mlp.layers.0.bias has the shape (3,) instead of (1024,)",
        "the file that the reward's authors published",
    ):
        assert part in str(caught.value)


def test_checkpoint_of_another_network(files: Path) -> None:
    with pytest.raises(ValueError, match="does not fit the network"):
        HPSv2(files / "aesthetic.pth", files / "clip_tokenizer", device="cpu", config=SMALL_H)


class _Intruder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "code", "list"])
def test_file_that_is_no_checkpoint(kind: str, files: Path, tmp_path: Path) -> None:
    path, trace = tmp_path / "file.pt", tmp_path / "trace"
    content = (files / "aesthetic.pth").read_bytes()
    intruder = pickle.dumps({"layers.0.weight": _Intruder(trace)})
    path.write_bytes({"truncated": content[:-5000], "text": b"<html>", "code": intruder}.get(kind, b""))
    if kind == "list":
        torch.save([torch.zeros(1)], path)
    match = "holds no state dict" if kind == "list" else r"cannot be read \(.*weights_only=True"
    with pytest.raises(ValueError, match=match) as caught:
        Aesthetic(path, files / "clip", device="cpu")
    assert str(path) in str(caught.value)
    assert not trace.exists()


def test_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    for reward in (ImageReward, HPSv2, Aesthetic):
        with pytest.raises(FileNotFoundError, match=r"was given the checkpoint '.*nothing\.pt', which is no file"):
            reward(tmp_path / "nothing.pt")


def test_clip_with_missing_weights(files: Path, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(files / "pickscore")
    tensors = model.state_dict()
    del tensors["logit_scale"], tensors["text_model.final_layer_norm.bias"]
    model.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights .* such as logit_scale, text_model\.final_layer_norm\.bias"):
        PickScore(tmp_path, files / "clip_tokenizer", device="cpu")


def test_folder_without_a_model(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load a CLIP model from the folder"):
        ClipScore(tmp_path, files / "clip_tokenizer", device="cpu")
    with pytest.raises(ValueError, match=r"cannot load a CLIP tokenizer from the folder .*: it has no vocabulary"):
        ClipScore(files / "clip", tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"cannot load BERT's tokenizer from the folder .*: it has no vocabulary"):
        ImageReward(files / "ImageReward.pt", tmp_path, device="cpu", config=SMALL_BLIP)


def test_tokenizer_of_another_network(files: Path, tmp_path: Path) -> None:
    CLIPTokenizerFast(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 3}).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"has 3 tokens and ends a text with number 1, but .* expects 49407; pass the"):
        HPSv2(files / "hpsv2.pt", tmp_path / "clip", device="cpu", config=SMALL_H)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(200))]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 207 tokens and the network of the reward 'image-reward' only \d+; pass"):
        ImageReward(files / "ImageReward.pt", tmp_path, device="cpu", config=SMALL_BLIP)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"dtype": "float64"}, "dtype must be auto, float32, bfloat16 or float16, got 'float64'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.0}, r"batch_size must be an integer of at least 1, got 2\.0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], match: str, files: Path) -> None:
    with pytest.raises(ValueError, match=match):
        load("hpsv2", files, **options)


_OFFLINE = """
import sys
from dpok_gym.rewards import make_reward
from dpok_gym.rewards.networks.checkpoints import find_file

assert not {"transformers", "huggingface_hub", "PIL"} & set(sys.modules)  # nothing is loaded before it is asked for
for name in sys.argv[1:]:
    try:
        make_reward(name)
    except FileNotFoundError as error:
        text = str(error)
        assert f"the reward {name!r} needs" in text and "hf download" in text and "Ways out" in text, text
        assert "and pass it instead of its name" in text, text
    else:
        raise AssertionError(name)
print(find_file("some", None, "THUDM/Cached", "Cached.pt").read_text())
"""


@pytest.mark.slow
def test_offline(tmp_path: Path) -> None:
    """Without the files and without a network, every name says what it needs; with them, the cache is enough."""
    cached = tmp_path / "hub" / "models--THUDM--Cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "Cached.pt").write_text("here I am")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    ran = subprocess.run(
        [sys.executable, "-c", _OFFLINE, *NAMES, "hpsv2.1"], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "here I am\n"
