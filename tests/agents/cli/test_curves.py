"""The learning curve: what it shows, and where its points are."""

import numpy as np
import pytest

from agents.cli import curves
from agents.cli.curves import learning_curve
from agents.common.evaluation import Evaluation
from tests.agents.cli.support import check_texts


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    kept = []
    save = curves.save
    monkeypatch.setattr(curves, "save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
    return kept


def _evaluation(alignment, kl):
    n = len(alignment)
    rewards = {"alignment": np.array(alignment, float), "taste": np.linspace(0, 1, n)}
    return Evaluation(
        ["a red star"] * n,
        np.zeros((n, 8, 8, 3), np.uint8),
        np.zeros(n),
        rewards,
        np.full((n, 1), kl),
        np.zeros((n, 1)),
        np.ones(1, bool),
        "alignment",
        None,
    )


def _rows(columns, n=5):
    return [{"rollout/images": 64.0 * k} | dict.fromkeys(columns, 0.1 * k) for k in range(1, n + 1)]


def test_it_begins_with_the_pretrained_model(tmp_path, figures):
    rows = _rows(["rollout/alignment"], 39)
    for k, row in enumerate(rows):
        row["train/kl_to_reference"] = float(k + 1)
    learning_curve(rows, tmp_path / "curve.png", "a title\n“a red star”")
    reward, kl = figures[0].axes
    assert reward.get_ylabel() == "alignment\n(trained on)"
    x, y = reward.lines[0].get_data()
    np.testing.assert_allclose(
        [x[0], x[-1], y[0]], [0, 38 * 64, 0.1]
    )  # the images of a row are those before its update
    assert "nats" in kl.get_ylabel()
    for line in kl.lines:  # each iteration, and the running mean
        x, y = line.get_data()
        assert (x[0], y[0], x[1]) == (0, 0, 32)  # a row has the mean over its update
    check_texts(figures[0])
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["each iteration (64 images)", "mean of 2 of them"]


def test_the_evaluations_stand_apart(tmp_path, figures):
    columns = ["rollout/aligned_share", "rollout/taste", "held_out/alignment", "held_out/quality"]
    rows = [row | {"train/kl_to_reference": 2.0} for row in _rows([*columns, "rollout/held_out_reward"])]
    before, after = _evaluation([1, 0, 0, 0], 0.0), _evaluation([1, 1, 1, 0.5], 3.0)
    learning_curve(rows, tmp_path / "curve.png", "a title", before, after, ["alignment", "quality"])
    panels = {axes.get_ylabel().split("\n")[0]: axes for axes in figures[0].axes}
    assert list(panels) == ["fully aligned", "taste", "alignment", "quality", "KL to pre-trained"]
    expected = {"fully aligned": (0.25, 0.75), "taste": (0.5, 0.5), "alignment": (0.25, 0.875)}
    for name, (level, final) in expected.items():
        curve, line, diamond, *_ = panels[name].lines
        assert max(curve.get_xdata()) == 256  # the curve itself is of the training only
        assert line.get_ydata()[0] == level
        assert (diamond.get_xdata()[0], diamond.get_ydata()[0]) == (320, final)
    assert len(panels["quality"].lines) == 1  # no evaluation has it
    _, diamond, *_ = panels["KL to pre-trained"].lines
    assert diamond.get_ydata()[0] == 3
    check_texts(figures[0])
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[1:] == [
        "pre-trained model, 4 other images",
        "fine-tuned model, the same 4 seeds (95 % interval)",
    ]


def test_what_says_how_rewards_differ_has_no_panel(tmp_path, figures):
    columns = ["held_out_reward", "alignment", "total_reward", "reward_std", "equal_share"]
    rows = _rows([*(f"rollout/{name}" for name in columns), "held_out/beauty"])
    rows[0]["images/brightness"] = 0.5
    learning_curve(rows, tmp_path / "curve.png", held_out=["beauty"])
    assert [axes.get_ylabel() for axes in figures[0].axes] == [
        "alignment\n(trained on)",
        "beauty\n(not trained on)",
    ]


@pytest.mark.parametrize("names", [["taste"], ["alignment", "taste"]])
def test_a_held_out_reward_has_its_levels(tmp_path, figures, names):
    """Raw, as the curve is: the weighted sum has no panel."""
    columns = ["rollout/held_out_reward", *(f"held_out/{name}" for name in names)]
    before, after = _evaluation([1, 0], 0.0), _evaluation([1, 1], 3.0)
    learning_curve(_rows(columns), tmp_path / "curve.png", "", before, after, names)
    panels = {axes.get_ylabel().split("\n")[0]: axes for axes in figures[0].axes}
    assert list(panels) == names
    _, line, diamond, *_ = panels["taste"].lines
    assert (line.get_ydata()[0], diamond.get_ydata()[0]) == (before.mean("taste"), after.mean("taste"))


def test_a_supervised_run(tmp_path, figures):
    drawing = _rows(["rollout/alignment", "rollout/quality"])
    # Stable-Baselines3 repeats the last episodes' reward in every row.
    fitting = [
        {"rollout/ep_rew_mean": 0.5, "train/n_updates": 50.0 * k, "train/denoising_loss": 1 / k} for k in range(1, 11)
    ]
    learning_curve(drawing + fitting, tmp_path / "curve.png", "a title", after=_evaluation([1, 0], 1.0))
    alignment, quality, loss = figures[0].axes
    assert quality.get_xlabel() == "images drawn by the pre-trained model"
    assert (loss.get_ylabel(), loss.get_xlabel()) == ("denoising loss", "optimiser steps")
    np.testing.assert_allclose(
        loss.lines[0].get_data(), [[50 * k for k in range(1, 11)], [1 / k for k in range(1, 11)]]
    )
    assert alignment.get_xlim() == quality.get_xlim()
    assert loss.get_xlim()[1] >= 500 > alignment.get_xlim()[1]  # two kinds of axes


def test_a_run_without_any_kl(tmp_path, figures):
    learning_curve(_rows(["rollout/alignment", "train/grad_norm"]), tmp_path / "curve.png")
    (reward,) = figures[0].axes
    assert reward.get_xlabel() == "images that the model has learned from"


@pytest.mark.parametrize("rows", [[], [{"rollout/images": 2.0, "rollout/alignment": 0.5}]])
def test_a_run_that_hardly_began(tmp_path, rows):
    assert learning_curve(rows, tmp_path / "curve.png").is_file()
