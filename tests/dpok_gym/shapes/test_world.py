"""What evaluations ask about the shapes world."""

import pytest

from dpok_gym.prompts import load_prompts
from dpok_gym.rewards import list_rewards
from dpok_gym.shapes.prompts import unseen_prompts
from dpok_gym.shapes.world import WORLD
from dpok_gym.worlds import find_world


def test_the_model_finds_its_world():
    assert find_world("shapes") is WORLD
    assert find_world("sd15") is None


def test_its_rewards_are_registered():
    assert WORLD.evaluation_rewards == ("shapes-alignment", "shapes-quality")
    assert (WORLD.alignment_reward, WORLD.quality_reward) == WORLD.evaluation_rewards
    assert WORLD.held_out_rewards == ("shapes-preference",)
    assert {*WORLD.evaluation_rewards, *WORLD.held_out_rewards} <= set(list_rewards())


def test_it_judges_images_of_its_size_for_prompts_that_it_reads():
    prompts = load_prompts("shapes")
    WORLD.check_prompts([*prompts.train, *prompts.held_out])
    assert WORLD.can_judge(prompts.train, (64, 64))
    assert not WORLD.can_judge(prompts.train, (64, 128))
    assert not WORLD.can_judge([*prompts.train, "a dog"], (64, 64))
    with pytest.raises(ValueError, match="cannot judge the prompt 'a dog'; write it like 'a green star'"):
        WORLD.check_prompts(["a red star", "a dog"])


def test_unseen_prompts():
    prompts = load_prompts("three green squares")
    assert WORLD.unseen_prompts(prompts) == unseen_prompts(prompts) == load_prompts("count").held_out
