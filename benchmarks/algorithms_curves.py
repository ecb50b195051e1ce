"""The curves of the runs of :mod:`benchmarks.algorithms`, read at equal costs and at equal rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np

from benchmarks.algorithms_records import PRETRAINED, numbers_by_task, numbers_of, passes, runs_of, score
from benchmarks.markdown import markdown
from benchmarks.runs import Record
from benchmarks.statistics import mean_over_tasks

#: Rollouts that are averaged where a curve is read.
_WINDOW = 3

#: The scores of a point that are read.
_SCORES = ("reward", "alignment", "quality")

Point = Mapping[str, float]
Cost = Callable[[Point], float]

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

    A run that costs less counts with its final evaluation. The result is None if there is no curve, and 0 if the run
    has diverged: it draws nothing.

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
    if measure(curve[-1]) <= cost:
        return curve[-1][name]
    return float(np.interp(cost, [measure(point) for point in curve], [point[name] for point in curve]))


def equal_cost_table(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str], yardstick: str) -> str:
    """Returns the alignment of training images at equal costs, as a mean over tasks and seeds.

    Args:
        records: of the runs.
        tasks: that count.
        labels: of the methods that train; those that miss a task are left out.
        yardstick: the method whose runs say what may be spent on a task.
    """
    rows: dict[str, list[str]] = {}
    for label in labels:
        cells = []
        for measure in COSTS.values():
            by_task = []
            for task in tasks:
                ends = [measure(run["curve"][-1]) for run in runs_of(records, yardstick, task) if run["curve"]]
                runs = runs_of(records, label, task) if ends else []
                values = [at_cost(run, fmean(ends), measure, "alignment") for run in runs]
                by_task.append([100 * value for value in values if value is not None])
            cells.append(f"{mean_over_tasks(by_task):.1f}" if by_task and all(by_task) else "")
        if any(cells):
            rows[label] = cells
    return markdown(rows, [f"alignment at equal {name}, %" for name in COSTS])


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


def claims_table(records: Sequence[Record], tasks: Sequence[str], arms: Sequence[str]) -> str:
    """Returns what the arms of the paper's two claims are worth at an equal reward.

    On each task, the reward is in the middle between that of the pre-trained model and the lowest one that an arm has
    in the end, as means over the seeds.

    Args:
        records: of the runs.
        tasks: that count.
        arms: labels: with and without the KL, online and supervised.
    """
    levels, starts = {}, {}
    for task in tasks:
        ends = [numbers_of(records, arm, task, score("reward")) for arm in arms]
        before = {name: numbers_of(records, PRETRAINED, task, score(name)) for name in _SCORES}
        if all(before.values()) and all(ends):
            starts[task] = {name: fmean(numbers) for name, numbers in before.items()}
            levels[task] = (starts[task]["reward"] + min(map(fmean, ends))) / 2
    rows = {}
    for arm in arms:
        cells = []
        for name in ("alignment", "quality"):
            by_task = []
            for task, level in levels.items():
                values = [at_reward(run, level, name, starts[task]) for run in runs_of(records, arm, task)]
                by_task.append([value for value in values if value is not None])
            cells.append(f"{mean_over_tasks(by_task):.3f}" if by_task and all(by_task) else "")
        reached = [
            at_reward(run, level, "reward", starts[task])
            for task, level in levels.items()
            for run in runs_of(records, arm, task)
        ]
        cells.append(f"{sum(value is not None for value in reached)} of {len(reached)}")
        ends = numbers_by_task(records, arm, list(levels), score("quality"))
        cells.append(f"{mean_over_tasks(ends):.3f}" if ends and all(ends) else "")
        rows[arm] = cells
    headings = ["alignment at equal reward", "quality at equal reward", "runs that reach it", "quality in the end"]
    return markdown(rows, headings)
