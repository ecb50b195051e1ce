"""The figure of the long runs: the reward and the judge on one scale."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import over_optimisation as module
from benchmarks.algorithms_records import LONG, PRETRAINED
from benchmarks.over_optimisation import learnt_from, over_optimisation
from benchmarks.runs import Record
from benchmarks.training_run import UNTRAINED
from tests.agents.cli.support import check_texts

TASK: dict[str, Any] = {"prompts": "three green squares", "reward": {"shapes-preference": 1.0}}


def point(images: float, reward: float, alignment: float, backward: float = 0.0) -> dict[str, float]:
    numbers = {"images": images, "num_gradient_evaluations": backward}
    return numbers | {"reward": reward, "alignment": alignment, "quality": 0.5}


def make_run(label: str, curve: list[dict[str, float]], seed: int = 0) -> Record:
    """Returns a long run; the last point of its curve has the final scores."""
    final = curve[-1]
    scores = {"reward": final["reward"], "judged": final["alignment"] + 0.2 * final["quality"]}
    return TASK | {"task": LONG, "label": label, "seed": seed, "scores": {"training": scores}, "curve": curve}


def before(**changes: Any) -> Record:
    """Returns a run of the pre-trained model: the reward is 1 with a spread of 2, the verdict 0.7 with one of 0.25."""
    scores = {"reward": 1.0, "reward_std": 2.0, "judged": 0.7, "judged_std": 0.25}
    run = {"task": "count", "label": PRETRAINED, "algorithm": UNTRAINED, "seed": 0}
    return TASK | run | {"scores": {"training": scores}} | changes


HACKED = [point(0, 1, 0.6), point(10, 3, 0.85), point(20, 7, 0.35), point(30, 9, 0.1)]
FIT = [point(0, 0.5, 0.5), point(10, 1.5, 0.7), point(20, 3, 0.85, 5), point(20, 5, 0.9, 20), point(20, 5, 0.9, 20)]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are written."""
    figures: list[Any] = []

    def save(figure: Figure, path: Path, dpi: int) -> None:
        figures.append(figure)
        figure.savefig(path, dpi=dpi)

    monkeypatch.setattr(module, "save", save)
    return figures


def lines_of(axes: Any) -> dict[str, Any]:
    """Returns the thick lines of a panel, by colour."""
    return {line.get_color(): line for line in axes.lines if line.get_linewidth() == 1.8}


def test_both_lines_are_in_spreads_of_the_pretrained_model(saved: list[Any], tmp_path: Path) -> None:
    records = [make_run("DDPO", HACKED), make_run("SFT", FIT), before(), before(reward={"other": 1.0}, scores={})]
    over_optimisation(records, ["SFT", "absent", "DDPO"], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    (figure,) = saved
    fit, hacked = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["SFT †", "DDPO"]
    reward, verdict = lines_of(hacked).values()
    for line, expected in ((reward, [0, 1, 3]), (verdict, [0, 1, -1])):
        heights = np.interp([0, 10, 20], line.get_xdata(), line.get_ydata())
        np.testing.assert_allclose(heights, expected, atol=0.06)  # drawn at points beside the middle one
    # The final evaluation: 9 is 4 spreads above 1, and 0.2 is 2 below 0.7.
    ends = [line.get_ydata()[0] for line in hacked.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(ends, [4, -2])
    assert hacked.get_title(loc="right") == "gap +6.0"
    levels = [line.get_ydata()[0] for line in hacked.lines if list(line.get_xdata()) == [0, 1]]
    np.testing.assert_allclose(levels, [0, 2])  # the verdict is at most 1.2
    assert lines_of(fit)[reward.get_color()].get_xdata()[[0, -1]].tolist() == [0, 20]
    check_texts(figure)


def test_the_gap_has_the_colour_of_the_line_that_is_ahead(saved: list[Any], tmp_path: Path) -> None:
    curve = [point(0, 1, 0.85), point(10, 1, 0.85), point(20, 5, 0.85), point(30, 5, 0.85)]
    over_optimisation([make_run("DDPO", curve), before()], ["DDPO"], tmp_path / "a.png")
    reward, judge = saved[0].axes[0].collections
    assert reward.get_paths()[0].vertices[:, 0].min() > 14  # the lines cross at 15
    assert judge.get_paths()[0].vertices[:, 0].max() < 16


def test_of_several_seeds_each_has_a_line(saved: list[Any], tmp_path: Path) -> None:
    higher = [each | {"reward": each["reward"] + 4} for each in HACKED]
    records = [make_run("DDPO", HACKED), make_run("DDPO", higher, seed=1), before()]
    over_optimisation(records, ["DDPO"], tmp_path / "a.png")
    (axes,) = saved[0].axes
    thick = next(iter(lines_of(axes).values()))
    thin = [line for line in axes.lines if line.get_linewidth() == 0.7 and line.get_color() == thick.get_color()]
    assert [line.get_ydata()[0] for line in thin] == [0, 2]
    assert thick.get_ydata()[0] == 1
    diamonds = [line.get_ydata() for line in axes.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(diamonds, [[4, 6], [-2, -2]])


def test_a_run_that_has_diverged_has_a_panel_that_says_so(saved: list[Any], tmp_path: Path) -> None:
    diverged = TASK | {"task": LONG, "label": "DDPO", "seed": 0, "scores": {}, "curve": [], "diverged": "NaN"}
    over_optimisation([diverged, make_run("SFT", FIT), before()], ["DDPO", "SFT"], tmp_path / "a.png")
    empty, full = saved[0].axes
    assert [text.get_text() for text in empty.texts] == ["1 of 1: images became NaN"]
    assert not lines_of(empty)
    assert lines_of(full)
    assert not full.texts


def test_a_running_mean_ends_where_it_lacks_neighbours() -> None:
    curve = [point(10 * k, float(k % 2), 0.5) for k in range(62)]  # of 61 rollouts, a twentieth is three
    x, means = module._smoothed(curve, lambda each: each["reward"])
    assert x.tolist() == [10 * k for k in range(1, 60)]
    assert means == pytest.approx([1 / 3 if k % 2 else 2 / 3 for k in range(1, 60)])


def test_a_fit_has_learnt_from_as_many_images_as_its_share() -> None:
    images, points = learnt_from(FIT)
    assert images.tolist() == [0, 5, 20]
    assert points[0] == {"reward": 1.0, "alignment": pytest.approx(0.6), "quality": 0.5}  # the mean of both rollouts
    assert points[1:] == FIT[2:4]
    images, points = learnt_from(HACKED)
    assert (images.tolist(), points) == ([0, 10, 20], HACKED[:3])


def test_without_the_pretrained_model_there_is_no_scale(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="three green squares"):
        over_optimisation([make_run("DDPO", HACKED), before(prompts="a red circle")], ["DDPO"], tmp_path / "a.png")
