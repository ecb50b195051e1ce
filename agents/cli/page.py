"""The page of a run: ``index.html`` in its folder, one file that shows the figures, the numbers and the settings."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agents.cli.config import Config
from agents.cli.run_folder import BEFORE_AFTER, HELD_OUT, LEARNING_CURVE, OPTIMUM, PAGE
from agents.cli.tables import score_rows
from dpok_gym.utils.files import write_text

#: The animations of ``dpok watch``.
DENOISING, TRAINING = "denoising.gif", "training.gif"

#: The figures, in the order of the page, with their headings and the answers to what a reader would ask.
_FIGURES = {
    BEFORE_AFTER: (
        "Before and after",
        "Images of the same seeds, before and after training: the first ones of the evaluation, or one for each of its "
        "prompts if there are many. They are not selected.",
    ),
    LEARNING_CURVE: (
        "Learning",
        "How the images of the training change. The curves begin with the pre-trained model. The evaluations, of other "
        "images, are the dashed line before and the diamond after training.",
    ),
    HELD_OUT: (
        "Prompts that the training never showed",
        "The same seeds before and after: what the training changed beside what it was asked for.",
    ),
    OPTIMUM: (
        "Beside the best possible policy",
        "Here the best value of E[r] - beta KL is known. The three models draw from the same noise.",
    ),
    DENOISING: (
        "Denoising, step by step",
        "The same noise becomes an image, with the pre-trained and with the fine-tuned model: each state x_t, and "
        "below it the image x_0 that the model expects of it.",
    ),
    TRAINING: ("Training", "The images of the same seeds while the model learns."),
}


def write_page(folder: Path, summary: Mapping[str, Any], config: Config) -> Path:
    """Writes the page of a run; its figures are in the file itself.

    Args:
        folder: the run folder, with the figures that there are.
        summary: of the run.
        config: its settings.

    Returns:
        The file.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = templates.get_template("run.html").render(
        summary=summary,
        scores=list(score_rows(summary, summary["choices"] is not None)) if not summary["interrupted"] else [],
        figures=list(_figures(folder)),
        settings=_settings(config),
    )
    write_text(folder / PAGE, text)
    return folder / PAGE


def _figures(folder: Path) -> Iterator[dict[str, str]]:
    for name, (heading, caption) in _FIGURES.items():
        path = folder / name
        if path.is_file():
            content = base64.b64encode(path.read_bytes()).decode()
            yield {
                "name": name,
                "heading": heading,
                "caption": caption,
                "source": f"data:image/{path.suffix[1:]};base64,{content}",
            }


def _settings(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the settings by group, as texts."""
    groups: dict[str, dict[str, Any]] = {"run": {}}
    titles = {"env_kwargs": "environment", "algo_kwargs": "algorithm", "policy_kwargs": "policy"}
    for name, value in asdict(config).items():
        if name in titles:
            groups[titles[name]] = {key: _text(entry) for key, entry in value.items()}
        else:
            groups["run"][name] = _text(value)
    return groups


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
