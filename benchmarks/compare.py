"""Algorithms side by side: ``python -m benchmarks.compare`` (hours), with ``--quick`` a quarter of one.

Every algorithm of ``compare.yaml`` on every task of it, over several seeds. Each run is one line of ``runs.jsonl``; an
interrupted sweep goes on where it stopped. Table and figures are made again from these lines whenever this is called,
with ``--report`` without any run. ``--tune`` makes the runs that settings can be chosen by.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import compare_figures
from benchmarks.runs import default_processes, read_runs, sweep
from benchmarks.statistics import Interval, interquartile_mean, probability_of_improvement

HERE = Path(__file__).parent
OURS = "DPOK"

#: Columns of the tables: heading, where the number is, its factor, its format, and whether with its interval.
COLUMNS: dict[str, tuple[tuple[str, ...], float, str, bool]] = {
    "aligned, %": (("scores", "training", "aligned"), 100, ".1f", True),
    "quality": (("scores", "training", "quality"), 1, ".3f", True),
    "reward": (("scores", "training", "reward"), 1, ".2f", True),
    "unseen: aligned, %": (("scores", "held_out", "aligned"), 100, ".1f", True),
    "unseen: quality": (("scores", "held_out", "quality"), 1, ".3f", True),
    "KL, nats": (("scores", "training", "kl"), 1, ".1f", False),
    "diversity": (("scores", "training", "diversity"), 1, ".3f", False),
    "calls to draw": (("network_calls_to_draw",), 1, ".0f", False),
    "seconds": (("seconds",), 1, ".0f", False),
}


def main() -> None:
    """Runs what is missing, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=Path, default=HERE / "compare.yaml")
    parser.add_argument(
        "--out", type=Path, help="folder; benchmarks/results/compare, or runs/compare-quick with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="few algorithms, one task, three seeds")
    parser.add_argument("--tune", action="store_true", help="make the runs of the tuning instead, and rank them")
    parser.add_argument("--report", action="store_true", help="make no runs: table and figures of those there are")
    parser.add_argument("--processes", type=int, default=default_processes(), help="runs side by side")
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    folder = options.out or (Path("runs/compare-quick") if options.quick else HERE / "results" / "compare")
    if options.tune:
        tune(settings, folder / "tuning.jsonl", options.processes)
        return
    wanted = list(descriptions(settings, settings["quick"] if options.quick else {}))
    file = folder / "runs.jsonl"
    records = read_runs(file) if options.report else sweep(wanted, file, options.processes)
    order = list(settings["algorithms"])
    report(sorted(records, key=lambda record: order.index(record["label"])), folder)


def descriptions(settings: dict[str, Any], chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The runs, those of the first seed first.

    Args:
        settings: as in ``compare.yaml``.
        chosen: ``seeds``, ``tasks`` and ``algorithms`` of it, where they are not all.
    """
    for seed in range(chosen.get("seeds", settings["seeds"])):
        for task in chosen.get("tasks", settings["tasks"]):
            for label in chosen.get("algorithms", settings["algorithms"]):
                yield describe(settings, task, label, seed)


def describe(
    settings: dict[str, Any], task: str, label: str, seed: int, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One run; ``changes`` are to the algorithm's settings."""
    entry = settings["algorithms"][label]
    own = entry["settings"] | (changes or {})
    if entry["algorithm"] != "rejection":
        own = settings["settings"] | own
    run = {"label": label, "task": task, "algorithm": entry["algorithm"], "seed": seed, "settings": own}
    return settings["common"] | settings["tasks"][task] | run


def tune(settings: dict[str, Any], file: Path, processes: int) -> None:
    """Makes the runs of the tuning, and prints each algorithm's from the best to the worst."""
    tuning = settings["tuning"]
    changes = {"eval_pictures": tuning["eval_pictures"], "held_out": False}
    wanted = [
        describe(settings, tuning["task"], label, tuning["seed"], change) | changes
        for label, grid in tuning["grids"].items()
        for change in grid
    ]
    records = sweep(wanted, file, processes)
    table = Table("algorithm", "settings", "reward", "aligned, %", "quality", "KL, nats", title="Tuning, by the reward")
    shared = settings["settings"]
    for label in tuning["grids"]:
        runs = [record for record in records if record["label"] == label]
        for record in sorted(runs, key=lambda record: -record["scores"]["training"]["reward"]):
            own = ", ".join(f"{k} {v}" for k, v in record["settings"].items() if shared.get(k) != v)
            found = record["scores"]["training"]
            scores = (f"{found['reward']:.3f}", f"{100 * found['aligned']:.1f}", f"{found['quality']:.3f}")
            table.add_row(label, own, *scores, f"{found['kl']:.1f}")
        table.add_section()
    Console(width=140).print(table)


def report(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Table and figures of runs, into a folder and onto the screen."""
    if not records:
        raise SystemExit(f"there are no runs in {folder}: make some, without --report")
    tasks = list(dict.fromkeys(record["task"] for record in records))
    labels = list(dict.fromkeys(record["label"] for record in records))
    text, console = "", Console(width=200)
    for task in (*tasks, "all tasks") if len(tasks) > 1 else tasks:
        among = tasks if task == "all tasks" else [task]
        rows = {label: row for label in labels if (row := _row(records, label, among))}
        text += f"\n### {task}\n\n" + _markdown(rows)
        table = Table("", *COLUMNS, title=task)
        for label, cells in rows.items():
            table.add_row(label, *cells)
        console.print(table)
    text += "\n### How likely a run of DPOK is better aligned than one of ...\n\n" + _improvements(
        records, labels, tasks
    )
    n_seeds = len({record["seed"] for record in records})
    head = f"Interquartile means over {n_seeds} seeds, with 95 % bootstrap intervals, stratified by task.\n"
    (folder / "table.md").write_text(head + text, encoding="utf-8")
    compare_figures.curves(records, folder / "curves.png")
    compare_figures.frontier(records, folder / "frontier.png")
    compare_figures.grid(folder / "pictures", tasks, labels, folder / "grid.png")
    console.print(f"table and figures: {folder}")


def numbers(records: Sequence[dict[str, Any]], label: str, task: str, path: Sequence[str]) -> list[float]:
    """What the runs of an algorithm on a task say under a path of keys; those that do not say it left out."""
    found = []
    for record in records:
        if (record["label"], record["task"]) == (label, task):
            value: Any = record
            for key in path:
                value = value.get(key, {})
            if value != {}:
                found.append(float(value))
    return found


def _row(records: Sequence[dict[str, Any]], label: str, tasks: Sequence[str]) -> list[str]:
    """The cells of an algorithm; empty if it has no runs on one of the tasks."""
    cells = []
    for path, scale, written, with_interval in COLUMNS.values():
        by_task = [numbers(records, label, task, path) for task in tasks]
        if not all(by_task):
            if path[0] == "scores" and path[1] == "training":
                return []
            cells.append("")
            continue
        found = Interval(*(scale * number for number in interquartile_mean(by_task)))
        cells.append(format(found, written) if with_interval else format(found.value, written))
    return cells


def _improvements(records: Sequence[dict[str, Any]], labels: Sequence[str], tasks: Sequence[str]) -> str:
    rows = {}
    for label in labels:
        both = [[numbers(records, name, task, COLUMNS["aligned, %"][0]) for task in tasks] for name in (OURS, label)]
        if label != OURS and all(map(all, both)):
            rows[label] = [format(probability_of_improvement(*both), ".2f")]
    return _markdown(rows, ["probability"])


def _markdown(rows: dict[str, list[str]], headings: Sequence[str] = tuple(COLUMNS)) -> str:
    lines = [["", *headings], ["---"] * (len(headings) + 1), *([label, *cells] for label, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
