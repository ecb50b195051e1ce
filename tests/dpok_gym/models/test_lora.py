"""Low-rank changes of a denoiser: enabled, disabled, several at once, and in diffusers' own file format."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpok_gym.models.lora import LoRA, reference_copy, reference_view
from dpok_gym.models.lora_files import FILE_NAME
from dpok_gym.models.stable_diffusion import StableDiffusion
from tests.support import assert_same

LAYERS = StableDiffusion.lora_layers
PREFIX = StableDiffusion.lora_prefix
ATTENTION = LAYERS["attention"]


@pytest.fixture
def network(tiny_sd_folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet").eval().requires_grad_(False)


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def output(network: nn.Module) -> Tensor:
    return network(randn(2, 4, 8, 8, seed=0), torch.tensor([981, 21]), randn(2, 40, 32, seed=1)).sample


def output_with(lora: LoRA) -> Tensor:
    with torch.no_grad(), lora.enabled():
        return output(lora._network)


def trained(network: nn.Module, rank: int = 2, seed: int = 2, target_modules: Sequence[str] = ATTENTION) -> LoRA:
    """A LoRA that changes something, as after training."""
    lora = LoRA(network, rank, target_modules)
    with torch.no_grad():
        for i, (name, value) in enumerate(lora.parameters.items()):
            if "lora_B" in name:
                value.copy_(0.3 * randn(*value.shape, seed=100 * seed + i))
    return lora


def test_changes_nothing_to_begin_with(network: UNet2DConditionModel) -> None:
    with torch.no_grad():
        before = output(network)
        lora = LoRA(network, 4, ATTENTION)
        assert torch.equal(output(network), before)
    assert torch.equal(output_with(lora), before)
    changed = trained(network)
    assert not torch.allclose(output_with(changed), before, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(output(network), before)


def test_parameters(network: UNet2DConditionModel) -> None:
    before = set(network.parameters())
    lora = LoRA(network, 3, ATTENTION)
    added = set(network.parameters()) - before
    assert set(lora.parameters.values()) == added
    assert all(value.requires_grad for value in added)
    assert not any(value.requires_grad for value in before)
    assert {min(value.shape) for value in added} == {3}
    # Self- and cross-attention of four transformer blocks, four projections each, two matrices each.
    assert len(added) == 4 * 2 * 4 * 2


def test_two_in_one_network(network: UNet2DConditionModel) -> None:
    first = trained(network, rank=2, seed=2)
    expected_first = output_with(first)
    second = trained(network, rank=5, seed=3, target_modules=["to_q", "ff.net.2"])
    expected_second = output_with(second)
    assert not torch.allclose(expected_first, expected_second, atol=1e-3)
    assert torch.equal(output_with(first), expected_first)
    assert not set(first.parameters) & set(second.parameters)
    with torch.no_grad():
        for value in second.parameters.values():
            value.zero_()
    assert torch.equal(output_with(first), expected_first)


@pytest.mark.slow
def test_backward_after_the_block(network: UNet2DConditionModel) -> None:
    """Also when both are used before the backward pass: what is disabled must not be frozen."""
    first, second = trained(network, seed=2), trained(network, seed=3)

    def gradients(of: LoRA) -> list[Tensor]:
        found = [value.grad.clone() for value in of.parameters.values()]
        for value in network.parameters():
            value.grad = None
        return found

    expected = []
    for lora in (first, second):
        with lora.enabled():
            output(network).square().sum().backward()
        expected.append(gradients(lora))
    assert all(bool(value.abs().sum() > 0) for value in expected[0])

    losses = []
    for lora in (first, second):
        with lora.enabled():
            losses.append(output(network).square().sum())
    with torch.no_grad():
        output(network)
    sum(losses).backward()
    for lora, values in zip((first, second), expected, strict=True):
        for value, parameter in zip(values, lora.parameters.values(), strict=True):
            torch.testing.assert_close(parameter.grad, value)


@pytest.mark.slow
def test_nested_blocks(network: UNet2DConditionModel) -> None:
    first, second = trained(network, seed=2), trained(network, seed=3, target_modules=["to_v", "ff.net.2"])
    with torch.no_grad():
        off = output(network)
        expected = {lora: output_with(lora) for lora in (first, second)}
        with first.enabled():
            with first.enabled():
                assert torch.equal(output(network), expected[first])
            assert torch.equal(output(network), expected[first])
            with second.enabled():
                assert torch.equal(output(network), expected[second])
                with first.enabled():
                    assert torch.equal(output(network), expected[first])
                assert torch.equal(output(network), expected[second])
            assert torch.equal(output(network), expected[first])
        assert torch.equal(output(network), off)


@pytest.mark.slow
def test_disabled_within_the_block_of_another(network: UNet2DConditionModel) -> None:
    first, second = trained(network, seed=2), trained(network, seed=3, target_modules=["to_v", "ff.net.2"])
    with torch.no_grad():
        reference = output(network)
        expected = output_with(first)
        for lora in (first, second):
            with lora.disabled():
                assert torch.equal(output(network), reference)
        with first.enabled():
            for lora in (first, second):
                with lora.disabled():
                    assert torch.equal(output(network), reference)
                    with first.enabled():
                        assert torch.equal(output(network), expected)
                    assert torch.equal(output(network), reference)
                assert torch.equal(output(network), expected)
            with pytest.raises(KeyError), second.disabled():
                raise KeyError
            assert torch.equal(output(network), expected)
        assert torch.equal(output(network), reference)


def test_reference_within_the_block_leaves_the_gradient(network: UNet2DConditionModel) -> None:
    """As a KL penalty needs it: the reference is computed between the forward and the backward pass."""
    lora = trained(network)

    def gradients(with_reference: bool) -> list[Tensor]:
        with lora.enabled():
            loss = output(network).square().sum()
            if with_reference:
                with torch.no_grad(), lora.disabled():
                    output(network)
        loss.backward()
        values = [value.grad.clone() for value in lora.parameters.values()]
        for value in lora.parameters.values():
            value.grad = None
        return values

    expected = gradients(with_reference=False)
    assert_same(gradients(with_reference=True), expected)
    assert any(bool(value.any()) for value in expected)
    assert all(value.requires_grad for value in lora.parameters.values())


def test_disabled_after_an_error(network: UNet2DConditionModel) -> None:
    lora = trained(network)
    with torch.no_grad():
        off = output(network)
        with pytest.raises(KeyError), lora.enabled():
            raise KeyError
        assert torch.equal(output(network), off)


def test_made_within_the_block_of_another(network: UNet2DConditionModel) -> None:
    first = trained(network)
    expected = output_with(first)
    with torch.no_grad(), first.enabled():
        trained(network, seed=3, target_modules=["to_q", "ff.net.2"])
        assert torch.equal(output(network), expected)


@pytest.mark.slow
def test_the_forgotten_leave_the_network(network: UNet2DConditionModel) -> None:
    kept, forgotten = trained(network), trained(network, seed=3)
    before = output_with(kept)
    name = forgotten.name
    with forgotten.enabled():  # the layers were set to it last
        pass
    del forgotten
    assert any(name in key for key, _ in network.named_parameters())
    added = LoRA(network, 2, ATTENTION)
    assert not any(name in key for key, _ in network.named_parameters())
    assert set(network.peft_config) == {kept.name, added.name}
    assert set(kept.parameters.values()) | set(added.parameters.values()) <= set(network.parameters())
    assert all(value.requires_grad for lora in (kept, added) for value in lora.parameters.values())
    assert torch.equal(output_with(kept), before)


@pytest.mark.slow
def test_plain_diffusers_reads_the_file(network: UNet2DConditionModel, tiny_sd_folder: Path, tmp_path: Path) -> None:
    trained(network, rank=2, seed=9)  # another one in the same network stays out of the file
    lora = trained(network, rank=4)
    assert lora.save(tmp_path / "deep" / "folder", PREFIX) == tmp_path / "deep" / "folder" / FILE_NAME
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipeline.load_lora_weights(tmp_path / "deep" / "folder")
    with torch.no_grad():
        torch.testing.assert_close(output(pipeline.unet), output_with(lora), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(output(network), output_with(lora), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "to_out.0"), ("attn2.to_q", "ff.net.2")])
def test_save_and_load(network: UNet2DConditionModel, targets: tuple[str, ...], tmp_path: Path) -> None:
    lora = trained(network, rank=3, target_modules=targets)
    expected = output_with(lora)
    path = lora.save(tmp_path, PREFIX)
    same_shape = trained(network, rank=3, seed=5, target_modules=targets)
    assert not torch.allclose(output_with(same_shape), expected, atol=1e-3)
    same_shape.load(tmp_path, PREFIX)
    assert torch.equal(output_with(same_shape), expected)
    assert all(value.requires_grad for value in same_shape.parameters.values())

    from_file = LoRA.from_folder(network, path, PREFIX)  # the file itself will do
    assert from_file.rank == 3
    assert torch.equal(output_with(from_file), expected)
    assert torch.equal(output_with(lora), expected)
    assert from_file.save(tmp_path / "again", PREFIX).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_state_dict(network: UNet2DConditionModel, tmp_path: Path) -> None:
    lora, other = trained(network, seed=2), trained(network, seed=3)
    state = lora.state_dict()
    file = load_file(lora.save(tmp_path, PREFIX))
    assert {PREFIX + key for key in state} == set(file)
    assert all(torch.equal(file[PREFIX + key], value) for key, value in state.items())
    assert not any(value.requires_grad for value in state.values())
    assert len(state) == len(lora.parameters)
    assert not any("lora0" in key or lora.name in key for key in state)
    assert set(other.state_dict()) == set(state)  # whatever number each of them has in the network

    expected, before = output_with(lora), output_with(other)
    other.load_state_dict({key: value.clone() for key, value in state.items()})
    assert torch.equal(output_with(other), expected)
    assert not torch.equal(before, expected)
    assert all(value.requires_grad for value in other.parameters.values())
    with torch.no_grad():
        for value in lora.parameters.values():
            value.zero_()
    assert torch.equal(output_with(other), expected)  # a copy of the values
    assert not any(bool(value.any()) for value in state.values())  # as with nn.Module: the parameters' own memory


@pytest.mark.slow
def test_state_dict_of_another_lora(network: UNet2DConditionModel) -> None:
    lora = trained(network, rank=2)
    before = {key: value.clone() for key, value in lora.state_dict().items()}
    for state in (LoRA(network, 3, ATTENTION).state_dict(), trained(network, target_modules=["to_q"]).state_dict(), {}):
        with pytest.raises(ValueError, match=r"the LoRA is of another model: it changes .*, 32 layers with rank 2"):
            lora.load_state_dict(state)
        assert_same(lora.state_dict(), before)


def test_prefix_of_another_family(network: UNet2DConditionModel, tmp_path: Path) -> None:
    lora = trained(network)
    path = lora.save(tmp_path, "transformer.")
    assert all(key.startswith("transformer.") for key in load_file(path))
    LoRA.from_folder(network, tmp_path, "transformer.")
    with pytest.raises(ValueError, match=r"is of another model: there is no layer 'transformer\."):
        LoRA.from_folder(network, tmp_path, PREFIX)


def test_an_interrupted_save_leaves_the_old_file(
    network: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = trained(network)
    path = lora.save(tmp_path, PREFIX)
    before = path.read_bytes()

    def half(part: Path, content: bytes) -> int:
        with open(part, "wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        lora.save(tmp_path, PREFIX)
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_merged_copy(network: UNet2DConditionModel, layers: str, tmp_path: Path) -> None:
    lora, other = trained(network, target_modules=LAYERS[layers]), trained(network, seed=3)
    with torch.no_grad():
        reference = output(network)
    expected = output_with(lora)
    merged: Any = lora.merged_copy()
    with torch.no_grad():
        torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(output(merged), reference, atol=1e-2)
        assert torch.equal(output(network), reference)
    assert torch.equal(output_with(lora), expected)
    assert not any("lora" in key or "base_layer" in key for key in merged.state_dict())
    assert {value.data_ptr() for value in merged.parameters()}.isdisjoint(
        value.data_ptr() for value in network.parameters()
    )
    merged.save_pretrained(tmp_path)
    read = UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(output(read.eval()), output(merged))
    assert other.parameters.keys().isdisjoint(lora.parameters)


@pytest.mark.slow
def test_reference_without_any_lora(network: UNet2DConditionModel) -> None:
    with torch.no_grad():
        reference = output(network)
    own = {value.data_ptr() for value in network.parameters()}
    names = set(network.state_dict())
    assert reference_view(network) is network
    lora = trained(network, target_modules=LAYERS["all"])
    expected = output_with(lora)
    view, copied = reference_view(network), reference_copy(network)
    for one in (view, copied):
        assert set(one.state_dict()) == names
        assert not hasattr(one, "peft_config")
        with torch.no_grad(), lora.enabled():
            assert torch.equal(output(one), reference)
    assert {value.data_ptr() for value in view.parameters()} == own
    assert {value.data_ptr() for value in copied.parameters()}.isdisjoint(own)
    assert torch.equal(output_with(lora), expected)
    assert set(lora.parameters.values()) <= set(network.parameters())


def test_load_of_another_lora(network: UNet2DConditionModel, tmp_path: Path) -> None:
    trained(network, rank=2).save(tmp_path, PREFIX)
    for other in (LoRA(network, 3, ATTENTION), LoRA(network, 2, ["to_q"])):
        before = {name: value.clone() for name, value in other.parameters.items()}
        with pytest.raises(ValueError, match="is of another model: it changes 32 layers with rank 2, and not the same"):
            other.load(tmp_path, PREFIX)
        assert all(torch.equal(value, before[name]) for name, value in other.parameters.items())


def test_lora_of_another_model(network: UNet2DConditionModel, tmp_path: Path) -> None:
    path = trained(network).save(tmp_path, PREFIX)
    save_file({key.replace("mid_block", "middle"): value for key, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="is of another model: there is no layer 'middle"):
        LoRA.from_folder(network, tmp_path, PREFIX)


def test_missing_and_damaged_files(network: UNet2DConditionModel, tmp_path: Path) -> None:
    lora = trained(network)
    for missing in (tmp_path, tmp_path / "nothing"):
        for read in (lora.load, partial(LoRA.from_folder, network)):
            with pytest.raises(FileNotFoundError, match=rf"no LoRA at {missing}: expected a .*{FILE_NAME}"):
                read(missing, PREFIX)
    path = lora.save(tmp_path, PREFIX)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a safetensors file at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            lora.load(tmp_path, PREFIX)
    save_file({"unet.conv_in.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no LoRA weights"):
        lora.load(tmp_path, PREFIX)


def test_a_layer_that_a_lora_cannot_change(network: UNet2DConditionModel) -> None:
    """peft refuses it in the middle of its work; the network then has no part of a LoRA."""
    before = output(network)
    trained_before = trained(network)
    with pytest.raises(ValueError, match=r"a LoRA cannot change one of the layers \['to_q', 'norm1'\]: .*GroupNorm"):
        LoRA(network, 2, ["to_q", "norm1"])
    assert set(network.peft_config) == {trained_before.name}
    assert all(value.requires_grad for value in trained_before.parameters.values())
    assert torch.equal(output(network), before)
    assert not torch.equal(output_with(trained_before), before)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_must_be_positive(network: UNet2DConditionModel, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must be an integer of at least 1, got {rank}"):
        LoRA(network, rank, ATTENTION)


def test_no_such_layer(network: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match=r"no layer of the denoiser ends in any of \['to_x'\]"):
        LoRA(network, 2, ["to_x"])
    with torch.no_grad():
        lora = trained(network)  # the failed attempt left the network usable
        assert not torch.equal(output_with(lora), output(network))


@pytest.mark.slow
def test_layers_of_the_family(network: UNet2DConditionModel) -> None:
    attention, everything = (LoRA(network, 2, LAYERS[name]) for name in ("attention", "all"))
    assert attention.target_modules == LAYERS["attention"]
    assert set(LAYERS["attention"]) < set(LAYERS["all"])

    def changed(lora: LoRA) -> set[str]:
        return {name.split(".lora_")[0] for name in lora.parameters}

    own = {name.removesuffix(".weight").removesuffix(".base_layer") for name, _ in network.named_parameters()}
    blocks = {name for name in own if "blocks" in name or "mid_block" in name}
    weighted = {name for name in blocks if not any(part in name for part in ("norm", "samplers", "lora_", ".bias"))}
    assert changed(everything) == weighted
    in_attention = {name for name in weighted if name.split(".")[-1].startswith("to_") or "to_out" in name}
    assert changed(attention) == in_attention


def test_targets_are_a_list(network: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="must be a list of endings of layer names, got 'attention'"):
        LoRA(network, 2, "attention")


@pytest.mark.slow
def test_the_scale_of_other_tools(network: UNet2DConditionModel, tmp_path: Path) -> None:
    """diffusers notes alpha and rank where they differ, and scales the change by alpha / rank."""
    path = trained(network, rank=2).save(tmp_path, PREFIX)
    plain = LoRA.from_folder(network, tmp_path, PREFIX)
    note = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    save_file(load_file(path), path, note)
    scaled = LoRA.from_folder(network, tmp_path, PREFIX)
    for (name, one), other in zip(plain.parameters.items(), scaled.parameters.values(), strict=True):
        torch.testing.assert_close(other, 3 * one if ".lora_B." in name else one)
