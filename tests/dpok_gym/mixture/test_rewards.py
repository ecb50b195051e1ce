"""The rewards of the mixture world."""

import math

import pytest
import torch

from dpok_gym import make_reward
from dpok_gym.mixture.image import draw_dots


def test_rewards() -> None:
    images = draw_dots(torch.tensor([[1.0, 2.0], [-0.5, 0.0]]))
    expected_by_name = {
        "mixture-linear": [1.0, -0.5],
        "mixture-quadratic": [-4.0, -2.25],
        "mixture-bump": [math.exp(-2.0), math.exp(-1.125)],
    }
    for name, expected in expected_by_name.items():
        assert make_reward(name)(images, ["", ""]).total.tolist() == pytest.approx(expected, abs=2e-5)
    with pytest.raises(ValueError, match=r"a dot is read from images of shape \(B, 3, 64, 64\)"):
        make_reward("mixture-linear")(images[:, :, ::2, ::2], ["", ""])


def test_the_bump_has_its_largest_value_inside_the_sheet() -> None:
    reward = make_reward("mixture-bump")
    assert reward(draw_dots(torch.tensor([[1.0, 0.0]])), [""]).total.item() == pytest.approx(1.0, abs=1e-6)
    edge = draw_dots(torch.tensor([[3.0, 0.0], [1.0, 3.0], [-3.0, -3.0]]))
    assert reward(edge, [""] * 3).total.max() < 0.2
