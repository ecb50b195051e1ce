"""The work that ``dpok train`` needs to reach its goal: ``python -m benchmarks.less_work``.

The default run is made again with one setting changed, for each line of ``less_work.yaml``. For each it prints the
images and the seconds of one core until the latest images of the training are good enough, and the scores in the end.
The runs are kept, see :mod:`benchmarks.runs`; ``--report`` makes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.markdown import markdown
from benchmarks.runs import HERE, Description, Record, sweep_and_report, sweep_options
from benchmarks.statistics import mean

COLUMNS = (
    "images until the target",
    "seconds, of the first line's",
    "in the end: aligned, %",
    "quality",
    "KL, nats",
    "seconds of the whole run",
)


def main() -> None:
    """Makes the runs that are missing, and reports."""
    options = sweep_options(__doc__, HERE / "less_work.yaml").parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    folder = options.out or HERE / "results" / "less_work"
    write = partial(report, settings=settings, folder=folder)
    sweep_and_report(list(descriptions(settings)), folder / "runs.jsonl", options, write, images=False)


def descriptions(settings: dict[str, Any]) -> Iterator[Description]:
    """Yields the descriptions of the runs of ``less_work.yaml``, those of the first seed first."""
    for seed in range(settings["seeds"]):
        for label, change in settings["changes"].items():
            of_run = {name: value for name, value in change.items() if name in settings["common"]}
            of_algorithm = {name: value for name, value in change.items() if name not in of_run}
            run = {"task": "less work", "label": label, "seed": seed} | of_run
            yield settings["common"] | run | {"settings": settings["settings"] | of_algorithm}


def cost_of_target(record: Record, target: float, window: int) -> tuple[int, float] | None:
    """Returns the images and the seconds until the latest images are good enough; None if they never are.

    Args:
        record: of a run. A point of its curve has the mean of the images since the point before.
        target: share that is fully aligned.
        window: number of latest images that are looked at.
    """
    per_iteration = record["settings"]["images_per_iteration"]
    n_points = max(1, window // per_iteration)
    points = record["curve"][:-1]  # the last one is the evaluation
    for last in range(n_points, len(points) + 1):
        latest = points[last - n_points : last]
        if sum(point["aligned"] for point in latest) / n_points >= target:
            # A point has the cost before its own images, which are the last ones of the window.
            return latest[-1]["images"] + per_iteration, latest[-1]["seconds"]
    return None


def report(records: Sequence[Record], settings: dict[str, Any], folder: Path) -> None:
    """Writes and prints the table.

    Args:
        records: of the runs.
        settings: those of ``less_work.yaml``.
        folder: for the table.
    """
    cells, before = {}, 0.0
    for label in settings["changes"]:
        of_label = [record for record in records if record["label"] == label]
        if not of_label:
            continue
        costs = [cost_of_target(record, settings["target"], settings["window"]) for record in of_label]
        reached = [cost for cost in costs if cost is not None]
        row = ["not reached", ""]
        if reached:
            images, seconds = (mean([cost[k] for cost in reached]) for k in (0, 1))
            before = before or seconds.value
            some = f" ({len(reached)} of {len(costs)} runs)" * (len(reached) < len(costs))
            row = [f"{images:.0f}{some}", f"{seconds.value / before:.2f}"]
        for name, scale, form in (("aligned", 100, ".0f"), ("quality", 1, ".3f"), ("kl", 1, ".1f")):
            row.append(format(mean([scale * record["scores"]["training"][name] for record in of_label]), form))
        cells[label] = [*row, format(mean([record["seconds"] for record in of_label]), ".0f")]
    table = Table("", *COLUMNS, title=f"{settings['target']:.0%} fully aligned")
    for label, row in cells.items():
        table.add_row(label, *row)
    Console(width=180).print(table)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(cells, COLUMNS), encoding="utf-8")


if __name__ == "__main__":
    main()
