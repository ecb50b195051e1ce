"""What is special about Stable Diffusion 3: T5, which may be left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.architecture import find_architecture
from dpok_gym.samplers import DenoisingProcess
from tests.support import assert_same

WITHOUT_T5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("stable-diffusion-3")


def test_t5_is_left_out_of_a_folder_that_has_it(folder: Path) -> None:
    """As diffusers does, and with other images than with T5."""
    model = load_model(folder, "cpu", without_t5=True)
    assert model.options == {"without_t5": True}
    live = TextToImageModel.from_pipeline(DiffusionPipeline.from_pretrained(folder, **WITHOUT_T5))
    processes = [DenoisingProcess(each, "ode", 3) for each in (model, live)]
    assert processes[0].config == processes[1].config
    x, timesteps = torch.randn(1, *model.latent_shape), torch.tensor([900.0])
    ours, theirs = (each.predict(x, timesteps, each.encode(["a dog"])) for each in (model, live))
    assert_same(ours, theirs)
    whole = load_model(folder, "cpu")
    assert (whole.predict(x, timesteps, whole.encode(["a dog"])) - ours).abs().max() > 1e-3
    with pytest.raises(ValueError, match="without_t5"):
        processes[0].config.check_equal(DenoisingProcess(whole, "ode", 3).config)


def test_a_folder_without_t5_needs_no_option(tiny_folder: Callable[[str], Path]) -> None:
    """Nor has the model of a live pipeline one, so that it is the same model when it is loaded again."""
    folder = tiny_folder("stable-diffusion-3-no-t5")
    live = TextToImageModel.from_pipeline(DiffusionPipeline.from_pretrained(folder, **WITHOUT_T5))
    assert live.options == load_model(folder, "cpu").options == {}


def test_size_without_t5(folder: Path) -> None:
    assert "text_encoder_3" in find_architecture(str(folder)).configs
    assert "text_encoder_3" not in find_architecture(str(folder), without_t5=True).configs
    assert "text_encoder_3" not in find_architecture("sd35", without_t5=True).configs


@pytest.mark.parametrize("name", ["stable-diffusion", "flux-dev"])
def test_a_family_that_needs_its_text_encoders(name: str, tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="has no T5 that it can do without: leave out without_t5"):
        load_model(tiny_folder(name), "cpu", without_t5=True)
