"""What evaluations ask about the mixture world."""

import pytest

from dpok_gym.mixture.data import MIXTURES
from dpok_gym.mixture.optimum import optimal_value
from dpok_gym.mixture.world import WORLD
from dpok_gym.prompts import PromptSet, load_prompts
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
    assert WORLD.optimal_value is optimal_value


def test_unseen_prompts_are_the_held_out_ones() -> None:
    assert WORLD.unseen_prompts(load_prompts("mixture")) == ("three modes",)
    assert WORLD.unseen_prompts(PromptSet("mine", ("two modes",))) == ()


def test_the_prompt_set_has_every_mixture_of_two_dimensions() -> None:
    prompts = load_prompts("mixture")
    assert set(prompts.train + prompts.held_out) == set(MIXTURES[2])
