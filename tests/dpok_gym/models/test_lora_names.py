"""LoRA files of transformers, from several tools, each against diffusers' and peft's own loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from dpok_gym.models import load_model
from dpok_gym.models.lora import LoRA
from dpok_gym.models.lora_files import FILE_NAME, read_lora, write_peft

#: Small pipelines, and a layer of each that a LoRA can change.
FAMILIES = {
    "stable-diffusion-3": "transformer_blocks.0.attn.add_k_proj",
    "stable-diffusion-3-no-t5": "transformer_blocks.1.ff.net.2",
    "flux-dev": "single_transformer_blocks.0.attn.to_q",
}
SIZE = 32


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, tiny_folder: Callable[[str], Path], fresh_models: Callable[[], None]) -> Any:
    return load_model(tiny_folder(name), "cpu", image_size=SIZE)


@pytest.fixture
def flux(tiny_folder: Callable[[str], Path], fresh_models: Callable[[], None]) -> Any:
    return load_model(tiny_folder("flux-dev"), "cpu", image_size=SIZE)


@torch.no_grad()
def output(model: Any, denoiser: Any = None) -> Tensor:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.predict(latents, torch.tensor([700.0]), model.encode(["a dog"]), 1.0, denoiser)


def our_output(model: Any, file: Path) -> Tensor:
    with LoRA.from_folder(model.denoiser, file, model.lora_prefix).enabled():
        return output(model)


def their_output(model: Any, file: Path) -> Tensor:
    pipeline: Any = plain_pipeline(model)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return output(model, pipeline.transformer)


def plain_pipeline(model: Any) -> Any:
    missing = [part for part in model.optional if getattr(model, part) is None]
    return DiffusionPipeline.from_pretrained(model.name, **dict.fromkeys(missing))


def random_state(model: Any, layers: str = "all", rank: int = 3) -> dict[str, Tensor]:
    """The tensors of a LoRA that changes something, by peft's names."""
    generator = torch.Generator().manual_seed(1)
    state = LoRA(model.denoiser, rank, model.lora_layers[layers]).state_dict()
    return {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in state.items()}


def flat(state: Mapping[str, Tensor], start: str, alpha: float = 2.0) -> dict[str, Tensor]:
    """Names whose dots are underscores, and an alpha for each layer."""
    renamed = {}
    for key, value in state.items():
        layer, _, matrix = key.partition(".lora_")
        layer = start + layer.replace(".", "_")
        renamed[f"{layer}.lora_{'down' if matrix.startswith('A') else 'up'}.weight"] = value
        renamed[f"{layer}.alpha"] = torch.tensor(alpha)
    return renamed


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def assert_read_alike(model: Any, file: Path) -> None:
    ours = our_output(model, file)
    torch.testing.assert_close(ours, their_output(model, file), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, output(model), atol=1e-3)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_diffusers(model: Any, rslora: bool, tmp_path: Path) -> None:
    """As its training scripts write it, with an alpha that is not the rank."""
    pipeline: Any = plain_pipeline(model)
    targets = list(model.lora_layers["attention"])
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=rslora, init_lora_weights=False)
    pipeline.transformer.add_adapter(config)
    layers = {key: value for key, value in pipeline.transformer.state_dict().items() if "lora_" in key}
    layers = {key.replace(".default", ""): value for key, value in layers.items()}
    pipeline.save_lora_weights(
        tmp_path, layers, transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict()
    )
    assert_read_alike(model, tmp_path / FILE_NAME)


def test_an_adapter_of_peft(model: Any, tmp_path: Path) -> None:
    """Written here and read by peft, and the other way round."""
    state = random_state(model)
    write_peft(state, tmp_path / "ours", None, {})
    theirs = PeftModel.from_pretrained(plain_pipeline(model).transformer, tmp_path / "ours")
    ours = our_output(model, tmp_path / "ours")
    torch.testing.assert_close(ours, output(model, theirs.base_model.model), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(our_output(model, tmp_path / "theirs"), ours)
    assert not torch.allclose(ours, output(model), atol=1e-3)


@pytest.mark.parametrize("start", ["lora_transformer_", "lora_unet_"])
def test_underscores_in_the_names_of_diffusers(model: Any, start: str, tmp_path: Path) -> None:
    """As OneTrainer writes them; diffusers itself reads those of FLUX only."""
    state = random_state(model)
    made = read_lora(save(tmp_path / "it.safetensors", flat(state, start)), model.denoiser, model.lora_prefix)
    assert made.keys() == state.keys()
    for key, value in state.items():
        expected = value * (2 / 3) if ".lora_B." in key else value  # alpha / rank
        torch.testing.assert_close(made[key], expected)


def flux_of_kohya(model: Any) -> dict[str, Tensor]:
    """The layers of a block of two streams by the authors' names, where queries, keys and values are one."""
    width = model.denoiser.inner_dim
    sizes = {"attn_qkv": (width, 3 * width), "attn_proj": (width, width)}
    sizes |= {"mlp_0": (width, 4 * width), "mlp_2": (4 * width, width)}
    tensors = {}
    for stream in ("img", "txt"):
        for layer, (inputs, outputs) in sizes.items():
            key = f"lora_unet_double_blocks_0_{stream}_{layer}"
            tensors[f"{key}.lora_down.weight"] = 0.3 * torch.randn(3, inputs)
            tensors[f"{key}.lora_up.weight"] = 0.3 * torch.randn(outputs, 3)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


@pytest.mark.parametrize("start", ["lora_unet_double_blocks_0_", "diffusion_model.double_blocks.0."])
def test_flux_by_the_names_of_its_authors(flux: Any, start: str, tmp_path: Path) -> None:
    """Of kohya's scripts, and as ComfyUI saves them."""
    tensors = flux_of_kohya(flux)
    if "." in start:
        dotted = {"attn_qkv": "attn.qkv", "attn_proj": "attn.proj", "mlp_0": "mlp.0", "mlp_2": "mlp.2"}
        for old, new in {"img_": "img_", "txt_": "txt_", **dotted}.items():
            tensors = {key.replace(old, new): value for key, value in tensors.items()}
        tensors = {key.replace("lora_unet_double_blocks_0_", start): value for key, value in tensors.items()}
    assert_read_alike(flux, save(tmp_path / "it.safetensors", tensors))


def test_flux_of_xlabs(flux: Any, tmp_path: Path) -> None:
    width = flux.denoiser.inner_dim
    tensors = {}
    for layer, outputs in {"qkv_lora1": 3, "qkv_lora2": 3, "proj_lora1": 1, "proj_lora2": 1}.items():
        key = f"double_blocks.0.processor.{layer}"
        tensors[f"{key}.down.weight"] = 0.3 * torch.randn(2, width)
        tensors[f"{key}.up.weight"] = 0.3 * torch.randn(outputs * width, 2)
    assert_read_alike(flux, save(tmp_path / "it.safetensors", tensors))


@pytest.mark.parametrize(
    "start", ["lora_unet_joint_blocks_0_x_block_attn_", "diffusion_model.joint_blocks.0.x_block.attn."]
)
def test_the_authors_names_of_stable_diffusion_3(
    tiny_folder: Callable[[str], Path], start: str, tmp_path: Path
) -> None:
    model: Any = load_model(tiny_folder("stable-diffusion-3"), "cpu")
    tensors = {f"{start}qkv.lora_down.weight": torch.ones(2, 32), f"{start}qkv.lora_up.weight": torch.ones(96, 2)}
    message = r"diffusers has no converter of these names for a SD3Transformer2DModel; .*diffusers, of peft or of One"
    with pytest.raises(ValueError, match=message):
        read_lora(save(tmp_path / "it.safetensors", tensors), model.denoiser, model.lora_prefix)


def test_names_that_diffusers_cannot_convert(flux: Any, tmp_path: Path) -> None:
    tensors = {"lora_unet_oddly_named.lora_down.weight": torch.ones(2, 32)}
    with pytest.raises(ValueError, match="diffusers cannot convert its names of layers, such as lora_unet_oddly"):
        read_lora(save(tmp_path / "it.safetensors", tensors), flux.denoiser, flux.lora_prefix)


def test_a_lora_of_another_family(model: Any, name: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    of_sd = {f"{key}.lora_A.weight": torch.ones(2, 768), f"{key}.lora_B.weight": torch.ones(320, 2)}
    kind = type(model.denoiser).__name__
    with pytest.raises(ValueError, match=rf"it is of Stable Diffusion 1\.x, and the model here has a {kind}"):
        read_lora(save(tmp_path / "sd.safetensors", of_sd), model.denoiser, model.lora_prefix)
    layer = f"transformer.{FAMILIES[name]}"
    ours = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    unet: Any = load_model(tiny_folder("stable-diffusion"), "cpu")
    with pytest.raises(ValueError, match=rf"it is of another model: there is no layer '{layer}' here"):
        read_lora(save(tmp_path / "transformer.safetensors", ours), unet.denoiser, unet.lora_prefix)


@pytest.mark.parametrize("start", ["text_encoder_3.block.0", "lora_te3_block_0", "text_encoders.t5xxl.block.0"])
def test_a_lora_of_t5_too(model: Any, start: str, tmp_path: Path) -> None:
    tensors = {f"{start}.lora_down.weight": torch.ones(2, 2), f"{start}.lora_up.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="it changes the text encoder too"):
        read_lora(save(tmp_path / "it.safetensors", tensors), model.denoiser, model.lora_prefix)
