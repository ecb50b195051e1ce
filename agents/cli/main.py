"""The command line, ``dpok COMMAND``, with the commands of :data:`COMMANDS`.

Each command is a module of this package with two functions: ``parse`` reads its options, ``run`` does its work. They
are imported once the command is known, and torch once its work begins.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from agents.cli.signals import SIGNALS, exit_code
from dpok_gym.utils.registry import RAISED_BY
from dpok_gym.utils.threads import is_busy

#: The module of each command, and its line in the help.
COMMANDS = {
    "train": ("agents.cli.train", "Fine-tune a text-to-image model with a reward, and compare it with the original."),
    "doctor": ("agents.cli.doctor", "Check a training in minutes, before hours are spent on it."),
    "sample": ("agents.cli.sample", "Draw images for a prompt with a pre-trained or a fine-tuned model."),
    "evaluate": ("agents.cli.evaluate", "Score a run on its training prompts and on prompts that it never saw."),
    "watch": ("agents.cli.watch", "Animate a run: the denoising before and after training, and the training itself."),
    "export": ("agents.cli.export", "Write what a run learned for diffusers, ComfyUI, peft, or as a whole model."),
    "label": ("agents.cli.label", "Draw pairs of images, and open a page on which people choose the better ones."),
    "import-choices": ("agents.cli.import_choices", "Read people's choices from datasets and other tools."),
    "export-choices": ("agents.cli.export_choices", "Write people's choices for other programs."),
    "fit-reward": ("agents.cli.fit_reward", "Learn a reward from people's choices between two images."),
    "serve-reward": ("agents.cli.serve_reward", "Serve a reward over HTTP."),
}


#: What torch says if the memory of the CPU does not suffice: it has no class of errors for it.
_MEMORY_IS_FULL = ("DefaultCPUAllocator", "Storage size calculation overflowed")


def run_process() -> NoReturn:
    """Runs the command of this process, and ends it."""
    code = main()
    if SIGNALS.received is not None or is_busy():
        # Python would wait for other threads, such as one that asks a reward that hangs.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    With DPOK_DEBUG=1 in the environment, an error shows its traceback.

    Args:
        argv: the words after ``dpok``; None for those of the process.

    Returns:
        The exit code: 0, 1 after an error of a user's own code, 2 after one in the input, 130 after Ctrl-C, 143 after
        SIGTERM, 129 after SIGHUP.
    """
    try:
        with SIGNALS.installed():
            code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print("dpok: interrupted", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:  # the reader of a pipe has gone, as head does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # or else Python flushes it at its end, and exits with 120
        return 0
    except Exception as error:
        message = _describe(error)
        if message is None or os.environ.get("DPOK_DEBUG"):
            raise
        print(f"dpok: error: {' '.join(message.split())}", file=sys.stderr)
        if not _raised_by(error):
            return 2
        traceback.print_exception(error)
        return 1


def _run(words: Sequence[str]) -> int:
    """Does what a command line says; returns the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from dpok_gym import __version__

        print(f"dpok {__version__}")
        return 0
    command, options = parse(words)
    return _module(command).run(options)


def _describe(error: Exception) -> str | None:
    """Returns what a user can do about an error; None for one that users do not cause."""
    if code := _raised_by(error):
        return f"{code} raised {type(error).__name__}: {error}; its own traceback follows"
    # Compared by name, because importing torch for its class would take seconds.
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or (isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_IS_FULL)):
        return (
            "the device's memory is full; take fewer or smaller images at once; training also takes less with "
            "--micro-batch-size 1, --gradient-checkpointing and --dtype bfloat16; --dry-run says how much it takes"
        )
    # The classes of the errors that users cause. Their messages say what to do, without a traceback.
    return str(error) if isinstance(error, (ValueError, TypeError, OSError, ImportError)) else None


def _raised_by(error: Exception) -> str:
    """Returns the user's code that raised an error, such as a reward; "" if it was ours."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(RAISED_BY)]
    return notes[0].removeprefix(RAISED_BY) if notes else ""


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Reads a command line, and runs nothing.

    Args:
        argv: the words after ``dpok``.

    Returns:
        The command's name, and its options.

    Raises:
        ValueError: if the command or an option is unknown, or a value cannot be read.
    """
    # For --reward module:name and the like, as python -m does. Not always, since the current folder may be somebody
    # else's run, with a module in it that a library looks for.
    if os.getcwd() not in sys.path and ("--trust" in argv or any(map(_is_found_here, argv))):
        sys.path.append(os.getcwd())
    command = argv[0]
    if command not in COMMANDS:
        from dpok_gym.utils.validation import suggest

        raise ValueError(f"unknown command {command!r}; {suggest(command, COMMANDS)}")
    return command, _module(command).parse(argv[1:])


def _is_found_here(word: str) -> bool:
    """Returns whether an option's value names a ``module:name`` whose module is in the current folder."""
    modules = re.findall(r"(?:^|[,=])\s*([A-Za-z_]\w*)[\w.]*:[A-Za-z_]", word)
    return any(os.path.isfile(f"{name}.py") or os.path.isdir(name) for name in modules)


def _module(command: str) -> Any:
    return importlib.import_module(COMMANDS[command][0])


def _help() -> str:
    """Returns what ``dpok --help`` prints."""
    lines = [
        "usage: dpok [-h] [--version] COMMAND [OPTIONS]",
        "",
        "Fine-tune text-to-image models by reinforcement learning.",
        "",
        "commands:",
    ]
    for name, (_, description) in COMMANDS.items():
        lines.append(f"  {name:<16}{description}")
    lines += ["", "dpok COMMAND --help shows the options of a command."]
    return "\n".join(lines)


if __name__ == "__main__":
    run_process()
