"""Makes fixtures.json: what the rewards' own packages say of a few images and prompts.

The networks are built by those packages, small unless ``--full-size`` is given, with weights that
:mod:`random_parts` makes from their names, so that only names, shapes and scores need to be kept. They are old packages
with old requirements, and torchvision has to match torch; so this runs in an environment of its own:

    python -m venv originals && . originals/bin/activate
    pip install torch==2.13.0 "transformers==4.44.2" "numpy<2" ftfy pillow regex
    pip install --no-deps torchvision==0.28.0 timm==0.6.13 image-reward==1.5 hpsv2==1.2.0 clip-anytorch==2.6.0
    python tests/dpok_gym/rewards/networks/data/make_fixtures.py

``--full-size`` builds the published sizes instead and adds their names, shapes and a few scores: 10 GB of memory, a
quarter of an hour. What the packages import without needing it for this is replaced by empty modules.
"""

import argparse
import gzip
import json
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from random_parts import random_image, random_state_dict, sample

FIXTURES = Path(__file__).with_name("fixtures.json")

SIZES = [(64, 64), (97, 61), (224, 227), (200, 303), (512, 384)]
PROMPTS = [
    "a green rabbit and a dog",
    "A  Photo of\tthe MOON, 4k — “highly detailed”",
    "café naïve 東京 [ENC] it’s",
    "fish &amp; chips, ﬁne ＡＢ\u3000Ｃ &lt;moon&gt;",
    " ".join(f"{number} red dogs and the rabbit's moon," for number in range(40)),
    "",
]
WORDS = "green rabbit and dog moon photo of the highly detailed fish chips red dogs"


class Stub(ModuleType):
    """A module from which anything can be imported."""

    __all__: tuple[str, ...] = ()
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> MagicMock:
        return MagicMock()


def stub(*names: str) -> None:
    """Puts something in the place of modules that are imported without being needed."""
    sys.modules |= {name: Stub(name) for name in names}


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def prepare_torchvision() -> None:
    """Lets torchvision be imported without its compiled operators, which no transform needs."""
    library = torch.library.Library("torchvision", "DEF")
    for name in (
        "nms(Tensor dets, Tensor scores, float threshold)",
        "qnms(Tensor dets, Tensor scores, float threshold)",
    ):
        library.define(f"{name} -> Tensor")
    prepare_torchvision.library = library  # type: ignore[attr-defined]  # it would be undone with its object


def shapes_of(network: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in network.state_dict().items()}


def fill(network: torch.nn.Module) -> dict[str, list[int]]:
    """Gives a network its random weights; returns their shapes."""
    shapes = shapes_of(network)
    network.load_state_dict(random_state_dict(shapes))
    network.eval()
    return shapes


def scores_of(score) -> list[list[float]]:
    """``score(image, path, prompt)`` for each of the images and prompts."""
    from PIL import Image

    rows = []
    for size in SIZES:
        image = Image.fromarray(random_image(*size))
        path = f"{size}.png"
        image.save(path)
        with torch.no_grad():
            rows.append([round(float(score(image, path, prompt)), 6) for prompt in PROMPTS])
    return rows


def pixels_of(preprocess) -> list[list[float]]:
    from PIL import Image

    return sample(preprocess(Image.fromarray(random_image(*size))).numpy() for size in SIZES)


def bert_words() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *",.'&;<>#-", *letters]
    return [*tokens, *(f"##{letter}" for letter in letters), *dict.fromkeys(WORDS.split())]


def clip_merges() -> list[str]:
    """Byte pairs that make whole words of :data:`WORDS`, left to right."""
    merges = []
    for word in dict.fromkeys(WORDS.split()):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
    return list(dict.fromkeys(merges))


def small_bpe(module: ModuleType) -> SimpleNamespace:
    """A tokenizer of CLIP's, with :func:`clip_merges` for its 48,894 merges and the ends where CLIP has them."""
    with gzip.open("merges.gz", "wt") as file:
        file.write("\n".join(["#version", *clip_merges()]))
    tokenizer = module.SimpleTokenizer(bpe_path="merges.gz")
    start, end = list(tokenizer.encoder)[-2:]
    tokenizer.encoder |= {start: 49406, end: 49407}
    return tokenizer


def image_reward(full_size: bool) -> dict:
    """``ImageReward.score`` of image-reward."""
    stub("fairscale", "fairscale.nn", "fairscale.nn.checkpoint", "fairscale.nn.checkpoint.checkpoint_activations")
    stub("ImageReward.ReFL", "pkg_resources")
    sys.modules["pkg_resources"].packaging = __import__("packaging.version")  # type: ignore[attr-defined]
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain

    text: dict[str, Any] = {
        "vocab_size": 30524,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
    }
    Path("bert-base-uncased").mkdir(exist_ok=True)
    words = bert_words()
    if full_size:  # the words stay few, the table of their embeddings does not
        words += [f"[unused{number}]" for number in range(30522 - len(words))]
    else:
        text |= {"num_hidden_layers": 2, "intermediate_size": 96, "max_position_embeddings": 48}
        text["vocab_size"] = len(words) + 2
        blip_pretrain.create_vit = lambda *_: (
            sys.modules["ImageReward.models.BLIP.vit"].VisionTransformer(224, 16, embed_dim=64, depth=2, num_heads=2),
            64,
        )
    Path("bert-base-uncased", "vocab.txt").write_text("\n".join(words))
    # What med_config.json says of BLIP's text encoder.
    text |= {"hidden_size": 768, "num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    text |= {"pad_token_id": 0, "type_vocab_size": 2, "encoder_width": 768, "add_cross_attention": True}
    Path("med_config.json").write_text(json.dumps(text))
    model = ImageReward("med_config.json")
    return {
        "shapes": fill(model),
        "pixels": pixels_of(model.preprocess),
        "tokens": model.blip.tokenizer(PROMPTS, truncation=True, max_length=35)["input_ids"],
        "scores": scores_of(lambda image, path, prompt: model.score(prompt, image)),
    }


def hpsv2(full_size: bool) -> dict:
    """``hpsv2.score``'s function of hpsv2."""
    stub("clint", "clint.textui", "turtle")
    here = folder_of("hpsv2") / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not here.exists():  # its wheel forgets the vocabulary, and the package cannot be imported without
        shutil.copy(folder_of("clip") / here.name, here)
    from hpsv2 import img_score
    from hpsv2.src.open_clip import tokenizer
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.transform import image_transform

    tokenizer._tokenizer = small_bpe(tokenizer)
    if full_size:
        config = json.loads(Path(tokenizer.__file__).with_name("model_configs").joinpath("ViT-H-14.json").read_text())
    else:
        vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 14, "image_size": 224}
        text = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2}
        config = {"embed_dim": 40, "vision_cfg": vision, "text_cfg": text}
    model = CLIP(**config, output_dict=True)
    shapes = fill(model)
    img_score.model_dict |= {"model": model, "preprocess_val": image_transform(224, is_train=False)}
    checkpoint = {"state_dict": model.state_dict()}
    img_score.torch = SimpleNamespace(**vars(torch) | {"load": lambda *_, **__: checkpoint})  # no file for every score
    return {
        "shapes": shapes,
        "pixels": pixels_of(img_score.model_dict["preprocess_val"]),
        "tokens": tokenizer.tokenize(PROMPTS).tolist(),
        "scores": scores_of(lambda image, path, prompt: img_score.score(image, prompt, cp="hpsv2.pt")[0]),
    }


def openai_clip(full_size: bool) -> tuple[dict, dict]:
    """``CLIPScore.score`` and ``AestheticScore.score`` of image-reward, with OpenAI's CLIP."""
    import clip
    from clip import simple_tokenizer
    from clip.model import CLIP
    from ImageReward.models.AestheticScore import AestheticScore
    from ImageReward.models.CLIPScore import CLIPScore

    clip.clip._tokenizer = small_bpe(simple_tokenizer)
    if full_size:
        network = CLIP(768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12)
    else:
        network = CLIP(768, 224, 2, 128, 14, 77, 49408, 64, 4, 2)  # the predictor takes 768 numbers
    shapes = fill(network)
    preprocess = clip.clip._transform(224)
    clip.load = lambda *_, **__: (network, preprocess)
    score = CLIPScore(None)
    clip_score = {
        "shapes": shapes,
        "pixels": pixels_of(preprocess),
        "tokens": clip.tokenize(PROMPTS, truncate=True).tolist(),
        "scores": scores_of(lambda image, path, prompt: score.score(prompt, path)),
    }
    rating = AestheticScore(None)
    aesthetic = {
        "shapes": fill(rating.mlp),
        "scores": scores_of(lambda image, path, prompt: rating.score(prompt, path)),
    }
    return clip_score, aesthetic


def pickscore(full_size: bool, vocabulary: dict[str, int]) -> dict:
    """The example of PickScore's authors, with transformers' own CLIP and processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPTokenizerFast

    Path("vocab.json").write_text(json.dumps(vocabulary))
    Path("merges.txt").write_text("\n".join(["#version: 0.2", *clip_merges(), ""]))
    CLIPTokenizer("vocab.json", "merges.txt", model_max_length=77).save_pretrained("clip_tokenizer")
    processor = CLIPProcessor(CLIPImageProcessor(), CLIPTokenizerFast.from_pretrained("clip_tokenizer"))
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = 40
    if full_size:
        vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        wide = 1024
    text |= {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(
        vision_config=vision | {"patch_size": 14, "image_size": 224, "hidden_act": "gelu"},
        text_config=text | {"hidden_act": "gelu"},
        projection_dim=wide,
    )
    model = CLIPModel(config)
    shapes = fill(model)
    options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}

    def score(image, path, prompt):
        images = model.get_image_features(**processor(images=image, **options))
        texts = model.get_text_features(**processor(text=prompt, **options))
        images, texts = (features / features.norm(dim=-1, keepdim=True) for features in (images, texts))
        return (model.logit_scale.exp() * (texts @ images.T))[0, 0]

    return {
        "config": {"vision_config": vision, "text_config": text, "projection_dim": wide},
        "shapes": shapes,
        "pixels": pixels_of(lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]),
        "tokens": [processor.tokenizer(prompt, truncation=True, max_length=77)["input_ids"] for prompt in PROMPTS],
        "scores": scores_of(score),
    }


def main() -> None:
    """Writes fixtures.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full-size", action="store_true", help="the published sizes; adds to the file that is there")
    full_size = parser.parse_args().full_size
    torch.set_num_threads(2)
    prepare_torchvision()
    os.chdir(tempfile.mkdtemp())
    if full_size:  # minutes for each score
        SIZES[:], PROMPTS[:] = SIZES[-2:], PROMPTS[2:5]
    made = {"image-reward": image_reward(full_size), "hpsv2": hpsv2(full_size)}
    made["clip-score"], made["aesthetic"] = openai_clip(full_size)

    from clip.clip import _tokenizer

    vocabulary = _tokenizer.encoder
    made["pickscore"] = pickscore(full_size, vocabulary)
    fixtures = json.loads(FIXTURES.read_text()) if FIXTURES.exists() else {}
    if full_size:
        fixtures["full_size"] = {"sizes": SIZES, "prompts": PROMPTS}
        fixtures["full_size"] |= {
            name: {key: entry[key] for key in ("shapes", "scores")} for name, entry in made.items()
        }
    else:
        tokenizers = {"clip_vocabulary": vocabulary, "clip_merges": clip_merges(), "bert_vocabulary": bert_words()}
        fixtures |= {"sizes": SIZES, "prompts": PROMPTS, **tokenizers, **made}
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in fixtures.items())
    FIXTURES.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
