"""The table of embedded worlds."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from dpok_gym import DenoisingVectorEnv, PromptSet, load_prompts, make_reward
from dpok_gym.models import list_models
from dpok_gym.rewards import list_rewards
from dpok_gym.worlds import WORLDS, World, find_world, register_world
from tests.support import redness

IMAGE_SHAPE = (16, 16)


def reads_greetings(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if not prompt.startswith("hello"):
            raise ValueError(f"no greeting: {prompt!r}")


def nothing_unseen(prompts: PromptSet) -> tuple[str, ...]:
    return ()


GREETINGS = World(
    image_shape=IMAGE_SHAPE,
    evaluation_rewards=("jpeg-compressibility",),
    held_out_rewards=(),
    alignment_reward=None,
    quality_reward=None,
    check_prompts=reads_greetings,
    unseen_prompts=nothing_unseen,
)


@pytest.fixture
def _forget() -> Iterator[None]:
    """Removes the names that a test registers."""
    before = dict(WORLDS._entries)
    yield
    WORLDS._entries.clear()
    WORLDS._entries.update(before)


def test_other_models_have_none() -> None:
    for model in ("sd15", "sdxl", "/a/folder", "", "Shapes"):
        assert find_world(model) is None


@pytest.mark.parametrize("name", WORLDS.names())
def test_built_in_worlds(name: str) -> None:
    """What each names is there: its model, its rewards, and prompts that it can judge."""
    world = find_world(name)
    assert isinstance(world, World)
    assert name in list_models()
    rewards = [*world.evaluation_rewards, *world.held_out_rewards]
    assert set(rewards) <= set(list_rewards())
    for reward in (world.alignment_reward, world.quality_reward):
        assert reward is None or reward in world.evaluation_rewards
    for reward in rewards:
        make_reward(reward)
    prompts = load_prompts(["one gaussian", "two modes"] if name == "mixture-1d" else name.partition("-")[0])
    assert DenoisingVectorEnv(model=name, prompts=prompts, reward=redness, device="cpu").world is world
    assert world.can_judge(prompts.train, world.image_shape)
    assert not set(world.unseen_prompts(prompts)) & set(prompts.train)


def test_it_is_there_for_every_name() -> None:
    assert WORLDS.names() == ["mixture", "mixture-1d", "shapes", "shapes-flow"]
    assert find_world("mixture") is find_world("mixture-1d")
    assert find_world("mixture") is not find_world("shapes")


@pytest.mark.parametrize(
    ("prompts", "image_shape", "expected"),
    [
        (["hello"], IMAGE_SHAPE, True),
        (["hello", "hello there"], IMAGE_SHAPE, True),
        (["hello", "goodbye"], IMAGE_SHAPE, False),
        (["hello"], (16, 32), False),
        (["goodbye"], (16, 32), False),
    ],
)
def test_can_judge(prompts: list[str], image_shape: tuple[int, int], expected: bool) -> None:
    assert GREETINGS.can_judge(prompts, image_shape) is expected


def test_other_errors_of_the_judge_are_not_hidden() -> None:
    def broken(prompts: Sequence[str]) -> None:
        raise KeyError("a mistake")

    world = World(IMAGE_SHAPE, (), (), None, None, broken, nothing_unseen)
    with pytest.raises(KeyError, match="a mistake"):
        world.can_judge(["hello"], IMAGE_SHAPE)


@pytest.mark.usefixtures("_forget")
class TestRegister:
    def test_a_world(self, tiny_sd_folder: Path) -> None:
        register_world(str(tiny_sd_folder), GREETINGS)
        register_world(str(tiny_sd_folder), GREETINGS)  # once more changes nothing
        assert find_world(str(tiny_sd_folder)) is GREETINGS
        for prompts, expected in (("hello", GREETINGS), ("goodbye", None)):
            env = DenoisingVectorEnv(model=str(tiny_sd_folder), prompts=prompts, reward=redness, device="cpu")
            assert env.world is expected

    def test_a_place(self) -> None:
        register_world("mine", "dpok_gym.mixture.world:WORLD")
        assert find_world("mine") is find_world("mixture")

    def test_a_place_where_nothing_is(self) -> None:
        register_world("mine", "dpok_gym.mixture.world:NOTHING")
        with pytest.raises(
            ImportError, match=r"the world 'mine' cannot be imported from 'dpok_gym\.mixture\.world:NOT"
        ):
            find_world("mine")

    def test_a_name_that_is_taken(self) -> None:
        with pytest.raises(ValueError, match="the world 'shapes' is already registered"):
            register_world("shapes", GREETINGS)
        assert find_world("shapes") is not GREETINGS

    @pytest.mark.parametrize("name", ["", "  "])
    def test_a_blank_name(self, name: str) -> None:
        with pytest.raises(ValueError, match="must be a text that is not blank"):
            register_world(name, GREETINGS)


def test_a_wrapped_environment_has_the_world_too() -> None:
    env: Any = gymnasium.make("DPOK-Shapes-v0", device="cpu").unwrapped
    assert env.batch.world is find_world("shapes")
