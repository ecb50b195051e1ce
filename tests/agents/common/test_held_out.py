"""The held-out reward: which one it is, on which images, and that it changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from agents.common.held_out import MAX_IMAGES, HeldOutReward, choose, chosen_images
from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import listen
from tests.agents.common.support import collect, snapshot
from tests.support import assert_same, colours, every_other_fails, redness


def blueness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 2].mean((1, 2))


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("shapes-alignment", ["shapes-preference"]),
        ({"shapes-alignment": 1.0, "shapes-quality": 0.2}, ["shapes-preference"]),
        ("shapes-preference", ["shapes-alignment", "shapes-quality"]),
        ("jpeg-compressibility", ["shapes-alignment", "shapes-quality"]),
        ({"shapes-alignment": 1.0, "shapes-preference": 1.0}, []),
    ],
)
def test_a_world_has_a_second_opinion(reward: Any, expected: list[str]) -> None:
    env = gymnasium.make_vec(
        "DPOK-Shapes-v0", num_envs=1, vectorization_mode="vector_entry_point", reward=reward, device="cpu"
    )
    held_out = HeldOutReward("auto", env)
    assert held_out.names == expected
    assert (", ".join(expected) or "no other reward") in held_out.description


def test_other_models_have_the_clip_score_if_it_is_there(
    make_env: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of the network, which takes long where there is none."""
    reward, why_none = choose(make_env())
    assert reward is None
    assert "not on this disk" in why_none
    assert "--held-out-reward" in HeldOutReward("auto", make_env()).description

    def load(checkpoint: Any, tokenizer: Any) -> Any:
        assert checkpoint == tokenizer == Path("/cache/snapshot")
        return redness

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: f"/cache/snapshot/{name}")
    monkeypatch.setattr("dpok_gym.rewards.networks.clip_score.ClipScore", load)
    assert choose(make_env()) == (redness, "")


def test_images_are_evenly_spaced() -> None:
    assert chosen_images(3) == {0, 1, 2}
    assert chosen_images(64) == set(range(0, 64, 4))
    assert len(chosen_images(1000)) == MAX_IMAGES


def test_scores(make_env: Callable[..., Any]) -> None:
    """An image has the same score in any batch; the others have none."""
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    scorer, prompts = HeldOutReward(redness, make_env()), ["a"] * 20
    whole = scorer(images, prompts, range(20), 20)
    assert whole.shape == (20, 1)
    parts = [scorer(images[rows], prompts[rows], range(20)[rows], 20) for rows in (slice(0, 7), slice(7, 20))]
    assert_same(torch.cat(parts), whole)
    whole = whole[:, 0]
    assert {int(row) for row in whole.isfinite().nonzero()} == chosen_images(20)
    expected = redness(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, prompts).double()
    torch.testing.assert_close(whole[whole.isfinite()], expected[whole.isfinite()])
    assert HeldOutReward(None, make_env())(images, prompts, range(20), 20).shape == (20, 0)
    torch.testing.assert_close(scorer.score(images, prompts)[:, 0], expected)
    assert HeldOutReward(None, make_env()).score(images, prompts).shape == (20, 0)


def test_no_images_have_no_scores(make_env: Callable[..., Any]) -> None:
    """A rank has none of an evaluation of fewer images than there are ranks; a reward cannot be asked about none."""
    scorer = HeldOutReward({redness: 1.0, blueness: 1.0}, make_env())
    assert scorer.score(np.zeros((0, 16, 16, 3), np.uint8), []).shape == (0, 2)


def test_few_images_are_in_full_precision_at_a_time(
    make_env: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    sizes: list[int] = []

    def spy(images: Tensor, prompts: list[str]) -> Tensor:
        assert len(prompts) == len(images)
        sizes.append(len(images))
        return redness(images, prompts)

    scorer = HeldOutReward(spy, make_env())
    whole = scorer.score(images, ["a"] * 5)
    monkeypatch.setattr("agents.common.held_out.MAX_PIXELS", 2 * 16 * 16)
    assert_same(scorer.score(images, ["a"] * 5), whole)
    assert sizes == [5, 2, 2, 1]


def test_the_judge_tells_how_many_are_fully_aligned() -> None:
    """If it is not trained on."""
    arguments: dict[str, Any] = {"num_inference_steps": 1, "device": "cpu"}
    env = DenoisingVectorEnv(1, reward="jpeg-compressibility", **arguments)
    scorer = HeldOutReward({"shapes-quality": 1.0, "shapes-alignment": 0.3}, env)
    scores = torch.tensor([[0.9, 1.0], [0.1, 0.5], [0.5, 1.0], [0.5, 0.0]], dtype=torch.float64)
    assert scorer.aligned_share(scores) == 0.5
    assert HeldOutReward("shapes-quality", env).aligned_share(scores[:, :1]) is None
    trained_on = DenoisingVectorEnv(1, reward="shapes-alignment", **arguments)
    assert HeldOutReward("shapes-alignment", trained_on).aligned_share(scores[:, 1:]) is None


def test_a_sum_has_a_column_for_each_reward(make_agent: Callable[..., Any]) -> None:
    agent = make_agent(held_out_reward={redness: 2.0, blueness: -1.0, colours: 0.5})
    rows = listen(agent)
    agent.learn(12)
    parts = [rows[0][f"held_out/{name}"] for name in ("redness", "blueness", "colours")]
    assert min(parts) > 0  # raw
    weighted = np.array([2.0, -1.0, 0.5]) @ parts
    assert weighted == pytest.approx(rows[0]["rollout/held_out_reward"])
    assert agent.held_out.unwanted == {"held_out/blueness"}


def test_weights_change_the_sum_alone(make_agent: Callable[..., Any], make_env: Callable[..., Any]) -> None:
    """So the curve of the log and the levels of the evaluations are the same number."""
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    light, heavy = (HeldOutReward({redness: weight}, make_env()) for weight in (0.5, 4.0))
    scores = light.score(images, ["a"] * 3)
    assert_same(heavy.score(images, ["a"] * 3), scores)
    assert_same(heavy.total(scores), 4 * scores[:, 0])
    agent = make_agent(held_out_reward={redness: 0.5})
    rows = listen(agent)
    agent.learn(12)
    assert rows[0]["rollout/held_out_reward"] == pytest.approx(0.5 * rows[0]["held_out/redness"])


def test_an_image_without_a_finite_score_is_left_out(
    make_agent: Callable[..., Any], make_env: Callable[..., Any]
) -> None:
    agent = make_agent(make_env(), held_out_reward=every_other_fails)
    rows = listen(agent)
    agent.learn(12)
    assert np.isfinite(rows[0]["rollout/held_out_reward"])


def test_it_is_logged_and_learned_from_by_nobody(make_agent: Callable[..., Any]) -> None:
    with_one, without = make_agent(held_out_reward=blueness), make_agent(held_out_reward=None)
    logs = [listen(agent) for agent in (with_one, without)]
    for agent in (with_one, without):
        agent.learn(24)
    assert_same(snapshot(with_one), snapshot(without))
    extra = logs[0][1].keys() - logs[1][1].keys()
    assert extra == {"rollout/held_out_reward", "held_out/blueness"}


def test_it_is_made_before_anything_is_drawn(make_agent: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="held_out_reward: unknown reward 'misspelt'"):
        make_agent(held_out_reward="misspelt")
    agent = make_agent(held_out_reward="no_such_module:reward")
    with pytest.raises(ImportError, match="no_such_module"):
        agent.learn(12)
    assert agent.num_timesteps == 0


def test_it_suits_the_environment_that_the_agent_is_put_on(
    make_agent: Callable[..., Any], make_env: Callable[..., Any]
) -> None:
    agent = make_agent()
    collect(agent)
    before = agent.held_out
    agent.set_env(make_env())
    assert agent.held_out is not before
