"""The tables of :mod:`benchmarks.algorithms`, in Markdown.

A table is a dict of rows, each a list of cells, and the headings of the columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from benchmarks.algorithms_curves import claims_table, equal_cost_table
from benchmarks.algorithms_records import (
    COMPONENT,
    LONG,
    PRETRAINED,
    gains,
    numbers_by_task,
    numbers_of,
    passes,
    runs_of,
    score,
    trained_labels,
    untrained_labels,
)
from benchmarks.markdown import markdown, p_value_cell
from benchmarks.over_optimisation import along_images
from benchmarks.runs import Record
from benchmarks.statistics import (
    holm,
    mean,
    mean_over_tasks,
    permutation_test,
    pooled_interquartile_mean,
    smallest_difference,
)
from dpok_gym.shapes.world import WORLD


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


def late_drift(record: Record) -> float | None:
    """Returns how far the late outputs of a run's denoiser have moved; None if that is not known, as its KL is not."""
    return None if score("kl")(record) is None else score("late_drift")(record)


COLUMNS = {
    "aligned, %": Column(score("aligned", scale=100), ".1f"),
    "quality": Column(score("quality"), ".3f"),
    "reward": Column(score("reward"), ".2f"),
    "KL, nats": Column(score("kl"), ".1f"),
    "late drift": Column(late_drift, ".2f", has_interval=False),
    "positions, nats": Column(score("entropy_of_positions"), ".2f"),
    "pixels": Column(score("diversity"), ".3f"),
    "passes to train, thousands": Column(lambda record: passes(record) / 1000, ".0f", has_interval=False),
    "passes to draw": Column(score("calls"), ".0f", has_interval=False),
    "seconds": Column(lambda record: record["seconds"], ".0f", has_interval=False),
}

#: The columns of the table of all tasks, and those of them for a first look.
OVERVIEW = (
    "runs",
    "gain, points",
    "pooled interquartile mean",
    "gain, unseen prompts",
    "reward minus judge",
    "passes to train, thousands",
    "passes to draw",
)
_IN_SHORT = ("gain, points", "gain, unseen prompts", "passes to train, thousands", "passes to draw")

#: Scores of a way to draw: key, factor and form. Costs are of one image that is delivered.
_OF_DRAWING = (
    ("aligned", 100, ".1f"),
    ("quality", 1, ".3f"),
    ("calls", 1, ".0f"),
    ("reward_calls", 1, ".0f"),
)

#: Images after which the table of the long runs has a number; the learning rate warms up until the first one.
_ON_THE_WAY = (2_000, 5_000, 10_000, 15_000)

#: Rewards that are what the judge says.
_OF_THE_JUDGE = ("benchmarks.sparse_reward:fully_aligned", *WORLD.evaluation_rewards)


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
    gained without making the images better. None if the reward is the judge itself, or if the run has diverged.

    Args:
        record: of a run.
        records: with the runs of the pre-trained model.
    """
    before = runs_of(records, PRETRAINED, record["task"])
    if not before or "diverged" in record or any(name in _OF_THE_JUDGE for name in record["reward"]):
        return None
    rises = []
    for name in ("reward", "judged"):
        start, spread = (np.mean([r["scores"]["training"][key] for r in before]) for key in (name, f"{name}_std"))
        if not spread:
            return None
        rises.append((record["scores"]["training"][name] - start) / spread)
    return float(rises[0] - rises[1])


def long_table(records: Sequence[Record], task: str, labels: Sequence[str]) -> str:
    """Returns the table of the long runs: the alignment on the way, and the final evaluation.

    A method that fits a fixed set of images has none on the way, as it draws them all before it learns.

    Args:
        records: of the runs.
        task: that the long runs are of.
        labels: of the methods, in the order of the rows.
    """
    before = runs_of(records, PRETRAINED, task)
    columns = {name: COLUMNS[name] for name in ("aligned, %", "quality", "KL, nats", "positions, nats")}
    columns["reward minus judge"] = Column(lambda record: proxy_minus_judge(record | {"task": task}, before), "+.2f")
    rows = {}
    for label in labels:
        runs = runs_of(records, label, LONG)
        if not runs:
            continue
        cells = []
        for mark in _ON_THE_WAY:
            found = [along_images(run["curve"], mark, itemgetter("alignment")) for run in runs]
            values = [100 * value for value in found if value is not None]
            cells.append(f"{np.mean(values):.0f}" if values else "")
        cells += [_cell(numbers_of(records, label, LONG, column.read), column) for column in columns.values()]
        drawn = [run["curve"][-1]["images"] for run in runs if run["curve"]]
        rows[label] = [*cells, f"{np.mean(drawn):,.0f}" if drawn else ""]
    return markdown(rows, [*(f"alignment after {mark:,} images, %" for mark in _ON_THE_WAY), *columns, "images"])


def long_drawing_table(records: Sequence[Record], labels: Sequence[str]) -> str:
    """Returns how else the models of the long runs draw: the aligned images in %, and the quality.

    Args:
        records: of the runs.
        labels: of the methods, in the order of the rows.
    """
    runs = _long(records)
    ways = dict.fromkeys(name for _, names in _ways(runs) for name in names)
    columns = {"as trained": "training"} | {name: name for name in ways}
    rows = {}
    for label in labels:
        cells = []
        for name in columns.values():
            aligned, quality = (_mean_score(runs, label, [LONG], key, name) for key in ("aligned", "quality"))
            cells.append("" if aligned is None or quality is None else f"{100 * aligned:.0f}, {quality:.2f}")
        if any(cells):
            rows[label] = cells
    return markdown(rows, columns)


def _long(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["task"] == LONG]


# ---------------------------------------------------------------------------------------------------- over all tasks


def overview(
    records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str], columns: Sequence[str] = OVERVIEW
) -> str:
    """Returns the table of all tasks: plain means of the gains, the pooled interquartile mean, unseen prompts, costs.

    Args:
        records: of the runs.
        tasks: that count.
        labels: of the methods, in the order of the rows.
        columns: names of columns, of :data:`OVERVIEW`.
    """
    rows = {}
    unseen = [task for task in tasks if numbers_of(records, PRETRAINED, task, score("aligned", "held_out"))]
    of_unseen = gains(records, unseen, labels, "held_out")
    for label, by_task in gains(records, tasks, labels).items():
        runs = [record for task in tasks for record in runs_of(records, label, task)]
        hacking = [value for record in runs if (value := proxy_minus_judge(record, records)) is not None]
        cells = (
            str(len(runs)),
            f"{mean_over_tasks(by_task):+.1f}",
            f"{pooled_interquartile_mean(by_task):+.1f}",
            f"{mean_over_tasks(of_unseen[label]):+.1f}" if label in of_unseen else "",
            f"{np.mean(hacking):+.2f}" if hacking else "",
            f"{np.mean([passes(record) for record in runs]) / 1000:.0f}",
            f"{mean_over_tasks(numbers_by_task(records, label, tasks, score('calls'))).value:.0f}",
        )
        by_name = dict(zip(OVERVIEW, cells, strict=True))
        rows[label] = [by_name[name] for name in columns]
    return markdown(rows, columns)


def pairs_table(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str]) -> str:
    """Returns a table of each two methods: the difference of their gains, and whether it can be told from noise.

    A cell has the difference of row and column in points. It is bold if the permutation test, with Holm's correction
    for all pairs, gives a p-value below 5 %. In brackets is the smallest difference that such a number of runs would
    show with a probability of 80 % after the correction.

    Args:
        records: of the runs.
        tasks: that count.
        labels: of the methods.
    """
    by_label = gains(records, tasks, labels)
    pairs = list(itertools.combinations(by_label, 2))
    p_values = {pair: permutation_test(by_label[pair[0]], by_label[pair[1]]) for pair in pairs}
    corrected = holm(p_values)
    rows: dict[str, list[str]] = {}
    for label in by_label:
        cells = []
        for other in by_label:
            pair = (label, other) if (label, other) in corrected else (other, label)
            if label == other:
                cells.append("")
                continue
            cells.append(_difference(by_label[label], by_label[other], len(pairs), corrected[pair] < 0.05))
        rows[label] = cells
    return markdown(rows, list(by_label))


def _difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], n_comparisons: int, is_bold: bool = False
) -> str:
    """Returns how far the mean of our gains is above theirs, and in brackets the smallest difference to be seen."""
    difference = f"{mean_over_tasks(ours).value - mean_over_tasks(theirs).value:+.1f}"
    visible = smallest_difference(ours, theirs, n_comparisons)
    return (f"**{difference}**" if is_bold else difference) + ("" if math.isnan(visible) else f" ({visible:.1f})")


# ----------------------------------------------------------------------------------- components, prompts, drawing


def components_table(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """Returns what changes if one component of DPOK does: the gain in fully aligned images, the KL and the quality.

    Below the row of DPOK, a cell of the difference has in brackets the smallest one that so many runs would show.

    Args:
        records: of the runs.
        tasks: on which components were changed.
    """
    labels = list(dict.fromkeys(r["label"] for r in records if r["label"].startswith(COMPONENT)))
    by_label = gains(records, tasks, ["DPOK", *labels])
    theirs = by_label.get("DPOK", [])
    changed = {label: ours for label, ours in by_label.items() if label != "DPOK"} if theirs else {}
    corrected = holm({label: permutation_test(ours, theirs) for label, ours in changed.items()})
    rows = {}
    for label, ours in ({"DPOK": theirs} | changed).items() if theirs else ():
        difference = ""
        if label in changed:
            difference = _difference(ours, theirs, len(changed))
        kl, quality = (numbers_by_task(records, label, tasks, score(name)) for name in ("kl", "quality"))
        rows[label.removeprefix(COMPONENT)] = [
            f"{mean_over_tasks(ours):+.1f}",
            difference,
            p_value_cell(corrected.get(label)),
            f"{mean_over_tasks(kl):.1f}",
            f"{mean_over_tasks(quality):.3f}",
            *(" ".join(f"{gain:+.0f}" for gain in of_task) for of_task in ours),
        ]
    of_seeds = [f"gain, each seed of {task}" for task in tasks]
    return markdown(rows, ["gain, points", "minus DPOK", "p, corrected", "KL, nats", "quality", *of_seeds])


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


def drawing_table(records: Sequence[Record], tasks: Sequence[str], untrained: Sequence[str], trained: str) -> str:
    """Returns what other ways to draw cost and reach: with trained models, and with the pre-trained one.

    Args:
        records: of the runs.
        tasks: that count.
        untrained: labels of the ways to draw with the pre-trained model.
        trained: a method whose training is an alternative to dear ways to draw.
    """
    ways = {label: (label, "training") for label in untrained}
    for label, names in _ways([record for record in records if record["task"] in tasks]):
        ways |= {label: (label, "training")} | {f"{label}, {name}": (label, name) for name in names}
    of_training = np.mean([passes(run) for task in tasks for run in runs_of(records, trained, task)])
    plain = _mean_score(records, PRETRAINED, tasks, "calls", "training")
    rows = {}
    for way, (label, name) in ways.items():
        cells = []
        for key, scale, form in _OF_DRAWING:
            value = _mean_score(records, label, tasks, key, name, scale)
            cells.append("" if value is None else format(value, form))
        calls = _mean_score(records, label, tasks, "calls", name)
        more = 0 if label not in untrained or calls is None or plain is None else calls - plain
        rows[way] = [*cells, f"{of_training / more:,.0f}" if more > 0 else ""]
    headings = ["aligned, %", "quality", "passes", "reward calls"]
    return markdown(rows, [*headings, f"images until a training with {trained} costs less"])


def _mean_score(
    records: Sequence[Record], label: str, tasks: Sequence[str], key: str, name: str, scale: float = 1
) -> float | None:
    """Returns the mean of a score over tasks; None if a task has no run with it."""
    by_task = numbers_by_task(records, label, tasks, score(key, name, scale))
    return mean_over_tasks(by_task).value if all(by_task) else None


def _ways(records: Sequence[Record]) -> Iterator[tuple[str, list[str]]]:
    """Yields the methods that draw in several ways, with the names of these."""
    seen: dict[str, list[str]] = {}
    for record in records:
        if "also" in record:
            seen.setdefault(record["label"], list(record["also"]))
    yield from seen.items()


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
    groups = {"all tasks": complete}
    groups["the tasks with a gradient"] = [task for task in complete if settings["tasks"][task].get("gradient", True)]
    single_prompts = [task for task in complete if "splits" not in settings["tasks"][task]]
    tables: dict[str, str] = {}
    if complete:
        tables["In short"] = overview(records, complete, settings["shown"]["short"], _IN_SHORT)
    for name, group in groups.items():
        if not group:  # the sweep has only begun
            continue
        tables[f"Gains over {name}"] = overview(records, group, labels)
        tables[f"Each two methods over {name}"] = pairs_table(records, group, trained)
        tables[f"Equal costs over {name}"] = equal_cost_table(records, group, trained, settings["shown"]["yardsticks"])
    if complete:
        tables["The paper's two claims"] = claims_table(records, single_prompts, settings["claims"])
        tables["Components of DPOK"] = components_table(records, settings["components"]["tasks"])
        tables["Other ways to draw"] = drawing_table(records, complete, untrained, settings["shown"]["yardsticks"][0])
    if _long(records):
        tables["Long runs"] = long_table(records, settings["long"]["task"], trained)
        tables["Other ways to draw after the long runs"] = long_drawing_table(records, trained)
    for task in tasks:
        tables[f"Task “{task}”"] = task_table(records, task, labels)
        if splits := settings["tasks"][task].get("splits"):
            kinds = ["training", *splits[1:]]
            tables[f"Kinds of prompts of “{task}”"] = prompts_table(records, task, kinds, labels)
    return tables
