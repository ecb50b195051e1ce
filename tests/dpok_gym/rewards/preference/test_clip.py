"""A reward on CLIP's features that is learned from choices."""

import json
import math

import pytest
import torch

from dpok_gym.rewards import make_reward
from dpok_gym.rewards.networks.clip_score import ClipScore
from dpok_gym.rewards.preference.clip import ClipReward
from dpok_gym.rewards.preference.data import Comparisons
from dpok_gym.rewards.preference.fit import fit, log_odds, measure
from dpok_gym.rewards.preference.reward import LearnedReward, PreferenceReward
from tests.dpok_gym.rewards.preference.support import save_clip

PROMPTS = ["a red circle", "two blue squares", "a green star"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def taste(n=160):
    """Choices of the image with more red, whatever the prompt, of images that are one colour each."""
    generator = torch.Generator().manual_seed(0)
    shades = torch.randint(256, (2 * n, 3), dtype=torch.uint8, generator=generator)
    pairs = torch.arange(2 * n).reshape(n, 2)
    order = shades[pairs][:, :, 0].long().argsort(1, descending=True)
    images = shades[:, :, None, None].expand(-1, -1, 32, 32).contiguous()
    return Comparisons(images, [PROMPTS[k % 3] for k in range(n)], pairs.gather(1, order), torch.ones(n))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_it_begins_as_clips_own_score(clip, lora_rank):
    reward = ClipReward(clip, lora_rank, "cpu")
    images = (255 * torch.rand(3, 3, 32, 32)).round() / 255
    scale = reward.network.model.logit_scale.exp().item()
    expected = scale * ClipScore(clip, clip, device="cpu")(images, PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    learned = reward.learned()
    assert {"log_factor", "match", "look"} <= learned.keys()
    assert (len(learned) > 3) == bool(lora_rank)
    assert sum(value.numel() for value in learned.values()) < sum(p.numel() for p in reward.network.parameters()) / 2


def test_the_score_by_hand(clip):
    reward = ClipReward(clip, device="cpu")
    head = reward.network
    with torch.no_grad():
        head.log_factor.fill_(0.3)
        head.match.copy_(torch.randn(16))
        head.look.copy_(torch.randn(16))
    image, text = torch.randn(2, 16)
    scale = head.model.logit_scale.exp() * math.exp(4 * 0.3)
    expected = scale * image @ text + 4 * head.match @ (image * text) + head.look @ image
    torch.testing.assert_close(head(image[None], text[None])[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_fit_learns_and_is_loaded_again(clip, lora_rank, tmp_path):
    torch.manual_seed(0)
    reward = ClipReward(clip, lora_rank, "cpu")
    before = {name: value.clone() for name, value in reward.network.model.state_dict().items()}
    choices = taste()
    _, test = choices.split(0.25, seed=0)
    first = measure(log_odds(reward, test), test.outcomes)
    fitted = fit(
        choices, reward=reward, epochs=8 if lora_rank else 60, held_out=0.25, batch_size=16, learning_rate=2e-2
    )
    assert fitted.held_out.agreement > max(first.agreement, 0.85)
    assert fitted.held_out.loss < first.loss
    for name, value in reward.network.model.state_dict().items():  # CLIP itself is as it was
        assert torch.equal(value, before[name]) != ("lora_" in name)

    fitted.reward.save(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["network"] == "clip"
    assert (tmp_path / "mine" / "model.safetensors").stat().st_size < 30_000
    again = LearnedReward.load(tmp_path / "mine", device="cpu")
    assert isinstance(again, ClipReward)
    images = torch.rand(3, 3, 50, 40)
    torch.testing.assert_close(again(images, PROMPTS), reward(images, PROMPTS))
    made = make_reward(tmp_path / "mine")
    torch.testing.assert_close(made(images, PROMPTS).total, again(images, PROMPTS))
    made.check_differentiable()
    with pytest.raises(ValueError, match="it is a reward of the network 'clip', and one of 'small' is needed"):
        PreferenceReward.load(tmp_path / "mine")


def test_vectors_that_are_kept_change_nothing(clip):
    reward, choices = ClipReward(clip, device="cpu", batch_size=7), taste(20)
    encoded = reward.encode(choices)
    assert encoded.images.shape == (40, 16)
    for one, other in zip(reward.compare(encoded), reward.compare(choices), strict=True):
        torch.testing.assert_close(one, other)
    with_lora = ClipReward(clip, 2, "cpu")
    assert with_lora.encode(choices) is choices


def test_the_gradient_in_the_images(clip):
    reward = ClipReward(clip, device="cpu")
    images = torch.rand(2, 3, 48, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:2]).sum(), images)
    direction = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        ends = [reward.score(images + sign * direction, PROMPTS[:2]).sum() for sign in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / 2, (gradient * direction).sum(), rtol=2e-2, atol=0)
    assert (gradient[:, :, :8] == 0).all()  # the central square is read
    assert (gradient[:, :, 8:40].abs().amax(1) > 0).all()


def test_an_interrupted_fit_goes_on(clip, tmp_path):
    choices, path = taste(60), tmp_path / "checkpoint.safetensors"
    settings = {"epochs": 3, "batch_size": 16}

    def stop(row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    whole = fit(choices, reward=ClipReward(clip, device="cpu"), **settings)
    part = fit(choices, reward=ClipReward(clip, device="cpu"), **settings, checkpoint=path, log=stop)
    assert part.interrupted
    assert path.stat().st_size < 10_000  # without CLIP
    resumed = fit(choices, reward=ClipReward(clip, device="cpu"), **settings, checkpoint=path)
    assert resumed.held_out == whole.held_out
    for one, other in zip(whole.reward.learned().values(), resumed.reward.learned().values(), strict=True):
        assert torch.equal(one, other)


def test_what_is_refused(clip, tmp_path):
    with pytest.raises(ValueError, match="the LoRA rank must be an integer"):
        ClipReward(clip, -1, "cpu")
    with pytest.raises(FileNotFoundError, match="needs a CLIP model, and 'nobody/nothing'"):
        ClipReward("nobody/nothing", device="cpu")
    reward = ClipReward(clip, device="cpu")
    reward.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in [
        ({"network": "large"}, "'network' must be 'small' or 'clip', not 'large'"),
        ({"lora_rank": 4}, "missing keys"),
        ({"lora_rank": "4"}, "the LoRA rank must be an integer"),
        ({"depth": 3}, "unexpected keyword argument 'depth'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=f"is damaged, or of another version: .*{message}"):
            LearnedReward.load(tmp_path)
