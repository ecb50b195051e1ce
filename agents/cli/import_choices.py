"""``dpok import-choices``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.cli.arguments import default_hint, parse_options
from dpok_gym.choices.formats import Format


@dataclass
class ImportChoices:
    """Read people's choices from datasets and other tools, for dpok fit-reward.

    The folder gets choices.jsonl, and the images that are inside Parquet files. Images that are files stay where they
    are. Comparisons without an answer are counted and left out.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE|FOLDER")]
    """File to read, or folder whose files are all read."""
    format: Format
    """Format of the file."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; it must not hold choices already."""
    images: Annotated[Path | None, default_hint("FOLDER", "that of the file, or the folder to read")] = None
    """Folder that the paths of the images are relative to."""


def parse(argv: Sequence[str]) -> ImportChoices:
    """Reads the options."""
    return parse_options(ImportChoices, "dpok import-choices", argv)


def run(options: ImportChoices) -> int:
    """Writes the choices in our form; returns the exit code."""
    from rich.console import Console

    from agents.cli.tables import say, tally_table
    from dpok_gym.choices.formats import FILE_NAME, import_choices
    from dpok_gym.utils.files import locked

    with locked(options.out):
        tally = import_choices(options.source, options.format, options.out, options.images)
    console = Console()
    console.print(tally_table("what was read", tally))
    say(console, f"learn from it with: dpok fit-reward {options.out / FILE_NAME} --out my_reward")
    return 0
