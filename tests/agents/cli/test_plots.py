import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from agents.cli import plots
from agents.common.evaluation import Evaluation
from tests.agents.cli.support import check_texts

LONG = "a purple triangle left of an orange square"


def _evaluation(prompts, aligned, rewards=None):
    n = len(prompts)
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)
    alignment = "alignment" if rewards is None else None
    rewards = {"alignment": np.array(aligned, float)} if rewards is None else rewards
    return Evaluation(
        list(prompts),
        images,
        np.zeros(n),
        rewards,
        np.zeros((n, 1)),
        np.zeros((n, 1)),
        np.ones(1, bool),
        alignment,
        None,
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    kept = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
    return kept


def _shown(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("varied", [False, True])
def test_before_after(tmp_path, figures, n, varied):
    prompts = [LONG, "a red star"] * n if varied else ["three green squares"] * n
    prompts = prompts[:n]
    before, after = _evaluation(prompts, [k % 3 == 0 for k in range(n)]), _evaluation(prompts, [True] * n)
    path = plots.before_after(before, after, tmp_path / "pairs.png", "DPOK on DPOK-Shapes-v0", ("pre-trained", "DPOK"))
    assert Image.open(path).format == "PNG"
    check_texts(figures[0])
    shown = _shown(figures[0])
    assert len(shown) == 2 * min(n, 16)
    assert all(axes.images[0].get_interpolation() == "nearest" for axes in shown)
    ticks = [axes for axes in shown if "✓" in [text.get_text() for text in axes.texts]]
    framed = [axes for axes in shown if to_hex(axes.spines["top"].get_edgecolor()).upper() == plots.ALIGNED]
    assert ticks == framed
    chosen = [k * n // min(n, 16) for k in range(min(n, 16))]
    assert len(ticks) == len(chosen) + sum(k % 3 == 0 for k in chosen)
    if varied and n > 1:  # a single prompt is the title
        assert shown[0].get_title().replace("\n", " ") == prompts[0]


def test_before_after_without_the_judge(tmp_path, figures):
    evaluation = _evaluation(["a dog on the moon"] * 2, [], {"jpeg-compressibility": np.zeros(2)})
    plots.before_after(evaluation, evaluation, tmp_path / "pairs.png")
    check_texts(figures[0])
    assert not figures[0].legends
    assert "reward 0" in _shown(figures[0])[0].texts[0].get_text()


def test_before_after_wants_the_same_prompts(tmp_path):
    with pytest.raises(ValueError, match="same prompts"):
        plots.before_after(_evaluation(["a"], [1]), _evaluation(["b"], [1]), tmp_path / "pairs.png")


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 9])
def test_image_grid(tmp_path, figures, n):
    evaluation = _evaluation([LONG] * n, [True] * n)
    path = plots.image_grid(
        evaluation.images, evaluation.prompts, tmp_path / "grid.png", f"“{LONG * 3}”", evaluation.aligned
    )
    assert path.is_file()
    assert len(_shown(figures[0])) == n
    check_texts(figures[0])
    plots.image_grid(evaluation.images, [f"seed {k}" for k in range(n)], tmp_path / "plain.png")
    assert not figures[1].legends


def test_learning_curve(tmp_path, figures):
    rows = [{"rollout/images": 64.0 * k, "rollout/alignment": 0.01 * k} for k in range(1, 40)]
    for k, row in enumerate(rows):
        row["train/kl_to_reference"] = float(k)
    plots.learning_curve(rows, tmp_path / "curve.png", "a title")
    reward, kl = figures[0].axes
    assert reward.get_ylabel() == "alignment"
    assert "nats" in kl.get_ylabel()
    x, y = kl.lines[0].get_data()
    assert (x[0], y[0]) == (64, 0)  # a row has the KL of the policy that drew its images
    assert len(x) == 39


def test_learning_curve_with_a_held_out_reward(tmp_path, figures):
    """What says how the rewards and images differ has no panel."""
    columns = ["held_out_reward", "alignment", "total_reward", "reward_std", "equal_share"]
    rows = [{"rollout/images": 64.0 * k} | {f"rollout/{name}": 0.1 * k for name in columns} for k in range(1, 6)]
    rows[0]["images/brightness"] = 0.5
    plots.learning_curve([row | {"train/kl_to_reference": 1.0} for row in rows], tmp_path / "curve.png")
    assert [axes.get_ylabel() for axes in figures[0].axes[:-1]] == [
        "alignment",
        "held-out reward\n(not trained on)",
    ]


@pytest.mark.slow
def test_learning_curve_of_a_supervised_run(tmp_path, figures):
    drawing = [
        {"rollout/images": 64.0 * k, "rollout/alignment": 0.5 + 0.01 * k, "rollout/quality": 0.4} for k in range(1, 6)
    ]
    # Stable-Baselines3 repeats the last episodes' reward in every row.
    fitting = [
        {"rollout/ep_rew_mean": 0.5, "train/n_updates": 50.0 * k, "train/denoising_loss": 1 / k} for k in range(1, 11)
    ]
    plots.learning_curve(drawing + fitting, tmp_path / "curve.png", "a title")
    alignment, quality, loss = figures[0].axes
    assert [axes.get_ylabel() for axes in (alignment, quality, loss)] == [
        "alignment",
        "quality",
        "denoising loss",
    ]
    assert [axes.get_xlabel() for axes in (alignment, quality, loss)] == [
        "",
        "images drawn by the pre-trained model",
        "optimiser steps",
    ]
    for axes, rows, x, y in (
        (alignment, drawing, "rollout/images", "rollout/alignment"),
        (quality, drawing, "rollout/images", "rollout/quality"),
        (loss, fitting, "train/n_updates", "train/denoising_loss"),
    ):
        curve = axes.lines[0].get_data()
        np.testing.assert_allclose(curve, [[row[name] for row in rows] for name in (x, y)])
    assert alignment.get_xlim() == quality.get_xlim()
    assert loss.get_xlim()[1] >= 500 > alignment.get_xlim()[1]  # two kinds of axes


def test_learning_curve_without_any_kl(tmp_path, figures):
    rows = [{"rollout/images": 64.0 * k, "rollout/alignment": 0.01 * k} for k in range(1, 6)]
    for row in rows[1:]:
        row["train/grad_norm"] = 1.0
    plots.learning_curve(rows, tmp_path / "curve.png")
    (reward,) = figures[0].axes
    assert reward.lines[0].get_data()[0].tolist() == [64, 128, 192, 256, 320]
    assert reward.get_xlabel() == "images drawn"


@pytest.mark.parametrize("rows", [[], [{"rollout/images": 2.0, "rollout/alignment": 0.5}]])
def test_learning_curve_of_a_run_that_hardly_began(tmp_path, rows):
    assert plots.learning_curve(rows, tmp_path / "curve.png").is_file()


def test_prompts_are_no_formulas(tmp_path, figures):
    prompts = ["$5 cut to $4_$"] * 2
    evaluation = _evaluation(prompts, [True, False])
    plots.image_grid(evaluation.images, prompts, tmp_path / "grid.png", prompts[0])
    plots.before_after(evaluation, evaluation, tmp_path / "pairs.png", prompts[0], ("pre-trained", "DPOK"))
    for figure in figures:
        check_texts(figure)
