"""The small pipelines for other people's tests."""

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from dpok_gym.models import load_model
from dpok_gym.testing import MAX_TOKENS, TINY_FAMILIES, WORDS, save_tiny_pipeline
from tests.support import real_clip_tokenizer

#: What the networks of these small pipelines predict.
PREDICTIONS = {
    "stable-diffusion": "epsilon",
    "stable-diffusion-v": "v_prediction",
    "stable-diffusion-xl": "epsilon",
    "stable-diffusion-3": "velocity",
    "stable-diffusion-3-no-t5": "velocity",
}


def weights(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_same_weights_each_time(family: str, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    folder = save_tiny_pipeline(tmp_path / "deep" / "model", family)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator was left alone
    assert folder == tmp_path / "deep" / "model"
    first = tiny_folder(family)
    assert weights(folder) == weights(first) != []
    for path in weights(folder):
        ours, theirs = load_file(folder / path), load_file(first / path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for path in folder.rglob("tokenizer.json"):
        assert filecmp.cmp(path, first / path.relative_to(folder), shallow=False)


def test_the_same_tokens_always(tiny_sd_folder: Path) -> None:
    """Written down: a tokenizer that is trained numbers its tokens differently in each process."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd_folder / "tokenizer")
    assert tokenizer("a green rabbit. 3 z")["input_ids"] == [0, 42, 85, 90, 78, 71, 67, 1]


@pytest.mark.parametrize(("family", "prediction"), PREDICTIONS.items())
def test_what_the_documentation_says(family: str, prediction: str, tiny_folder: Callable[[str], Path]) -> None:
    model: Any = load_model(tiny_folder(family), "cpu")
    assert (model.latent_shape, model.image_shape) == ((4, 8, 8), (16, 16))
    assert model.scheduler_config.get("prediction_type", "velocity") == prediction
    tokens = model.tokenizer([*WORDS, "ab 1."])["input_ids"]
    assert [len(row) - 2 for row in tokens] == [1, 1, 1, 1, 4]
    assert model.tokenizer.unk_token_id not in [token for row in tokens for token in row[1:-1]]
    assert model.tokenizer.model_max_length == MAX_TOKENS
    if getattr(model, "tokenizer_3", None) is None:
        model.check_prompts(["a " * (MAX_TOKENS - 2)])
        with pytest.raises(ValueError, match="shorten it"):
            model.check_prompts(["a " * (MAX_TOKENS - 1)])
    pipeline = model.to_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["a dog"], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family must be one of 'stable-diffusion', 'stable-diffusion-v', "):
        save_tiny_pipeline(tmp_path, "kandinsky")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_published_vocabulary(tmp_path: Path) -> None:
    """The real tokenizer gives the ids that CLIP's authors print, and a small pipeline reads prompts with it."""
    tokenizer = real_clip_tokenizer()
    ids = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert tokenizer("a photo of an astronaut riding a horse on mars")["input_ids"] == ids
    model: Any = load_model(save_tiny_pipeline(tmp_path, tokenizer=tokenizer), "cpu")
    assert model.encode(["a photo of an astronaut"])["encoder_hidden_states"].shape == (1, 77, 32)
    with pytest.raises(ValueError, match="has 78 tokens"):
        model.check_prompts(["very " * 75 + "old"])
