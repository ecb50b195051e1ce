"""Algorithms side by side: ``python -m benchmarks.compare`` (hours), with ``--quick`` a quarter of an hour.

It runs every algorithm of ``compare.yaml`` on every task in it, over several seeds. Each run is one line of
``runs.jsonl``, and an interrupted sweep continues where it stopped. Every call makes tables and figures again from
these lines; ``--report`` makes no runs. ``--tune`` makes the runs by which the settings were chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import compare_figures, figures
from benchmarks.compare_tables import COLUMNS, list_labels, list_tasks, make_rows, make_text, rank
from benchmarks.runs import HERE, Description, Record, sweep_and_report, sweep_options
from benchmarks.training_run import REJECTION, prompts_of_row


def main() -> None:
    """Makes the runs that are missing, and reports."""
    parser = sweep_options(__doc__, HERE / "compare.yaml")
    parser.add_argument("--quick", action="store_true", help="few algorithms, one task, three seeds, fewer images")
    parser.add_argument("--tune", action="store_true", help="make the runs of the tuning instead, and rank them")
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    folder = options.out or HERE / "results" / "compare"
    if options.quick and not options.out:
        folder = Path("runs/compare-quick")
    if options.tune:
        print_ranking = partial(rank, shared=settings["settings"])
        sweep_and_report(list(trials(settings)), folder / "tuning.jsonl", options, print_ranking, images=False)
    else:
        write_report = partial(report, order=list(settings["algorithms"]), folder=folder)
        sweep_and_report(list(descriptions(settings, options.quick)), folder / "runs.jsonl", options, write_report)


def descriptions(settings: dict[str, Any], quick: bool = False) -> Iterator[Description]:
    """Yields the descriptions of the runs, those of the first seed first.

    Args:
        settings: as in ``compare.yaml``.
        quick: True for the fewer and shorter runs.
    """
    differences = settings["quick"] if quick else {}
    tasks = differences.get("tasks", settings["tasks"])
    for seed in range(differences.get("seeds", settings["seeds"])):
        for task in tasks:
            for label in differences.get("algorithms", settings["algorithms"]):
                tuned = tasks[task].get("tuned", {}).get(label)
                run = describe(settings | {"tasks": tasks}, task, label, seed, tuned)
                yield run | {"eval_images": differences.get("eval_images", run["eval_images"])}


def describe(
    settings: dict[str, Any],
    task: str,
    label: str,
    seed: int,
    changes: dict[str, Any] | None = None,
    tuned: bool = True,
) -> Description:
    """Returns the description of one run.

    Args:
        settings: as in ``compare.yaml``.
        task: a name of its tasks.
        label: a name of its algorithms.
        seed: of the run.
        changes: to the settings of the algorithm.
        tuned: True to begin with the settings that the tuning chose, False with those that it began with.
    """
    algorithm = settings["algorithms"][label]
    of_task = {name: value for name, value in settings["tasks"][task].items() if name != "tuned"}
    chosen = algorithm.get("tuned", {}) if tuned else {}
    own = algorithm["settings"] | chosen | of_task.pop("settings", {}).get(label, {}) | (changes or {})
    if algorithm["algorithm"] != REJECTION:
        own = settings["settings"] | own
    run = {"label": label, "task": task, "algorithm": algorithm["algorithm"], "seed": seed, "settings": own}
    return settings["common"] | of_task | run


def trials(settings: dict[str, Any]) -> Iterator[Description]:
    """Yields the descriptions of the runs of the tuning; ``settings`` as in ``compare.yaml``."""
    of_tuning = {"eval_images": settings["tuning"]["eval_images"], "held_out": False}
    for each in settings["tuning"]["rounds"]:
        for label, grid in each["grids"].items():
            for change in grid:
                yield describe(settings, each["task"], label, each["seed"], change, each["tuned"]) | of_tuning


def report(records: Sequence[Record], order: Sequence[str], folder: Path) -> None:
    """Writes table and figures into a folder, and prints the table.

    Args:
        records: of the runs.
        order: the labels of the algorithms, in the order of the table.
        folder: for the files; it has the rows of images.
    """
    records = sorted(records, key=lambda record: order.index(record["label"]))
    tasks, labels = list_tasks(records), list_labels(records)
    rows = make_rows(records)
    console = Console(width=220)
    for task, by_label in rows.items():
        table = Table("", *COLUMNS, title=task)
        for label, cells in by_label.items():
            table.add_row(label, *cells)
        console.print(table)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(make_text(records, rows), encoding="utf-8")
    compare_figures.curves(records, tasks, folder / "curves.png")
    compare_figures.curves(records, tasks, folder / "costs.png", compare_figures.BY_COST)
    compare_figures.frontier(records, tasks, folder / "frontier.png")
    for task in tasks:
        record = next(record for record in records if record["task"] == task)
        figures.grid(folder, task, labels, prompts_of_row(record), folder / f"grid-{task}.png")
    console.print(f"table and figures: {folder}")


if __name__ == "__main__":
    main()
