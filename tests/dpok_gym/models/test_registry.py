"""Names of models: what they may stand for, and models that are made by a function."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dpok_gym.models import TextToImageModel, list_models, load_model, register_model
from dpok_gym.models.registry import MODELS, find_source, is_factory, list_local_models
from dpok_gym.utils.registry import Registry


@pytest.fixture(autouse=True)
def _names_of_a_test(monkeypatch: pytest.MonkeyPatch, fresh_models: Any) -> None:
    """Names that a test registers are gone after it."""
    monkeypatch.setattr(MODELS, "_entries", dict(MODELS._entries))


@pytest.fixture
def live(tiny_sd_folder: Path) -> TextToImageModel:
    return load_model(tiny_sd_folder, "cpu")


def test_built_in_names() -> None:
    assert {"sd15", "sd21", "sdxl"} <= set(list_models())
    assert isinstance(MODELS, Registry)
    assert find_source("sdxl") == "stabilityai/stable-diffusion-xl-base-1.0"
    assert find_source("someone/model") == "someone/model"


@pytest.mark.slow
def test_a_name_for_a_folder(tiny_sd_folder: Path) -> None:
    register_model("mine", tiny_sd_folder)
    assert "mine" in list_models()
    assert "mine" in list_local_models()
    model = load_model("mine", "cpu")
    assert model.name == "mine"
    same = load_model(tiny_sd_folder, "cpu")
    assert same.name == str(tiny_sd_folder)
    assert torch.equal(model.denoiser.conv_in.weight, same.denoiser.conv_in.weight)
    bfloat16 = load_model("mine", "cpu", "bfloat16", image_size=[16, 32])
    assert (bfloat16.name, bfloat16.options) == ("mine", {"dtype": "bfloat16", "image_size": [16, 32]})


def test_a_name_for_a_factory(live: TextToImageModel) -> None:
    calls = []

    def factory(name: str, device: str) -> TextToImageModel:
        calls.append((name, device))
        return live

    register_model("made", factory)
    model = load_model("made", "cpu")
    assert (model.name, model.options) == ("made", {})
    assert model.denoiser is live.denoiser
    assert live.name != "made"  # it keeps the name that it was loaded by
    assert load_model("made", "cpu") is model
    larger = load_model("made", "cpu", image_size=32, negative_prompt="dog")
    assert larger.denoiser is live.denoiser
    assert (larger.name, larger.image_shape) == ("made", (32, 32))
    assert larger.options == {"image_size": 32, "negative_prompt": "dog"}
    assert calls == [("made", "cpu")]


def test_a_factory_by_its_place(live: TextToImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_users_module")
    module.make_model = lambda name, device: live  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    register_model("placed", "a_users_module:make_model")
    assert load_model("placed", "cpu").denoiser is live.denoiser
    without_name = load_model("a_users_module:make_model", "cpu")
    assert (without_name.name, without_name.denoiser is live.denoiser) == ("a_users_module:make_model", True)
    register_model("wrong", "a_users_module:nothing")
    with pytest.raises(ImportError, match="the model 'wrong' cannot be imported from 'a_users_module:nothing'"):
        load_model("wrong", "cpu")


def test_a_factory_is_defined_anew(live: TextToImageModel) -> None:
    """As when a notebook's cell runs again: the new function is used, not the model of the old one."""
    other = load_model(live.name, "cpu", negative_prompt="dog")
    factories = []
    for made in (live, other):

        def factory(name: str, device: str, made: TextToImageModel = made) -> TextToImageModel:
            return made

        factory.__qualname__ = "factory"  # a function of a module's top level
        factories.append(factory)
    register_model("again", factories[0])
    assert load_model("again", "cpu")._unconditional is live._unconditional  # type: ignore[attr-defined]
    register_model("again", factories[1])
    assert load_model("again", "cpu").negative_prompt == "dog"  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"revision": "main"}, "revision"),
        ({"variant": "fp16", "allow_pickle": True}, "variant, allow_pickle"),
        ({"config": "folder"}, "config"),
        ({"vae_tiling": True, "image_size": 32}, "vae_tiling"),
        ({"compile": True}, "compile"),
    ],
)
def test_a_factory_takes_no_files(live: TextToImageModel, options: dict[str, Any], named: str) -> None:
    def factory(name: str, device: str) -> TextToImageModel:
        return live

    register_model("made", factory)
    with pytest.raises(ValueError, match=f"'made' is made by the function 'factory', .*: leave out {named}$"):
        load_model("made", "cpu", **options)


def test_a_factory_must_return_a_model() -> None:
    register_model("wrong", lambda name, device: name)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="'<lambda>' must return a TextToImageModel, got 'wrong'"):
        load_model("wrong", "cpu")


def test_names_that_are_taken(tiny_sd_folder: Path, tiny_v_folder: Path) -> None:
    register_model("mine", tiny_sd_folder)
    register_model("mine", str(tiny_sd_folder))  # the same again
    with pytest.raises(ValueError, match="the model 'mine' is already registered"):
        register_model("mine", tiny_v_folder)
    with pytest.raises(ValueError, match="the model 'sd15' is already registered"):
        register_model("sd15", tiny_v_folder)
    with pytest.raises(ValueError, match="not blank"):
        register_model(" ", tiny_v_folder)


@pytest.mark.parametrize("source", [None, 3, "", "  ", ["folder"]])
def test_sources_that_are_none(source: Any) -> None:
    with pytest.raises(ValueError, match="the source of the model 'mine' must be a folder, a file, a hub id"):
        register_model("mine", source)


def test_which_sources_are_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("package.module:make", "module:Class", len):
        assert is_factory(source)  # type: ignore[arg-type]
    for source in ("someone/model", "/a/folder", "C:\\models\\mine", "C:/models/mine", "shapes", "http://host:80/x"):
        assert not is_factory(source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "module:factory").mkdir()
    assert not is_factory("module:factory")


def test_listing_models_loads_no_torch() -> None:
    code = """
import sys
import dpok_gym.models
print(len(dpok_gym.models.list_models()) >= 5)
dpok_gym.models.register_model("mine", "someone/model")
print("mine" in dpok_gym.models.list_models(), set(dpok_gym.models.__all__) <= set(dir(dpok_gym.models)))
print({"torch", "diffusers", "transformers"} & set(sys.modules))
try:
    dpok_gym.models.nothing
except AttributeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "True",
        "True True",
        "set()",
        "module 'dpok_gym.models' has no attribute 'nothing'",
    ]
