"""The figures of the comparison: what they show is what the runs have."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from benchmarks import algorithms_figures, figures
from benchmarks.algorithms_records import PRETRAINED
from benchmarks.runs import HERE, Record
from benchmarks.training_run import UNTRAINED
from tests.agents.cli.support import check_texts

SETTINGS = yaml.safe_load((HERE / "algorithms.yaml").read_text(encoding="utf-8"))
TASKS = ("one", "two", "three")
SEEDS = 3
BEST = "best of 4"
LABELS = ("DPOK", BEST, "SFT", PRETRAINED)


def make_record(task: str, label: str, seed: int, rng: np.random.Generator) -> Record:
    """Returns a run in which no two scores are the same: 8 rollouts of 10 images, or a fit of 80 images."""
    scores = {name: rng.uniform(0.3, 1) for name in ("aligned", "alignment")}
    run = {"task": task, "label": label, "seed": seed, "algorithm": "dpok", "scores": {"training": scores}, "curve": []}
    if label in (BEST, PRETRAINED):
        run["algorithm"] = UNTRAINED
    else:
        passes = 3 if label == "DPOK" else 1  # through the denoiser, for each step of an image
        curve = [cost(10 * k, 10 * k * passes, 10 * k * (passes - 1) / 2, k) for k in range(8)]
        if label == "SFT":
            curve += [cost(80, 80 + 40 * k, 40 * k, 8 + k) for k in (1, 2)]
        last = curve[-1] if label == "SFT" else cost(80, 240, 80, 8)
        run["curve"] = [point | {"alignment": rng.uniform(0.5, 1)} for point in curve] + [last | scores]
    if label != PRETRAINED:
        scores["kl"] = rng.uniform(1, 100)
    return run


def cost(images: float, forward: float, backward: float, seconds: float) -> dict[str, float]:
    counts = {"num_function_evaluations": forward, "num_gradient_evaluations": backward}
    return {"images": images, "seconds": float(seconds)} | counts


@pytest.fixture
def records() -> list[Record]:
    rng = np.random.default_rng(0)
    return [make_record(*each, rng) for each in itertools.product(TASKS, LABELS, range(SEEDS))]


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function of the module; returns the figure that it has written."""
    saved: list[Figure] = []

    def save(figure: Figure, path: Path, dpi: int) -> None:
        saved.append(figure)
        figures.save(figure, path, dpi)

    monkeypatch.setattr(algorithms_figures, "save", save)

    def call(function: Callable[..., None], *arguments: Any) -> Figure:
        path = tmp_path / "folder" / "figure.png"
        function(*arguments, path)
        assert path.stat().st_size > 10_000
        return saved[-1]

    return call


def scores_of(records: list[Record], task: str, label: str, name: str = "aligned") -> list[float]:
    runs = [record for record in records if (record["task"], record["label"]) == (task, label)]
    return [record["scores"]["training"][name] for record in runs if name in record["scores"]["training"]]


def dots(axes: Any) -> list[list[list[float]]]:
    """Returns the places of the small markers of a panel, a list for each method."""
    return [np.asarray(each.get_offsets()).tolist() for each in axes.collections if len(each.get_offsets()) == SEEDS]


def markers(axes: Any) -> list[Any]:
    """Returns the markers that stand alone: those of means."""
    return [line for line in axes.lines if len(np.atleast_1d(line.get_xdata())) == 1]


def test_every_method_has_a_style_of_its_own() -> None:
    styles = [algorithms_figures.STYLES[label] for label in SETTINGS["methods"]]
    assert len(set(styles)) == len(styles)


def test_gains(records: list[Record], draw: Callable[..., Any]) -> None:
    figure = draw(algorithms_figures.gains, records, TASKS, LABELS)
    assert [axes.get_title() for axes in figure.axes] == list(TASKS)
    order = ["DPOK", "SFT", BEST, PRETRAINED]  # without training last
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == order
    for axes, task in zip(figure.axes, TASKS, strict=True):
        rows = dict(zip(order, axes.get_yticks(), strict=True))
        low, high = axes.get_xlim()
        for label, places, mean in zip(order, dots(axes), markers(axes), strict=True):
            expected = 100 * np.array(scores_of(records, task, label))
            np.testing.assert_allclose(np.array(places)[:, 0], expected)
            np.testing.assert_allclose(mean.get_xdata(), [expected.mean()])
            assert (mean.get_markerfacecolor() == "white") == (label in (BEST, PRETRAINED))
            # All are in the row, and in the panel.
            heights = [*np.array(places)[:, 1], *mean.get_ydata()]
            assert np.abs(np.array(heights) - rows[label]).max() < 0.5
            assert low < expected.min()
            assert expected.max() < high
        dotted = [line.get_xdata() for line in axes.lines if line.get_linestyle() == ":"]
        assert dotted == [[pytest.approx(100 * np.mean(scores_of(records, task, PRETRAINED)))] * 2]
        intervals = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1.6]
        assert len(intervals) == len(order)
        (border,) = (line for line in axes.lines if list(line.get_xdata()) == [0, 1])
        assert rows["SFT"] + 0.5 < border.get_ydata()[0] < rows[BEST] - 0.5
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "pre-trained, mean"
    check_texts(figure)


def test_a_method_without_runs_on_a_task_has_an_empty_row(records: list[Record], draw: Callable[..., Any]) -> None:
    some = [record for record in records if (record["label"], record["task"]) != ("DPOK", "two")]
    figure = draw(algorithms_figures.gains, some, TASKS, LABELS)
    assert [len(dots(axes)) for axes in figure.axes] == [4, 3, 4]


def test_costs(records: list[Record], draw: Callable[..., Any]) -> None:
    figure = draw(algorithms_figures.costs, records, TASKS[:2], ["DPOK", "SFT"])
    assert len(figure.axes) == 2 * 4
    names = ["images drawn", "denoiser passes, thousands", "seconds of one core", "final evaluation"]
    assert [axes.get_xlabel() for axes in figure.axes] == 2 * names
    # A run of DPOK is shown until its last rollout: 70 images, 210 forward and 70 backward passes, which are as much as
    # 140. A fit is shown to its end.
    ends = {"DPOK": (70, 0.35, 7), "SFT": (80, 0.32, 10)}
    for place, axes in enumerate(figure.axes[:3]):
        for label, line in zip(ends, axes.lines, strict=False):
            assert line.get_color() == algorithms_figures.STYLES[label].colour
            assert line.get_xdata()[-1] == pytest.approx(ends[label][place])
    for row, task in enumerate(TASKS[:2]):
        final = figure.axes[4 * row + 3]
        assert figure.axes[4 * row].get_title(loc="left") == task
        for label, places, mean in zip(ends, dots(final), markers(final), strict=True):
            expected = scores_of(records, task, label, "alignment")
            np.testing.assert_allclose(np.array(places)[:, 1], expected)
            np.testing.assert_allclose(mean.get_ydata(), [np.mean(expected)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DPOK", "SFT", PRETRAINED]
    check_texts(figure)


def test_curves_are_means_over_seeds(records: list[Record], draw: Callable[..., Any]) -> None:
    figure = draw(algorithms_figures.costs, records, ["one"], ["DPOK"])
    runs = [record for record in records if (record["task"], record["label"]) == ("one", "DPOK")]
    first = [run["curve"][0]["alignment"] for run in runs]
    line = figure.axes[0].lines[0]
    assert line.get_ydata()[0] == pytest.approx(np.mean(first))
    assert not np.isnan(figure.axes[0].collections[0].get_paths()[0].vertices).any()  # the band


def test_the_curves_of_all_methods(records: list[Record], draw: Callable[..., Any]) -> None:
    figure = draw(algorithms_figures.curves, records, TASKS, [["DPOK", "absent"], ["SFT"]])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "", "two", "", "three", ""]
    ends = {"DPOK": 0.35, "SFT": 0.32}  # thousands of passes, see above
    for axes, label in zip(figure.axes, 3 * ["DPOK", "SFT"], strict=True):
        (line,) = (line for line in axes.lines if line.get_linestyle() != ":")
        assert line.get_color() == algorithms_figures.STYLES[label].colour
        assert line.get_xdata()[-1] == pytest.approx(ends[label])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DPOK", "SFT", PRETRAINED]
    check_texts(figure)


def test_frontier(records: list[Record], draw: Callable[..., Any]) -> None:
    trained = ["DPOK", "SFT"]
    figure = draw(algorithms_figures.frontier, records, TASKS, trained)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == list(TASKS)
    for axes, task in zip(panels, TASKS, strict=True):
        assert axes.get_xscale() == "symlog"
        assert axes.get_xlabel() in ("", "KL to the pre-trained model, nats per image")
        for label, places, mean in zip(trained, dots(axes), markers(axes), strict=True):
            expected = scores_of(records, task, label, "kl"), 100 * np.array(scores_of(records, task, label))
            np.testing.assert_allclose(np.transpose(places), expected)
            np.testing.assert_allclose([*mean.get_xdata(), *mean.get_ydata()], np.mean(expected, axis=1))
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == trained
    check_texts(figure)


def test_a_panel_without_any_kl_is_empty(records: list[Record], draw: Callable[..., Any]) -> None:
    for record in records:
        if record["task"] == "one":
            record["scores"]["training"].pop("kl", None)
    figure = draw(algorithms_figures.frontier, records, TASKS, ["DPOK", "SFT"])
    assert [len(dots(axes)) for axes in figure.axes[:3]] == [0, 2, 2]
