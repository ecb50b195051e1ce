"""The effect of KL regularisation in online RL and in supervised fine-tuning: ``python -m benchmarks.kl_analysis``.

It trains with several strengths of each kind of regularisation (``kl_analysis.yaml``), and shows reward, alignment and
quality against the KL that was reached. The runs are kept, see :mod:`benchmarks.runs`; ``--report`` makes
none. :mod:`benchmarks.kl_bound` measures the KL of the finished images, of which the KL shown here is a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.figures import LEVEL, grid, label_points, save, scale_kl, tidy
from benchmarks.markdown import markdown
from benchmarks.runs import HERE, Description, Record, row_file, sweep_and_report, sweep_options
from benchmarks.statistics import Interval, difference_of_means, mean
from benchmarks.training_run import UNTRAINED, prompts_of_row


class Score(NamedTuple):
    """A column of the tables.

    Attributes:
        prompts: "training" or "held_out".
        name: its name among the scores of a run.
        format: of the number, as in an f-string.
    """

    prompts: str
    name: str
    format: str


#: The columns, by heading.
SHOWN = {
    "reward trained on": Score("training", "reward", ".2f"),
    "share fully aligned": Score("training", "aligned", ".3f"),
    "quality": Score("training", "quality", ".3f"),
    "unseen: aligned": Score("held_out", "aligned", ".3f"),
    "unseen: quality": Score("held_out", "quality", ".3f"),
    "diversity": Score("training", "diversity", ".3f"),
    "KL, nats": Score("training", "kl", ".1f"),
    "late drift": Score("training", "late_drift", ".3f"),
}

#: The panels of a figure.
PANELS = ("reward trained on", "share fully aligned", "quality")

_TEXT = (
    "Interquartile means (of up to three runs the mean); of several runs with 95 % bootstrap intervals, little more "
    "than the range of so few.\n\n{}\n### Differences\n\n{}"
)

#: The family and the value of the pre-trained model.
_PRE_TRAINED = ("best of n, drawn", 1)

#: The family whose runs are shown along training.
_ALONG_TRAINING = "DPOK, KL in the loss"

#: The numbers of the runs with the same settings, by heading: one for each seed.
Scores = dict[str, list[float]]

#: The scores of each family, by the value of its setting.
Families = dict[str, dict[float, Scores]]


def main() -> None:
    """Makes the runs that are missing, and reports."""
    options = sweep_options(__doc__, HERE / "kl_analysis.yaml").parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    folder = options.out or HERE / "results" / "kl_analysis"
    write_report = partial(report, settings=settings, folder=folder)
    sweep_and_report(descriptions(settings), folder / "runs.jsonl", options, write_report)


def descriptions(settings: dict[str, Any]) -> list[Description]:
    """Returns the descriptions of the runs of ``kl_analysis.yaml``, those of the first seed first."""
    runs = []
    for seed in range(settings["seeds"]):
        for name, family in settings["families"].items():
            ((argument, values),) = family["values"].items()
            method = settings["methods"][family["method"]]
            for value in values:
                run = settings["common"] | {"task": settings["task"], "label": _label(name, value), "seed": seed}
                run |= {"algorithm": method["algorithm"], "family": name, "value": value}
                changes = family.get("fixed", {}) | {argument: value}
                if method["algorithm"] == UNTRAINED:
                    runs.append(run | {"settings": {}, "draw": changes})
                else:
                    runs.append(run | {"settings": settings["settings"] | method["settings"] | changes})
    return runs


def report(records: Sequence[Record], settings: dict[str, Any], folder: Path) -> None:
    """Writes and prints a table of the families and one of the claims; draws the figure and some of the images.

    Args:
        records: of the runs.
        settings: as in ``kl_analysis.yaml``.
        folder: for the files; it has the rows of images.
    """
    families = collect(records)
    rows, differences = make_rows(families), make_differences(families, settings["claims"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(make_text(rows, differences), encoding="utf-8")
    console = Console(width=180)
    for title, lines, headings in (("Means", rows, ("runs", *SHOWN)), ("Differences", differences, tuple(SHOWN))):
        table = Table("", *headings, title=title)
        for label, cells in lines.items():
            table.add_row(label, *cells)
        console.print(table)
    level = families.get(_PRE_TRAINED[0], {}).get(_PRE_TRAINED[1])
    for name, shown in settings["figures"].items():
        chosen = {family: families[family] for family in shown["families"] if family in families}
        arguments = {family: next(iter(settings["families"][family]["values"])) for family in chosen}
        figure(chosen, arguments, level, shown["question"], folder / f"{name}.png")
    training_figure(records, folder / "training.png")
    files = {label: row_file(folder, settings["task"], label) for label in settings["shown"]}
    grid(files, settings["task"], prompts_of_row(records[0]), folder / "grid.png")


def collect(records: Sequence[Record]) -> Families:
    """Collects the scores of runs by family and value."""
    families: Families = {}
    for record in records:
        scores = families.setdefault(record["family"], {}).setdefault(record["value"], {})
        for heading, score in SHOWN.items():
            scores.setdefault(heading, []).append(record["scores"][score.prompts][score.name])
    return families


def make_rows(families: Families) -> dict[str, list[str]]:
    """Returns the cells of each value of each family: the number of runs, and the means."""
    rows = {}
    for label, scores in _by_label(families).items():
        means = [mean(scores[heading]) for heading in SHOWN]
        n_runs = len(scores["KL, nats"])
        rows[label] = [str(n_runs), *_format(means)]
    return rows


def make_differences(families: Families, claims: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Returns the cells of each claim whose runs are there: the scores of its first label minus those of its second."""
    by_label = _by_label(families)
    rows = {}
    for one, other in claims:
        if one in by_label and other in by_label:
            ours, theirs = by_label[one], by_label[other]
            differences = [difference_of_means(ours[heading], theirs[heading]) for heading in SHOWN]
            rows[f"{one} - {other}"] = _format(differences, "+")
    return rows


def make_text(rows: dict[str, list[str]], differences: dict[str, list[str]]) -> str:
    """Returns the tables in Markdown."""
    return _TEXT.format(markdown(rows, ("runs", *SHOWN)), markdown(differences, SHOWN))


def _format(intervals: Sequence[Interval], sign: str = "") -> list[str]:
    """Returns one cell for each column of the tables."""
    columns = zip(intervals, SHOWN.values(), strict=True)
    return [f"{interval:{sign}{score.format}}" for interval, score in columns]


def _by_label(families: Families) -> dict[str, Scores]:
    by_label = {}
    for name, by_value in families.items():
        for value, scores in by_value.items():
            by_label[_label(name, value)] = scores
    return by_label


def _label(family: str, value: float) -> str:
    return f"{family}, {value:g}"


def figure(families: Families, arguments: dict[str, str], level: Scores | None, question: str, path: Path) -> None:
    """Draws reward, alignment and quality against the KL: a curve for each family, a point for each value.

    Args:
        families: the scores.
        arguments: the setting that has the values, by family.
        level: the scores of the pre-trained model; None if it has no run.
        question: what the figure answers, its title.
        path: file to write.
    """
    drawing = Figure(figsize=(3.6 * len(PANELS), 4.6), layout="constrained")
    panels = drawing.subplots(1, len(PANELS))
    colours = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    points: dict[Axes, list[tuple[float, float, str]]] = {}
    for axes, heading in zip(panels, PANELS, strict=True):
        points[axes] = []
        for colour, (name, by_value) in zip(colours, families.items(), strict=False):
            marker = "s" if name.startswith("SFT") else "o"
            points[axes] += _family_curve(axes, by_value, heading, marker, colour)
            axes.plot([], [], f"{marker}-", color=colour, label=f"{name}: {arguments[name]}")  # for the legend
        if level is not None:
            axes.axhline(mean(level[heading]).value, label="pre-trained, KL 0", **LEVEL)
        scale_kl(axes, 1)
        axes.margins(y=0.12)  # room for the labels
        axes.set_title(heading, fontsize=10)
        tidy(axes)
    drawing.suptitle(question, fontsize=11)
    handles, names = panels[0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()  # the layout, on which the places of the labels depend
    for axes, of_panel in points.items():
        label_points(axes, of_panel, canvas.get_renderer())
    save(drawing, path)


def training_figure(records: Sequence[Record], path: Path) -> None:
    """Draws the reward and the KL of DPOK's runs with different coefficients along training.

    Args:
        records: of the runs.
        path: file to write.
    """
    drawing = Figure(figsize=(8.8, 3.7), layout="constrained")
    panels = drawing.subplots(1, 2)
    runs = [record for record in records if record["family"] == _ALONG_TRAINING and record["value"] > 0]
    runs.sort(key=lambda record: record["value"])
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, max(len(runs), 1)))
    for colour, record in zip(colours, runs, strict=False):
        for axes, name in zip(panels, ("reward", "kl"), strict=True):
            # The last point is the final evaluation, of other images.
            points = np.array([(point["images"], point[name]) for point in record["curve"][:-1] if name in point])
            if name == "kl":  # that of the pre-trained model
                points = np.concatenate([[(0, 0)], points])
            axes.plot(*points.T, color=colour, label=f"kl_coef = {record['value']:g}")
    for axes, heading in zip(panels, ("reward of the images drawn", "KL to pre-trained, nats per image"), strict=True):
        axes.set(xlabel="images drawn", ylabel=heading, xlim=(0, None))
        tidy(axes)
    panels[1].set_ylim(bottom=0)
    panels[1].legend(frameon=False, fontsize=8)
    drawing.suptitle("How far does DPOK go from the pre-trained model, for each price of the KL?", fontsize=11)
    save(drawing, path)


def _family_curve(
    axes: Axes, by_value: dict[float, Scores], heading: str, marker: str, colour: Any
) -> list[tuple[float, float, str]]:
    """Draws the means of a family, each with its interval; returns the points, and the value of the setting of each."""
    values = sorted(by_value)
    kl = [mean(by_value[value]["KL, nats"]) for value in values]
    means = [mean(by_value[value][heading]) for value in values]
    points = [(x.value, y.value, f"{value:g}") for value, x, y in zip(values, kl, means, strict=True)]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "-", color=colour, alpha=0.5, linewidth=1)
    for (x, y, _), interval in zip(points, means, strict=True):
        axes.plot(x, y, marker, color=colour, markersize=6)
        axes.vlines(x, interval.low, interval.high, color=colour, linewidth=1)
    return points


if __name__ == "__main__":
    main()
