"""What KL regularisation does, in online RL and in supervised fine-tuning: ``python -m benchmarks.kl_analysis``.

Trains with several strengths of each kind of regularisation (``kl_analysis.yaml``) and shows reward, alignment and
quality against the KL that was reached. Runs are kept as in :mod:`benchmarks.compare`; ``--report`` makes none. How
tight the bound is that the KL of trajectories gives is measured by :mod:`benchmarks.kl_bound`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.compare import HERE, describe
from benchmarks.compare_figures import save, tidy
from benchmarks.runs import default_processes, read_runs, sweep
from benchmarks.statistics import Interval, interquartile_mean

#: What is shown: the key of a score, and how it is called.
SHOWN = {"reward": "reward trained on", "aligned": "share fully aligned", "quality": "quality", "kl": "KL, nats"}


WRITTEN = {"reward": ".2f", "aligned": ".3f", "quality": ".3f", "kl": ".1f"}


def main() -> None:
    """Runs what is missing, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=Path, default=HERE / "kl_analysis.yaml")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kl_analysis")
    parser.add_argument("--report", action="store_true", help="make no runs: table and figure of those there are")
    parser.add_argument("--processes", type=int, default=default_processes(), help="runs side by side")
    options = parser.parse_args()
    file = options.out / "runs.jsonl"
    if options.report:
        records = read_runs(file)
    else:
        records = sweep(
            descriptions(yaml.safe_load(options.settings.read_text(encoding="utf-8"))), file, options.processes
        )
    if not records:
        raise SystemExit(f"there are no runs in {options.out}: make some, without --report")
    report(records, options.out)


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
                run |= {"label": f"{name}, {value:g}", "family": name, "value": value, "held_out": False}
                found.append(run | {"pictures": settings["pictures"]})
    return found


def report(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """A table of each family, and the figure."""
    families: dict[str, dict[float, dict[str, Interval]]] = {}
    for record in records:
        families.setdefault(record["family"], {}).setdefault(record["value"], {})
    for name, points in families.items():
        for value in points:
            found = [r["scores"]["training"] for r in records if (r["family"], r["value"]) == (name, value)]
            points[value] = {key: interquartile_mean([[scores[key] for scores in found]]) for key in SHOWN}
    table = Table("", "value", *SHOWN.values(), title="Interquartile means, 95 % bootstrap intervals")
    lines = [f"| | value | {' | '.join(SHOWN.values())} |\n", f"|{'---|' * (len(SHOWN) + 2)}\n"]
    for name, points in families.items():
        for value, scores in sorted(points.items()):
            cells = [name, f"{value:g}", *(format(scores[key], WRITTEN[key]) for key in SHOWN)]
            table.add_row(*cells)
            lines.append(f"| {' | '.join(cells)} |\n")
        table.add_section()
    Console(width=150).print(table)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("".join(lines), encoding="utf-8")
    figure(families, folder / "kl_analysis.png")


def figure(families: dict[str, dict[float, dict[str, Interval]]], path: Path) -> None:
    """Reward, alignment and quality against KL: a curve for each family, a point for each strength."""
    drawn = Figure(figsize=(13, 4.6), layout="constrained")
    panels = drawn.subplots(1, 3)
    colours = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axes, key in zip(panels, ("reward", "aligned", "quality"), strict=True):
        for colour, (name, points) in zip(colours, families.items(), strict=False):
            ordered = [points[value] for value in sorted(points)]
            x, y = ([scores[what] for scores in ordered] for what in ("kl", key))
            marker = "s" if name.startswith("SFT") else "o"
            axes.plot([it.value for it in x], [it.value for it in y], "-", color=colour, alpha=0.5, linewidth=1)
            for at, it, value in zip(x, y, sorted(points), strict=True):
                axes.plot(at.value, it.value, marker, color=colour, markersize=6)
                axes.vlines(at.value, it.low, it.high, color=colour, linewidth=1)
                axes.annotate(f"{value:g}", (at.value, it.value), (4, 4), textcoords="offset points", fontsize=7)
            axes.plot([], [], f"{marker}-", color=colour, label=name)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(left=0)
        axes.set_xlabel("KL to pre-trained, nats per picture")
        axes.set_ylabel(SHOWN[key])
        tidy(axes)
    handles, names = panels[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    save(drawn, path)


if __name__ == "__main__":
    main()
