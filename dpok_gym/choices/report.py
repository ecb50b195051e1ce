"""A report of choices: about the people who made them, and about the models whose images they saw.

Letters used for shapes: N comparisons, K sources.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from dpok_gym.choices.agreement import Share, repeated_answers, same_answers
from dpok_gym.choices.pairs import name_origin
from dpok_gym.choices.records import Choice

#: Resamples of the bootstrap, and its seed.
BOOTSTRAP, _SEED = 1000, 0


@dataclass(frozen=True)
class Person:
    """What is known of one person, or of all of them.

    Attributes:
        name: theirs.
        choices: number of choices, skipped ones included.
        ties: of these, images that were alike.
        both_bad: of these, images that were both bad.
        skipped: of these, questions that had no answer.
        per_minute: 60 seconds divided by the median time of a choice; None if no time is known.
        agreement: of the repeats, those with the same answer as before; a tie is an answer too.
        left: of the choices of one image, those of the left one. A share far from one half is a bias.
    """

    name: str
    choices: int
    ties: int
    both_bad: int
    skipped: int
    per_minute: float | None
    agreement: Share
    left: Share


@dataclass(frozen=True)
class Source:
    """A model or a run whose images were compared with those of others.

    Attributes:
        name: the run, or the model.
        wins: comparisons that its image won.
        ties: comparisons without a preferred image.
        losses: comparisons that its image lost.
        win_rate: probability of winning against another source, in [0, 1], by the Bradley-Terry model.
        interval: ends of its 95 % interval, by a bootstrap over the pairs.
    """

    name: str
    wins: int
    ties: int
    losses: int
    win_rate: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Disagreement:
    """A pair with different answers.

    Attributes:
        prompt: of the images.
        images: their paths.
        sha256: their hashes; None if unknown.
        answers: each person's name and answer: 0 or 1 for an image, or why it was neither.
    """

    prompt: str
    images: tuple[Path, Path]
    sha256: tuple[str, str] | None
    answers: tuple[tuple[str, int | str], ...]


@dataclass(frozen=True)
class Report:
    """The results of a file of choices.

    Attributes:
        people: one row for each person, and one for all of them if there are several.
        agreement: of the pairs that two people saw, for each two people, those with the same answer.
        sources: by win rate, best first; empty if all images are from one source, or if some sources were never
            compared with the others, directly or through further ones.
        disagreements: the pairs with different answers, of several people or of one.
    """

    people: tuple[Person, ...]
    agreement: Share
    sources: tuple[Source, ...]
    disagreements: tuple[Disagreement, ...]


def make_report(choices: Sequence[Choice]) -> Report:
    """Computes the results. A tie and "both bad" are the same answer: neither; skipped questions are no answer.

    Args:
        choices: those that were not taken back.
    """
    by_person: dict[str, list[Choice]] = defaultdict(list)
    for choice in choices:
        by_person[choice.who or "unknown"].append(choice)
    people = [_describe_person(name, made) for name, made in sorted(by_person.items())]
    if len(people) > 1:
        people.append(_describe_person("everybody", choices))
    by_pair: dict[Hashable, list[Choice]] = defaultdict(list)
    for choice in choices:
        if choice.outcome is not None:
            by_pair[choice.prompt, frozenset(choice.images)].append(choice)
    return Report(tuple(people), _agreement(by_pair.values()), _rank(choices), tuple(_disagreements(by_pair.values())))


def _describe_person(name: str, made: Sequence[Choice]) -> Person:
    sides = [choice.left == choice.preferred for choice in made if None not in (choice.preferred, choice.left)]
    times = [choice.milliseconds for choice in made if choice.milliseconds]
    reasons = [choice.reason for choice in made]
    return Person(
        name,
        len(made),
        reasons.count("tie"),
        reasons.count("both-bad"),
        reasons.count("skip"),
        60_000 / statistics.median(times) if times else None,
        same_answers(repeated_answers(made)),
        Share(sum(sides), len(sides)),
    )


def _agreement(pairs: Iterable[Sequence[Choice]]) -> Share:
    of_two: list[tuple[Choice, Choice]] = []
    for choices in pairs:
        first: dict[str | None, Choice] = {}  # of each person; repeats are measured apart
        for choice in choices:
            first.setdefault(choice.who, choice)
        of_two += combinations(first.values(), 2)
    return same_answers(of_two)


def _disagreements(pairs: Iterable[Sequence[Choice]]) -> Iterator[Disagreement]:
    for choices in pairs:
        if len({choice.favourite for choice in choices}) < 2:
            continue
        images = choices[0].images
        answers: list[tuple[str, int | str]] = []
        for choice in choices:
            answer = str(choice.reason) if choice.favourite is None else images.index(choice.favourite)
            answers.append((choice.who or "unknown", answer))
        yield Disagreement(choices[0].prompt, images, choices[0].sha256, tuple(answers))


# ------------------------------------------------------------------------------------------------------------ win rates


def _rank(choices: Sequence[Choice]) -> tuple[Source, ...]:
    """Compares the sources by the Bradley-Terry model. A tie is half a win; repeats do not count twice."""
    rows: list[tuple[str, str, float, str]] = []  # first source, second one, share of a win of the first, the pair
    for choice in choices:
        names = [name_origin(origin) for origin in choice.origins or ()]
        if choice.outcome is not None and choice.repeat_of is None and len(set(names)) == 2 and all(names):
            rows.append((names[0], names[1], choice.outcome, str(choice.images)))
    names = sorted({name for row in rows for name in (row[0], row[1])})
    if not names:
        return ()
    first, second = (np.array([names.index(name) for name in of_side]) for of_side in list(zip(*rows, strict=True))[:2])
    outcomes = np.array([row[2] for row in rows])
    graph = coo_array((np.ones(len(rows)), (first, second)), shape=(len(names),) * 2)
    if connected_components(graph, directed=False)[0] > 1:
        return ()
    rates = win_rates(first, second, outcomes, np.unique([row[3] for row in rows], return_inverse=True)[1], len(names))
    sources = []
    for k, name in enumerate(names):
        own = np.concatenate([outcomes[first == k], 1 - outcomes[second == k]])
        wins, ties, losses = ((own == value).sum().item() for value in (1, 0.5, 0))
        low, high = np.quantile(rates[1:, k], [0.025, 0.975]).tolist()
        sources.append(Source(name, wins, ties, losses, rates[0, k].item(), (low, high)))
    return tuple(sorted(sources, key=lambda source: -source.win_rate))


def win_rates(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    outcomes: NDArray[np.float64],
    clusters: NDArray[np.int64],
    n_sources: int,
    resamples: int = BOOTSTRAP,
) -> NDArray[np.float64]:
    """Fits the Bradley-Terry model: source i beats source j with probability sigmoid(s_i - s_j).

    Each two sources that were compared get one more win and one more loss, as in Agresti and Coull's interval: a source
    that won every time would be infinitely strong, and a bootstrap would find no uncertainty in it.

    Args:
        first: (N,) the first source of each comparison, in [0, K).
        second: (N,) the second one.
        outcomes: (N,) share of a win of the first one: 0, 1/2 or 1.
        clusters: (N,) comparisons that are resampled together have the same number, from 0: those of the same pair.
        n_sources: K.
        resamples: R.

    Returns:
        (1 + R, K): mean probability of winning against the other sources; first of all data, then of the resamples.
    """
    compared = np.unique(np.sort(np.stack([first, second]), axis=0), axis=1)  # (2, M)
    first, second = (np.concatenate([one, *[other] * 2]) for one, other in zip((first, second), compared, strict=True))
    outcomes = np.concatenate([outcomes, *(np.full(compared.shape[1], value) for value in (1.0, 0.0))])
    n_clusters = clusters.max() + 1
    added = np.arange(2 * compared.shape[1]) + n_clusters
    clusters = np.concatenate([clusters, added])
    n_clusters += len(added)
    rng = np.random.default_rng(_SEED)
    counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples)
    weights = np.concatenate([np.ones((1, n_clusters)), counts])[:, clusters]
    rates = np.empty((1 + resamples, n_sources))
    strengths = np.zeros(n_sources)
    for row, weight in enumerate(weights):
        wins = np.zeros((n_sources, n_sources))
        np.add.at(wins, (first, second), weight * outcomes)
        np.add.at(wins, (second, first), weight * (1 - outcomes))
        fitted = _fit_strengths(wins, strengths)
        strengths = fitted if row == 0 else strengths  # the resamples begin near their ends
        probability = expit(fitted[:, None] - fitted)
        rates[row] = (probability.sum(axis=1) - 0.5) / (n_sources - 1)
    return rates


def _fit_strengths(wins: NDArray[np.float64], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the strengths (K,) of the greatest likelihood, with mean 0.

    Args:
        wins: (K, K) how often source i has won against source j.
        start: (K,) where to begin.
    """

    def loss(strengths: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        gaps = strengths[:, None] - strengths
        surprise = wins * expit(-gaps)
        # The last term keeps sources at 0 that a resample leaves out; it is far below one comparison.
        value = (wins * np.logaddexp(0, -gaps)).sum() + 1e-3 * (strengths**2).sum()
        return float(value), surprise.sum(axis=0) - surprise.sum(axis=1) + 2e-3 * strengths

    fitted = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return fitted - fitted.mean()
