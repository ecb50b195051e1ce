"""Writing of the embedded models, so that older versions of transformers read them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dpok_gym.utils.reading import read_json


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves a pipeline with a denoiser and an autoencoder in half precision: half the size.

    diffusers loads such weights as float32 by default. transformers would keep the text encoders in half precision,
    which does not go with the others, so they stay in float32.

    Args:
        pipeline: changed in place.
        folder: made if it is not there.
    """
    for name, part in pipeline.components.items():
        if name in ("unet", "transformer", "vae"):
            part.half()
    pipeline.save_pretrained(folder)
    for text_encoder in folder.glob("text_encoder*"):
        use_old_names(text_encoder / "model.safetensors")
    for tokenizer in folder.glob("tokenizer*"):
        write_vocabulary(tokenizer)


def use_old_names(path: Path) -> None:
    """Renames the weights of a CLIP text encoder, in place, to what transformers 4 knows and 5 reads as well.

    Version 5 left out "text_model.", which all published encoders have before their names.
    """
    state: dict[str, Any] = {}
    for name, values in load_file(path).items():
        is_new = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
        state[f"text_model.{name}" if is_new else name] = values
    save_file(state, path, {"format": "pt"})


def write_vocabulary(folder: Path) -> None:
    """Writes the two files of which transformers 4 makes a CLIP tokenizer, beside the one that version 5 writes."""
    model = read_json(folder / "tokenizer.json")["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    # The first line is skipped. A merge is a pair in newer files, and a text in older ones.
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
