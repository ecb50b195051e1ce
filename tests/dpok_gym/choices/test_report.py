"""The results: agreement, position bias, speed, win rates."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from dpok_gym.choices.agreement import Share
from dpok_gym.choices.records import Choice
from dpok_gym.choices.report import make_report, win_rates
from dpok_gym.choices.tables import disagreement_table, report_tables

RUNS = ({"model": "shapes", "run": None}, {"model": "shapes", "run": "runs/a"})


def choice(number, preferred, who="ada", **fields):
    """Makes a choice between the images of a pair; ``preferred`` is an image, or why there is none."""
    images = (Path(f"{number}a.png"), Path(f"{number}b.png"))
    reason = preferred if isinstance(preferred, str) else None
    fields = {"id": f"{who}{number}", "left": 0, "sha256": (f"{number}a", f"{number}b")} | fields
    return Choice("a red star", images, None if reason else preferred, reason, who, **fields)


def repeat(number, preferred, who="ada"):
    return choice(number, preferred, who, id=f"{who}{number}again", repeat_of=f"{who}{number}", left=1)


def test_what_is_known_of_a_person():
    made = [choice(k, k % 2, milliseconds=1000 * (k + 1)) for k in range(5)]
    made += [
        choice(5, "tie"),
        choice(6, "both-bad"),
        choice(7, "skip"),
        repeat(0, 0),
        repeat(1, "tie"),
        repeat(5, "both-bad"),
    ]
    made += [choice(8, 1, left=None), repeat(7, 0), choice(9, 1, id="x", repeat_of="undone")]
    (person,) = make_report(made).people
    assert (person.name, person.choices, person.ties, person.both_bad, person.skipped) == ("ada", 14, 2, 2, 1)
    assert person.per_minute == 20
    assert person.agreement == Share(2, 3)  # a tie and "both bad" are both neither; what was skipped is not compared
    assert person.left == Share(3, 8)


def test_agreement_between_people():
    made = [choice(0, 0), choice(0, 0, "bob"), choice(0, 1, "eva"), choice(1, 0), choice(1, "skip", "bob")]
    made += [repeat(0, 1), choice(2, "tie"), choice(2, "both-bad", "bob"), choice(3, 1)]
    report = make_report(made)
    assert report.agreement == Share(2, 4)
    assert [person.name for person in report.people] == ["ada", "bob", "eva", "everybody"]
    (row,) = report.disagreements
    assert row.answers == (("ada", 0), ("bob", 0), ("eva", 1), ("ada", 1))
    (table,) = disagreement_table(report)
    assert table.rows == (("a red star", "0a.png / 0b.png", "ada: 0a.png; bob: 0a.png; eva: 0b.png; ada: 0b.png"),)
    texts = [table.title for table in report_tables(report)]
    assert texts == ["Choices", "How sure people are", "How well people agree"]


def test_the_same_images_in_the_other_order_are_the_same_pair():
    images = (Path("a.png"), Path("b.png"))
    one, other = Choice("x", images, 0, who="ada"), Choice("x", images[::-1], 1, who="bob")
    report = make_report([one, other])
    assert report.agreement == Share(1, 1)
    assert not report.disagreements


def test_nothing_is_known_without_choices():
    report = make_report([])
    assert (report.people, report.sources, report.disagreements) == ((), (), ())
    assert report_tables(report) == []


def test_win_rates_of_two_models():
    made = [choice(k, 1, origins=RUNS) for k in range(12)] + [choice(k, 0, origins=RUNS) for k in range(12, 16)]
    made += [choice(k, "tie", origins=RUNS) for k in range(16, 20)] + [repeat(k, 1) for k in range(5)]
    run, pre_trained = make_report(made).sources
    assert (run.name, run.wins, run.ties, run.losses) == ("runs/a", 12, 4, 4)
    assert (pre_trained.name, pre_trained.wins, pre_trained.losses) == ("shapes", 4, 12)
    assert run.win_rate == pytest.approx((12 + 2 + 1) / (20 + 2), abs=1e-3)  # one more win and one more loss
    assert run.interval[0] < run.win_rate < run.interval[1] < 1
    assert 0.3 < run.interval[1] - run.interval[0] < 0.45
    assert run.interval == pytest.approx(tuple(1 - end for end in pre_trained.interval[::-1]))


def test_win_rates_of_many_models_find_what_made_the_choices():
    rng = np.random.default_rng(0)
    strengths = np.linspace(-1.5, 1.5, 4)
    first = rng.integers(4, size=2000)
    second = (first + rng.integers(1, 4, size=2000)) % 4
    outcomes = (rng.random(2000) < expit(strengths[first] - strengths[second])).astype(float)
    rates = win_rates(first, second, outcomes, np.arange(2000), 4, resamples=100)
    true = (expit(strengths[:, None] - strengths).sum(axis=1) - 0.5) / 3
    np.testing.assert_allclose(rates[0], true, atol=0.03)
    assert (np.quantile(rates[1:], 0.005, axis=0) < true).all()
    assert (np.quantile(rates[1:], 0.995, axis=0) > true).all()


def test_the_choices_of_one_pair_are_resampled_together():
    first, second, outcomes = np.zeros(100, int), np.ones(100, int), np.repeat([0.0, 1.0], 50)
    alone = win_rates(first, second, outcomes, np.arange(100), 2)
    together = win_rates(first, second, outcomes, np.arange(100) // 10, 2)
    assert together[1:, 0].std() > 2 * alone[1:, 0].std()


def test_models_that_were_never_compared_have_no_win_rates():
    def of(*runs):
        return tuple({"model": "shapes", "run": run} for run in runs)

    apart = [choice(0, 0, origins=of("a", "b")), choice(1, 0, origins=of("c", "d"))]
    assert make_report(apart).sources == ()
    assert len(make_report([*apart, choice(2, 1, origins=of("b", "c"))]).sources) == 4
    assert make_report([choice(0, 0, origins=of("a", "a")), choice(1, 0)]).sources == ()
