"""How often a person agrees with themselves."""

import math
from pathlib import Path

import numpy as np
import pytest

from dpok_gym.choices.agreement import Share, repeated_answers, same_answers, self_agreement, wilson_interval
from dpok_gym.choices.records import Choice

A, B = Path("a.png"), Path("b.png")


def test_wilson_interval():
    # R: prop.test(x, n, correct = FALSE)
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.7224672, 1), abs=1e-6)
    assert wilson_interval(0, 0) == (0, 1)


def test_a_share_says_its_interval():
    assert str(Share(8, 10)) == "8 of 10, 80% (49% to 94%)"
    assert Share(8, 10).interval == wilson_interval(8, 10)
    assert str(Share(0, 0)) == "none yet"
    assert math.isnan(Share(0, 0).value)


def test_a_tie_is_an_answer_for_a_person_and_none_for_a_reward():
    made = [Choice("x", (A, B), None, "tie", id="1"), Choice("x", (A, B), None, "both-bad", repeat_of="1")]
    made += [Choice("x", (A, B), None, "skip", id="2"), Choice("x", (A, B), 0, repeat_of="2")]
    assert repeated_answers(made) == [tuple(made[:2])]
    assert same_answers(repeated_answers(made)) == Share(1, 1)
    assert self_agreement(made).repeats == 0


def test_the_same_image_counts_whatever_its_place():
    first = Choice("x", (A, B), 0, id="1")
    same = Choice("x", (B, A), 1, id="2", repeat_of="1")
    other = Choice("x", (A, B), 1, id="3", repeat_of="1")
    tie = Choice("x", (A, B), None, "tie", id="4", repeat_of="1")
    lost = Choice("x", (A, B), 0, id="5", repeat_of="0")
    found = self_agreement([first, same, other, tie, lost])
    assert (found.repeats, found.agreement) == (2, 0.5)
    assert found.interval == wilson_interval(1, 2)
    assert found.ceiling == 0.5
    nothing = self_agreement([first])
    assert nothing.repeats == 0
    assert math.isnan(nothing.agreement)


def test_the_ceiling_is_the_agreement_with_a_reward_that_never_errs():
    rng = np.random.default_rng(0)
    choices, n, error_rate = [], 4000, 0.1
    for k in range(n):
        errors = rng.random(2) < error_rate
        choices.append(Choice("x", (A, B), int(errors[0]), id=str(k)))
        choices.append(Choice("x", (A, B), int(errors[1]), id=f"{k} again", repeat_of=str(k)))
    found = self_agreement(choices)
    assert found.agreement == pytest.approx(0.82, abs=0.02)
    right = sum(choice.preferred == 0 for choice in choices) / len(choices)
    assert found.ceiling == pytest.approx(right, abs=0.01)
    assert found.ceiling_interval[0] < right < found.ceiling_interval[1]
