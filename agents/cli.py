"""The command line: ``dpok train``, ``sample``, ``evaluate``, ``fit-reward`` and ``serve-reward``.

What the commands do is in :mod:`agents.commands`; that module loads torch, so it is imported once a command has been
read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from agents.options import Evaluate, FitReward, Sample, ServeReward, Train

COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "fit-reward": FitReward,
    "serve-reward": ServeReward,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 after a mistake in the input, 130 after Ctrl-C.

    With DPOK_DEBUG=1 in the environment, such a mistake shows where it was found.
    """
    options = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="dpok",
        description="Fine-tune text-to-image models by reinforcement learning.",
        args=argv,
    )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for --reward module:name, which python -m would find there too
    try:
        from agents import commands

        name = next(name for name, kind in COMMANDS.items() if kind is type(options))
        return getattr(commands, name.replace("-", "_"))(options)
    except KeyboardInterrupt:
        print("dpok: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("DPOK_DEBUG"):
            raise
        print(f"dpok: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" or os.environ.get("DPOK_DEBUG"):  # torch's, not imported here
            raise
        advice = "training takes less with --micro-batch-size auto, --gradient-checkpointing and --dtype bfloat16"
        print(f"dpok: error: the device's memory is full; {advice}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
