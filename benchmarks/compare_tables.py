"""The tables of :mod:`benchmarks.compare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.markdown import markdown
from benchmarks.runs import Record
from benchmarks.statistics import Interval, improvement, interquartile_mean, probability_of_improvement

#: The pair of the paper's comparison.
OURS, THEIRS = "DPOK", "SFT"

_ALL_TASKS = "all tasks"


class Column(NamedTuple):
    """A column of the tables.

    Attributes:
        read: takes a run's record and returns the number; None if the run has none.
        format: of the number, as in an f-string.
        scale: factor of the number in the table.
        has_interval: whether the interval is shown.
        is_comparable: whether numbers of different tasks can be compared.
    """

    read: Callable[[Record], float | None]
    format: str
    scale: float = 1
    has_interval: bool = True
    is_comparable: bool = True


COLUMNS = {
    "aligned, %": Column(lambda record: record["scores"]["training"]["aligned"], ".1f", scale=100),
    "quality": Column(lambda record: record["scores"]["training"]["quality"], ".3f"),
    # The learned reward has a zero of its own for each prompt.
    "reward": Column(lambda record: record["scores"]["training"]["reward"], ".2f", is_comparable=False),
    "unseen: aligned, %": Column(lambda record: record["scores"]["held_out"]["aligned"], ".1f", scale=100),
    "unseen: quality": Column(lambda record: record["scores"]["held_out"]["quality"], ".3f"),
    "KL, nats": Column(lambda record: record["scores"]["training"]["kl"], ".1f"),
    "of it in one step, %": Column(
        lambda record: largest_share(record["scores"]["training"]["step_kl"]), ".0f", scale=100, has_interval=False
    ),
    "diversity": Column(lambda record: record["scores"]["training"].get("diversity"), ".3f"),
    "calls to train": Column(lambda record: record["num_function_evaluations"], ".0f", has_interval=False),
    "calls to draw": Column(lambda record: record["num_function_evaluations_to_draw"], ".0f", has_interval=False),
    "seconds": Column(lambda record: record["seconds"], ".0f", has_interval=False),
}

_EXPLANATION = """\
Interquartile means over {seeds} seeds (of three runs the mean, of four that of the middle two, of five that of the
middle three), with 95 % bootstrap intervals, probably too narrow with so few runs; for all tasks, means over tasks. KL:
of the trajectories, in nats per image; of the best of n, the bound log n - (n - 1) / n. Calls: passes of the denoiser
over one image, without backward passes; those to train are of a whole run, those to draw of a delivered image.
Seconds: of one core.
"""


def list_tasks(records: Sequence[Record]) -> list[str]:
    """Returns the tasks, in the order of ``compare.yaml``: that of the runs with the lowest seed."""
    by_seed = sorted(records, key=lambda record: record["seed"])
    return list(dict.fromkeys(record["task"] for record in by_seed))


def list_labels(records: Sequence[Record]) -> list[str]:
    """Returns the labels of the algorithms, in the order of the records."""
    return list(dict.fromkeys(record["label"] for record in records))


def make_text(records: Sequence[Record], rows: dict[str, dict[str, list[str]]]) -> str:
    """Returns the tables in Markdown.

    Args:
        records: of the runs; algorithms come in this order.
        rows: see :func:`make_rows`.
    """
    tasks, labels = list_tasks(records), list_labels(records)
    counts = Counter((record["label"], record["task"]) for record in records).values()
    seeds = [str(count) for count in sorted({min(counts), max(counts)})]
    text = _EXPLANATION.format(seeds=" to ".join(seeds))
    for task, by_label in rows.items():
        text += f"\n### {task}\n\n" + markdown(by_label, COLUMNS)
    text += f"\n### {OURS} over {THEIRS}\n\n" + _differences(records, tasks)
    text += "\n### How likely a run of the row is better aligned than one of the column\n\n"
    return text + _improvements(records, labels, tasks)


def make_rows(records: Sequence[Record]) -> dict[str, dict[str, list[str]]]:
    """Returns the cells of each algorithm in the table of each task, and in that of all tasks if there are several."""
    tasks = list_tasks(records)
    by_task: dict[str, dict[str, list[str]]] = {}
    for title, included in _with_all(tasks).items():
        by_task[title] = {}
        for label in list_labels(records):
            # Runs may be missing: an algorithm without runs on one of the tasks is left out.
            if all(numbers(records, label, task, "aligned, %") for task in included):
                by_task[title][label] = _cells(records, label, included)
    return by_task


def _with_all(tasks: Sequence[str]) -> dict[str, Sequence[str]]:
    """Returns the tasks that each table is about, by its title."""
    tables: dict[str, Sequence[str]] = {task: [task] for task in tasks}
    if len(tasks) > 1:
        tables[_ALL_TASKS] = tasks
    return tables


def largest_share(parts: Sequence[float]) -> float | None:
    """Returns the largest part's share of the sum; None if the sum is 0."""
    return max(parts) / sum(parts) if sum(parts) > 0 else None


def numbers(records: Sequence[Record], label: str, task: str, column: str) -> list[float]:
    """Returns the numbers of an algorithm's runs on a task in a column; runs that have none are left out."""
    runs = [record for record in records if (record["label"], record["task"]) == (label, task)]
    values = [COLUMNS[column].read(run) for run in runs]
    return [float(value) for value in values if value is not None]


def _cells(records: Sequence[Record], label: str, tasks: Sequence[str]) -> list[str]:
    """Returns the cells of an algorithm, one for each column."""
    cells = []
    for name, column in COLUMNS.items():
        by_task = [numbers(records, label, task, name) for task in tasks]
        if not all(by_task) or (len(tasks) > 1 and not column.is_comparable):
            cells.append("")
            continue
        interval = _scaled(interquartile_mean(by_task), column)
        shown = interval if column.has_interval else interval.value
        cells.append(format(shown, column.format))
    return cells


def _scaled(interval: Interval, column: Column) -> Interval:
    return Interval(*(column.scale * number for number in interval))


def _differences(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """Returns a table of our algorithm minus the supervised one, with the probability that ours is better."""
    shown = ("aligned, %", "quality", "unseen: aligned, %", "unseen: quality")
    rows = {}
    for title, included in _with_all(tasks).items():
        cells = []
        for name in shown:
            ours = [numbers(records, OURS, task, name) for task in included]
            theirs = [numbers(records, THEIRS, task, name) for task in included]
            if all(ours) and all(theirs):
                difference = _scaled(improvement(ours, theirs), COLUMNS[name])
                probability = probability_of_improvement(ours, theirs).value
                cells += [f"{difference:+{COLUMNS[name].format}}", f"{probability:.2f}"]
        if len(cells) == 2 * len(shown):
            rows[title] = cells
    headings = []
    for name in shown:
        headings += [name, "probability"]
    return markdown(rows, headings)


def _improvements(records: Sequence[Record], labels: Sequence[str], tasks: Sequence[str]) -> str:
    """Returns a table of the algorithms that have runs on all tasks, each against each other one."""
    complete = {}
    for label in labels:
        by_task = [numbers(records, label, task, "aligned, %") for task in tasks]
        if all(by_task):
            complete[label] = by_task
    rows: dict[str, list[str]] = {}
    for label, ours in complete.items():
        rows[label] = []
        for other, theirs in complete.items():
            cell = "" if other == label else f"{probability_of_improvement(ours, theirs).value:.2f}"
            rows[label].append(cell)
    return markdown(rows, list(complete))


def rank(records: Sequence[Record], shared: dict[str, Any]) -> None:
    """Prints what the tuning tried, each algorithm's settings from the best to the worst, as means over seeds.

    Args:
        records: of the runs.
        shared: settings of all runs, which are left out.
    """
    formats = {"reward": ".3f", "aligned": ".3f", "quality": ".3f", "kl": ".1f"}
    tried: dict[tuple[str, str], dict[str, list[dict[str, float]]]] = {}
    for record in records:
        own = [f"{name} {value}" for name, value in record["settings"].items() if shared.get(name) != value]
        by_settings = tried.setdefault((record["task"], record["label"]), {})
        by_settings.setdefault(", ".join(own), []).append(record["scores"]["training"])
    table = Table("task", "", "settings", *formats, "runs", title="Tuning, by the reward")
    for (task, label), by_settings in tried.items():
        means: dict[str, dict[str, float]] = {}
        for own_settings, scores in by_settings.items():
            means[own_settings] = _means(scores, list(formats))
        for own_settings in sorted(means, key=lambda settings: -means[settings]["reward"]):
            cells = [format(means[own_settings][name], format_spec) for name, format_spec in formats.items()]
            table.add_row(task, label, own_settings, *cells, str(len(by_settings[own_settings])))
        table.add_section()
    Console(width=180).print(table)


def _means(scores: Sequence[dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    means = {}
    for name in names:
        means[name] = fmean(score[name] for score in scores)
    return means
