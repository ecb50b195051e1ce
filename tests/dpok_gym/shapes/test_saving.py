"""The files of the embedded models, which older versions of transformers read too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from dpok_gym.shapes import FLOW_WEIGHTS, WEIGHTS
from dpok_gym.shapes.saving import use_old_names, write_vocabulary

ENCODERS = [WEIGHTS / "text_encoder", FLOW_WEIGHTS / "text_encoder", FLOW_WEIGHTS / "text_encoder_2"]
TOKENIZERS = [WEIGHTS / "tokenizer", FLOW_WEIGHTS / "tokenizer", FLOW_WEIGHTS / "tokenizer_2"]


def names(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def test_weights_have_the_names_of_published_encoders(tmp_path: Path) -> None:
    """Which are those of transformers 4, and version 5 reads the same numbers from them."""
    config = CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    encoder = CLIPTextModelWithProjection(config)
    encoder.save_pretrained(tmp_path)
    for _ in range(2):  # a second time changes nothing
        use_old_names(tmp_path / "model.safetensors")
    old = names(tmp_path)
    assert "text_projection.weight" in old
    assert all(name.startswith("text_model.") for name in old - {"text_projection.weight"})
    read, info = CLIPTextModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)


@pytest.mark.parametrize("folder", ENCODERS, ids=str)
def test_embedded_text_encoders(folder: Path) -> None:
    assert all(name.startswith("text_model.") for name in names(folder) - {"text_projection.weight"})


@pytest.mark.parametrize("folder", TOKENIZERS, ids=str)
def test_embedded_tokenizers(folder: Path, tmp_path: Path) -> None:
    """The two files are those that this package writes, and hold the same vocabulary as the newer one."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    write_vocabulary(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]]
    ours = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)
    prompts = ["three green squares", "a red circle left of a purple star"]
    assert ours(prompts)["input_ids"] == CLIPTokenizer.from_pretrained(folder)(prompts)["input_ids"]
