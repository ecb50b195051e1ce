"""Learning a reward from choices: the files, the split, the loss, the fit, and what is made of it."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from dpok_gym.rewards import make_reward
from dpok_gym.rewards.preference.data import Comparisons, load_comparisons
from dpok_gym.rewards.preference.fit import bradley_terry_loss, default_held_out, fit, log_odds, measure
from dpok_gym.rewards.preference.network import PreferenceConfig, PreferenceNetwork, split_words
from dpok_gym.rewards.preference.reward import PreferenceReward
from dpok_gym.rewards.registry import load_reward

WORDS = ("a", "above", "blue", "circle", "red", "square")


def small_network(**changes):
    sizes = {"max_words": 6, "image_size": 16, "width": 32, "layers": 1, "heads": 2}
    return PreferenceNetwork(PreferenceConfig(WORDS, **sizes | changes))


def colour_choices(n=240):
    """An image with much of a colour is preferred to one with little, which colour says the prompt."""
    generator = torch.Generator().manual_seed(0)
    shades = torch.rand(n, 2, 3, generator=generator)
    channel = torch.arange(n) % 2 * 2
    for k, much in enumerate((0.7, 0.0)):
        shades[torch.arange(n), k, channel] = much + 0.3 * torch.rand(n, generator=generator)
    images = (255 * shades).byte().flatten(0, 1)[:, :, None, None].expand(-1, -1, 16, 16).contiguous()
    prompts = [f"something {'red' if c == 0 else 'blue'}" for c in channel]
    return Comparisons(images, prompts, torch.arange(2 * n).reshape(n, 2), torch.ones(n))


def write(folder, rows):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 12), (200, 10, 10)).save(folder / name)
    (folder / "damaged.png").write_bytes((folder / "a.png").read_bytes()[:40])
    path = folder / "choices.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"prompt": "a red star", "images": ["a.png", "b.png"], "preferred": 1}


def test_choices_are_loaded_with_their_images(tmp_path):
    tie = GOOD | {"preferred": None, "reason": "tie"}
    last = {"prompt": "other", "images": ["b.png", "a.png"], "preferred": 0}
    skip = GOOD | {"preferred": None, "reason": "skip"}
    bad = GOOD | {"preferred": None, "reason": "both-bad"}
    comparisons = load_comparisons(write(tmp_path, [GOOD, tie, skip, bad, *[GOOD] * 18, last]), 16)
    assert comparisons.images.shape == (2, 3, 16, 16)
    assert (comparisons.images == torch.tensor([200, 10, 10], dtype=torch.uint8)[:, None, None]).all()
    assert comparisons.pairs.tolist() == [[1, 0], [0, 1], [0, 1], *[[1, 0]] * 19]  # the preferred one first
    assert comparisons.outcomes.tolist() == [1, 0.5, 0.5, *[1] * 19]
    assert comparisons.prompts == ["a red star"] * 21 + ["other"]
    assert comparisons[torch.tensor([0, 1])].outcomes.tolist() == [1, 0.5]


def test_damaged_images_and_too_few_choices_are_refused(tmp_path):
    damaged = GOOD | {"images": ["a.png", "damaged.png"]}
    with pytest.raises(ValueError, match=r"line 2 of '.*choices.jsonl': .*damaged.png cannot be read"):
        load_comparisons(write(tmp_path, [GOOD, damaged, *[GOOD] * 20]), 16)
    with pytest.raises(ValueError, match="has 0 choices of a preferred image, and a reward needs at least 20"):
        load_comparisons(write(tmp_path, []), 16)


def test_the_split_shares_no_image():
    generator = torch.Generator().manual_seed(1)
    # 50 islands of 6 images with 8 choices each.
    island = torch.arange(50).repeat_interleave(8)
    pairs = 6 * island[:, None] + torch.stack([torch.randperm(6, generator=generator)[:2] for _ in island])
    images = torch.randint(256, (300, 3, 1, 1), dtype=torch.uint8, generator=generator)
    comparisons = Comparisons(images, [str(k) for k in range(400)], pairs, torch.ones(400))
    train, test = comparisons.split(0.2, seed=0)
    for part in (train, test):  # the prompts are the numbers of the choices
        rows = torch.tensor([int(prompt) for prompt in part.prompts])
        assert torch.equal(part.images[part.pairs], images[pairs[rows]])
    assert not {*map(str, train.images.tolist())} & {*map(str, test.images.tolist())}
    assert sorted(train.prompts + test.prompts) == sorted(comparisons.prompts)
    assert 72 <= len(test) <= 88
    assert test.prompts != comparisons.split(0.2, seed=1)[1].prompts
    links = torch.stack([torch.arange(30), torch.arange(1, 31)], 1)
    chain = Comparisons(images, ["x"] * 30, links, torch.ones(30))
    with pytest.raises(ValueError, match="the 30 choices cannot be split"):
        chain.split(0.2, seed=0)
    with pytest.raises(ValueError, match="must lie in \\(0, 1\\), got 1"):
        chain.split(1, seed=0)


def test_a_split_with_a_large_component():
    """An image that was compared with many others keeps all these choices on one side, and no more."""
    star = torch.stack([torch.zeros(90, dtype=torch.int64), torch.arange(1, 91)], 1)
    pairs = torch.cat([star, torch.arange(91, 111).reshape(10, 2)])
    images = torch.zeros(111, 3, 1, 1, dtype=torch.uint8)
    comparisons = Comparisons(images, [str(k) for k in range(100)], pairs, torch.ones(100))
    for seed in range(20):
        assert len(comparisons.split(0.1, seed)[1]) == 10
    assert len(comparisons.split(0.99, 0)[0]) in (1, 10)


def test_bradley_terry_loss():
    scores = torch.tensor([1.0, -2.0, 500.0]), torch.tensor([1.0, 1.0, -500.0])
    won, tied = torch.ones(3), torch.full((3,), 0.5)
    expected = [math.log(2), math.log(1 + math.e**3), 0.0]
    torch.testing.assert_close(bradley_terry_loss(*scores, won), torch.tensor(expected))
    torch.testing.assert_close(bradley_terry_loss(*scores[::-1], 1 - won), torch.tensor(expected))
    assert bradley_terry_loss(*scores[::-1], won)[2] == 1000
    # A tie is half a win for each: the least loss is that of equal scores, log 2.
    halves = (bradley_terry_loss(*scores, won) + bradley_terry_loss(*scores, 1 - won)) / 2
    torch.testing.assert_close(bradley_terry_loss(*scores, tied), halves)
    difference = torch.zeros(1, requires_grad=True)
    loss = bradley_terry_loss(difference, torch.zeros(1), tied[:1])
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(loss, difference)[0] == 0


def test_measure_by_hand():
    # Its favourite is chosen with 0.6 (right, right, wrong) and with 0.95 (right).
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    odds = torch.tensor([logit(0.6), logit(0.6), -logit(0.6), logit(0.95)])
    measured = measure(odds, torch.ones(4), n_bins=5)
    assert measure(-odds, torch.zeros(4), n_bins=5).observed == measured.observed
    assert (measured.choices, measured.ties) == (4, 0)
    assert measured.interval == pytest.approx([0.3006, 0.9544], abs=1e-4)  # R: prop.test(3, 4, correct = FALSE)
    assert measured.agreement == 0.75
    assert measured.counts == [3, 1]
    assert measured.predicted == pytest.approx([0.6, 0.95])
    assert measured.observed == pytest.approx([2 / 3, 1])
    assert measured.calibration_error == pytest.approx((3 * (2 / 3 - 0.6) + 0.05) / 4)
    assert measured.loss == pytest.approx(-(2 * math.log(0.6) + math.log(0.4) + math.log(0.95)) / 4)


def test_ties_count_in_the_loss_and_the_calibration_and_not_in_the_agreement():
    odds = torch.tensor([1.0, -1.0, 1.0, 1.0])
    measured = measure(odds, torch.tensor([1.0, 1.0, 0.5, 1.0]))
    assert (measured.choices, measured.ties) == (4, 1)
    assert measured.agreement == pytest.approx(2 / 3)
    assert measured.observed == pytest.approx([2.5 / 4])
    losses = [math.log(1 + math.exp(-d)) for d in (1, -1, 1)] + [math.log(1 + math.exp(-1)) + 0.5]
    assert measured.loss == pytest.approx(sum(losses) / 4)


def test_held_out_ties_measure_nothing():
    choices = colour_choices(40)
    with pytest.raises(ValueError, match="held-out choices are all ties; hold out more"):
        fit(replace(choices, outcomes=torch.full((40,), 0.5)), epochs=1, device="cpu")


def test_what_the_network_reads():
    network = small_network().eval()
    images = torch.rand(1, 3, 16, 16)

    def score(prompt):
        return network(images, network.tokenize([prompt])).item()

    assert split_words("A red circle, above it") == ["a", "red", "circle", ",", "above", "it"]
    assert score("a red circle above a blue square") == score("A  Red circle above a BLUE square")
    assert score("red circle above blue square") != score("blue square above red circle")
    assert score("a red rabbit") == score("a red wolf")
    assert score("a red rabbit") != score("a red")  # that there is a word is seen
    assert score("a red circle above a blue square") == score("a red circle above a blue")  # only six words are read
    assert network.tokenize(["red", ""]).tolist() == [[6, 0, 0, 0, 0, 0], [0] * 6]


def test_scores_do_not_depend_on_the_batch():
    reward = PreferenceReward(small_network(), "cpu", batch_size=2)
    images, prompts = torch.rand(5, 3, 16, 16), ["a red circle", "", "blue", "a square above a circle", "red"]
    alone = torch.cat([reward(images[k : k + 1], prompts[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(reward(images, prompts), alone)
    assert alone.unique().numel() == 5


def test_the_gradient_in_the_images():
    reward = PreferenceReward(small_network(), "cpu")
    images = torch.rand(2, 3, 40, 24, requires_grad=True)
    prompts = ["a red circle", "blue square"]
    assert not reward(images, prompts).requires_grad
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())
    (gradient,) = torch.autograd.grad(reward.score(images, prompts).sum(), images)
    assert (gradient.abs().amax(1) > 0).all()  # resizing leaves no pixel out
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        difference = (reward.score(images + step, prompts) - reward.score(images - step, prompts)).sum() / 2
    torch.testing.assert_close(difference, (gradient * step).sum(), rtol=1e-2, atol=0)


def test_a_folder_is_a_reward(tmp_path):
    reward = PreferenceReward(small_network(), "cpu")
    reward.save(tmp_path / "mine")
    again = PreferenceReward.load(tmp_path / "mine", device="cpu")
    assert again.network.config == reward.network.config
    for one, other in zip(reward.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(one.half().float(), other)
    images, prompts = torch.rand(3, 3, 16, 16), ["red", "a blue square", "other"]
    torch.testing.assert_close(again(images, prompts), reward(images, prompts), rtol=0, atol=5e-3)
    name = str(tmp_path / "mine")
    made = make_reward({name: 2.0})
    torch.testing.assert_close(made(images, prompts).total, 2 * again(images, prompts))
    made.check_differentiable()
    images.requires_grad_()
    assert made.differentiable(images, prompts).requires_grad


def test_folders_that_are_no_reward(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no reward: it has no config.json and no model.safetensors"):
        make_reward(str(tmp_path))
    PreferenceReward(small_network(), "cpu").save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="is damaged, or of another version"):
        PreferenceReward.load(tmp_path)
    (tmp_path / "config.json").write_text('{"words": [], "depth": 3}')
    with pytest.raises(ValueError, match="is damaged, or of another version"):
        PreferenceReward.load(tmp_path)
    with pytest.raises(ValueError, match="multiple of 8 from 16 on, got 20"):
        small_network(image_size=20)


@pytest.mark.slow
def test_a_fit_learns_and_keeps_its_best():
    rows: list[dict[str, Any]] = []
    fitted = fit(colour_choices(), epochs=6, batch_size=16, device="cpu", log=rows.append)
    assert fitted.held_out.agreement >= 0.9
    assert fitted.trained_on + fitted.held_out.choices == 240
    assert [row["epoch"] for row in rows] == list(range(1, 7))
    assert rows[fitted.epoch - 1]["held_out_loss"] == min(row["held_out_loss"] for row in rows)
    assert fitted.held_out.loss == pytest.approx(rows[fitted.epoch - 1]["held_out_loss"], abs=5e-3)  # rounded to half
    _, test = colour_choices().split(default_held_out(240), seed=0)
    assert measure(log_odds(fitted.reward, test), test.outcomes) == fitted.held_out
    # It read the prompt: red and blue images swap places.
    images = torch.zeros(2, 3, 16, 16)
    images[0, 0], images[1, 2] = 1, 1
    red, blue = (fitted.reward(images, [prompt] * 2) for prompt in ("something red", "something blue"))
    assert red[0] > red[1]
    assert blue[1] > blue[0]


def test_of_few_choices_more_are_held_out():
    assert [default_held_out(n) for n in (20, 100, 250, 500, 20_000)] == [0.3, 0.3, 0.2, 0.1, 0.1]


def test_a_fit_is_no_worse_than_its_start():
    """Choices at random teach nothing, so the weights stay those of the start."""
    choices = colour_choices(60)
    flips = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.5
    choices = replace(choices, pairs=torch.where(flips[:, None], choices.pairs.flip(1), choices.pairs))
    start = PreferenceReward(small_network(), "cpu")
    before = {name: value.half().float() for name, value in start.learned().items()}
    fitted = fit(choices, reward=start, epochs=2, learning_rate=0.3, device="cpu")
    assert fitted.epoch == 0
    for name, value in fitted.reward.learned().items():
        assert torch.equal(value, before[name])


@pytest.mark.slow
def test_an_interrupted_fit(tmp_path):
    choices, path = colour_choices(60), tmp_path / "checkpoint.pt"

    def stop_after(epoch):
        def log(row):
            if row["epoch"] == epoch:
                raise KeyboardInterrupt

        return log

    settings: dict[str, Any] = {"epochs": 3, "device": "cpu"}
    whole = fit(choices, **settings)
    part = fit(choices, **settings, checkpoint=path, log=stop_after(1))
    assert part.interrupted
    assert part.epoch == 1
    resumed = fit(choices, **settings, checkpoint=path)
    assert not resumed.interrupted
    assert resumed.held_out == whole.held_out
    for one, other in zip(whole.reward.network.parameters(), resumed.reward.network.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="checkpoint of a fit with other settings"):
        fit(choices, **settings | {"epochs": 4}, checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint of a fit with other settings"):
        fit(choices, **settings, reward=whole.reward, checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint of a fit with other settings"):
        fit(replace(choices, pairs=choices.pairs.flip(1)), **settings, checkpoint=path)


def test_a_reward_that_was_fitted_anew_is_read_anew(tmp_path):
    config = PreferenceConfig(("red",), 3, 16)
    images, prompts, totals = torch.rand(2, 3, 16, 16), ["red", "red"], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        PreferenceReward(PreferenceNetwork(config), "cpu").save(tmp_path)
        totals.append(make_reward(tmp_path)(images, prompts).total)
    assert torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[1], totals[2])
    assert load_reward(str(tmp_path)) is load_reward(str(tmp_path))


def test_a_fit_that_diverges_says_so():
    with pytest.raises(ValueError, match="the held-out loss was not finite after any epoch; try a smaller learning"):
        fit(colour_choices(20), epochs=1, learning_rate=1e18, device="cpu")


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"held_out": 0.0}])
def test_bad_settings_of_a_fit(settings):
    with pytest.raises(ValueError, match="must"):
        fit(colour_choices(20), **settings)
