"""What KL regularisation does, in online RL and in supervised fine-tuning: ``python -m benchmarks.kl_analysis``.

Trains with several strengths of each kind of regularisation (``kl_analysis.yaml``) and shows reward, alignment and
quality against the KL that was reached. Runs are kept as in :mod:`benchmarks.compare`; ``--report`` makes none. How
tight the bound is that the KL of trajectories gives is measured by :mod:`benchmarks.kl_bound`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.compare import HERE, describe, markdown
from benchmarks.compare_figures import grid, save, tidy
from benchmarks.runs import sweep_and_report, sweep_options
from benchmarks.statistics import Interval, improvement, interquartile_mean

#: What is shown: its name, where it is among the scores, and its format.
SHOWN = {
    "reward trained on": ("training", "reward", ".2f"),
    "share fully aligned": ("training", "aligned", ".3f"),
    "quality": ("training", "quality", ".3f"),
    "unseen: aligned": ("held_out", "aligned", ".3f"),
    "unseen: quality": ("held_out", "quality", ".3f"),
    "diversity": ("training", "diversity", ".3f"),
    "KL, nats": ("training", "kl", ".1f"),
}

#: The panels of the figure.
PANELS = ("reward trained on", "share fully aligned", "quality", "unseen: quality")

#: Of a family, by value: the runs' scores by name.
Families = dict[str, dict[float, dict[str, list[float]]]]


def main() -> None:
    """Runs what is missing, and reports."""
    options = sweep_options(__doc__, HERE / "kl_analysis.yaml").parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    folder = options.out or HERE / "results" / "kl_analysis"
    reported = partial(report, settings=settings, folder=folder)
    sweep_and_report(descriptions(settings), folder / "runs.jsonl", options, reported)


def descriptions(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of ``kl_analysis.yaml``, those of the first seed first."""
    shared = yaml.safe_load((HERE / "compare.yaml").read_text(encoding="utf-8"))
    found = []
    for seed in range(settings["seeds"]):
        for name, family in settings["families"].items():
            ((argument, values),) = family["values"].items()
            for value in values:
                changes = family.get("fixed", {}) | {argument: value}
                run = describe(shared, settings["task"], family["label"], seed, changes)
                run["pictures"] = family.get("pictures", run["pictures"])
                found.append(run | {"label": _label(name, value), "family": name, "value": value})
    return found


def report(records: Sequence[dict[str, Any]], settings: dict[str, Any], folder: Path) -> None:
    """A table of each family, one of the claims, the figure, and some of the pictures.

    Args:
        records: of the runs.
        settings: as in ``kl_analysis.yaml``.
        folder: for the files; with the runs' pictures in ``pictures``.
    """
    families: Families = {}
    for record in records:
        scores = families.setdefault(record["family"], {}).setdefault(record["value"], {})
        for name, (prompts, score, _) in SHOWN.items():
            scores.setdefault(name, []).append(record["scores"][prompts][score])
    by_label = {_label(name, value): scores for name, points in families.items() for value, scores in points.items()}
    rows = {}
    for label, scores in by_label.items():
        n_runs = len(next(iter(scores.values())))
        rows[label] = [str(n_runs), *(format(interquartile_mean([scores[name]]), SHOWN[name][2]) for name in SHOWN)]
    differences = {}
    for one, other in settings["claims"]:
        if one in by_label and other in by_label:
            both = ((by_label[one][name], by_label[other][name]) for name in SHOWN)
            found = [improvement([ours], [theirs]) for ours, theirs in both]
            written = [written for _, _, written in SHOWN.values()]
            differences[f"{one} - {other}"] = [f"{it:+{how}}" for it, how in zip(found, written, strict=True)]
    text = (
        "Interquartile means (of up to three runs the mean); of several runs with 95 % bootstrap intervals, little "
        "more than the range of so few.\n\n{}\n### Differences\n\n{}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(
        text.format(markdown(rows, ("runs", *SHOWN)), markdown(differences, SHOWN)), encoding="utf-8"
    )
    console = Console(width=180)
    for title, lines, columns in (("Means", rows, ("runs", *SHOWN)), ("Differences", differences, tuple(SHOWN))):
        table = Table("", *columns, title=title)
        for label, cells in lines.items():
            table.add_row(label, *cells)
        console.print(table)
    figure(families, folder / "kl_analysis.png")
    grid(folder / "pictures", settings["task"], settings["shown"], folder / "grid.png")


def figure(families: Families, path: Path) -> None:
    """Reward, alignment and quality against KL: a curve for each family, a point for each strength."""
    drawn = Figure(figsize=(4.4 * len(PANELS), 5.2), layout="constrained")
    panels = drawn.subplots(1, len(PANELS))
    colours = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axes, shown in zip(panels, PANELS, strict=True):
        for colour, (name, points) in zip(colours, families.items(), strict=False):
            values = sorted(points)
            x, y = ([interquartile_mean([points[value][what]]) for value in values] for what in ("KL, nats", shown))
            marker = "s" if name.startswith("SFT") else "o"
            axes.plot([it.value for it in x], [it.value for it in y], "-", color=colour, alpha=0.5, linewidth=1)
            for at, it, value in zip(x, y, values, strict=True):
                _point(axes, at, it, f"{value:g}", marker, colour)
            axes.plot([], [], f"{marker}-", color=colour, label=name)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(left=0)
        axes.set_xlabel("KL to pre-trained, nats per picture")
        axes.set_ylabel(shown)
        tidy(axes)
    handles, names = panels[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    save(drawn, path)


def _point(axes: Any, x: Interval, y: Interval, text: str, marker: str, colour: Any) -> None:
    axes.plot(x.value, y.value, marker, color=colour, markersize=6)
    axes.vlines(x.value, y.low, y.high, color=colour, linewidth=1)
    axes.annotate(text, (x.value, y.value), (4, 4), textcoords="offset points", fontsize=7)


def _label(family: str, value: float) -> str:
    return f"{family}, {value:g}"


if __name__ == "__main__":
    main()
