"""Files of LoRAs that other tools write and read: each against diffusers' and peft's own loading."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpok_gym.models import load_model
from dpok_gym.models.lora import LoRA
from dpok_gym.models.lora_files import FILE_NAME, Ranks, read_lora, write_diffusers, write_kohya, write_peft
from dpok_gym.models.stable_diffusion import StableDiffusion

ATTENTION, ALL = (StableDiffusion.lora_layers[name] for name in ("attention", "all"))
#: All layers of a UNet that a LoRA can change.
EVERY = (*ALL, "conv", "conv_in", "conv_out", "linear_1", "linear_2")
FOLDERS = {"sd": "tiny_sd_folder", "xl": "tiny_xl_folder"}
NOTES = "lora_adapter_metadata"


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(FOLDERS[request.param])


@pytest.fixture
def sd_unet(tiny_sd_folder: Path) -> UNet2DConditionModel:
    return unet_of(tiny_sd_folder)


def unet_of(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False)


def output(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 40, network.config.cross_attention_dim, generator=generator)
    added = None
    if network.config.addition_embed_type:
        added = {"text_embeds": torch.randn(2, 48, generator=generator), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return network(latents, torch.tensor([981, 21]), text, added_cond_kwargs=added).sample


def random_state(network: nn.Module, targets: tuple[str, ...] = ATTENTION, rank: int = 4) -> dict[str, Tensor]:
    """The tensors of a LoRA that changes something, by peft's names."""
    generator = torch.Generator().manual_seed(1)
    state = LoRA(network, rank, targets).state_dict()
    return {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in state.items()}


def with_other_ranks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with one rank less in every third layer."""
    layers = sorted({key.split(".lora_")[0] for key in state})
    smaller = set(layers[::3])
    cut = {}
    for key, value in state.items():
        rows = value[:-1] if "lora_A" in key else value[:, :-1]
        cut[key] = rows.contiguous() if key.split(".lora_")[0] in smaller else value
    return cut


def prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"unet.{key}": value for key, value in state.items()}


def noted(path: Path, state: Mapping[str, Tensor], **settings: Any) -> Path:
    """A file with peft's settings in its header, as diffusers writes it."""
    notes = {f"unet.{name}": value for name, value in LoraConfig(**settings).to_dict().items()}
    notes = {name: sorted(value) if isinstance(value, set) else value for name, value in notes.items()}
    save_file(prefixed(state), path, {"format": "pt", NOTES: json.dumps(notes)})
    return path


def plain(path: Path, state: Mapping[str, Tensor]) -> Path:
    save_file(dict(state), path)
    return path


def of_2023(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the attention processors of 2023."""
    renamed = {}
    for key, value in state.items():
        layer, matrix = key.replace(".to_out.0", ".to_out").split(".lora_")
        block, _, projection = layer.rpartition(".")
        side = "down" if matrix.startswith("A") else "up"
        renamed[f"unet.{block}.processor.{projection}_lora.{side}.weight"] = value
    return renamed


def kohya(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    named = convert_state_dict_to_kohya(prefixed(state))
    return {key: torch.tensor(alpha) if key.endswith(".alpha") else value for key, value in named.items()}


def alpha_notes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    ranks = Ranks.of(state)
    return {
        "r": ranks.rank,
        "lora_alpha": 6,
        "rank_pattern": {f"^{layer}": rank for layer, rank in ranks.others.items()},
        "alpha_pattern": {f"^{ranks.layers[0]}": 16, "attn2.to_k": 1},
        "target_modules": list(ranks.layers),
    }


#: Writers of a file, by the case. Each takes a path, and a LoRA of the UNet by peft's names.
FILES: dict[str, tuple[tuple[str, ...], Callable[[Path, dict[str, Tensor]], Any]]] = {
    "training scripts": (ATTENTION, lambda path, s: plain(path, convert_state_dict_to_diffusers(prefixed(s)))),
    "peft's names": (ALL, lambda path, s: plain(path, prefixed(s))),
    "several ranks": (ALL, lambda path, s: plain(path, prefixed(with_other_ranks(s)))),
    "rslora": (
        ATTENTION,
        lambda path, s: noted(path, s, r=4, lora_alpha=4, use_rslora=True, target_modules=list(ATTENTION)),
    ),
    "alpha": (
        ALL,
        lambda path, s: noted(
            path, s, r=4, lora_alpha=2, target_modules=list(ALL), lora_dropout=0.1, init_lora_weights="gaussian"
        ),
    ),
    "patterns": (
        ALL,
        lambda path, s: noted(path, with_other_ranks(s), **alpha_notes(with_other_ranks(s))),
    ),
    "2023": (ATTENTION, lambda path, s: plain(path, of_2023(s))),
    "kohya": (ALL, lambda path, s: plain(path, kohya(s, 1.0))),
    "kohya, several ranks": (ALL, lambda path, s: plain(path, kohya(with_other_ranks(s), 2.0))),
    "kohya, half precision": (ATTENTION, lambda path, s: plain(path, {k: v.half() for k, v in kohya(s, 2.0).items()})),
}


#: Cases whose names or sizes are others in Stable Diffusion XL.
OTHER_IN_XL = ("training scripts", "several ranks", "kohya", "kohya, several ranks")


@pytest.mark.parametrize(
    ("folder", "case"),
    [*(("sd", case) for case in FILES), *(("xl", case) for case in OTHER_IN_XL)],
    indirect=["folder"],
)
def test_equal_to_diffusers(folder: Path, case: str, tmp_path: Path) -> None:
    targets, write = FILES[case]
    network = unet_of(folder)
    before = output(network)
    path = tmp_path / FILE_NAME
    write(path, random_state(network, targets))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    theirs = output(pipeline.unet.eval())  # the dropout of a new LoRA is on
    with LoRA.from_folder(network, tmp_path, "unet.").enabled():
        torch.testing.assert_close(output(network), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, before, atol=1e-2)


def test_training_scripts_with_convolutions(folder: Path, tmp_path: Path) -> None:
    """Some names are diffusers' and some peft's. diffusers looks at the first one, and may then drop the others."""
    network = unet_of(folder)
    tensors = convert_state_dict_to_diffusers(prefixed(random_state(network, ALL)))
    plain(tmp_path / FILE_NAME, tensors)
    ordered = dict(sorted(tensors.items(), key=lambda item: ".lora.down." not in item[0]))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(ordered)  # in this order it drops none
    with LoRA.from_folder(network, tmp_path, "unet.").enabled():
        torch.testing.assert_close(output(network), output(pipeline.unet), rtol=1e-4, atol=1e-4)


def test_alphas_of_single_layers_in_a_kohya_file(folder: Path, tmp_path: Path) -> None:
    """diffusers leaves them out in attention; the scale of each layer is its alpha / its rank."""
    network = unet_of(folder)
    state = random_state(network, EVERY)
    named = kohya(state, 4.0)
    alphas = {key: 2.0 ** (number % 3) for number, key in enumerate(k for k in named if k.endswith(".alpha"))}
    plain(tmp_path / "x.safetensors", named | {key: torch.tensor(value) for key, value in alphas.items()})
    read = read_lora(tmp_path / "x.safetensors", network)
    for key, value in state.items():
        layer, matrix = key.split(".lora_")
        scale = alphas[f"lora_unet_{layer.replace('.', '_')}.alpha"] / 4 if matrix.startswith("B") else 1
        torch.testing.assert_close(read[key], value * scale)


def author_names(network: UNet2DConditionModel) -> dict[str, str]:
    """The name that each layer of a UNet has in the code of Stable Diffusion's authors."""
    per_block = network.config.layers_per_block
    in_resnet = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    fixed = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    names = {}
    for layer, module in network.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        if layer in fixed:
            names[layer] = fixed[layer]
            continue
        match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.+)", layer)
        if match:
            side, kind, rest = match[1], match[3], in_resnet.get(match[5], match[5])
            block, number = int(match[2]), int(match[4])
            if kind == "downsamplers":
                names[layer] = f"input_blocks.{(block + 1) * (per_block + 1)}.0.op"
                continue
            if side == "down_blocks":
                index, root = 1 + block * (per_block + 1) + number, "input_blocks"
            else:
                index, root = block * (per_block + 1) + number, "output_blocks"
            if kind == "upsamplers":
                has_attention = hasattr(network.up_blocks[block], "attentions")
                index = block * (per_block + 1) + per_block
                names[layer] = f"{root}.{index}.{2 if has_attention else 1}.conv"
            else:
                names[layer] = f"{root}.{index}.{0 if kind == 'resnets' else 1}.{rest}"
            continue
        match = re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", layer)
        assert match, layer
        index = 2 * int(match[2]) if match[1] == "resnets" else 1
        names[layer] = f"middle_block.{index}.{in_resnet.get(match[3], match[3])}"
    return names


def test_kohya_file_with_the_names_of_the_authors(tiny_xl_folder: Path, tmp_path: Path) -> None:
    """As kohya's scripts write LoRAs of Stable Diffusion XL."""
    names = author_names(unet_of(tiny_xl_folder))
    targets = (*ATTENTION, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "ff.net.0.proj", "ff.net.2")
    state = random_state(unet_of(tiny_xl_folder), targets)
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, matrix = key.split(".lora_")
        name = "lora_unet_" + names[layer].replace(".", "_")
        tensors[f"{name}.lora_{'down' if matrix.startswith('A') else 'up'}.weight"] = value
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    plain(tmp_path / "x.safetensors", tensors)
    pipeline = DiffusionPipeline.from_pretrained(tiny_xl_folder)
    pipeline.load_lora_weights(tmp_path / "x.safetensors")
    network = unet_of(tiny_xl_folder)
    with LoRA.from_folder(network, tmp_path, "unet.").enabled():
        torch.testing.assert_close(output(network), output(pipeline.unet), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn1.to_q": 3}}], ids=str)
@pytest.mark.parametrize("whole", ["folder", "file"])
def test_peft_adapter(sd_unet: Any, tiny_sd_folder: Path, settings: dict[str, Any], whole: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "conv1"], **settings)
    adapted = get_peft_model(unet_of(tiny_sd_folder), config)
    torch.manual_seed(3)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.2)
    expected = output(adapted)
    adapted.save_pretrained(tmp_path)
    path = tmp_path if whole == "folder" else tmp_path / "adapter_model.safetensors"
    with LoRA.from_folder(sd_unet, path, "unet.").enabled():
        torch.testing.assert_close(output(sd_unet), expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"peft's format, whose adapter_config\.json must be beside it"):
        read_lora(path, sd_unet)


def test_an_adapter_that_a_denoiser_saved(sd_unet: Any, tiny_sd_folder: Path, tmp_path: Path) -> None:
    """Its names have no prefix, nor have its settings."""
    other = unet_of(tiny_sd_folder)
    other.add_adapter(LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=list(ATTENTION)))
    torch.manual_seed(3)
    for name, value in other.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.2)
    expected = output(other)
    other.save_lora_adapter(tmp_path)
    with LoRA.from_folder(sd_unet, tmp_path, "unet.").enabled():
        torch.testing.assert_close(output(sd_unet), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_advice_for_text_encoders(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """A model with the whole LoRA in it draws what diffusers draws with the LoRA."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    text = get_peft_model_state_dict(get_peft_model(pipe.text_encoder, config))
    text = {key.removeprefix("base_model.model."): value for key, value in text.items()}
    denoiser = random_state(unet_of(tiny_sd_folder))
    StableDiffusionPipeline.save_lora_weights(tmp_path, denoiser, text)
    with pytest.raises(ValueError, match="changes the text encoder too"):
        read_lora(tmp_path, unet_of(tiny_sd_folder))

    def draw(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return pipe("a green rabbit.", num_inference_steps=2, generator=noise, output_type="pt").images

    plain_images = draw(StableDiffusionPipeline.from_pretrained(tiny_sd_folder))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipe.load_lora_weights(tmp_path)
    expected = draw(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "model")
    assert not torch.allclose(plain_images, expected, atol=1e-2)
    model = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(draw(model), expected, rtol=1e-3, atol=1e-3)
    load_model(tmp_path / "model", "cpu")


def test_pickles_need_permission(sd_unet: Any, tmp_path: Path) -> None:
    state = random_state(sd_unet)
    torch.save(of_2023(state), tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match=r"is a pickle, which may run code .*allow_pickle=True.*--trust"):
        read_lora(tmp_path, sd_unet)
    read = read_lora(tmp_path, sd_unet, allow_pickle=True)
    assert all(torch.equal(read[key], value) for key, value in state.items())


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("harm",))


@pytest.mark.parametrize("content", [Harmful(), [1], {"a": 1}, b"damaged"], ids=["code", "list", "numbers", "damaged"])
def test_damaged_pickles(sd_unet: Any, tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"the LoRA file {path} cannot be read, or is damaged: "):
        read_lora(path, sd_unet, allow_pickle=True)
    assert "harm" not in capsys.readouterr().out


def replaced(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in prefixed(state).items()}


ONE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "DoRA": (lambda s: {**prefixed(s), f"{ONE}.lora_magnitude_vector": torch.ones(3)}, "its format is DoRA"),
    "DoRA, kohya": (lambda s: {**kohya(s, 1.0), "lora_unet_x.dora_scale": torch.ones(3)}, "its format is DoRA"),
    "LoHa": (lambda s: {"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "its format is LoHa"),
    "LoKr": (lambda s: {"lora_unet_x.lokr_w1": torch.ones(2, 2)}, "its format is LoKr"),
    "Tucker": (lambda s: {**kohya(s, 1.0), "lora_unet_x.lora_mid.weight": torch.ones(1)}, "a Tucker decomposition"),
    "biases": (lambda s: {**prefixed(s), f"{ONE}.lora_B.bias": torch.ones(64)}, "a LoRA with biases"),
    "whole weights": (lambda s: {**kohya(s, 1.0), "lora_unet_x.diff": torch.ones(1)}, "differences of whole weights"),
    "textual inversion": (lambda s: {"emb_params": torch.ones(2, 32)}, "a textual inversion"),
    "a model": (lambda s: {"unet.conv_in.weight": torch.ones(2)}, "holds no LoRA weights; give a file that"),
    "text encoder": (
        lambda s: {**prefixed(s), "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 2)},
        r"changes the text encoder too \(1 tensors, .*pipe\.fuse_lora\(\)",
    ),
    "text encoder, kohya": (
        lambda s: {**kohya(s, 1.0), "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)},
        "changes the text encoder too",
    ),
    "another family": (lambda s: replaced(s, "unet.", "transformer."), "no layer 'transformer"),
    "another model": (lambda s: replaced(s, "mid_block", "middle"), "of another model: there is no layer 'middle"),
    "half": (lambda s: {k: v for k, v in prefixed(s).items() if "lora_A" in k}, "lacks one of its two matrices"),
    "more": (lambda s: {**prefixed(s), f"{ONE}.lora_C.weight": torch.ones(2)}, "lora_C.weight is not understood here"),
    "integers": (lambda s: {k: v.int() for k, v in prefixed(s).items()}, r"is of the type torch\.int32"),
    "not finite": (lambda s: {k: v / 0 for k, v in prefixed(s).items()}, "values that are not finite"),
    "vectors": (lambda s: {k: v.flatten() for k, v in prefixed(s).items()}, r"has the shape \(.*\) and is no matrix"),
    "scalars": (lambda s: {k: v.sum() for k, v in prefixed(s).items()}, r"has the shape \(.*\) and is no matrix"),
    "scalars, kohya": (lambda s: {k: v.sum() for k, v in kohya(s, 1.0).items()}, "and is no matrix"),
    "empty, kohya": (lambda s: {k: v[:0] if v.dim() else v for k, v in kohya(s, 1.0).items()}, "alpha has no layer"),
    "no layers": (lambda s: {"lora": torch.ones(2)}, "its lora is not understood here"),
    "rank 0": (
        lambda s: {k: v[:0] if "_A" in k else v[:, :0] for k, v in prefixed(s).items()},
        "have the ranks 0 and 0, and not one from 1",
    ),
    "two ranks": (
        lambda s: {k: v[:3] if "_A" in k else v for k, v in prefixed(s).items()},
        "have the ranks 3 and 4, and not one from 1 to 5,120",
    ),
    "wider": (
        lambda s: {k: torch.ones(4, 7) if "_A" in k else v for k, v in prefixed(s).items()},
        r"another model: its .* has the shape \(4, 7\), for a layer whose weight has the shape",
    ),
    "alpha alone": (lambda s: {**kohya(s, 1.0), "lora_unet_x.alpha": torch.tensor(1.0)}, "alpha has no layer"),
    "unknown, kohya": (
        lambda s: {k.replace("_mid_", "_x_"): v for k, v in kohya(s, 1.0).items()},
        r"there is no layer|diffusers cannot convert",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(sd_unet: Any, case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    path = tmp_path / FILE_NAME
    made = {key: value.clone().contiguous() for key, value in make(random_state(sd_unet)).items()}
    save_file(made, path)
    names = {name for name, _ in sd_unet.named_modules()}
    with pytest.raises(ValueError, match=message) as caught:
        LoRA.from_folder(sd_unet, tmp_path, "unet.")
    assert "\n" not in str(caught.value)
    assert "LoRA" in str(caught.value)
    assert {name for name, _ in sd_unet.named_modules()} == names


@pytest.mark.parametrize("form", ["peft", "kohya", "2023", "authors"])
def test_a_lora_of_another_generation(form: str, tmp_path: Path) -> None:
    """The message names both, in every format."""
    networks = {}
    for family, settings in REAL_UNETS.items():
        with torch.device("meta"):
            networks[family] = UNet2DConditionModel(**settings)
    for family, other in (("1.5", "xl"), ("xl", "1.5")):
        state: dict[str, Tensor] = {}
        for layer, module in networks[family].named_modules():
            if layer.endswith("attn2.to_k"):
                state |= {f"{layer}.lora_A.weight": torch.ones(1, module.in_features)}
                state |= {f"{layer}.lora_B.weight": torch.ones(module.out_features, 1)}
        named = {"peft": prefixed, "kohya": lambda s: kohya(s, 1.0), "2023": of_2023}.get(form)
        if named is None:
            names = author_names(networks[family])
            layers = {f"lora_unet_{layer.replace('.', '_')}": name for layer, name in names.items()}
            made = {
                f"lora_unet_{layers[key.split('.')[0]].replace('.', '_')}.{key.partition('.')[2]}": value
                for key, value in kohya(state, 1.0).items()
            }
        else:
            made = named(state)
        path = plain(tmp_path / f"{family}.safetensors", made)
        assert set(read_lora(path, networks[family])) == set(state)
        titles = {"1.5": r"Stable Diffusion 1\.x", "xl": "Stable Diffusion XL"}
        with pytest.raises(ValueError, match=f"it is of {titles[family]}, and the model here is of {titles[other]}"):
            read_lora(path, networks[other])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "its setting use_dora=True of peft is not understood"),
        ({"lora_bias": True}, "its setting lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "its setting init_lora_weights='pissa'"),
        ({"bias": "all"}, "its setting bias='all'"),
        ({"peft_type": "LOHA"}, "its setting peft_type='LOHA'"),
        ({"turbo": 3}, "its setting turbo=3"),
        ({"modules_to_save": ["conv_in"]}, r"its setting modules_to_save=\['conv_in'\]"),
        ({"r": 8}, "its settings note rank 8 for the layer .*, whose rank is 4"),
        ({"rank_pattern": {"(a+)+b": 4}}, r"its setting rank_pattern has the pattern '\(a\+\)\+b'"),
        ({"rank_pattern": [1]}, "its rank_pattern must be a mapping"),
        ({"lora_alpha": "big"}, "its lora_alpha of the layer .* must be a number, not 'big'"),
        ({"lora_alpha": float("inf")}, "its lora_alpha of the layer .* must be finite"),
    ],
    ids=str,
)
def test_settings_that_are_not_understood(sd_unet: Any, settings: Any, message: str, tmp_path: Path) -> None:
    notes = {f"unet.{name}": value for name, value in ({"r": 4, "lora_alpha": 4} | settings).items()}
    save_file(prefixed(random_state(sd_unet)), tmp_path / FILE_NAME, {NOTES: json.dumps(notes)})
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path, sd_unet)


@pytest.mark.parametrize("notes", ["[1]", "{", "3"])
def test_damaged_notes(sd_unet: Any, notes: str, tmp_path: Path) -> None:
    save_file(prefixed(random_state(sd_unet)), tmp_path / FILE_NAME, {NOTES: notes})
    with pytest.raises(ValueError, match="its note lora_adapter_metadata"):
        read_lora(tmp_path, sd_unet)


def test_which_file_of_a_folder(sd_unet: Any, tmp_path: Path) -> None:
    state = random_state(sd_unet)
    for number in (1, 2):
        plain(tmp_path / f"{number}.safetensors", prefixed(state))
        if number == 1:
            read_lora(tmp_path, sd_unet)
    with pytest.raises(ValueError, match=r"has 2 \.safetensors files: name one of them, such as .*1\.safetensors"):
        read_lora(tmp_path, sd_unet)
    plain(tmp_path / FILE_NAME, prefixed(state))
    read_lora(tmp_path, sd_unet)


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "diffusers": lambda state, folder: write_diffusers(state, folder, "unet.", {"a": "note"}),
    "kohya": lambda state, folder: write_kohya(state, folder / "x.safetensors", {"a": "note"}),
    "peft": lambda state, folder: write_peft(state, folder, "a/model", {"a": "note"}),
}


@pytest.mark.parametrize(("folder", "several"), [("sd", False), ("xl", True)], indirect=["folder"])
@pytest.mark.parametrize("kind", WRITERS)
def test_round_trip(folder: Path, kind: str, several: bool, tmp_path: Path) -> None:
    """Other tools read what we write, and so do we."""
    network = unet_of(folder)
    state = random_state(network, ALL)
    state = with_other_ranks(state) if several else state
    path = WRITERS[kind](state, tmp_path)
    read = read_lora(path, network)
    assert set(read) == set(state)
    for key, value in state.items():
        torch.testing.assert_close(read[key], value, rtol=1e-6, atol=0)
    with safe_open(path, "pt") as file:
        assert file.metadata()["a"] == "note"
    assert WRITERS[kind](state, tmp_path / "again").read_bytes() == path.read_bytes()

    lora = LoRA.from_folder(network, path, "unet.")
    with lora.enabled():
        ours = output(network)
    if kind == "peft":
        theirs = output(PeftModel.from_pretrained(unet_of(folder), tmp_path))
    else:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(path)
        theirs = output(pipeline.unet)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


#: The UNet of Stable Diffusion 1.5, and that of XL.
REAL_UNETS: dict[str, dict[str, Any]] = {
    "1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "xl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def comfy_names(network: UNet2DConditionModel) -> set[str]:
    """The names of layers of a UNet that ComfyUI's key map knows: the authors' names, and diffusers' names."""
    known = set()
    for layer, name in author_names(network).items():
        known |= {f"lora_unet_{layer.replace('.', '_')}", f"lora_unet_{name.replace('.', '_')}"}
    return known


def webui_name(key: str) -> str | None:
    """The layer, by its author's name, that AUTOMATIC1111's web UI takes a name of kohya's for; None for none."""
    in_resnet = {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }
    if match := re.fullmatch(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", key):
        index = int(match[2]) * 3 + int(match[4]) + (match[1] == "down")
        place = 1 if match[3] == "attentions" else 0
        side = "input" if match[1] == "down" else "output"
        return f"{side}_blocks_{index}_{place}_{in_resnet.get(match[5], match[5])}"
    if match := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", key):
        index = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block_{index}_{in_resnet.get(match[3], match[3])}"
    return None


@pytest.mark.parametrize("family", REAL_UNETS)
def test_comfyui_and_web_ui_know_every_exported_layer(family: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel(**REAL_UNETS[family])
    authors = author_names(network)
    for targets in (ATTENTION, ALL):
        layers = [name for name in authors if any(name.endswith(f".{target}") for target in targets)]
        ends = {"lora_A.weight": (1, 2), "lora_B.weight": (2, 1)}
        state = {f"{layer}.{end}": torch.ones(size) for layer in layers for end, size in ends.items()}
        written = load_file(write_kohya(state, tmp_path / "x.safetensors", {}))
        keys = {key.split(".")[0] for key in written}
        assert len(keys) == len(layers)
        assert {key.partition(".")[2] for key in written} == {"lora_up.weight", "lora_down.weight", "alpha"}
        assert keys <= comfy_names(network)
        assert {webui_name(key) for key in keys} == {authors[layer].replace(".", "_") for layer in layers}
    n_attention = sum(name.endswith(("attn1", "attn2")) for name, _ in network.named_modules())
    assert n_attention == {"1.5": 32, "xl": 140}[family]


def test_ranks() -> None:
    state: dict[str, Tensor] = {}
    for layer, rank in {"a.x": 4, "b.x": 4, "c": 2}.items():
        state |= {f"{layer}.lora_A.weight": torch.ones(rank, 3), f"{layer}.lora_B.weight": torch.ones(3, rank)}
    ranks = Ranks.of(state)
    assert ranks == Ranks(4, {"c": 2}, ("a.x", "b.x", "c"))
    assert str(ranks) == "3 layers with ranks 2 to 4"
    assert ranks.to_peft() == {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"^c": 2},
        "alpha_pattern": {"^c": 2},
        "target_modules": ["a.x", "b.x", "c"],
    }
    assert str(Ranks.of({})) == "0 layers with rank 0"
