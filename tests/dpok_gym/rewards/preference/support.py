"""A small CLIP for tests."""

import torch
from transformers import CLIPConfig, CLIPModel

from dpok_gym.testing.parts import make_text_config, make_tokenizer


def save_clip(folder):
    """Writes a CLIP of random weights with its tokenizer: 32 x 32 pixels, vectors of 16 entries; returns the folder."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = make_text_config(tokenizer, projection_dim=16).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
