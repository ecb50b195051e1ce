"""A search for settings that has the same rules for every algorithm.

One setting after the other is tried, in the order that is given, with the best values of those before it and the middle
values of those after it. Its grid grows at an end as long as the best value is there. Then the best of all that were
tried run with more seeds. If the winner has a value at an end of its grid, the next value runs with all seeds as well.

The search is a function of the runs that there are: it says which ones are missing. So a sweep can stop anywhere, and
the search goes on from the runs that were kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Change = dict[str, Any]

#: From a change of the settings and a seed to its run; None if there is none yet.
Runs = Callable[[Change, int], Any]

#: From the runs of one change, with one or more seeds, to its rank: the higher the better.
Rank = Callable[[Sequence[Any]], float]


class Axis(NamedTuple):
    """A setting that is searched.

    Attributes:
        name: of the setting.
        values: to begin with, above 0 and ascending, an odd number of at least three. The grid grows by the factor from
            the first one to the second.
        most: largest number of values that are tried.
        limits: the lowest and the highest value that may be tried.
    """

    name: str
    values: Sequence[float]
    most: int
    limits: tuple[float, float] = (0, math.inf)


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


def search(
    axes: Sequence[Axis],
    runs: Runs,
    rank: Rank,
    seeds: Sequence[int],
    n_finalists: int,
    acceptable: float = -math.inf,
) -> Outcome:
    """Returns which runs are needed next, or which settings are the best.

    Args:
        axes: the settings, in the order in which they are searched.
        runs: those that there are.
        rank: of the runs of one change.
        seeds: the first one is that of the search, the finalists run with all of them.
        n_finalists: number of settings that do.
        acceptable: lowest rank that may be chosen. While no finalist has it, the next best setting becomes one, too.
    """

    def missing(changes: Sequence[Change], seeds: Sequence[int]) -> list[tuple[Change, int]]:
        return [(change, seed) for change in changes for seed in seeds if runs(change, seed) is None]

    def rank_of(change: Change, seeds: Sequence[int]) -> float:
        return rank([runs(change, seed) for seed in seeds])

    chosen: Change = {axis.name: axis.values[len(axis.values) // 2] for axis in axes}
    tried: list[Change] = []
    grids: dict[str, list[float]] = {}
    for axis in axes:
        grid = list(axis.values)
        while True:
            changes = [chosen | {axis.name: value} for value in grid]
            if needed := missing(changes, seeds[:1]):
                return Outcome(needed)
            ranks = [rank_of(change, seeds[:1]) for change in changes]
            best = ranks.index(max(ranks))
            further = _beyond(grid[best], grid, axis)
            if further is None or len(grid) == axis.most:
                break
            grid = sorted([*grid, further])
        tried += [change for change in changes if change not in tried]
        chosen, grids[axis.name] = changes[best], grid
    tried.sort(key=lambda change: -rank_of(change, seeds[:1]))
    finalists, others = tried[:n_finalists], tried[n_finalists:]
    while True:
        if needed := missing(finalists, seeds):
            return Outcome(needed)
        final = max(finalists, key=lambda change: rank_of(change, seeds))
        if others and rank_of(final, seeds) < acceptable:
            finalists.append(others.pop(0))
            continue
        ends = [(axis, _beyond(final[axis.name], grids[axis.name], axis)) for axis in axes]
        at_edge = {axis.name: further for axis, further in ends if further is not None}
        open_ends = [axis.name for axis in axes if axis.name in at_edge and len(grids[axis.name]) < axis.most]
        if not open_ends:
            return Outcome([], final, tuple(at_edge))
        for name in open_ends:  # more seeds have moved the best value to an end
            finalists.append(final | {name: at_edge[name]})
            grids[name] = sorted([*grids[name], at_edge[name]])


def _beyond(value: float, grid: Sequence[float], axis: Axis) -> float | None:
    """Returns the value outside a grid next to one at its end; None for other ones, or beyond a limit."""
    factor = axis.values[1] / axis.values[0]
    factors = {grid[0]: 1 / factor, grid[-1]: factor}
    if value not in factors:
        return None
    further = _scaled(value, factors[value])
    low, high = axis.limits
    return further if further not in grid and low <= further <= high else None  # no integer is smaller than 1


def _scaled(value: float, factor: float) -> float:
    """Returns the next value of a grid; integers stay integers."""
    return max(1, round(value * factor)) if isinstance(value, int) else float(f"{value * factor:.4g}")
