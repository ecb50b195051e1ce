"""The tables of :mod:`benchmarks.algorithms`, in Markdown.

A table is a dict of rows, each a list of cells, and the headings of the columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from benchmarks.compare_tables import markdown
from benchmarks.runs import Record
from benchmarks.statistics import (
    holm,
    mean,
    mean_over_tasks,
    permutation_test,
    pooled_interquartile_mean,
    smallest_difference,
)
from benchmarks.training_run import UNTRAINED
from dpok_gym.shapes.choices import QUALITY_WEIGHT

PRETRAINED, LONG, COMPONENT = "pre-trained", "long", "DPOK: "
#: Permutations of a test: enough for Holm's correction of about a hundred tests.
_RESAMPLES = 99_999
#: Points of a curve that are averaged where a curve is read.
_WINDOW = 3

#: From the label of a method to the numbers of its runs, by task.
Numbers = dict[str, list[list[float]]]


class Column(NamedTuple):
    """A column of a table about the runs of one task.

    Attributes:
        read: from a run to a number; None if it has none.
        form: of the number, as in an f-string.
        has_interval: whether its interval is shown.
    """

    read: Callable[[Record], float | None]
    form: str
    has_interval: bool = True


def score(name: str, prompts: str = "training", scale: float = 1.0) -> Callable[[Record], float | None]:
    """Returns a function that reads a score of a run; None if the run has no such score.

    Args:
        name: of the score, see :func:`benchmarks.training_run.summarize`.
        prompts: the set of prompts, or the way to draw.
        scale: factor of the number.
    """

    def read(record: Record) -> float | None:
        value = record["scores"].get(prompts, {}).get(name)
        return None if value is None else scale * value

    return read


def passes(costs: Mapping[str, Any]) -> float:
    """Returns the passes of the denoiser in a training, in images; a backward pass counts as two forward ones.

    Args:
        costs: a run, or a point of its curve.
    """
    return costs["num_function_evaluations"] + 2 * costs["num_gradient_evaluations"]


COLUMNS = {
    "aligned, %": Column(score("aligned", scale=100), ".1f"),
    "quality": Column(score("quality"), ".3f"),
    "reward": Column(score("reward"), ".2f"),
    "KL, nats": Column(score("kl"), ".1f"),
    "positions, nats": Column(score("entropy_of_positions"), ".2f"),
    "pixels": Column(score("diversity"), ".3f"),
    "passes to train, thousands": Column(lambda record: passes(record) / 1000, ".0f", has_interval=False),
    "passes to draw": Column(lambda record: record["num_function_evaluations_to_draw"], ".0f", has_interval=False),
    "seconds": Column(lambda record: record["seconds"], ".0f", has_interval=False),
}


def runs_of(records: Sequence[Record], label: str, task: str) -> list[Record]:
    """Returns the runs of a method on a task, in the order of their seeds."""
    runs = [record for record in records if (record["label"], record["task"]) == (label, task)]
    return sorted(runs, key=lambda record: record["seed"])


def numbers_of(records: Sequence[Record], label: str, task: str, read: Callable[[Record], float | None]) -> list[float]:
    """Returns what is read of the runs of a method on a task; runs without it are left out."""
    values = [read(record) for record in runs_of(records, label, task)]
    return [value for value in values if value is not None]


def numbers_by_task(
    records: Sequence[Record], label: str, tasks: Sequence[str], read: Callable[[Record], float | None]
) -> list[list[float]]:
    """Returns what is read of the runs of a method, for each task; see :func:`numbers_of`."""
    return [numbers_of(records, label, task, read) for task in tasks]


def task_table(records: Sequence[Record], task: str, labels: Sequence[str]) -> str:
    """Returns the table of a task: means with intervals, the hacking of the reward, and each seed.

    Args:
        records: of the runs.
        task: of the table.
        labels: of the methods, in the order of the rows.
    """
    rows = {}
    for label in labels:
        if not runs_of(records, label, task):
            continue
        cells = [_cell(numbers_of(records, label, task, column.read), column) for column in COLUMNS.values()]
        hacking = Column(lambda record: proxy_minus_judge(record, records), "+.2f")
        aligned = numbers_of(records, label, task, COLUMNS["aligned, %"].read)
        seeds = " ".join(f"{value:.0f}" for value in aligned)
        rows[label] = [*cells, _cell(numbers_of(records, label, task, hacking.read), hacking), seeds]
    return markdown(rows, [*COLUMNS, "reward minus judge", "aligned, each seed"])


def _cell(numbers: Sequence[float], column: Column) -> str:
    if not numbers:
        return ""
    interval = mean(numbers)
    return format(interval if column.has_interval else interval.value, column.form)


def proxy_minus_judge(record: Record, records: Sequence[Record]) -> float | None:
    """Returns how much more the reward has risen than what the judge says, in standard deviations of an image.

    Both are standardised by the images of the pre-trained model for the same task: above 0, some of the reward has been
    gained without making the images better.

    Args:
        record: of a run.
        records: with the runs of the pre-trained model.
    """
    before = runs_of(records, PRETRAINED, record["task"])
    if not before:
        return None
    rises = []
    for name in ("reward", "judged"):
        start, spread = (np.mean([r["scores"]["training"][key] for r in before]) for key in (name, f"{name}_std"))
        if not spread:
            return None
        rises.append((record["scores"]["training"][name] - start) / spread)
    return float(rises[0] - rises[1])


# ---------------------------------------------------------------------------------------------------- over all tasks


def gains(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str], prompts: str = "training") -> Numbers:
    """Returns how many points of fully aligned images each run is above the pre-trained model's mean.

    Args:
        records: of the runs.
        tasks: that count.
        labels: of the methods; those that miss a task are left out.
        prompts: the set of prompts.
    """
    read = score("aligned", prompts, 100)
    starts = [fmean(numbers) for numbers in numbers_by_task(records, PRETRAINED, tasks, read)]
    by_label: Numbers = {}
    for label in labels:
        by_task = numbers_by_task(records, label, tasks, read)
        if all(by_task):
            by_label[label] = [
                (np.array(numbers) - start).tolist() for numbers, start in zip(by_task, starts, strict=True)
            ]
    return by_label


def overview(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str]) -> str:
    """Returns the table of all tasks: plain means of the gains, the pooled interquartile mean, unseen prompts, costs.

    Args:
        records: of the runs.
        tasks: that count.
        labels: of the methods, in the order of the rows.
    """
    rows = {}
    unseen = [task for task in tasks if numbers_of(records, PRETRAINED, task, score("aligned", "held_out"))]
    of_unseen = gains(records, unseen, labels, "held_out") if unseen else {}
    for label, by_task in gains(records, tasks, labels).items():
        runs = [record for task in tasks for record in runs_of(records, label, task)]
        hacking = [value for record in runs if (value := proxy_minus_judge(record, records)) is not None]
        rows[label] = [
            f"{mean_over_tasks(by_task):+.1f}",
            f"{pooled_interquartile_mean(by_task):+.1f}",
            f"{mean_over_tasks(of_unseen[label]):+.1f}" if label in of_unseen else "",
            f"{np.mean(hacking):+.2f}" if hacking else "",
            f"{np.mean([passes(record) for record in runs]) / 1000:.0f}",
            f"{np.mean([record['num_function_evaluations_to_draw'] for record in runs]):.0f}",
        ]
    headings = ("gain, points", "pooled interquartile mean", "unseen prompts", "reward minus judge")
    return markdown(rows, [*headings, "passes to train, thousands", "passes to draw"])


def pairs_table(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str]) -> str:
    """Returns a table of each two methods: the difference of their gains, and whether it can be told from noise.

    A cell has the difference of row and column in points. It is bold if the permutation test, with Holm's correction
    for all pairs, gives a p-value below 5 %. In brackets is the smallest difference that such a number of runs would
    show with a probability of 80 %.

    Args:
        records: of the runs.
        tasks: that count.
        labels: of the methods.
    """
    by_label = gains(records, tasks, labels)
    pairs = list(itertools.combinations(by_label, 2))
    p_values = {pair: permutation_test(by_label[pair[0]], by_label[pair[1]], n_resamples=_RESAMPLES) for pair in pairs}
    corrected = holm(p_values)
    rows: dict[str, list[str]] = {}
    for label in by_label:
        cells = []
        for other in by_label:
            pair = (label, other) if (label, other) in corrected else (other, label)
            if label == other:
                cells.append("")
                continue
            difference = mean_over_tasks(by_label[label]).value - mean_over_tasks(by_label[other]).value
            text = f"**{difference:+.1f}**" if corrected[pair] < 0.05 else f"{difference:+.1f}"
            cells.append(f"{text} ({smallest_difference(by_label[label], by_label[other]):.1f})")
        rows[label] = cells
    return markdown(rows, list(by_label))


# ------------------------------------------------------------------------------------------------------ equal budgets


def at_cost(record: Record, cost: float, measure: Callable[[Mapping[str, float]], float], name: str) -> float | None:
    """Returns a score of the images that a run was drawing when it had cost so much; None if it never cost so much.

    It is a mean over the last points of the curve before that.

    Args:
        record: of a run.
        cost: in the unit of ``measure``.
        measure: the cost of a point of the curve.
        name: of the score.
    """
    points = record["curve"]
    if not points or measure(points[-1]) < cost:
        return None
    reached = [point for point in points if measure(point) <= cost]
    return float(np.mean([point[name] for point in reached[-_WINDOW:]])) if reached else None


#: The costs of a point of a curve, by what they are called.
COSTS: dict[str, Callable[[Mapping[str, float]], float]] = {
    "images": lambda point: point["images"],
    "passes": passes,
    "seconds": lambda point: point["seconds"],
}


def equal_cost_table(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str]) -> str:
    """Returns the alignment of training images at equal costs, as a mean over tasks and seeds.

    On each task the cost is the smallest one that a whole run of some method has: so all have reached it.

    Args:
        records: of the runs.
        tasks: that count.
        labels: of the methods that train.
    """
    rows: dict[str, list[str]] = {}
    complete = [label for label in labels if all(runs_of(records, label, task) for task in tasks)]
    for label in complete:
        rows[label] = []
        for measure in COSTS.values():
            by_task = []
            for task in tasks:
                ends = [measure(run["curve"][-1]) for other in complete for run in runs_of(records, other, task)]
                values = [at_cost(run, min(ends), measure, "alignment") for run in runs_of(records, label, task)]
                by_task.append([100 * value for value in values if value is not None])
            rows[label].append(f"{mean_over_tasks(by_task):.1f}" if all(by_task) else "")
    return markdown(rows, [f"alignment at equal {name}, %" for name in COSTS])


# -------------------------------------------------------------------------------------- components, claims, prompts


def components_table(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """Returns what changes if one component of DPOK does, in points of fully aligned images, and the KL.

    Args:
        records: of the runs.
        tasks: on which components were changed.
    """
    labels = list(dict.fromkeys(r["label"] for r in records if r["label"].startswith(COMPONENT)))
    seeds = {record["seed"] for record in records if record["label"] in labels}
    compared = [record for record in records if record["seed"] in seeds]
    rows = {}
    p_values, cells = {}, {}
    for label in labels:
        ours, theirs = (numbers_by_task(compared, name, tasks, score("aligned", scale=100)) for name in (label, "DPOK"))
        if not (all(ours) and all(theirs)):
            continue
        p_values[label] = permutation_test(ours, theirs)
        kl = numbers_by_task(compared, label, tasks, score("kl"))
        difference = mean_over_tasks(ours).value - mean_over_tasks(theirs).value
        cells[label] = [f"{difference:+.1f}", f"{smallest_difference(ours, theirs):.1f}", f"{mean_over_tasks(kl):.1f}"]
    corrected = holm(p_values) if p_values else {}
    for label, row in cells.items():
        rows[label.removeprefix(COMPONENT)] = [*row, f"{corrected[label]:.2f}"]
    return markdown(rows, ["aligned, points", "smallest difference to be seen", "KL, nats", "p, corrected"])


def at_reward(record: Record, reward: float, name: str) -> float | None:
    """Returns a score of a run's training images when their reward first reached a level; None if it never did.

    Args:
        record: of a run.
        reward: the level.
        name: a score of the points, or "judged".
    """
    points = record["curve"][:-1]
    for last in range(_WINDOW, len(points) + 1):
        window = points[last - _WINDOW : last]
        if np.mean([point["reward"] for point in window]) >= reward:
            return float(np.mean([judged(point) if name == "judged" else point[name] for point in window]))
    return None


def judged(point: Mapping[str, float]) -> float:
    """Returns how much the simulated person likes the images of a point of a curve."""
    return point["alignment"] + QUALITY_WEIGHT * point["quality"]


def claims_table(records: Sequence[Record], tasks: Sequence[str], arms: Sequence[str]) -> str:
    """Returns what the arms of the paper's two claims are worth at an equal reward.

    On each task the reward is the highest one that all runs of all arms reach in training.

    Args:
        records: of the runs.
        tasks: that count.
        arms: labels: with and without the KL, online and supervised.
    """
    rows: dict[str, list[str]] = {}
    levels = {}
    for task in tasks:
        reached = [_highest_reward(run) for arm in arms for run in runs_of(records, arm, task)]
        if reached and all(runs_of(records, arm, task) for arm in arms):
            levels[task] = min(reached)
    for arm in arms:
        cells = []
        for name, form in (("alignment", ".3f"), ("quality", ".3f")):
            by_task = []
            for task, level in levels.items():
                values = [at_reward(run, level, name) for run in runs_of(records, arm, task)]
                by_task.append([value for value in values if value is not None])
            cells.append(f"{mean_over_tasks(by_task):{form}}" if by_task and all(by_task) else "")
        ends = numbers_by_task(records, arm, list(levels), score("quality"))
        rows[arm] = [*cells, f"{mean_over_tasks(ends):.3f}" if ends and all(ends) else ""]
    return markdown(rows, ["alignment at equal reward", "quality at equal reward", "quality in the end"])


def _highest_reward(record: Record) -> float:
    points = record["curve"][:-1]
    means = [np.mean([p["reward"] for p in points[k : k + _WINDOW]]) for k in range(len(points) - _WINDOW + 1)]
    return float(max(means, default=-math.inf))


def prompts_table(records: Sequence[Record], task: str, kinds: Sequence[str], labels: Sequence[str]) -> str:
    """Returns the gains on each kind of prompts of a task with many, in points of fully aligned images.

    Args:
        records: of the runs.
        task: with several kinds of prompts.
        kinds: names of their scores.
        labels: of the methods.
    """
    by_kind = {kind: gains(records, [task], labels, kind) for kind in kinds}
    rows = {}
    for label in labels:
        if all(label in by_label for by_label in by_kind.values()):
            rows[label] = [f"{mean(by_label[label][0]):+.1f}" for by_label in by_kind.values()]
    return markdown(rows, kinds)


def drawing_table(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """Returns how trained models draw in other ways: best of n, and more or less of the LoRA.

    Args:
        records: of the runs.
        tasks: that count.
    """
    rows = {}
    for label, names in _ways(records):
        for name in ("training", *names):
            cells = []
            for key, scale, form in (("aligned", 100, ".1f"), ("quality", 1, ".3f")):
                by_task = numbers_by_task(records, label, tasks, score(key, name, scale))
                cells.append(f"{mean_over_tasks(by_task):{form}}" if all(by_task) else "")
            calls = numbers_by_task(records, label, tasks, score("calls", name))
            cells.append(f"{mean_over_tasks(calls).value:.0f}" if all(calls) else "")
            rows[label if name == "training" else f"{label}, {name}"] = cells
    return markdown(rows, ["aligned, %", "quality", "passes to draw"])


def _ways(records: Sequence[Record]) -> Iterator[tuple[str, list[str]]]:
    """Yields the methods that draw in several ways, with the names of these."""
    seen: dict[str, list[str]] = {}
    for record in records:
        if "also" in record:
            seen.setdefault(record["label"], list(record["also"]))
    yield from seen.items()


def trained_labels(records: Sequence[Record]) -> list[str]:
    """Returns the methods that train, components left out, in the order of the records."""
    labels = dict.fromkeys(record["label"] for record in records if record["algorithm"] != UNTRAINED)
    return [label for label in labels if not label.startswith(COMPONENT)]


def untrained_labels(records: Sequence[Record]) -> list[str]:
    """Returns the ways to draw with the pre-trained model, in the order of the records."""
    return list(dict.fromkeys(record["label"] for record in records if record["algorithm"] == UNTRAINED))


def all_tables(records: Sequence[Record], settings: dict[str, Any]) -> dict[str, str]:
    """Returns all tables by their titles.

    Args:
        records: of the runs.
        settings: as in ``algorithms.yaml``.
    """
    trained, untrained = trained_labels(records), untrained_labels(records)
    labels = [*trained, *untrained]
    tasks = [task for task in settings["tasks"] if runs_of(records, PRETRAINED, task)]
    complete = [task for task in tasks if any(runs_of(records, label, task) for label in trained)]
    tables = {
        "All tasks": overview(records, complete, labels),
        "Each two methods": pairs_table(records, complete, trained),
        "At equal costs": equal_cost_table(records, complete, trained),
        "The paper's two claims": claims_table(records, complete, settings["arms"]),
        "Components of DPOK": components_table(records, settings["components"]["tasks"]),
        "Other ways to draw": drawing_table(records, complete),
    }
    for task in tasks:
        tables[f"Task “{task}”"] = task_table(records, task, labels)
        if splits := settings["tasks"][task].get("splits"):
            kinds = ["training", *splits[1:]]
            tables[f"Kinds of prompts of “{task}”"] = prompts_table(records, task, kinds, labels)
    return tables
