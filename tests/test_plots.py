import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from agents import plots
from agents.evaluation import Evaluation

LONG = "a purple triangle left of an orange square"


def _evaluation(prompts, aligned, rewards=None):
    n = len(prompts)
    pictures = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)
    rewards = {"shapes-alignment": np.array(aligned, float)} if rewards is None else rewards
    return Evaluation(list(prompts), pictures, np.zeros(n), rewards, np.zeros((n, 1)))


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    kept = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
    return kept


def _check_texts(figure):
    """No text runs into another one or out of the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # a legend finds its place when it is drawn
    renderer = canvas.get_renderer()
    texts = [text for axes in figure.axes for text in [axes.title, *axes.texts] if axes.get_visible()]
    texts += figure.texts + [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    inside = figure.bbox
    for box in boxes:
        assert box.x0 >= inside.x0
        assert box.x1 <= inside.x1
        assert box.y0 >= inside.y0
        assert box.y1 <= inside.y1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def _shown(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("varied", [False, True])
def test_before_after(tmp_path, figures, n, varied):
    prompts = [LONG, "a red star"] * n if varied else ["three green squares"] * n
    prompts = prompts[:n]
    before, after = _evaluation(prompts, [k % 3 == 0 for k in range(n)]), _evaluation(prompts, [True] * n)
    path = plots.before_after(before, after, tmp_path / "pairs.png", "DPOK on DPOK-Shapes-v0", ("pre-trained", "DPOK"))
    assert Image.open(path).format == "PNG"
    _check_texts(figures[0])
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
    found = _evaluation(["a dog on the moon"] * 2, [], {"jpeg-compressibility": np.zeros(2)})
    plots.before_after(found, found, tmp_path / "pairs.png")
    _check_texts(figures[0])
    assert not figures[0].legends
    assert "reward 0" in _shown(figures[0])[0].texts[0].get_text()


def test_before_after_wants_the_same_prompts(tmp_path):
    with pytest.raises(ValueError, match="same prompts"):
        plots.before_after(_evaluation(["a"], [1]), _evaluation(["b"], [1]), tmp_path / "pairs.png")


@pytest.mark.parametrize("n", [1, 9])
def test_picture_grid(tmp_path, figures, n):
    found = _evaluation([LONG] * n, [True] * n)
    path = plots.picture_grid(found.pictures, found.prompts, tmp_path / "grid.png", f"“{LONG * 3}”", found.aligned)
    assert path.is_file()
    assert len(_shown(figures[0])) == n
    _check_texts(figures[0])
    plots.picture_grid(found.pictures, [f"seed {k}" for k in range(n)], tmp_path / "plain.png")
    assert not figures[1].legends


def test_learning_curve(tmp_path, figures):
    rows = [{"rollout/pictures": 64.0 * k, "rollout/shapes-alignment": 0.01 * k} for k in range(1, 40)]
    for k, row in enumerate(rows[1:]):
        row["train/kl_to_pretrained"] = float(k)
    plots.learning_curve(rows, tmp_path / "curve.png", "a title")
    reward, kl = figures[0].axes
    assert reward.get_ylabel() == "shapes-alignment"
    assert "nats" in kl.get_ylabel()
    x, y = kl.lines[0].get_data()
    assert (x[0], y[0]) == (64, 0)  # the KL of the first update is that of the first rollout
    assert len(x) == 38


def test_learning_curve_of_a_supervised_run(tmp_path, figures):
    drawing = [
        {"rollout/pictures": 64.0 * k, "rollout/shapes-alignment": 0.5 + 0.01 * k, "rollout/shapes-quality": 0.4}
        for k in range(1, 6)
    ]
    # Stable-Baselines3 repeats the last episodes' reward in every row.
    fitting = [
        {"rollout/ep_rew_mean": 0.5, "train/n_updates": 50.0 * k, "train/denoising_loss": 1 / k} for k in range(1, 11)
    ]
    plots.learning_curve(drawing + fitting, tmp_path / "curve.png", "a title")
    alignment, quality, loss = figures[0].axes
    assert [axes.get_ylabel() for axes in (alignment, quality, loss)] == [
        "shapes-alignment",
        "shapes-quality",
        "denoising loss",
    ]
    assert [axes.get_xlabel() for axes in (alignment, quality, loss)] == [
        "",
        "pictures drawn by the pre-trained model",
        "optimiser steps",
    ]
    for axes, rows, x, y in (
        (alignment, drawing, "rollout/pictures", "rollout/shapes-alignment"),
        (quality, drawing, "rollout/pictures", "rollout/shapes-quality"),
        (loss, fitting, "train/n_updates", "train/denoising_loss"),
    ):
        found = axes.lines[0].get_data()
        np.testing.assert_allclose(found, [[row[name] for row in rows] for name in (x, y)])
    assert alignment.get_xlim() == quality.get_xlim()
    assert loss.get_xlim()[1] >= 500 > alignment.get_xlim()[1]  # two kinds of axes


def test_learning_curve_without_any_kl(tmp_path, figures):
    rows = [{"rollout/pictures": 64.0 * k, "rollout/shapes-alignment": 0.01 * k} for k in range(1, 6)]
    for row in rows[1:]:
        row["train/grad_norm"] = 1.0
    plots.learning_curve(rows, tmp_path / "curve.png")
    (reward,) = figures[0].axes
    assert reward.lines[0].get_data()[0].tolist() == [64, 128, 192, 256, 320]
    assert reward.get_xlabel() == "pictures drawn"


@pytest.mark.parametrize("rows", [[], [{"rollout/pictures": 2.0, "rollout/shapes-alignment": 0.5}]])
def test_learning_curve_of_a_run_that_hardly_began(tmp_path, rows):
    assert plots.learning_curve(rows, tmp_path / "curve.png").is_file()


def test_read_log(tmp_path):
    (tmp_path / "progress.csv").write_text('a,b/c\n1,\n2.5,"3"\n4,nan\n')
    rows = plots.read_log(tmp_path / "progress.csv")
    assert rows[:2] == [{"a": 1.0}, {"a": 2.5, "b/c": 3.0}]
    assert np.isnan(rows[2]["b/c"])


def test_prompts_are_no_formulas(tmp_path, figures):
    prompts = ["$5 cut to $4_$"] * 2
    evaluation = _evaluation(prompts, [True, False])
    plots.picture_grid(evaluation.pictures, prompts, tmp_path / "grid.png", prompts[0])
    plots.before_after(evaluation, evaluation, tmp_path / "pairs.png", prompts[0], ("pre-trained", "DPOK"))
    for figure in figures:
        _check_texts(figure)
