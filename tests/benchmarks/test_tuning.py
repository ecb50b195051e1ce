"""The search for settings: what it asks for, and what it chooses."""

import itertools
import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest

from benchmarks.tuning import Axis, Outcome, search

RATE = Axis("learning_rate", [1e-3, 3e-3, 9e-3], 6)
PRICE = Axis("kl_coef", [0.01, 0.02, 0.04], 4)
SEEDS = (100, 101, 102)


def run(
    axes: list[Axis],
    truth: Callable[[dict[str, Any], int], float],
    n_finalists: int = 2,
    acceptable: float = -math.inf,
) -> tuple[Outcome, list]:
    """Makes the runs that a search asks for until it is over; returns its outcome and the runs."""
    made: dict[tuple, float] = {}

    def runs(change: dict[str, Any], seed: int) -> float | None:
        return made.get((*sorted(change.items()), seed))

    while (outcome := search(axes, runs, fmean, SEEDS, n_finalists, acceptable)).missing:
        assert outcome.best is None
        for change, seed in outcome.missing:
            assert runs(change, seed) is None
            made[(*sorted(change.items()), seed)] = truth(change, seed)
    return outcome, list(made)


def test_the_best_of_a_peak() -> None:
    """One setting after the other, each from the best of those before."""

    def truth(change: dict[str, Any], seed: int) -> float:
        return -abs(math.log(change["learning_rate"] / 3e-3)) - abs(math.log(change["kl_coef"] / 0.01))

    outcome, made = run([RATE, PRICE], truth)
    assert outcome == Outcome([], {"learning_rate": 3e-3, "kl_coef": 0.01}, ())
    # Two grids that share a run, the second of which grows by one, and two finalists with two more seeds.
    assert len(made) == 3 + 3 + 2 * 2
    changes = [dict(key[:-1]) for key in made]
    assert all(change["kl_coef"] == 0.02 for change in changes if change["learning_rate"] != 3e-3)


@pytest.mark.parametrize(("peak", "n_tried"), [(1e-4, 6), (5e-4, 5), (8e-2, 6), (1e9, 6)])
def test_a_grid_grows_to_its_best_value(peak: float, n_tried: int) -> None:
    def truth(change: dict[str, Any], seed: int) -> float:
        return -abs(math.log(change["learning_rate"] / peak))

    outcome, made = run([RATE], truth, n_finalists=1)
    values = sorted({dict(key[:-1])["learning_rate"] for key in made})
    assert len(values) == n_tried
    assert all(round(later / earlier, 2) in (3.0, 3.01) for earlier, later in itertools.pairwise(values))
    assert outcome.best is not None
    assert abs(math.log(outcome.best["learning_rate"] / min(peak, values[-1]))) < math.log(3)
    assert outcome.at_edge == (("learning_rate",) if peak == 1e9 else ())


def test_more_seeds_decide_between_the_finalists() -> None:
    """The luckiest run of the search does not win."""

    def truth(change: dict[str, Any], seed: int) -> float:
        lucky = change["learning_rate"] == 3e-3 and seed == SEEDS[0]
        return 5.0 if lucky else {1e-3: 0.0, 3e-3: 0.0, 9e-3: 4.0}.get(change["learning_rate"], -9.0)

    outcome, made = run([RATE], truth)
    assert outcome.best == {"learning_rate": 9e-3}
    assert len(made) == 3 + 2 * 2 + 3  # the winner is at the end of the grid, so the value above it runs as well
    assert run([RATE], truth, n_finalists=1)[0].best == {"learning_rate": 3e-3}


def test_there_are_more_finalists_until_one_is_acceptable() -> None:
    def truth(change: dict[str, Any], seed: int) -> float:
        best = {1e-3: 1.0, 3e-3: 3.0, 9e-3: 2.0}.get(change["learning_rate"], 0.0)
        return -100.0 if best > 1 and seed != SEEDS[0] else best

    assert run([RATE], truth)[0].best == {"learning_rate": 3e-3}
    outcome, made = run([RATE], truth, acceptable=-10.0)
    # The last one is at the end of the grid, so the value below it runs as well.
    assert (outcome.best, len(made)) == ({"learning_rate": 1e-3}, 4 * 3)
    assert run([RATE], lambda *_: -100.0, acceptable=-10.0)[0].best is not None


@pytest.mark.parametrize(("most", "tried", "best"), [(3, [1, 2, 4], 4), (4, [1, 2, 4, 8], 8), (9, [1, 2, 4, 8, 16], 8)])
def test_a_grid_grows_if_more_seeds_move_the_best_value_to_its_end(most: int, tried: list[int], best: int) -> None:
    def truth(change: dict[str, Any], seed: int) -> float:
        return -abs(math.log2(change["n"] / (2.5 if seed == SEEDS[0] else 8)))

    outcome, made = run([Axis("n", [1, 2, 4], most)], truth)
    assert sorted({dict(key[:-1])["n"] for key in made}) == tried
    assert outcome == Outcome([], {"n": best}, ("n",) if best == tried[-1] else ())


def test_integers_stay_integers() -> None:
    axis = Axis("n", [4, 8, 16], 6)
    outcome, made = run([axis], lambda change, seed: -abs(change["n"] - 1), n_finalists=1)
    assert sorted({dict(key[:-1])["n"] for key in made}) == [1, 2, 4, 8, 16]
    assert (outcome.best, outcome.at_edge) == ({"n": 1}, ())


def test_a_grid_stays_within_its_limits() -> None:
    """What cannot be tried is no edge of the search."""
    axis = Axis("n", [4, 8, 16], 6, (2, 16))
    outcome, made = run([axis], lambda change, seed: -abs(change["n"] - 1), n_finalists=1)
    assert sorted({dict(key[:-1])["n"] for key in made}) == [2, 4, 8, 16]
    assert (outcome.best, outcome.at_edge) == ({"n": 2}, ())
    outcome, made = run([axis], lambda change, seed: change["n"], n_finalists=1)
    assert (outcome.best, outcome.at_edge) == ({"n": 16}, ())
