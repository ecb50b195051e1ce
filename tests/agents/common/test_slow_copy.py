"""Weights that follow the trained ones, and take their place for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agents.common.slow_copy import SlowCopy


def make_network() -> nn.Linear:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    return network


def test_follows_by_hand() -> None:
    network = make_network()
    copy = SlowCopy(dict(network.named_parameters()))
    nn.init.constant_(network.weight, 5.0)
    assert copy.state_dict()["weight"].item() == 1.0
    copy.follow(0.75)
    assert copy.state_dict()["weight"].item() == 2.0  # 0.75 * 1 + 0.25 * 5
    copy.follow(1.0)
    assert copy.state_dict()["weight"].item() == 2.0
    copy.follow(0.0)
    assert copy.state_dict()["weight"].item() == 5.0
    nn.init.constant_(network.weight, 7.0)
    copy.restore()
    assert network.weight.item() == 5.0
    nn.init.constant_(network.weight, 8.0)
    assert copy.state_dict()["weight"].item() == 5.0  # the two share no memory


def test_takes_the_place_of_the_trained_weights() -> None:
    network, x = make_network(), torch.ones(1, 1)
    copy = SlowCopy({"network.weight": network.weight})
    nn.init.constant_(network.weight, 5.0)
    before = network(x)
    with copy.in_place():
        assert network(x).item() == 1.0
    assert network(x).item() == 5.0
    # A graph from before the block still belongs to the trained weight.
    before.square().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.item() == 10.0
    with pytest.raises(KeyboardInterrupt), copy.in_place():
        raise KeyboardInterrupt
    assert network(x).item() == 5.0


def test_is_no_parameter_and_is_saved() -> None:
    network = make_network()
    copy = SlowCopy({"down.0.weight": network.weight})
    assert list(copy.parameters()) == []
    assert set(copy.state_dict()) == {"down/0/weight"}
    nn.init.constant_(network.weight, 5.0)
    copy.follow(0)
    other = SlowCopy({"down.0.weight": make_network().weight})
    other.load_state_dict(copy.state_dict())
    assert other.state_dict()["down/0/weight"].item() == 5.0
