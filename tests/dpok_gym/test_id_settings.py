"""A model of another family than the id's: one line says which settings are not meant for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import dpok_gym  # noqa: F401  (registers the environments)
from dpok_gym import id_settings
from dpok_gym.models import load_model

#: A task that every model can draw, without a network for the reward.
TASK: dict[str, Any] = {"prompts": "a dog", "reward": "jpeg-compressibility", "device": "cpu"}


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    id_settings._warn.cache_clear()
    caplog.set_level(logging.WARNING, id_settings.__name__)
    return lambda: [record.getMessage() for record in caplog.records if record.name == id_settings.__name__]


@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_settings_of_another_family(make: Any, warned: Any, tiny_folder: Callable[[str], Path]) -> None:
    flux = str(tiny_folder("flux-dev"))
    for _ in range(2):  # once is enough
        env = make("DPOK-SD15-v0", model=flux, num_inference_steps=4, **TASK)
        assert env.unwrapped.spec.id == "DPOK-SD15-v0"
    assert warned() == [
        "guidance_scale=7.5, eta=1.0 of DPOK-SD15-v0 are meant for a StableDiffusionPipeline, and the model is a "
        "FluxPipeline: give your own (--guidance-scale, --eta), or use DPOK-FLUX-v0 with this model"
    ]


def test_a_loaded_model(warned: Any, tiny_sd_folder: Path) -> None:
    gymnasium.make("DPOK-FLUX-v0", model=load_model(tiny_sd_folder, "cpu"), **TASK)
    (text,) = warned()
    assert text.startswith("num_inference_steps=28, guidance_scale=3.5, eta=0.5 of DPOK-FLUX-v0 are meant for a Flux")
    assert text.endswith("or use DPOK-SD15-v0 or DPOK-SD21-v0 with this model")


@pytest.mark.parametrize(
    ("env_id", "family", "changes"),
    [
        ("DPOK-FLUX-v0", "flux-dev", {}),
        ("DPOK-SD15-v0", "flux-dev", {"num_inference_steps": 4, "guidance_scale": 3.5, "eta": 0.5}),
        ("DPOK-Mixture-v0", "stable-diffusion", {"model": "mixture", "prompts": "two modes", "reward": "mixture-bump"}),
    ],
)
def test_nothing_to_say(
    env_id: str, family: str, changes: dict[str, Any], warned: Any, tiny_folder: Callable[[str], Path]
) -> None:
    gymnasium.make(env_id, **({"model": str(tiny_folder(family))} | TASK | changes))
    assert warned() == []
