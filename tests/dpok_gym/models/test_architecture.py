"""The sizes of models, before their weights are there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpok_gym.models import load_model
from dpok_gym.models.architecture import PUBLISHED, Architecture, find_architecture
from dpok_gym.testing import TINY_FAMILIES


def _millions(network: Any) -> float:
    return round(sum(value.numel() for value in network.parameters()) / 1e6, 1)


@pytest.mark.parametrize(
    ("name", "sizes", "latents"),
    [  # millions of parameters, as they are published: the denoiser, the autoencoder and the text encoders
        ("sd15", (859.5, 83.7, 123.1), (4, 64, 64)),
        ("sd21", (865.9, 83.7, 340.4), (4, 96, 96)),
        ("sdxl", (2567.5, 83.7, 123.1, 694.7), (4, 128, 128)),
        ("sd35", (2243.2, 83.8, 123.7, 694.7, 4762.3), (16, 128, 128)),
        ("flux", (11901.4, 83.8, 123.1, 4762.3), (16, 128, 128)),
        ("pixart", (610.9, 83.7, 4762.3), (4, 128, 128)),
        ("sana", (1604.5, 312.3, 2614.3), (32, 32, 32)),
    ],
)
def test_published_sizes(name: str, sizes: tuple[float, ...], latents: tuple[int, ...]) -> None:
    assert find_architecture(name) is PUBLISHED[name]
    model: Any = find_architecture(name).make(torch.bfloat16)
    networks = [model.denoiser, model.vae, *(getattr(model, part) for part in model.text_encoders)]
    assert tuple(map(_millions, networks)) == sizes
    assert model.latent_shape == latents
    tensors = [value for network in networks for value in (*network.parameters(), *network.buffers())]
    assert {value.device.type for value in tensors} == {"meta"}
    assert {value.dtype for value in tensors if value.is_floating_point()} == {torch.bfloat16}


def test_positions_of_stable_diffusion_3_are_part_of_its_file() -> None:
    """A table without a gradient. The denoiser of 3.5 medium has 2.47 billion numbers, 4.94 GB in bfloat16."""
    denoiser = PUBLISHED["sd35"].make(torch.bfloat16).denoiser
    assert round(sum(value.numel() for value in denoiser.state_dict().values()) / 1e9, 2) == 2.47


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_folder_has_the_sizes_of_the_model_in_it(family: str, tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder(family)
    model: Any = load_model(folder, "cpu")
    for architecture in (find_architecture(str(folder)), Architecture.of_model(model)):
        made: Any = architecture.make(torch.float32)
        for part in ("denoiser", "vae", *model.text_encoders):
            networks = [getattr(each, part) for each in (made, model)]
            ours, theirs = ({n: v.shape for n, v in each.state_dict().items()} if each else None for each in networks)
            assert ours == theirs


def test_only_the_configs_are_needed(tiny_sd_folder: Path, tmp_path: Path) -> None:
    for path in tiny_sd_folder.rglob("*.json"):
        (tmp_path / path.relative_to(tiny_sd_folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tmp_path / path.relative_to(tiny_sd_folder))
    assert find_architecture(str(tmp_path)) == find_architecture(str(tiny_sd_folder))
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no vae/config\.json; get it again"):
        find_architecture(str(tmp_path))


def test_configs_in_the_cache_of_the_hub(tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(repository: str, name: str, revision: str | None = None) -> str | None:
        path = tiny_sd_folder / name
        return str(path) if (repository, revision) == ("some/model", "main") and path.is_file() else None

    monkeypatch.setattr("dpok_gym.models.architecture.try_to_load_from_cache", cached)
    assert find_architecture("some/model", revision="main") == find_architecture(str(tiny_sd_folder))
    with pytest.raises(ValueError, match=r"are not here, .* hf download some/model --include '\*\.json'"):
        find_architecture("some/model")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("cond_stage_model.transformer.text_model.x", "sd15"),
        ("cond_stage_model.model.transformer.x", "sd21"),
        ("conditioner.embedders.1.model.x", "sdxl"),
        ("something.else", None),
    ],
)
def test_a_single_file_is_one_of_the_published(
    tmp_path: Path, key: str, name: str | None, tiny_sd_folder: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(1)}, path)
    if name:
        assert find_architecture(str(path)) is PUBLISHED[name]
    else:
        with pytest.raises(ValueError, match=r"holds no Stable Diffusion 1\.x, 2\.x or XL"):
            find_architecture(str(path))
    # Unless a folder says that it is another one.
    of_folder = find_architecture(str(path), config=str(tiny_sd_folder))
    assert of_folder == find_architecture(str(tiny_sd_folder))


def test_what_is_not_known(tmp_path: Path, tiny_sd_folder: Path) -> None:
    with pytest.raises(ValueError, match="'mixture' is made by a function"):
        find_architecture("mixture")
    with pytest.raises(ValueError, match="there is no model at /no/such/folder; check the path"):
        find_architecture("/no/such/folder")
    shutil.copytree(tiny_sd_folder, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "QwenImagePipeline"}))
    with pytest.raises(ValueError, match="is a QwenImagePipeline, whose memory is not known"):
        find_architecture(str(tmp_path / "other"))
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"broken\.safetensors cannot be told"):
        find_architecture(str(tmp_path / "broken.safetensors"))
