"""Devices by name."""

import pytest
import torch

from dpok_gym.utils.device import find_device


def test_auto_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(torch, "empty", lambda size, device: asked.append(device) or torch.zeros(size))
    find_device("auto")
    assert asked == ["cuda"]


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta", "", 3.5])
def test_a_device_that_is_not_there_is_an_error_with_advice(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be used here: .*; use 'auto' or 'cpu'"):
        find_device(name)
