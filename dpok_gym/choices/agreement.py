"""The agreement of a person with themselves, and the bound that it sets for a reward."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.stats import binomtest

from dpok_gym.choices.records import Choice


@dataclass(frozen=True)
class Share:
    """``count`` of ``total``, with Wilson's interval of 95 %."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]; NaN of a total of 0."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the interval, see :func:`wilson_interval`."""
        return wilson_interval(self.count, self.total)

    def __str__(self) -> str:
        if not self.total:
            return "none yet"
        low, high = self.interval
        return f"{self.count} of {self.total}, {self.value:.0%} ({low:.0%} to {high:.0%})"


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the ends of the 95 % interval of a share, in [0, 1]; (0, 1) without trials.

    Unlike the normal approximation, it holds for few trials and for shares near 0 and 1.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if not trials:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def repeated_answers(choices: Iterable[Choice]) -> list[tuple[Choice, Choice]]:
    """Returns each repeat, after the choice that it repeats, if both are among the choices and neither was skipped."""
    answered = [choice for choice in choices if choice.outcome is not None]
    by_id = {choice.id: choice for choice in answered if choice.id is not None}
    return [(by_id[choice.repeat_of], choice) for choice in answered if choice.repeat_of in by_id]


def same_answers(pairs: Iterable[tuple[Choice, Choice]]) -> Share:
    """Returns in how many pairs of choices the answer is the same: the same image, or neither of the two."""
    same = [one.favourite == other.favourite for one, other in pairs]
    return Share(sum(same), len(same))


@dataclass(frozen=True)
class SelfAgreement:
    """The agreement of people with their own earlier choices between the same images, as a reward's is measured.

    A reward is measured on the choices that prefer an image. So repeats with a tie are left out here, other than in
    :func:`same_answers` of the report: there, a tie that comes again is the same answer.

    Attributes:
        repeats: number of repeats in which both choices prefer an image.
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


def self_agreement(choices: Iterable[Choice]) -> SelfAgreement:
    """Compares the repeats among the choices with what they repeat, see :func:`repeated_answers`."""
    share = same_answers(
        pair for pair in repeated_answers(choices) if all(choice.preferred is not None for choice in pair)
    )
    low, high = share.interval
    return SelfAgreement(share.total, share.value, (low, high), _ceiling(share.value), (_ceiling(low), _ceiling(high)))


def _ceiling(agreement: float) -> float:
    return (1 + math.sqrt(max(2 * agreement - 1, 0.0))) / 2
