"""``dpok doctor``: a check-up of a training, before hours are spent on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from agents.cli import train
from agents.cli.arguments import UsageError, parse_some_options
from agents.cli.config import Config
from agents.cli.tables import describe_finding, say, write_json
from agents.common.doctor import Finding, Status, check_prompts, examine, find_refused
from dpok_gym.prompts import load_prompts
from dpok_gym.vector_env import find_model_of_env

_HELP = """usage: dpok doctor [OPTIONS OF dpok train] [--report FILE]

Check a training in minutes, before hours are spent on it: its reward, prompts, first update, memory and time. It takes
the options of dpok train, which follow. It writes nothing, but for a report in JSON if --report names a file. The exit
code is 1 if a check has failed.
"""


@dataclass
class OwnOptions:
    """The option that ``dpok train`` does not have."""

    report: Path | None = None


@dataclass
class Doctor:
    """The options of ``dpok doctor``, as :func:`parse` reads them.

    Attributes:
        config: the settings of the training.
        report: the file that the findings are written to; None for none.
    """

    config: Config
    report: Path | None


def parse(argv: Sequence[str]) -> Doctor:
    """Reads the options of ``dpok train``, and ``--report``.

    Raises:
        ValueError: if an option, or a value, is wrong.
    """
    if {"-h", "--help"} & set(argv):
        print(_HELP)
    own = parse_some_options(OwnOptions, argv)
    options = train.parse(_without_report(argv))
    if options.resume_from is not None or options.out is not None or options.is_dry:
        raise UsageError(
            "dpok doctor checks a new training, and writes no run folder: leave out --out, --resume and --dry-run"
        )
    return Doctor(options.config, own.report)


def _without_report(argv: Sequence[str]) -> list[str]:
    """Returns the words that ``dpok train`` knows."""
    words, rest = list(argv), []
    while words:
        word = words.pop(0)
        if word == "--report":
            words = words[1:]
        elif not word.startswith("--report="):
            rest.append(word)
    return rest


def run(options: Doctor) -> int:
    """Checks the training and prints what was found; returns the exit code."""
    console = Console()
    say(console, "a check-up takes about as long as 64 images of the training")
    findings: list[Finding] = []
    for finding in _examine(options.config):
        findings.append(finding)
        say(console, describe_finding(finding))
    counts = Counter(finding.status for finding in findings)
    say(console, ", ".join(f"{counts[status]} {status}" for status in get_args(Status) if counts[status]))
    if options.report is not None:
        write_json(options.report, {"findings": [asdict(finding) for finding in findings]})
    return int(any(finding.status == "failed" for finding in findings))


def _examine(config: Config) -> Iterator[Finding]:
    """Checks the training that a config describes. The environment would refuse wrong prompts, so they come first."""
    settings = config.env_kwargs
    model = find_model_of_env({**settings, "device": config.device})
    prompts = load_prompts(settings["prompts"])
    asked = model, prompts.train, settings["max_prompt_bytes"], settings["long_prompts"] == "skip"
    yield check_prompts(*asked)
    refused = find_refused(*asked)
    if len(refused) < len(prompts.train):
        env = config.make_env(config.n_envs, prompts=prompts.without(refused) if refused else prompts)
        yield from examine(config.make_agent(env), config.images, config.eval_images)
