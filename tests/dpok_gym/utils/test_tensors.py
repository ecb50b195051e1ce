"""Tensors in files, and the state of optimisers as tensors."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpok_gym.utils.files import WriteError
from dpok_gym.utils.tensors import flatten_optimizer, load_optimizer, load_tensors, save_tensors
from tests.support import assert_same


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3).T, "b": torch.tensor(3)}
    state = {"numbers": [1, 0.1, float("inf")], "text": "é"}
    save_tensors(tmp_path / "file.safetensors", tensors, state)
    loaded, loaded_state = load_tensors(tmp_path / "file.safetensors")
    assert_same(loaded, {name: value.contiguous() for name, value in tensors.items()})
    assert loaded_state == state
    save_tensors(tmp_path / "file.safetensors", {})
    assert load_tensors(tmp_path / "file.safetensors") == ({}, {})


@pytest.mark.parametrize("content", [b"", bytes(2000), b"junk"])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.safetensors is damaged"):
        load_tensors(path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"nothing/file\.safetensors cannot be written: .*No such file"):
        save_tensors(tmp_path / "nothing" / "file.safetensors", {"a": torch.ones(1)})


@pytest.mark.parametrize(
    "optimizer_class",
    [torch.optim.AdamW, torch.optim.RMSprop, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)],
)
def test_optimizers_go_on(optimizer_class: Callable[..., torch.optim.Optimizer]) -> None:
    parameters = [
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Parameter(torch.ones(2, 2)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    others = copy.deepcopy(parameters)
    optimizer, other = optimizer_class(parameters), optimizer_class(others)

    def step(optimizer: torch.optim.Optimizer, values: list[torch.nn.Parameter]) -> None:
        optimizer.zero_grad()
        (values[0].square().sum() + values[1].pow(3).sum()).backward()  # the third one has no gradient
        optimizer.step()

    step(optimizer, parameters)
    flat = flatten_optimizer(optimizer)
    assert {name.partition(".")[0] for name in flat} == {"0", "1"}
    assert all(isinstance(value, Tensor) for value in flat.values())
    load_optimizer(other, {name: value.clone() for name, value in flat.items()})
    assert_same(flatten_optimizer(other), flat)
    with torch.no_grad():
        for value, mine in zip(others, parameters, strict=True):
            value.copy_(mine)
    for _ in range(2):
        step(optimizer, parameters)
        step(other, others)
    assert_same([value.data for value in others], [value.data for value in parameters])


def test_an_optimizers_state_of_more_parameters_is_refused() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="the optimiser's state is of a parameter 2, and there are 1"):
        load_optimizer(optimizer, {"2.exp_avg": torch.zeros(3)})
    load_optimizer(optimizer, {})
    assert flatten_optimizer(optimizer) == {}
