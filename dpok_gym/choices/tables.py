"""The results of choices as tables of texts, for the page and for the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from dpok_gym.choices.report import Report


@dataclass(frozen=True)
class TextTable:
    """A table.

    Attributes:
        title: what it is about.
        note: how to read it.
        header: the names of the columns.
        rows: as many texts in each as there are columns.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def report_tables(report: Report) -> list[TextTable]:
    """Returns the tables of a report, without its disagreements; those without rows are left out."""
    people = tuple(
        (
            person.name,
            str(person.choices),
            str(person.ties),
            str(person.both_bad),
            str(person.skipped),
            "unknown" if person.per_minute is None else f"{person.per_minute:.1f}",
        )
        for person in report.people
    )
    checks = tuple((person.name, str(person.agreement), str(person.left)) for person in report.people)
    agreement = (("everybody", str(report.agreement)),) if report.agreement.total else ()
    sources = tuple(
        (
            source.name,
            str(source.wins),
            str(source.ties),
            str(source.losses),
            f"{source.win_rate:.0%} ({source.interval[0]:.0%} to {source.interval[1]:.0%})",
        )
        for source in report.sources
    )
    tables = [
        TextTable(
            "Choices",
            "A tie says that both images are equally good. The speed is that of the median choice.",
            ("who", "choices", "ties", "both bad", "skipped", "per minute"),
            people,
        ),
        TextTable(
            "How sure people are",
            "The same answer as before, when a pair came again; a reward can hardly agree with people more often. Half "
            "of the chosen images should be left ones. In brackets is the interval of 95 %.",
            ("who", "same answer again", "left image chosen"),
            checks,
        ),
        TextTable(
            "How well people agree",
            "The same answer of two people to the same pair.",
            ("who", "same answer"),
            agreement,
        ),
        TextTable(
            "Which model wins?",
            "How often its image is preferred to one of another model (Bradley-Terry; ties are half a win), with the "
            "interval of 95 %.",
            ("model or run", "wins", "ties", "losses", "win rate"),
            sources,
        ),
    ]
    return [table for table in tables if table.rows]


def disagreement_table(report: Report) -> list[TextTable]:
    """Returns the table of the pairs with different answers; none if there are none."""
    rows = []
    for row in report.disagreements:
        names = [image.name for image in row.images]
        answers = [
            f"{who}: {answer.replace('-', ' ') if isinstance(answer, str) else names[answer]}"
            for who, answer in row.answers
        ]
        rows.append((row.prompt, " / ".join(names), "; ".join(answers)))
    note = "Pairs that two people, or one person twice, answered in different ways; the page /report shows them."
    return [TextTable("Different answers", note, ("prompt", "images", "answers"), tuple(rows))] if rows else []
