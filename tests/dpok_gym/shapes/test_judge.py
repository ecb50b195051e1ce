"""The judge: objects found, alignment and quality."""

from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional as F

from dpok_gym.shapes.captions import parse_prompt, sample_requested_scenes
from dpok_gym.shapes.detection import detect_objects
from dpok_gym.shapes.judge import alignment, judge, quality
from dpok_gym.shapes.scenes import COLOURS, SHAPES, Scenes, render, sample_scenes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(*objects):
    """One scene of objects given as (text, x, y), e.g. ("red circle", 20, 30), on grey."""
    names = [text.split() for text, _, _ in objects]
    return Scenes(
        count=torch.tensor([len(objects)]),
        shape=torch.tensor([[SHAPES.index(shape) for _, shape in names]]),
        colour=torch.tensor([[COLOURS.index(colour) for colour, _ in names]]),
        centre=torch.tensor([[[x, y] for _, x, y in objects]], dtype=torch.float32),
        size=torch.full((1, len(objects)), 9.0),
        background=torch.full((1, 3, 3, 3), 0.7),
    )


def kinds(scenes):
    """The multiset of kinds of every scene."""
    rows = zip(scenes.count.tolist(), scenes.colour.tolist(), scenes.shape.tolist(), strict=True)
    return [sorted(zip(colours[:n], shapes[:n], strict=True)) for n, colours, shapes in rows]


def exact(scenes, found):
    """Share of the scenes whose objects were all found, and nothing else."""
    return sum(a == b for a, b in zip(kinds(scenes), kinds(found), strict=True)) / len(scenes)


@pytest.mark.slow
def test_the_objects_of_clean_scenes_are_found_exactly():
    scenes = sample_scenes(150, seeded())
    assert exact(scenes, detect_objects(render(scenes))) >= 0.99
    scenes, requests = sample_requested_scenes(150, seeded(1))
    found = detect_objects(render(scenes))
    assert exact(scenes, found) >= 0.99
    assert (alignment(found, requests) == 1).float().mean() >= 0.99


def test_centres_sizes_and_backgrounds_are_found():
    scenes = sample_scenes(50, seeded(2))
    scenes = scenes[scenes.count == 1]
    found = detect_objects(render(scenes))
    assert (found.centre[:, 0] - scenes.centre[:, 0]).abs().max() < 0.1
    assert (found.size[:, 0] - scenes.size[:, 0]).abs().max() < 0.1
    assert (found.background - scenes.background).abs().max() < 0.01


RED_GREEN = (("red circle", 20, 14), ("green star", 24, 44))  # the circle is above the star


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objects", "prompt", "expected"),
    [
        # colour
        ([("green star", 30, 30)], "a green star", 1),
        ([("red star", 30, 30)], "a green star", 1 / 2),
        ([("green circle", 30, 30)], "a green star", 1 / 2),
        ([("blue circle", 30, 30)], "a green star", 0),
        ([("green star", 15, 15), ("red circle", 45, 45)], "a green star", 1 / 2),
        # count
        ([("blue square", x, 30) for x in (12, 34)], "two blue squares", 1),
        ([("blue square", x, 30) for x in (12, 34)], "three blue squares", 2 / 3),
        ([("blue square", 14, y) for y in (12, 34)] + [("blue square", 45, 20)], "two blue squares", 2 / 3),
        ([("blue square", 12, 30), ("blue circle", 40, 30)], "two blue squares", 3 / 4),
        # composition
        (RED_GREEN, "a red circle and a green star", 1),
        (RED_GREEN, "a green star and a red circle", 1),
        (RED_GREEN, "a green circle and a red star", 1 / 2),
        (RED_GREEN, "a red circle and a blue star", 3 / 4),
        (RED_GREEN[:1], "a red circle and a green star", 1 / 2),
        ((*RED_GREEN, ("red circle", 48, 30)), "a red circle and a green star", 2 / 3),
        # location
        (RED_GREEN, "a red circle above a green star", 1),
        (RED_GREEN, "a green star below a red circle", 1),
        (RED_GREEN, "a red circle below a green star", 2 / 3),
        (RED_GREEN, "a red circle left of a green star", 2 / 3),
        (RED_GREEN, "a red circle above a blue star", 1.5 / 3),
        (RED_GREEN[1:], "a red circle above a green star", 1 / 3),
        ((*RED_GREEN, ("blue square", 48, 30)), "a red circle above a green star", 3 / 4),
    ],
)
def test_alignment_of_each_category(objects, prompt, expected):
    scenes = scene(*objects)
    assert alignment(scenes, [parse_prompt(prompt)]).tolist() == pytest.approx([expected])
    assert judge(render(scenes), [prompt]).alignment.tolist() == pytest.approx([expected])


@pytest.mark.slow
def test_quality_falls_with_damage():
    scenes = sample_scenes(40, seeded(3))
    clean = render(scenes)
    noise = torch.randn(clean.shape, generator=seeded(4))
    blurred = F.avg_pool2d(clean, 3, stride=1, padding=1, count_include_pad=False)
    speckled = torch.where(torch.rand(40, 1, 64, 64, generator=seeded(5)) < 0.02, 0.0, clean)

    def judged(images):
        values = quality(images, detect_objects(images))
        assert ((values >= 0) & (values <= 1)).all()
        return values

    assert judged(clean).min() > 0.95
    assert (judged(blurred) < judged(clean) - 0.03).all()
    assert judged(blurred).mean() < 0.9
    assert judged(speckled).max() < 0.95
    assert judged((clean + 0.05 * noise).clamp(0, 1)).max() < 0.8
    assert judged((clean + 0.15 * noise).clamp(0, 1)).max() < 0.5


def test_merged_and_two_coloured_objects_are_not_recognised():
    merged = scene(("red square", 24, 30), ("red square", 36, 30))
    image = render(scene(("red circle", 30, 30)))
    other = render(scene(("green circle", 30, 30)))
    halves = torch.where(torch.arange(64) < 30, image, other)
    for images in (render(merged), halves):
        verdict = judge(images, ["a red circle"])
        assert verdict.alignment.item() < 1
        assert verdict.quality.item() < 0.6
    found = detect_objects(render(merged))
    assert found.count.tolist() == [1]
    assert found.shape.tolist() == [[-1]]


def test_unrecognised_objects_come_last_and_are_not_drawn():
    image = render(scene(("red square", 16, 14), ("red square", 28, 14), ("blue star", 40, 44)))
    found = detect_objects(image)
    assert kinds(found) == [sorted([(COLOURS.index("blue"), SHAPES.index("star")), (COLOURS.index("red"), -1)])]
    assert found.shape[0, -1] == -1
    assert quality(image, found).item() < 0.7


def test_images_without_objects():
    grey = torch.full((1, 3, 64, 64), 0.5)
    noise = torch.rand(1, 3, 64, 64, generator=seeded())
    for image in (grey, noise, torch.zeros_like(grey), torch.ones_like(grey)):
        verdict = judge(image, ["a red circle"])
        assert verdict.alignment.item() < 0.5
        assert verdict.quality.item() < 0.1
    found = detect_objects(grey)
    assert found.count.tolist() == [0]
    assert found.shape.shape == (1, 1)
    assert judge(grey, ["a red circle above a blue star"]).alignment.tolist() == [0]


def test_black_and_white_blobs_are_not_objects():
    image = render(scene(("red circle", 20, 20)))
    for value in (0.0, 1.0):
        damaged = image.clone()
        damaged[:, :, 40:55, 40:55] = value
        assert kinds(detect_objects(damaged)) == kinds(detect_objects(image))
        assert judge(damaged, ["a red circle"]).quality.item() < 0.8


@pytest.mark.slow
def test_verdicts_are_deterministic_and_independent_of_the_batch():
    scenes, requests = sample_requested_scenes(70, seeded(6))
    images = (render(scenes) + 0.05 * torch.randn(70, 3, 64, 64, generator=seeded(7))).clamp(0, 1)
    prompts = [str(request) for request in requests]
    first, again = judge(images, prompts), judge(images, prompts)
    assert torch.equal(first.alignment, again.alignment)
    assert torch.equal(first.quality, again.quality)
    assert all(torch.equal(getattr(first.scenes, f.name), getattr(again.scenes, f.name)) for f in fields(Scenes))
    for i in range(0, 70, 7):
        alone = judge(images[i : i + 1], prompts[i : i + 1])
        assert alone.alignment.item() == first.alignment[i].item()
        assert alone.quality.item() == first.quality[i].item()


def test_half_precision_is_accepted():
    scenes = sample_scenes(10, seeded(8))
    assert kinds(detect_objects(render(scenes).half())) == kinds(scenes)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), "not \\(3, 64, 64\\)"),
        (torch.zeros(2, 64, 64, 3), "not \\(2, 64, 64, 3\\)"),
        (torch.zeros(2, 3, 32, 32), "not \\(2, 3, 32, 32\\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
        (torch.full((2, 3, 64, 64), -1.0), "range from -1.0"),
        (torch.full((2, 3, 64, 64), 255.0), "to 255.0"),
        (torch.full((2, 3, 64, 64), float("nan")), "nan"),
        (torch.zeros(0, 3, 64, 64), "at least one"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        detect_objects(images)
    with pytest.raises(ValueError, match=message):
        quality(images, sample_scenes(2, seeded()))
    with pytest.raises(ValueError, match=message):
        judge(images, ["a red star"] * 2)


def test_wrong_numbers_and_prompts_are_refused():
    scenes = scene(("red circle", 30, 30))
    with pytest.raises(ValueError, match="2 requests"):
        alignment(scenes, [parse_prompt("a red circle")] * 2)
    with pytest.raises(ValueError, match="1 images but 2 scenes"):
        quality(render(scenes), sample_scenes(2, seeded()))
    with pytest.raises(ValueError, match="2 requests"):
        judge(render(scenes), ["a red circle"] * 2)
    with pytest.raises(ValueError, match="cannot judge the prompt 'a dog'"):
        judge(render(scenes), ["a dog"])


def test_wrong_drawing_costs_quality():
    scenes = scene(("red circle", 30, 30))
    wrong = replace(scenes, shape=scenes.shape + 1)
    assert quality(render(scenes), scenes).item() > quality(render(scenes), wrong).item()
