"""What the figures of the benchmarks share."""

from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import figures
from benchmarks.runs import row_file
from tests.agents.cli.support import check_texts
from tests.benchmarks.support import RESULTS


def test_curves_are_running_means_of_what_is_drawn() -> None:
    heights = [0.0, 1.0, 5.0, 2.0, 7.0, 4.0, 9.0]
    points = [{"images": float(min(k, 5)), "quality": y, "seconds": float(k)} for k, y in enumerate(heights)]
    points.append({"images": 5.0, "quality": 100.0, "seconds": 6.0})  # the final evaluation, which is left out
    x, y = figures.smooth(points, itemgetter("quality"), itemgetter("seconds"))
    assert x.tolist() == list(range(7))
    # Of five points, at the ends of fewer; and the last two are of a fit, and are as they are.
    assert y.tolist() == [0.0, 2.0, 3.0, 14 / 3, 7.0, 4.0, 9.0]
    x, y = figures.smooth(points, itemgetter("quality"), itemgetter("images"))
    assert (x.tolist(), y[-1]) == ([0, 1, 2, 3, 4, 5], 9.0)


def test_a_running_mean_has_fewer_values_at_the_ends() -> None:
    values = np.array([0.0, 3.0, 6.0, 3.0])
    assert figures.running_mean(values, 3).tolist() == [0, 3, 4, 3]
    for window in (0, 1):
        assert figures.running_mean(values, window).tolist() == values.tolist()


def test_a_mean_of_curves_is_drawn_where_all_have_points() -> None:
    at = figures.common_range([np.array([0.0, 5.0, 9.0]), np.array([1.0, 20.0])])
    assert (at[0], at[-1]) == (1, 9)


def test_panels_that_are_left_over_are_hidden() -> None:
    figure, panels = figures.make_panels(5, 3, (6, 2), sharex=True)
    figures.name_x(panels, 3, "nats")
    assert [axes.get_visible() for axes in figure.axes] == [True] * 5 + [False]
    assert [axes.get_xlabel() for axes in panels] == ["", "", "", "nats", "nats"]
    assert all(axes.xaxis.get_tick_params()["labelbottom"] for axes in panels)


def test_points_at_zero_nats_are_not_cut() -> None:
    figure = Figure()
    axes = figure.add_subplot()
    axes.scatter([0, 50, 700], [1, 2, 3])
    figures.scale_kl(axes, 10)
    low, high = axes.get_xlim()
    assert low < 0
    assert high > 700
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "10", "100"]


def test_a_grid_has_the_ticks_of_the_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, Any] = {}
    monkeypatch.setattr(figures.plots, "image_rows", lambda found, *_: rows.update(found))
    prompts = ["three green squares"] * 8
    files = {label: row_file(RESULTS / "algorithms", "count", label) for label in ("best of 8", "pre-trained", "none")}
    figures.grid(files, "count", prompts, tmp_path / "a.png")
    assert {label: aligned.sum() for label, (_, aligned) in rows.items()} == {"best of 8": 8, "pre-trained": 3}


def test_labels_of_points_do_not_overlap() -> None:
    figure = Figure()
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    points = [(1.0, 1.0, "0.005"), (1.02, 1.01, "0.02"), (1.0, 1.04, "10"), (2.0, 2.0, "0")]
    axes.plot(*zip(*[point[:2] for point in points], strict=True), "o")
    canvas.draw()
    figures.label_points(axes, points, canvas.get_renderer())
    assert [text.get_text() for text in axes.texts] == [text for *_, text in points]
    check_texts(figure)
