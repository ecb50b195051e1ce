"""What evaluations and fits say, as the run folder keeps it and as tables on the screen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agents.evaluation import Evaluation
from dpok_gym.files import replacing
from dpok_gym.rewards.preference_fit import Measured


def scores_of(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """What the two evaluations say, means over the pictures; None for what was not measured."""
    scores: dict[str, Any] = {"eval_pictures": len(after) if after else 0}
    for when, found in {"before": before, "after": after}.items():
        scores[f"aligned_{when}"] = found.aligned_share if found else None
        scores[f"quality_{when}"] = found.mean("shapes-quality") if found else None
        scores[f"reward_{when}"] = found.mean_reward if found else None
        scores[f"rewards_{when}"] = {name: found.mean(name) for name in found.rewards} if found else {}
    scores["kl_to_pretrained"] = float(after.kl.mean()) if after else None
    return scores


def scores_table(title: str, scores: dict[str, Any]) -> Table:
    """Scores as :func:`scores_of` gives them."""
    table = Table("", title=title, title_justify="left")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    for row in _rows(scores):
        table.add_row(*row)
    return table


def _rows(scores: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if scores["aligned_before"] is not None:
        yield "fully aligned pictures", f"{scores['aligned_before']:.1%}", f"{scores['aligned_after']:.1%}"
    for name, value in scores["rewards_before"].items():
        yield name, f"{value:.3f}", f"{scores['rewards_after'][name]:.3f}"
    yield "reward trained on", f"{scores['reward_before']:.3f}", f"{scores['reward_after']:.3f}"
    yield "KL to pre-trained, nats per picture", "0", f"{scores['kl_to_pretrained']:.2f}"


def calibration_table(held_out: Measured) -> Table:
    """Predicted against observed."""
    title = f"how often the favourite was chosen ({held_out.choices} choices held out)"
    table = Table(title=title, title_justify="left")
    for heading in ("predicted", "observed", "choices"):
        table.add_column(heading, justify="right")
    for predicted, observed, count in zip(held_out.predicted, held_out.observed, held_out.counts, strict=True):
        table.add_row(f"{predicted:.1%}", f"{observed:.1%}", str(count))
    return table


def say(console: Console, text: str) -> None:
    """A line as it is: folders may have brackets, and a command is to be copied."""
    console.print(text, markup=False, soft_wrap=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is whole or not there."""
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
