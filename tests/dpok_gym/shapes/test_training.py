"""The training loop of the shapes world's networks."""

import json

import pytest
import torch
from torch import nn

from dpok_gym.shapes.training import minimise, seeded_generator
from tests.support import assert_same

STEPS = 300


def make_modules() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"linear": nn.Linear(3, 1)})


def train(folder, stop_at=None, **options) -> nn.ModuleDict:
    modules = make_modules()

    def loss(step):
        if step == stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(8, 3, generator=seeded_generator(step)) + 0.1 * torch.randn(8, 3)
        return (modules["linear"](inputs) - inputs[:, :1]).square().mean()

    return minimise("linear", modules, loss, STEPS, 1e-2, folder, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_an_interrupted_run_ends_at_the_same_weights(tmp_path, options):
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "interrupted", stop_at=280, **options)  # after the checkpoint of step 250
    resumed = train(tmp_path / "interrupted", **options)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert (first["stage"], first["step"], last["step"]) == ("linear", 50, STEPS)
    assert last["loss"] < 0.1 * first["loss"]


@pytest.mark.slow
def test_averaged_weights_lag_behind(tmp_path):
    for name in ("last", "averaged"):
        (tmp_path / name).mkdir()
    last, averaged = train(tmp_path / "last"), train(tmp_path / "averaged", ema_decay=0.99)
    start = make_modules().get_parameter("linear.weight")
    moved, lagging = (modules.get_parameter("linear.weight") - start for modules in (last, averaged))
    assert 0.5 < lagging.norm() / moved.norm() < 1
