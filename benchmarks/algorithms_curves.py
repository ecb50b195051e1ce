"""The curves of the runs of :mod:`benchmarks.algorithms`, read at equal costs and at equal rewards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np

from benchmarks.algorithms_records import PRETRAINED, numbers_by_task, numbers_of, passes, runs_of, score
from benchmarks.markdown import markdown, p_value_cell
from benchmarks.runs import Record
from benchmarks.statistics import holm, mean_over_tasks, permutation_test, smallest_difference

#: Rollouts that are averaged where a curve is read.
_WINDOW = 3

#: Costs that differ by less than this share are equal: a fit costs a quarter of a percent more than DPOK.
_TOLERANCE = 0.01

#: The level at which two methods are read, as a share of the final rise of the lower one. A lower level is in the noise
#: of a rollout's mean, and many runs of the lower method never reach a higher one.
_HEIGHT = 0.75

#: The least rise of the lower one, in standard deviations of an image: of less, the noise of its mean is a large part.
_LEAST_RISE = 0.1

#: The scores of a point that are read.
_SCORES = ("reward", "alignment", "quality")

Point = Mapping[str, float]
Cost = Callable[[Point], float]

#: A level of the reward for each task, with the means of the pre-trained model.
Levels = dict[str, tuple[float, dict[str, float]]]

#: The costs of a point of a curve, by what they are called.
COSTS: dict[str, Cost] = {
    "images": lambda point: point["images"],
    "passes": passes,
    "seconds": lambda point: point["seconds"],
}


def smoothed(points: Sequence[Point], name: str) -> list[float]:
    """Returns a score along a curve: of the latest three rollouts at each point.

    A fit of a fixed set of images has points of its own, of the same prompts and noise each, which are not averaged.

    Args:
        points: of a curve, without the final evaluation.
        name: of the score.
    """
    values = []
    for last, point in enumerate(points, 1):
        latest = [point] if "drawn_for_it" in point else points[max(0, last - _WINDOW) : last]
        values.append(fmean(each[name] for each in latest))
    return values


def at_cost(record: Record, cost: float, measure: Cost, name: str) -> float | None:
    """Returns a score of the images that a run was drawing when it had cost so much, interpolated between two points.

    A run that costs less, or at most one percent more, counts with its final evaluation. The result is None if there is
    no curve, and 0 if the run has diverged: it draws nothing.

    Args:
        record: of a run.
        cost: in the unit of ``measure``.
        measure: the cost of a point of the curve.
        name: of the score, 0 or more.
    """
    if "diverged" in record:
        return 0.0
    if not record["curve"]:
        return None
    curve = record["curve"]
    if measure(curve[-1]) <= (1 + _TOLERANCE) * cost:
        return curve[-1][name]
    return float(np.interp(cost, [measure(point) for point in curve], [point[name] for point in curve]))


def equal_cost_table(
    records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str], yardsticks: Sequence[str]
) -> str:
    """Returns the alignment at equal costs, as a mean over tasks and seeds.

    Args:
        records: of the runs.
        tasks: that count.
        labels: of the methods that train; those that miss a task are left out.
        yardsticks: the methods whose runs say what may be spent on a task. The first one does for every cost, the
            others for passes.
    """
    columns = [(yardsticks[0], name) for name in COSTS] + [(other, "passes") for other in yardsticks[1:]]
    rows: dict[str, list[str]] = {}
    for label in labels:
        cells = []
        for yardstick, name in columns:
            by_task = [_alignments(records, task, label, yardstick, COSTS[name]) for task in tasks]
            cells.append(f"{mean_over_tasks(by_task):.1f}" if by_task and all(by_task) else "")
        if any(cells):
            rows[label] = cells
    return markdown(rows, [f"alignment at the {name} of {yardstick}, %" for yardstick, name in columns])


def _alignments(records: Sequence[Record], task: str, label: str, yardstick: str, measure: Cost) -> list[float]:
    """Returns the alignment of a method's runs, in %, when they had cost as much as the mean run of a yardstick."""
    ends = [measure(run["curve"][-1]) for run in runs_of(records, yardstick, task) if run["curve"]]
    values = [at_cost(run, fmean(ends), measure, "alignment") for run in runs_of(records, label, task) if ends]
    return [100 * value for value in values if value is not None]


def at_reward(record: Record, reward: float, name: str, start: Point) -> float | None:
    """Returns a score of a run's images when their reward first reached a level; None if it never did.

    The curve is that of the pre-trained model, of the images of the training, smoothed, and of the final evaluation. It
    is interpolated between two points.

    Args:
        record: of a run.
        reward: the level.
        name: a score of the points.
        start: the means of the pre-trained model.
    """
    if not record["curve"]:
        return None
    *points, final = record["curve"]
    of_fit = [point for point in points if "drawn_for_it" in point]  # those before a fit are of the pre-trained model
    points = [start, *(of_fit or points[1:])]
    rewards, values = ([*smoothed(points, score), final[score]] for score in ("reward", name))
    for place, high in enumerate(rewards):
        if high >= reward:
            if place == 0:
                return values[0]
            low = rewards[place - 1]
            return float(np.interp(reward, [low, high], values[place - 1 : place + 1]))
    return None


def claims_table(records: Sequence[Record], tasks: Sequence[str], pairs: Sequence[tuple[str, str]]) -> str:
    """Returns what two methods are worth at an equal reward, for the paper's two claims: the first minus the second.

    On each task the reward is three quarters of the way from that of the pre-trained model to the lower one that the
    two have in the end, as means over the seeds. A task on which the lower one has hardly risen is left out. The
    smallest difference that so many runs would show is in brackets.

    Args:
        records: of the runs.
        tasks: that count; for a pair, those on which both have runs and have risen.
        pairs: labels of the methods.
    """
    levels = {(one, other): _levels(records, tasks, (one, other)) for one, other in pairs}
    levels = {pair: of_tasks for pair, of_tasks in levels.items() if of_tasks}
    names = ("alignment", "quality")
    read = {
        (pair, name): [_at_levels(records, label, of_tasks, name) for label in pair]
        for pair, of_tasks in levels.items()
        for name in names
    }
    corrected = holm({key: permutation_test(*both) for key, both in read.items() if all(map(all, both))})
    rows = {}
    for pair, of_tasks in levels.items():
        heights = [(level - start["reward"]) / start["reward_std"] for level, start in of_tasks.values()]
        n_reached = sum(len(numbers) for numbers in itertools.chain(*read[pair, names[0]]))
        n_runs = sum(len(runs_of(records, label, task)) for label in pair for task in of_tasks)
        cells = [", ".join(of_tasks), f"{fmean(heights):.2f}", f"{n_reached} of {n_runs}"]
        for name in names:
            p_value, (ours, theirs) = corrected.get((pair, name)), read[pair, name]
            visible = smallest_difference(ours, theirs, len(read)) if p_value is not None else math.nan
            in_brackets = "" if math.isnan(visible) else f" ({visible:.3f})"
            cells += [_difference(ours, theirs) + in_brackets, p_value_cell(p_value)]
        ends = [numbers_by_task(records, label, list(of_tasks), score("quality")) for label in pair]
        rows["“{}” minus “{}”".format(*pair)] = [*cells, _difference(*ends)]
    headings = ["tasks", "level of the reward", "runs that reach it", "alignment", "p, corrected"]
    return markdown(rows, [*headings, "quality", "p, corrected", "quality in the end"])


def _at_levels(records: Sequence[Record], label: str, levels: Levels, name: str) -> list[list[float]]:
    """Returns a score of a method's runs when they first had the reward of a level, for each task."""
    by_task = []
    for task, (level, start) in levels.items():
        found = [at_reward(run, level, name, start) for run in runs_of(records, label, task)]
        by_task.append([value for value in found if value is not None])
    return by_task


def _levels(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str]) -> Levels:
    """Returns the level of the reward on each task on which the methods rise, and the pre-trained model's means."""
    levels: Levels = {}
    for task in tasks:
        before = {name: numbers_of(records, PRETRAINED, task, score(name)) for name in (*_SCORES, "reward_std")}
        ends = [numbers_of(records, label, task, score("reward")) for label in labels]
        if all(before.values()) and all(ends):
            start = {name: fmean(numbers) for name, numbers in before.items()}
            rise = min(map(fmean, ends)) - start["reward"]
            if rise >= _LEAST_RISE * start["reward_std"]:
                levels[task] = (start["reward"] + _HEIGHT * rise, start)
    return levels


def _difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> str:
    """Returns the difference of two means over tasks; nothing if a task has no numbers."""
    if not (all(ours) and all(theirs)):
        return ""
    return f"{mean_over_tasks(ours).value - mean_over_tasks(theirs).value:+.3f}"
