"""What is learned from few choices: the people, and what they choose."""

import torch

from benchmarks.few_choices import choose, tastes


def test_people_choose_what_they_like():
    images = torch.full((6, 3, 64, 64), 255, dtype=torch.uint8)
    images[1, :, :32] = 0  # much of it is coloured
    images[2, :, :8] = 0
    prompt = "three green squares"
    liked = tastes(images, prompt)["large shapes too"]
    assert liked[1] > liked[2] > liked[0]
    choices = choose(images, liked, prompt, 0)
    assert choices.pairs.tolist()[:2] == [[1, 0], [2, 3]]
    assert choices.outcomes.tolist() == [1, 1, 0.5]  # the last two images are alike
    assert choose(images, liked, prompt, 1).pairs.tolist()[:2] == [[0, 1], [3, 2]]
