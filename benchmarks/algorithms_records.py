"""Scores and costs of the runs of :mod:`benchmarks.algorithms`, by method and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.runs import Record
from benchmarks.training_run import UNTRAINED
from dpok_gym.shapes.choices import QUALITY_WEIGHT

PRETRAINED, LONG, COMPONENT = "pre-trained", "long", "DPOK: "

#: From the label of a method to the numbers of its runs, by task.
Numbers = dict[str, list[list[float]]]

#: What the judge says of images without a model that can draw any.
_WORST = {"aligned": 0.0, "alignment": 0.0, "quality": 0.0, "judged": 0.0}


def score(name: str, prompts: str = "training", scale: float = 1.0) -> Callable[[Record], float | None]:
    """Returns a function that reads a score of a run; None if the run has no such score.

    For the judge, a run that has diverged has drawn nothing.

    Args:
        name: of the score, see :func:`benchmarks.training_run.summarize`.
        prompts: the set of prompts, or the way to draw.
        scale: factor of the number.
    """

    def read(record: Record) -> float | None:
        scores = _WORST if "diverged" in record else record["scores"].get(prompts, {})
        value = scores.get(name)
        return None if value is None else scale * value

    return read


def passes(costs: Mapping[str, Any]) -> float:
    """Returns the passes of the denoiser in a training, in images; a backward pass counts as two forward ones.

    Args:
        costs: a run, or a point of its curve.
    """
    return costs["num_function_evaluations"] + 2 * costs["num_gradient_evaluations"]


def judged(point: Mapping[str, float]) -> float:
    """Returns how much the simulated person likes the images of a point of a curve."""
    return point["alignment"] + QUALITY_WEIGHT * point["quality"]


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


def spread_of_seconds(records: Sequence[Record]) -> tuple[float, float]:
    """Returns by how much the slowest of the runs with the same work is above the fastest: the median, and the most.

    The runs of a method on a task have the same work. Both are 0 if no method has two runs.

    Args:
        records: of the runs.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if record["algorithm"] != UNTRAINED and "diverged" not in record:
            seconds.setdefault((record["label"], record["task"]), []).append(record["seconds"])
    spreads = [max(each) / min(each) - 1 for each in seconds.values()]
    return (median(spreads), max(spreads)) if spreads else (0.0, 0.0)


def trained_labels(records: Sequence[Record]) -> list[str]:
    """Returns the methods that train, components left out, in the order of the records."""
    labels = dict.fromkeys(record["label"] for record in records if record["algorithm"] != UNTRAINED)
    return [label for label in labels if not label.startswith(COMPONENT)]


def untrained_labels(records: Sequence[Record]) -> list[str]:
    """Returns the ways to draw with the pre-trained model, in the order of the records."""
    return list(dict.fromkeys(record["label"] for record in records if record["algorithm"] == UNTRAINED))


def gains(records: Sequence[Record], tasks: Sequence[str], labels: Sequence[str], prompts: str = "training") -> Numbers:
    """Returns how many points of fully aligned images each run is above the pre-trained model with the same seed.

    Both are evaluated with the same noise, so what it adds to both does not count.

    Args:
        records: of the runs.
        tasks: that count.
        labels: of the methods; those that miss a task are left out.
        prompts: the set of prompts.
    """
    read = score("aligned", prompts, 100)
    by_label: Numbers = {}
    for label in labels:
        by_task = []
        for task in tasks:
            starts = {run["seed"]: read(run) for run in runs_of(records, PRETRAINED, task)}
            pairs = [(read(run), starts.get(run["seed"])) for run in runs_of(records, label, task)]
            by_task.append([end - start for end, start in pairs if end is not None and start is not None])
        if by_task and all(by_task):
            by_label[label] = by_task
    return by_label
