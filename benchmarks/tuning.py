"""A search for settings that has the same rules for every algorithm.

One setting after the other is tried, in the order that is given, with the best values of those before it and the middle
values of those after it. Its grid grows at an end as long as the best value is there. Then the best of all that were
tried run with more seeds.

The search is a function of the scores that there are: it says which runs are missing. So a sweep can stop anywhere, and
the search goes on from the runs that were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Change = dict[str, Any]

#: From a change of the settings and a seed to its score, the higher the better; None if there is no such run yet.
Scores = Callable[[Change, int], float | None]


class Axis(NamedTuple):
    """A setting that is searched.

    Attributes:
        name: of the setting.
        values: to begin with, above 0 and ascending, an odd number of at least three. The grid grows by the factor from
            the first one to the second.
        most: largest number of values that are tried.
    """

    name: str
    values: Sequence[float]
    most: int


class Outcome(NamedTuple):
    """The state of a search.

    Attributes:
        missing: the changes and the seeds of the next runs; empty if the search is over.
        best: the change that is chosen; None until the search is over.
        at_edge: the settings whose best value is at an end of its grid all the same, as the grid may not grow further.
    """

    missing: list[tuple[Change, int]]
    best: Change | None = None
    at_edge: tuple[str, ...] = ()


def search(axes: Sequence[Axis], scores: Scores, seeds: Sequence[int], n_finalists: int) -> Outcome:
    """Returns which runs are needed next, or which settings are the best.

    Args:
        axes: the settings, in the order in which they are searched.
        scores: of the runs that there are.
        seeds: the first one is that of the search, the finalists run with all of them.
        n_finalists: number of settings that do.
    """
    chosen: Change = {axis.name: axis.values[len(axis.values) // 2] for axis in axes}
    tried: list[Change] = []
    at_edge = []
    for axis in axes:
        grid, factor = list(axis.values), axis.values[1] / axis.values[0]
        while True:
            changes = [chosen | {axis.name: value} for value in grid]
            missing = [(change, seeds[0]) for change in changes if scores(change, seeds[0]) is None]
            if missing:
                return Outcome(missing)
            best = max(range(len(grid)), key=lambda index: _score(scores, changes[index], seeds[:1]))
            if 0 < best < len(grid) - 1:
                break
            further = _scaled(grid[best], 1 / factor if best == 0 else factor)
            if further in grid:  # no integer is smaller than 1
                break
            if len(grid) == axis.most:
                at_edge.append(axis.name)
                break
            grid = [further, *grid] if best == 0 else [*grid, further]
        tried += [change for change in changes if change not in tried]
        chosen = changes[best]
    ranked = sorted(tried, key=lambda change: -_score(scores, change, seeds[:1]))[:n_finalists]
    missing = [(change, seed) for change in ranked for seed in seeds[1:] if scores(change, seed) is None]
    if missing:
        return Outcome(missing)
    return Outcome([], max(ranked, key=lambda change: _score(scores, change, seeds)), tuple(at_edge))


def _score(scores: Scores, change: Change, seeds: Sequence[int]) -> float:
    known = [score for seed in seeds if (score := scores(change, seed)) is not None]
    return sum(known) / len(known)


def _scaled(value: float, factor: float) -> float:
    """Returns the next value of a grid; integers stay integers."""
    return max(1, round(value * factor)) if isinstance(value, int) else float(f"{value * factor:.4g}")
