"""What evaluations ask about the mixture world."""

import numpy as np
import pytest
import torch

from dpok_gym.mixture.data import MIXTURES
from dpok_gym.mixture.image import draw_dots
from dpok_gym.mixture.optimum import optimal_value
from dpok_gym.mixture.world import WORLD
from dpok_gym.prompts import PromptSet, load_prompts
from dpok_gym.utils.images import to_uint8
from dpok_gym.worlds import find_world


@pytest.mark.parametrize("model", ["mixture", "mixture-1d"])
def test_the_models_find_their_world(model: str) -> None:
    assert find_world(model) is WORLD


def test_nothing_is_judged() -> None:
    assert WORLD.evaluation_rewards == WORLD.held_out_rewards == ()
    assert WORLD.alignment_reward is None
    assert WORLD.quality_reward is None
    WORLD.check_prompts(["two modes", "a prompt of another world"])


def test_the_optimum_is_known() -> None:
    assert WORLD.optimum is not None
    assert WORLD.optimum.value is optimal_value


def test_positions_are_read_from_images() -> None:
    points = torch.tensor([[0.5, -1.0], [2.0, 0.25]])
    assert WORLD.optimum is not None
    np.testing.assert_allclose(WORLD.optimum.positions(to_uint8(draw_dots(points))), points, atol=0.01)


def test_unseen_prompts_are_the_held_out_ones() -> None:
    assert WORLD.unseen_prompts(load_prompts("mixture")) == ("three modes",)
    assert WORLD.unseen_prompts(PromptSet("mine", ("two modes",))) == ()


def test_the_prompt_set_has_every_mixture_of_two_dimensions() -> None:
    prompts = load_prompts("mixture")
    assert set(prompts.train + prompts.held_out) == set(MIXTURES[2])
