"""The rewards of the mixture world."""

import pytest
import torch

from dpok_gym import make_reward
from dpok_gym.mixture.image import draw_dots


def test_rewards() -> None:
    images = draw_dots(torch.tensor([[1.0, 2.0], [-0.5, 0.0]]))
    for name, expected in {"mixture-linear": [1.0, -0.5], "mixture-quadratic": [-4.0, -2.25]}.items():
        assert make_reward(name)(images, ["", ""]).total.tolist() == pytest.approx(expected, abs=2e-5)
    with pytest.raises(ValueError, match=r"a dot is read from images of shape \(B, 3, 64, 64\)"):
        make_reward("mixture-linear")(images[:, :, ::2, ::2], ["", ""])
