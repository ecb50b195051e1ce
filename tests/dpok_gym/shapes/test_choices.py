"""The simulated person, and the images that it compares."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dpok_gym.rewards import make_reward
from dpok_gym.rewards.preference.data import load_comparisons
from dpok_gym.shapes import choices
from dpok_gym.shapes.captions import parse_prompt, sample_requested_scenes
from dpok_gym.shapes.judge import judge
from dpok_gym.shapes.scenes import render


@pytest.fixture
def small(monkeypatch):
    """One cluster of four groups, in three denoising steps."""
    monkeypatch.setattr(choices, "GROUPS", 4)
    monkeypatch.setattr(choices, "DENOISING_STEPS", (3,))
    monkeypatch.setattr(choices, "CAPTION_STEPS", 2)
    monkeypatch.setattr(choices, "CAPTION_BATCH", 8)


def test_utilities_are_the_judges():
    scenes, _ = sample_requested_scenes(6, torch.Generator().manual_seed(0))
    images = render(scenes)
    prompts = ["a red circle above a blue square", "three green stars"]
    seen = choices.utilities(images, [parse_prompt(prompt) for prompt in prompts])
    for row, prompt in zip(seen, prompts, strict=True):
        verdict = judge(images, [prompt] * 6)
        torch.testing.assert_close(row, verdict.alignment + 0.2 * verdict.quality)


def test_how_the_person_chooses():
    rng = np.random.default_rng(0)
    seen = torch.rand(8, 20, generator=torch.Generator().manual_seed(0))
    seen[:, ::2] = 0.5  # half of the images look the same
    chosen = [row for _ in range(200) for row in choices.choose(seen, rng)]
    assert len(chosen) == 200 * choices.CHOICES_PER_CLUSTER
    caption, a, b, preferred = np.array(chosen).T
    difference = (seen[caption, b] - seen[caption, a]).numpy()
    assert np.abs(difference).min() >= choices.JUST_NOTICEABLE
    assert ((difference > 0) != preferred).mean() == pytest.approx(choices.ERROR_RATE, abs=0.01)
    assert preferred.mean() == pytest.approx(0.5, abs=0.03)
    assert (a // 5 == b // 5).mean() == pytest.approx(choices.HARD_SHARE, abs=0.05)
    own = (a // 5 == caption // 2) | (b // 5 == caption // 2)
    assert own.all()  # one of the two is always from the caption's own group
    assert set(caption) == set(range(8))


@pytest.mark.slow
def test_images_and_choices_from_nothing(tmp_path, small):
    choices.draw_images(tmp_path, seed=3, n_batches=1)
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == [f"000-{group:02}-{k}.png" for group in range(4) for k in range(5)]
    drawn = [file.read_bytes() for file in files]
    assert len(set(drawn)) == 20
    scenes, _ = choices.describe(3, 0)
    true = np.stack([np.asarray(Image.open(file)) for file in files[::5]])
    error = torch.from_numpy(true).permute(0, 3, 1, 2) / 255 - render(scenes)
    assert error.abs().mean() < 0.03  # the first of each group is its scene

    files[-1].unlink()  # as if it had been interrupted
    files[0].unlink()
    choices.draw_images(tmp_path, seed=3, n_batches=1)
    assert [file.read_bytes() for file in files] == drawn
    written = files[0].stat().st_mtime_ns
    choices.draw_images(tmp_path, seed=3, n_batches=1)
    assert files[0].stat().st_mtime_ns == written  # nothing is drawn twice

    path = choices.compare_images(tmp_path, seed=3, n_batches=1)
    assert len(load_comparisons(path, 64)) == choices.CHOICES_PER_CLUSTER
    for line in path.read_text().splitlines():
        row = json.loads(line)
        images = np.stack([np.asarray(Image.open(tmp_path / name)) for name in row["images"]])
        verdict = judge(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, [row["prompt"]] * 2)
        torch.testing.assert_close(
            torch.tensor(row["utilities"]), verdict.alignment + 0.2 * verdict.quality, rtol=0, atol=1e-4
        )


@pytest.mark.slow
def test_all_steps_together(tmp_path, small, monkeypatch):
    monkeypatch.setattr(choices, "GROUPS", 8)  # two clusters, one of them to hold out
    command = ["--work", str(tmp_path), "--out", str(tmp_path / "reward"), "--batches", "1", "--epochs", "2"]
    choices.main(command)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "epoch" in row] == [1, 2]
    weights = (tmp_path / "reward" / "model.safetensors").read_bytes()
    reward = make_reward(str(tmp_path / "reward"))
    assert reward(torch.rand(2, 3, 64, 64), ["a red star", "a wolf"]).total.isfinite().all()
    choices.main(command)  # nothing is left to do
    assert (tmp_path / "reward" / "model.safetensors").read_bytes() == weights
