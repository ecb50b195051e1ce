"""``dpok export-choices``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.cli.arguments import parse_options
from dpok_gym.choices.formats import Format


@dataclass
class ExportChoices:
    """Write people's choices for other programs, with copies of the images.

    No format holds all that choices.jsonl does; what each loses is in docs/guides/choices_formats.md. Answers that the
    format has not, such as ties, are counted and left out.
    """

    choices: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """JSONL file with a choice on each line."""
    format: Format
    """Format to write."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write, empty or new."""


def parse(argv: Sequence[str]) -> ExportChoices:
    """Reads the options."""
    return parse_options(ExportChoices, "dpok export-choices", argv)


def run(options: ExportChoices) -> int:
    """Writes the choices in another format; returns the exit code."""
    from rich.console import Console

    from agents.cli.tables import tally_table
    from dpok_gym.choices.formats import export_choices
    from dpok_gym.choices.records import read_choices

    tally = export_choices(read_choices(options.choices), options.format, options.out)
    Console().print(tally_table(f"what was written into {options.out}", tally))
    return 0
