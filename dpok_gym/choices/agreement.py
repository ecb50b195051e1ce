"""How often a person agrees with themselves, and what that says about the best reward."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.stats import binomtest

from dpok_gym.choices.records import Choice


@dataclass(frozen=True)
class SelfAgreement:
    """The agreement of people with their own earlier choices between the same images.

    Attributes:
        repeats: number of repeats in which both choices prefer an image; those with a tie are left out.
        agreement: share of them that prefer the same image as before, in [0, 1]; NaN without repeats.
        interval: ends of its 95 % interval.
        ceiling: the highest agreement with these people's choices that a reward can be expected to reach. A person who
            errs in a share e of the choices agrees with themselves in a = 1 - 2e + 2e^2 of the repeats, and a reward
            that never errs agrees with the person in 1 - e = (1 + sqrt(2a - 1)) / 2. If some pairs are harder than
            others, it is less, but not below a (if e is at most 1/2 everywhere).
        ceiling_interval: the ceiling at both ends of the interval.
    """

    repeats: int
    agreement: float
    interval: tuple[float, float]
    ceiling: float
    ceiling_interval: tuple[float, float]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the ends of the 95 % interval of a share, in [0, 1]; (0, 1) without trials.

    Unlike the normal approximation, it holds for few trials and for shares near 0 and 1.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if not trials:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def self_agreement(choices: Iterable[Choice]) -> SelfAgreement:
    """Compares each repeat (``repeat_of``) with the choice that it repeats, if that is among the choices."""
    choices = list(choices)
    by_id = {choice.id: choice for choice in choices if choice.id is not None}
    pairs = [(by_id[choice.repeat_of], choice) for choice in choices if choice.repeat_of in by_id]
    favourites = [tuple(each.images[each.preferred] for each in pair if each.preferred is not None) for pair in pairs]
    decided = [pair for pair in favourites if len(pair) == 2]
    n_same = sum(first == second for first, second in decided)
    share = n_same / len(decided) if decided else math.nan
    low, high = wilson_interval(n_same, len(decided))
    return SelfAgreement(len(decided), share, (low, high), _ceiling(share), (_ceiling(low), _ceiling(high)))


def _ceiling(agreement: float) -> float:
    return (1 + math.sqrt(max(2 * agreement - 1, 0.0))) / 2
