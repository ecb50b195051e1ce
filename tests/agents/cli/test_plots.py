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
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
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
    chosen = range(min(n, 16))
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


def test_rows_of_images(tmp_path, figures):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    rows = {"best of n, distilled": (images, np.array([True, False, True])), "pre-trained": (images, None)}
    plots.image_rows(rows, ["a red star", LONG, "a red star"], tmp_path / "rows.png", "a title")
    plots.image_rows(rows, ["a red star"] * 3, tmp_path / "rows.png", "a title")
    for figure in figures:
        check_texts(figure)
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert "best of n,\ndistilled\n2 of 3 aligned" in texts
        assert texts.count("✓") == 2
    assert [axes.get_title().replace("\n", " ") for axes in figures[0].axes[:3]] == ["a red star", LONG, "a red star"]
    assert "“a red star”" in figures[1].texts[0].get_text()


def test_scatter(tmp_path, figures):
    positions = np.array([[0.5, -1.0], [2.0, 0.25], [1.0, 1.0]])
    panels = {"pre-trained\nE[r] - KL = 0.1": positions, "best possible": positions + 1}
    plots.scatter(panels, ["two modes", "one", "two modes"], tmp_path / "scatter.png", 3.0, "a title")
    check_texts(figures[0])
    first, second = figures[0].axes
    assert first.collections[0].get_offsets().tolist() == [[0.5, -1.0], [1.0, 1.0]]
    assert second.collections[1].get_offsets().tolist() == [[3.0, 1.25]]
    assert first.get_xlim() == second.get_ylim() == (-3, 3)


def test_prompts_are_no_formulas(tmp_path, figures):
    prompts = ["$5 cut to $4_$"] * 2
    evaluation = _evaluation(prompts, [True, False])
    plots.image_grid(evaluation.images, prompts, tmp_path / "grid.png", prompts[0])
    plots.before_after(evaluation, evaluation, tmp_path / "pairs.png", prompts[0], ("pre-trained", "DPOK"))
    for figure in figures:
        check_texts(figure)
