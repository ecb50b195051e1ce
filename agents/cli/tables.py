"""The results of evaluations and fits: as JSON in the folders, and as tables on the screen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agents.common.doctor import Finding
from agents.common.evaluation import Evaluation
from dpok_gym.choices.agreement import SelfAgreement
from dpok_gym.choices.formats import Tally
from dpok_gym.rewards.preference.fit import Measured
from dpok_gym.utils.files import write_text


def scores_of(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """Returns the scores of two evaluations, as means over their images.

    Args:
        before: images of the pre-trained model; None if there are none, which gives a score of None.
        after: images of the fine-tuned model.
    """
    scores: dict[str, Any] = {"eval_images": len(after) if after else 0}
    for when, evaluation in {"before": before, "after": after}.items():
        scores |= _scores_of_one(when, evaluation)
    scores["kl_to_pretrained"] = float(after.kl.mean()) if after else None
    scores["late_drift"] = after.late_drift if after else None
    return scores


def _scores_of_one(when: str, evaluation: Evaluation | None) -> dict[str, Any]:
    if evaluation is None:
        return {f"aligned_{when}": None, f"quality_{when}": None, f"reward_{when}": None, f"rewards_{when}": {}}
    quality = evaluation.quality_reward
    return {
        f"aligned_{when}": evaluation.aligned_share,
        f"quality_{when}": None if quality is None else evaluation.mean(quality),
        f"reward_{when}": evaluation.mean_reward,
        f"rewards_{when}": {name: evaluation.mean(name) for name in evaluation.rewards},
    }


def scores_table(title: str, scores: dict[str, Any], from_choices: bool = False) -> Table:
    """Returns a table of scores.

    Args:
        title: above the table.
        scores: what :func:`scores_of` returns.
        from_choices: whether the model learned from a file of choices, so that the reward only measures it.
    """
    table = Table("", title=title, title_justify="left")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    for row in score_rows(scores, from_choices):
        table.add_row(*row)
    return table


def score_rows(scores: Mapping[str, Any], from_choices: bool) -> Iterator[tuple[str, str, str]]:
    """Yields name, number before and number after training; arguments as for :func:`scores_table`."""
    if scores["aligned_before"] is not None:  # only embedded worlds have a judge
        yield "fully aligned images", f"{scores['aligned_before']:.1%}", f"{scores['aligned_after']:.1%}"
    before = scores["rewards_before"]  # of an older run with other rewards, perhaps
    for name, value in scores["rewards_after"].items():
        yield name, f"{before[name]:.3f}" if name in before else "", f"{value:.3f}"
    yield (
        f"reward {'(not ' * from_choices}trained on{')' * from_choices}",
        f"{scores['reward_before']:.3f}",
        f"{scores['reward_after']:.3f}",
    )
    if scores.get("objective") is not None:
        objective = scores["objective"]
        name = f"reward - {objective['nat_price']:g} KL (the best possible is {objective['optimum']:.3f})"
        yield name, f"{objective['before']:.3f}", f"{objective['after']:.3f}"
        regret_before = objective["optimum"] - objective["before"]
        yield "regret: distance to the best possible value", f"{regret_before:.3f}", f"{objective['regret']:.3f}"
    yield "KL to pre-trained, nats per image", "0", f"{scores['kl_to_pretrained']:.2f}"
    yield "drift of the steps without exploration", "0", f"{scores['late_drift']:.3f}"


def calibration_table(held_out: Measured) -> Table:
    """Returns a table of the predicted and the observed shares of choices."""
    title = f"how often the favourite was chosen ({held_out.choices} choices held out, {held_out.ties} of them ties)"
    table = Table(title=title, title_justify="left")
    for heading in ("predicted", "observed", "choices"):
        table.add_column(heading, justify="right")
    for predicted, observed, count in zip(held_out.predicted, held_out.observed, held_out.counts, strict=True):
        table.add_row(f"{predicted:.1%}", f"{observed:.1%}", str(count))
    return table


def describe_agreement(held_out: Measured, people: SelfAgreement) -> str:
    """Returns the agreement with the held-out choices, its interval, and what of it people reach themselves."""
    (low, high), n = held_out.interval, held_out.choices - held_out.ties
    error = held_out.calibration_error
    lines = [
        f"agreement {held_out.agreement:.1%} in {n} choices (95 % interval {low:.0%} to {high:.0%}), loss "
        f"{held_out.loss:.3f} nats, expected calibration error {error:.3f}"
    ]
    if people.repeats:
        (low, high), (least, most) = people.interval, people.ceiling_interval
        self_agreement = f"{people.agreement:.1%} of {people.repeats} repeats without ties ({low:.0%} to {high:.0%})"
        lines += [
            f"people agree with themselves in {self_agreement}; so a reward that never errs would agree with them in "
            f"{people.ceiling:.0%} at most ({least:.0%} to {most:.0%})"
        ]
    else:
        lines.append("there are no repeats of a choice, so what a perfect reward would reach is not known")
    return "\n".join(lines)


def tally_table(title: str, tally: Tally) -> Table:
    """Returns a table of the choices that were imported or exported, and of those that were left out."""
    table = Table("", title=title, title_justify="left")
    table.add_column("number", justify="right")
    numbers = {"choices": tally.choices, "ties among them": tally.ties, "skipped among them": tally.skips}
    numbers |= {"images": len(tally.images), "people": len(tally.people)}
    numbers |= {f"left out: {reason}": n for reason, n in tally.left_out.items()}
    for name, number in numbers.items():
        table.add_row(name, f"{number:,}")
    return table


def describe_finding(finding: Finding) -> str:
    """Returns the lines of a finding: what was measured and what is normal; and what to do, unless all is well."""
    lines = [f"{finding.status.upper():<12}{finding.name}: {finding.measured}", f"{'':12}normal: {finding.normal}"]
    if finding.advice and finding.status not in ("ok", "not checked"):
        lines.append(f"{'':12}what to do: {finding.advice}")
    return "\n".join(lines)


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    # Folders may have brackets in their names, which rich would read as markup; and users copy commands of any length.
    console.print(text, markup=False, soft_wrap=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that is whole or not there."""
    write_text(path, json.dumps(content, indent=2) + "\n")
