"""Algorithms side by side: ``python -m benchmarks.compare`` (hours), with ``--quick`` a quarter of one.

Every algorithm of ``compare.yaml`` on every task of it, over several seeds. Each run is one line of ``runs.jsonl``; an
interrupted sweep goes on where it stopped. Table and figures are made again from these lines whenever this is called,
with ``--report`` without any run. ``--tune`` makes the runs that settings can be chosen by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import compare_figures
from benchmarks.runs import sweep_and_report, sweep_options
from benchmarks.statistics import Interval, improvement, interquartile_mean, probability_of_improvement

HERE = Path(__file__).parent
#: The pair of the paper's comparison.
OURS, THEIRS = "DPOK", "SFT"

#: Columns of the tables: heading, what it is of a run, its factor, its format, and whether with its interval.
COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], float | None], float, str, bool]] = {
    "aligned, %": (lambda run: run["scores"]["training"]["aligned"], 100, ".1f", True),
    "quality": (lambda run: run["scores"]["training"]["quality"], 1, ".3f", True),
    "reward": (lambda run: run["scores"]["training"]["reward"], 1, ".2f", True),
    "unseen: aligned, %": (lambda run: run["scores"]["held_out"]["aligned"], 100, ".1f", True),
    "unseen: quality": (lambda run: run["scores"]["held_out"]["quality"], 1, ".3f", True),
    "KL, nats": (lambda run: run["scores"]["training"]["kl"], 1, ".1f", True),
    "of it in one step, %": (lambda run: largest_share(run["scores"]["training"]["step_kl"]), 100, ".0f", False),
    "diversity": (lambda run: run["scores"]["training"].get("diversity"), 1, ".3f", True),
    "calls to train": (lambda run: run["network_calls"], 1, ".0f", False),
    "calls to draw": (lambda run: run["network_calls_to_draw"], 1, ".0f", False),
    "seconds": (lambda run: run["seconds"], 1, ".0f", False),
}

#: What is not comparable between tasks: the learned reward has a zero of its own for each prompt.
_WITHIN_TASKS = ("reward",)

_EXPLANATION = """\
Interquartile means over {seeds} seeds (of three runs the mean, of four that of the middle two, of five that of the
middle three), with 95 % bootstrap intervals, probably too narrow with so few runs; for all tasks, means over tasks. KL:
of the trajectories, in nats per picture; of the best of n, the bound log n - (n - 1) / n. Calls: passes of the denoiser
over one picture, without backward passes; those to train are of a whole run, those to draw of a delivered picture.
Seconds: of one core.
"""


def main() -> None:
    """Runs what is missing, and reports."""
    parser = sweep_options(__doc__, HERE / "compare.yaml")
    parser.add_argument("--quick", action="store_true", help="few algorithms, one task, three seeds, fewer pictures")
    parser.add_argument("--tune", action="store_true", help="make the runs of the tuning instead, and rank them")
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    folder = options.out or (Path("runs/compare-quick") if options.quick else HERE / "results" / "compare")
    if options.tune:
        ranked = partial(rank, shared=settings["settings"])
        sweep_and_report(list(trials(settings)), folder / "tuning.jsonl", options, ranked, pictures=False)
    else:
        reported = partial(report, order=list(settings["algorithms"]), folder=folder)
        sweep_and_report(list(descriptions(settings, options.quick)), folder / "runs.jsonl", options, reported)


def descriptions(settings: dict[str, Any], quick: bool = False) -> Iterator[dict[str, Any]]:
    """The runs, those of the first seed first.

    Args:
        settings: as in ``compare.yaml``.
        quick: the fewer and shorter ones.
    """
    differences = settings["quick"] if quick else {}
    tasks = differences.get("tasks", settings["tasks"])
    for seed in range(differences.get("seeds", settings["seeds"])):
        for task in tasks:
            for label in differences.get("algorithms", settings["algorithms"]):
                tuned = tasks[task].get("tuned", {}).get(label)
                run = describe(settings | {"tasks": tasks}, task, label, seed, tuned)
                yield run | {"eval_pictures": differences.get("eval_pictures", run["eval_pictures"])}


def describe(
    settings: dict[str, Any],
    task: str,
    label: str,
    seed: int,
    changes: dict[str, Any] | None = None,
    tuned: bool = True,
) -> dict[str, Any]:
    """One run; ``changes`` are to the algorithm's settings, those that the tuning chose or those that it began with."""
    entry = settings["algorithms"][label]
    task_settings = {name: value for name, value in settings["tasks"][task].items() if name != "tuned"}
    chosen = entry.get("tuned", {}) if tuned else {}
    own = entry["settings"] | chosen | task_settings.pop("settings", {}).get(label, {}) | (changes or {})
    if entry["algorithm"] != "rejection":
        own = settings["settings"] | own
    run = {"label": label, "task": task, "algorithm": entry["algorithm"], "seed": seed, "settings": own}
    return settings["common"] | task_settings | run


def trials(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The runs of the tuning."""
    changes = {"eval_pictures": settings["tuning"]["eval_pictures"], "held_out": False}
    for each in settings["tuning"]["rounds"]:
        for label, grid in each["grids"].items():
            for change in grid:
                yield describe(settings, each["task"], label, each["seed"], change, each["tuned"]) | changes


def rank(records: Sequence[dict[str, Any]], shared: dict[str, Any]) -> None:
    """Prints what was tried in the tuning, each algorithm's settings from the best to the worst, means over seeds.

    Args:
        records: of the runs.
        shared: settings that need not be told.
    """
    shown = {"reward": ".3f", "aligned": ".3f", "quality": ".3f", "kl": ".1f"}
    tried: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        own = ", ".join(f"{name} {value}" for name, value in record["settings"].items() if shared.get(name) != value)
        runs = tried.setdefault((record["task"], record["label"]), {})
        runs.setdefault(own, []).append(record["scores"]["training"])
    table = Table("task", "", "settings", *shown, "runs", title="Tuning, by the reward")
    for (task, label), by_settings in tried.items():
        means = {own: {name: fmean(run[name] for run in runs) for name in shown} for own, runs in by_settings.items()}
        for own in sorted(means, key=lambda own: -means[own]["reward"]):
            cells = (format(means[own][name], written) for name, written in shown.items())
            table.add_row(task, label, own, *cells, str(len(by_settings[own])))
        table.add_section()
    Console(width=180).print(table)


def report(records: Sequence[dict[str, Any]], order: Sequence[str], folder: Path) -> None:
    """Table and figures of runs, into a folder and onto the screen; algorithms in this order."""
    records = sorted(records, key=lambda record: order.index(record["label"]))
    tasks = list(dict.fromkeys(record["task"] for record in sorted(records, key=lambda record: record["seed"])))
    labels = list(dict.fromkeys(record["label"] for record in records))
    counts = Counter((record["label"], record["task"]) for record in records).values()
    text = _EXPLANATION.format(seeds=" to ".join(map(str, sorted({min(counts), max(counts)}))))
    console = Console(width=220)
    for task in (*tasks, "all tasks") if len(tasks) > 1 else tasks:
        among = tasks if task == "all tasks" else [task]
        rows = {label: row for label in labels if (row := _row(records, label, among))}
        text += f"\n### {task}\n\n" + markdown(rows, COLUMNS)
        table = Table("", *COLUMNS, title=task)
        for label, cells in rows.items():
            table.add_row(label, *cells)
        console.print(table)
    text += f"\n### {OURS} over {THEIRS}\n\n" + _differences(records, tasks)
    text += "\n### How likely a run of the row is better aligned than one of the column\n\n"
    text += _improvements(records, labels, tasks)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text, encoding="utf-8")
    compare_figures.curves(records, tasks, folder / "curves.png")
    compare_figures.frontier(records, tasks, folder / "frontier.png")
    for task in tasks:
        compare_figures.grid(folder / "pictures", task, labels, folder / f"grid-{task}.png")
    console.print(f"table and figures: {folder}")


def largest_share(parts: Sequence[float]) -> float | None:
    """Of the sum, that of the largest; None if there is nothing."""
    return max(parts) / sum(parts) if sum(parts) > 0 else None


def numbers(records: Sequence[dict[str, Any]], label: str, task: str, column: str) -> list[float]:
    """What the runs of an algorithm on a task have in a column; those that have nothing left out."""
    value = COLUMNS[column][0]
    runs = [record for record in records if (record["label"], record["task"]) == (label, task)]
    return [float(found) for run in runs if (found := value(run)) is not None]


def _row(records: Sequence[dict[str, Any]], label: str, tasks: Sequence[str]) -> list[str]:
    """The cells of an algorithm; empty if it has no runs on one of the tasks."""
    if not all(numbers(records, label, task, "aligned, %") for task in tasks):
        return []
    cells = []
    for column, (_, scale, written, with_interval) in COLUMNS.items():
        by_task = [numbers(records, label, task, column) for task in tasks]
        if not all(by_task) or (len(tasks) > 1 and column in _WITHIN_TASKS):
            cells.append("")
            continue
        found = Interval(*(scale * number for number in interquartile_mean(by_task)))
        cells.append(format(found, written) if with_interval else format(found.value, written))
    return cells


def _differences(records: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """Of our algorithm and the supervised one, for each task and all: how far apart, and how likely better."""
    shown = ("aligned, %", "quality", "unseen: aligned, %", "unseen: quality")
    rows = {}
    for task in (*tasks, "all tasks") if len(tasks) > 1 else tasks:
        cells = []
        for column in shown:
            among = tasks if task == "all tasks" else [task]
            both = [[numbers(records, label, name, column) for name in among] for label in (OURS, THEIRS)]
            if all(map(all, both)):
                _, scale, written, _ = COLUMNS[column]
                found = Interval(*(scale * number for number in improvement(*both)))
                cells += [f"{found:+{written}}", f"{probability_of_improvement(*both).value:.2f}"]
        if len(cells) == 2 * len(shown):
            rows[task] = cells
    return markdown(rows, [heading for column in shown for heading in (column, "probability")])


def _improvements(records: Sequence[dict[str, Any]], labels: Sequence[str], tasks: Sequence[str]) -> str:
    found = {label: [numbers(records, label, task, "aligned, %") for task in tasks] for label in labels}
    complete = {label: by_task for label, by_task in found.items() if all(by_task)}
    rows = {
        label: [
            "" if other == label else f"{probability_of_improvement(by_task, complete[other]).value:.2f}"
            for other in complete
        ]
        for label, by_task in complete.items()
    }
    return markdown(rows, list(complete))


def markdown(rows: dict[str, list[str]], headings: Iterable[str]) -> str:
    """A table whose first column has no heading."""
    headings = ["", *headings]
    lines = [headings, ["---"] * len(headings), *([label, *cells] for label, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
