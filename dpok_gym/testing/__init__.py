"""Small models for tests: pipelines of random weights that are made in a second, without a download.

    from dpok_gym.models import load_model
    from dpok_gym.testing import save_tiny_pipeline

    def test_mine(tmp_path):
        model = load_model(save_tiny_pipeline(tmp_path / "model"), "cpu")

They have all parts of the published models, tokenizers included. So code that works with one of them works with the
real model too, only slower. Their images are noise.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dpok_gym.testing.parts import MAX_TOKENS as MAX_TOKENS
from dpok_gym.testing.parts import WORDS as WORDS
from dpok_gym.testing.parts import make_tokenizer
from dpok_gym.utils.validation import check_choice

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

#: The module of each family. It has ``save(folder, family, tokenizer)``.
TINY_FAMILIES: dict[str, str] = {
    "stable-diffusion": "stable_diffusion",
    "stable-diffusion-v": "stable_diffusion",
    "stable-diffusion-xl": "stable_diffusion",
    "stable-diffusion-3": "stable_diffusion_3",
    "stable-diffusion-3-no-t5": "stable_diffusion_3",
    "flux-dev": "flux",
    "flux-schnell": "flux",
    "flux2-klein": "flux2",
    "pixart-sigma": "pixart_sigma",
    "sana": "sana",
}


def save_tiny_pipeline(
    folder: str | Path, family: str = "stable-diffusion", tokenizer: CLIPTokenizer | None = None
) -> Path:
    """Saves a diffusers pipeline of random weights, the same ones each time.

    The networks have about a million parameters at most, and the layers of the real ones. Their own tokenizers read
    lower-case letters, digits and a little punctuation, at most 40 tokens; T5 reads as many as in the real pipelines.

    Args:
        folder: where the pipeline is written; made if it is not there.
        family: one of :data:`TINY_FAMILIES`, each described in its module. "stable-diffusion" draws 16 x 16 images
            from 4 x 8 x 8 latents.
        tokenizer: another CLIP tokenizer, such as a published model's; None for the small one.

    Returns:
        The folder, for :func:`dpok_gym.models.load_model` or ``DiffusionPipeline.from_pretrained``.

    Raises:
        ValueError: if the family is unknown.
    """
    check_choice("family", family, *TINY_FAMILIES)
    module = importlib.import_module(f"dpok_gym.testing.{TINY_FAMILIES[family]}")
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay the same
        torch.manual_seed(1)
        module.save(Path(folder), family, tokenizer or make_tokenizer())
    return Path(folder)
