"""Scenes and captions of the shapes world."""

import pytest
import torch

from dpok_gym.shapes.captions import (
    CATEGORIES,
    ObjectKind,
    Request,
    all_requests,
    corrupt,
    parse_prompt,
    relation_of,
    sample_requested_scenes,
)
from dpok_gym.shapes.judge import alignment
from dpok_gym.shapes.scenes import _OUTER, COLOURS, SHAPES, coverage, render, sample_scenes
from tests.support import assert_same


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sampling_is_determined_by_the_seed():
    assert_same(sample_scenes(20, seeded(1)), sample_scenes(20, seeded(1)))
    with pytest.raises(AssertionError):
        assert_same(sample_scenes(20, seeded(1)), sample_scenes(20, seeded(2)))
    scenes, requests = sample_requested_scenes(20, seeded(1))
    again, requests_again = sample_requested_scenes(20, seeded(1))
    assert_same(scenes, again)
    assert requests == requests_again
    assert torch.equal(render(scenes), render(again))


@pytest.mark.parametrize("sample", [sample_scenes, lambda n, g: sample_requested_scenes(n, g)[0]])
def test_objects_are_apart_and_inside(sample):
    scenes = sample(200, seeded(3))
    assert ((scenes.count >= 1) & (scenes.count <= 4)).all()
    scene, slot = torch.nonzero(scenes.present, as_tuple=True)
    masks = coverage(scenes.shape[scene, slot], scenes.centre[scene, slot], scenes.size[scene, slot])
    radius = (scenes.size[scene, slot] * _OUTER[scenes.shape[scene, slot]])[:, None]
    assert (scenes.centre[scene, slot] - radius).min() > 0.99
    assert (scenes.centre[scene, slot] + radius).max() < 63.01
    assert masks.sum((1, 2)).min() > 90
    owners = torch.zeros(200, 64, 64).index_add_(0, scene, (masks > 0).float())
    assert owners.max() == 1


def test_everything_is_sampled_and_rendered():
    scenes = sample_scenes(300, seeded(4))
    assert set(scenes.count.tolist()) == {1, 2, 3, 4}
    assert set(scenes.shape[scenes.present].tolist()) == set(range(len(SHAPES)))
    assert set(scenes.colour[scenes.present].tolist()) == set(range(len(COLOURS)))
    images = render(scenes)
    assert images.shape == (300, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_captions_are_true_and_parse_back():
    scenes, requests = sample_requested_scenes(400, seeded(5))
    assert (alignment(scenes, requests) == 1).all()
    assert [parse_prompt(str(request)) for request in requests] == requests
    share = [sum(request.category == category for request in requests) / 400 for category in CATEGORIES]
    assert all(0.18 < value < 0.32 for value in share)


@pytest.mark.parametrize(
    ("category", "number"), [("colour", 24), ("count", 72), ("composition", 552), ("location", 2208)]
)
def test_all_requests(category, number):
    requests = all_requests(category)
    assert len(set(requests)) == len(set(map(str, requests))) == len(requests) == number
    assert {request.category for request in requests} == {category}
    assert [parse_prompt(str(request)) for request in requests] == requests


def test_corrupted_captions_are_wrong_in_one_attribute():
    scenes, requests = sample_requested_scenes(300, seeded(6))
    generator = seeded(7)
    corrupted = [corrupt(request, generator) for request in requests]
    assert (alignment(scenes, corrupted) < 1).all()
    changed = set()
    for before, after in zip(requests, corrupted, strict=True):
        assert after.category == before.category
        assert parse_prompt(str(after)) == after
        attributes = set()
        if before.relation != after.relation:
            attributes.add("relation")
        if len(before.kinds) != len(after.kinds):
            attributes.add("count")
        # Every object of "three green squares" changes together, so distinct changes are counted.
        for a, b in set(zip(before.kinds, after.kinds, strict=False)):
            attributes |= {("colour", a)} if a.colour != b.colour else set()
            attributes |= {("shape", a)} if a.shape != b.shape else set()
        assert len(attributes) == 1
        name = attributes.pop()
        changed.add(name if isinstance(name, str) else name[0])
    assert changed == {"relation", "count", "colour", "shape"}


def test_relation_of():
    offset = torch.tensor([[0.0, -5.0], [1.0, 5.0], [-5.0, 1.0], [5.0, -1.0]])
    assert relation_of(offset).tolist() == [0, 1, 2, 3]


def test_prompts_are_read_leniently_or_refused_clearly():
    assert parse_prompt("  A Red  circle. ") == Request((ObjectKind(0, 0),))
    assert str(parse_prompt("an orange star")) == "an orange star"
    for text in ("", "a dog", "a orange star", "five red circles", "a red circle and a red circle"):
        with pytest.raises(ValueError, match="write it like 'a green star'"):
            parse_prompt(text)
    with pytest.raises(ValueError, match="unknown category 'size'"):
        all_requests("size")
