"""The rewards of the shapes world."""

import threading

import pytest
import torch

from dpok_gym.rewards import list_rewards, make_reward
from dpok_gym.shapes import PREFERENCE, rewards
from dpok_gym.shapes.captions import corrupt, sample_requested_scenes
from dpok_gym.shapes.judge import judge
from dpok_gym.shapes.scenes import render

PROMPTS = ["a red circle", "a red circle", "three blue stars"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def judged(monkeypatch):
    """The prompts of each call of the judge."""
    calls = []

    def counting_judge(images, prompts):
        calls.append(list(prompts))
        return judge(images, prompts)

    monkeypatch.setattr(rewards, "judge", counting_judge)
    monkeypatch.setattr(rewards, "_latest", threading.local())
    return calls


def test_components_are_the_judges(images):
    batch = make_reward({"shapes-alignment": 1.0, "shapes-quality": 0.5})(images, PROMPTS)
    judgement = judge(images, PROMPTS)
    torch.testing.assert_close(batch.components["shapes-alignment"], judgement.alignment, rtol=0, atol=0)
    torch.testing.assert_close(batch.components["shapes-quality"], judgement.quality, rtol=0, atol=0)
    torch.testing.assert_close(batch.total, judgement.alignment + 0.5 * judgement.quality)


def test_the_same_images_are_judged_once(images, judged):
    reward = make_reward({"shapes-alignment": 1.0, "shapes-quality": 1.0})
    before = reward(images, PROMPTS)
    assert judged == [PROMPTS]
    # Other prompts, other images in the same tensor, another batch size: each is judged anew.
    reward(images, ["a red circle"] * 3)
    assert len(judged) == 2
    images[:] = 0.5
    after = reward(images, PROMPTS)
    assert len(judged) == 3
    assert not torch.equal(before.total, after.total)
    reward(images[:1], ["a red circle"])
    assert len(judged) == 4


def test_each_thread_keeps_its_own_verdict(images, judged):
    other = torch.zeros_like(images)
    in_thread = []

    def ask():
        in_thread.append(rewards.ShapesQuality()(other, PROMPTS))

    here = rewards.ShapesAlignment()(images, PROMPTS)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    torch.testing.assert_close(rewards.ShapesQuality()(images, PROMPTS), judge(images, PROMPTS).quality)
    assert len(judged) == 2  # the other thread's question did not replace the verdict of this one
    assert in_thread[0].tolist() == [0, 0, 0]
    assert here.shape == (3,)


@pytest.mark.slow
def test_the_shipped_preference_prefers_true_captions():
    assert sum(path.stat().st_size for path in PREFERENCE.iterdir()) < 3_000_000
    assert "shapes-preference" in list_rewards()
    reward = make_reward("shapes-preference")
    reward.check_differentiable()
    generator = torch.Generator().manual_seed(5)
    scenes, requests = sample_requested_scenes(200, generator)
    prompts = [str(request) for request in requests]
    corrupted = [str(corrupt(request, generator)) for request in requests]
    images = render(scenes)
    true = reward(images, prompts).total
    assert (true > reward(images, corrupted).total).float().mean() > 0.85
    shuffled = images[torch.randperm(200, generator=generator)]
    assert (true > reward(shuffled, prompts).total).float().mean() > 0.95


def test_each_call_loads_the_preference_anew():
    first, second = rewards.shapes_preference(), rewards.shapes_preference()
    assert first is not second
    assert first.network.config.image_size == 64
