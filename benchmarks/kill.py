"""Kills runs at any moment, resumes them, and compares them with whole ones: ``python -m benchmarks.kill``.

Each case is a command that writes a folder: ``dpok train`` with an algorithm on an embedded world, or ``dpok
fit-reward``. It runs once without a kill. Then it is killed by SIGKILL, once

- at each of its file operations in the folder: before a file is opened, renamed or removed or a folder is made, and in
  the middle of what is written into a file, half of which is then there;
- at ``--kills`` random moments.

After each kill the command is resumed. The folder must then equal that of the whole run, but for times: weights and
optimiser, the state of the checkpoints, log rows, TensorBoard points, evaluation, LoRA, figures, page and summary.

Each process is a fork of this one, which has imported everything: a start costs milliseconds. The results are in
``results/kill.json``; a case that is there, with as many kills, is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from agents.cli.config import FILE_NAME
from agents.cli.logs import read_log
from agents.cli.main import main as dpok
from agents.cli.run_folder import load_evaluation
from agents.cli.tables import say
from dpok_gym.models import clear_model_cache
from dpok_gym.utils.files import write_text

RESULTS = Path(__file__).parent / "results" / "kill.json"

_TINY = ["--num-inference-steps", "2", "--images", "8", "--images-per-iteration", "2", "--eval-images", "2"]
_TINY += ["--checkpointing-steps", "2", "--device", "cpu"]

#: Algorithms, and their options.
ALGORITHMS: dict[str, list[str]] = {
    "dpok": ["--use-critic", "--normalize-rewards"],
    "ddpo": [],
    "grpo": ["--group-size", "2"],
    "draft": ["--reward", "benchmarks.kill:Brightness", "--batch-size", "1"],
    "sft": ["--n-gradient-steps", "4", "--log-every", "1", "--batch-size", "2"],
}
#: Embedded worlds, and the options of their policies; all weights of the mixture's small network are trained.
ENVIRONMENTS: dict[str, list[str]] = {
    "DPOK-Mixture-v0": [],
    "DPOK-Shapes-v0": ["--lora-rank", "2", "--target-modules", "attention"],
}
FIT_REWARD = "fit-reward"


class Brightness:
    """The mean of an image, a reward with a gradient; the embedded worlds' own judges have none."""

    differentiable = True

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the mean of each image (B, 3, H, W), (B,)."""
        return images.mean((1, 2, 3))

    __call__ = score


@dataclass(frozen=True)
class Case:
    """A command that writes a folder.

    Attributes:
        name: for the table.
        words: the command, without ``--out``.
    """

    name: str
    words: list[str]

    def start(self, folder: Path) -> int:
        """Runs the command; returns its exit code."""
        return dpok([*self.words, "--out", str(folder)])

    def resume(self, folder: Path) -> int:
        """Goes on with what a killed process left; returns the exit code."""
        # Before the config is written, only the command itself knows the settings.
        if self.words[0] == "train" and (folder / FILE_NAME).is_file():
            return dpok(["train", "--resume", "--trust", "--out", str(folder)])
        return self.start(folder)


@dataclass
class Outcome:
    """The outcome of the kills of a case.

    Attributes:
        case: its name.
        operations: file operations in the folder, each of which got a kill.
        kills: kills at random moments.
        killed: processes that were killed.
        resumed: those that went on to the end.
        equal: those whose folder then equals that of the whole run.
        failures: the kills that did not; see :func:`try_kill`.
    """

    case: str
    operations: int
    kills: int
    killed: int = 0
    resumed: int = 0
    equal: int = 0
    failures: list[str] = field(default_factory=list)


class FileOperations:
    """Counts the operations on the files of a folder from now on, and kills the process at one of them.

    Args:
        folder: the folder; others are not watched.
        kill_at: number of the operation, from 1; 0 for none.
    """

    def __init__(self, folder: Path, kill_at: int = 0) -> None:
        self._folder, self._kill_at = os.path.abspath(folder), kill_at
        self._written: tuple[str, int] | None = None
        #: What was done, in order.
        self.seen: list[str] = []
        write = safetensors.torch.serialize_file

        def serialize(tensors: Any, path: Any, metadata: Any = None) -> None:  # in Rust, which has no audit events
            self._begin_write(str(path))
            write(tensors, path, metadata=metadata)

        setattr(safetensors.torch, "serialize_file", serialize)  # noqa: B010 (mypy refuses an assignment)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes) and self._is_inside(path):
                if flags & (os.O_WRONLY | os.O_RDWR):
                    self._begin_write(os.fsdecode(path))
                else:
                    self._end_write()
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            in_removal = event in ("os.remove", "os.rmdir") and args[-1] != -1  # rmtree's, relative to a folder
            if in_removal or self._is_inside(args[0]):
                self._end_write()
                self._note(event.removeprefix("os."), os.fsdecode(args[0]))

    def _is_inside(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self._folder)

    def _begin_write(self, path: str) -> None:
        self._end_write()
        self._note("open", path)
        self._written = path, os.path.getsize(path) if os.path.exists(path) else 0

    def _end_write(self) -> None:
        """Counts what was written since the latest file was opened."""
        if self._written is None:
            return
        (path, before), self._written = self._written, None

        def cut_in_half() -> None:
            os.truncate(path, (before * path.endswith(".csv") + os.path.getsize(path)) // 2)  # rows are appended

        self._note("write", path, cut_in_half)

    def _note(self, operation: str, path: str, damage: Callable[[], None] = lambda: None) -> None:
        self.seen.append(f"{operation} {os.path.relpath(path, self._folder)}")
        if len(self.seen) == self._kill_at:
            self._kill_at = 0
            damage()
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(function: Callable[[], int | None]) -> int:
    """Runs a function in a fork of this process; returns its exit code, or minus the signal that ended it."""
    return _wait(_fork(function))


def _fork(function: Callable[[], int | None]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    # That of the parent is shared by all its forks, and one that is killed may hold it for ever.
    tqdm.set_lock(threading.RLock())
    try:
        code = function() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fingerprint(folder: Path) -> dict[str, str]:
    """Returns what two folders must have in common: the content of each file, without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "tfevents" not in path.name:  # read as a whole, with the folder
            try:
                found[str(path.relative_to(folder))] = _content(path)
            except (OSError, ValueError, KeyError) as error:
                found[str(path.relative_to(folder))] = f"damaged: {error}"
    return found


def _content(path: Path) -> str:
    if path.is_dir():
        return _points(path) if path.name == "tensorboard" else "folder"
    if path.suffix == ".csv":
        rows = read_log(path)
        return str([{key: row[key] for key in sorted(row) if not key.startswith("time/")} for row in rows])
    if path.name == "trainer_state.json":
        return json.dumps(json.loads(path.read_text(encoding="utf-8"))["agent"], sort_keys=True)
    if path.name == "summary.json":
        return json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"seconds": 0})
    if path.suffix == ".html":
        text = re.sub("[0-9,]+ seconds of training", "", path.read_text(encoding="utf-8"))
        return hashlib.sha256(text.encode()).hexdigest()
    if path.suffix == ".png":
        return _digest(np.asarray(Image.open(path)))
    if path.suffix == ".npz":
        evaluation = load_evaluation(path)
        arrays = [value for value in vars(evaluation).values() if isinstance(value, np.ndarray)]
        return str([_digest(array) for array in (*arrays, *evaluation.rewards.values())])
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _points(folder: Path) -> str:
    """Returns the points and the images of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    points: dict[str, Any] = {}
    for name in sorted(tags["scalars"]):
        if not name.startswith("time/"):
            points[name] = [(event.step, event.value) for event in events.Scalars(name)]
    for name in sorted(tags["images"]):
        points[name] = [
            (image.step, hashlib.sha256(image.encoded_image_string).hexdigest()) for image in events.Images(name)
        ]
    return str(points)


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Returns the names under which two fingerprints differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def operations_of(case: Case, folder: Path) -> list[str]:
    """Makes the whole run in a child; returns its file operations."""
    listed = folder.with_suffix(".operations")

    def whole() -> int:
        operations = FileOperations(folder)
        code = case.start(folder)
        listed.write_text(json.dumps(operations.seen))
        return code

    code = in_child(whole)
    if code:
        raise RuntimeError(f"the whole run of {case.name} ended with the exit code {code}")
    return json.loads(listed.read_text())


def kill_at_operation(case: Case, folder: Path, number: int) -> int:
    """Runs a case in a child that is killed at a file operation; returns how it ended, see :func:`in_child`."""

    def killed() -> int:
        FileOperations(folder, number)
        return case.start(folder)

    return in_child(killed)


def kill_after(case: Case, folder: Path, seconds: float) -> int:
    """Runs a case in a child that is killed after some time; returns how it ended, see :func:`in_child`."""
    process = _fork(lambda: case.start(folder))
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)  # no error if it has ended, as it is waited for below
    return _wait(process)


def try_kill(outcome: Outcome, case: Case, folder: Path, whole: Path, kill: Callable[[], int], where: str) -> None:
    """Kills, resumes and compares; adds to the outcome."""
    shutil.rmtree(folder, ignore_errors=True)
    if kill() != -signal.SIGKILL:
        return
    outcome.killed += 1
    code = in_child(lambda: case.resume(folder))
    differing = differences(fingerprint(folder), fingerprint(whole))
    is_complete = code == 2 and not differing  # it was killed after its last file
    outcome.resumed += code == 0 or is_complete
    outcome.equal += not differing
    if differing or not (code == 0 or is_complete):
        outcome.failures.append(f"{where}: exit code {code}, differs in {', '.join(differing) or 'nothing'}")


def run_case(case: Case, n_kills: int, n_operations: int | None, log: Callable[[str], None]) -> Outcome:
    """Kills a case at its file operations and at random moments.

    Args:
        case: the command.
        n_kills: random moments.
        n_operations: file operations, spread evenly; None for all.
        log: gets a line now and then.
    """
    with tempfile.TemporaryDirectory() as name:
        whole, folder = Path(name) / "whole", Path(name) / "killed"
        started = time.monotonic()
        operations = operations_of(case, whole)
        seconds = time.monotonic() - started
        log(f"{case.name}: {len(operations)} file operations in {seconds:.1f} s")
        numbers = list(range(1, len(operations) + 1))
        if n_operations is not None and n_operations < len(numbers):
            numbers = [numbers[k * len(numbers) // n_operations] for k in range(n_operations)]
        outcome = Outcome(case.name, len(numbers), n_kills)
        for number in numbers:
            where = f"operation {number}, {operations[number - 1]}"
            kill = lambda number=number: kill_at_operation(case, folder, number)  # noqa: E731
            try_kill(outcome, case, folder, whole, kill, where)
        rng = random.Random(0)
        for _ in range(3 * n_kills):  # some moments come after the end
            if outcome.killed < len(numbers) + n_kills:
                moment = rng.uniform(0, seconds)
                kill = lambda moment=moment: kill_after(case, folder, moment)  # noqa: E731
                try_kill(outcome, case, folder, whole, kill, f"after {moment:.3f} of {seconds:.3f} s")
    for failure in outcome.failures:
        log(f"{case.name}: {failure}")
    return outcome


def make_choices(folder: Path, n_choices: int = 40) -> Path:
    """Writes choices of the brighter image of two; returns the file for ``dpok fit-reward``."""
    rng, rows = np.random.default_rng(0), []
    for k in range(n_choices):
        names = [f"{k}-{side}.png" for side in "ab"]
        levels = rng.integers(256, size=2)
        for name, level in zip(names, levels, strict=True):
            Image.new("RGB", (20, 16), (int(level),) * 3).save(folder / name)
        rows.append({"prompt": "a bright day", "images": names, "preferred": int(levels.argmax())})
    path = folder / "choices.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def training_case(algo: str, env: str) -> Case:
    """Returns a tiny training."""
    options = [*_TINY, *ENVIRONMENTS[env], *ALGORITHMS[algo]]
    return Case(f"{algo} on {env}", ["train", "--env", env, "--algo", algo, *options])


def fit_case(choices: Path) -> Case:
    """Returns a tiny fit of a reward."""
    tiny = ["--epochs", "3", "--held-out", "0.2", "--image-size", "16", "--batch-size", "8", "--device", "cpu"]
    return Case(FIT_REWARD, [FIT_REWARD, str(choices), *tiny])


@contextmanager
def silent() -> Iterator[None]:
    """Sends what is printed within the block to nowhere; errors stay."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def warm_up(cases: Sequence[Case]) -> None:
    """Imports all that the cases need, so that a fork has it; starts no thread."""
    tqdm.monitor_interval = 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            if case.start(Path(folder) / str(number)):
                raise RuntimeError(f"{case.name} does not run")
    clear_model_cache()  # the children get models that nobody has trained


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Prints the outcomes."""
    table = Table("case", "file operations", "random moments", "killed", "resumed", "equal")
    for row in outcomes:
        table.add_row(
            row.case, *(str(value) for value in (row.operations, row.kills, row.killed, row.resumed, row.equal))
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kills, prints and writes; returns 1 if a run did not go on or ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="random moments for each case")
    parser.add_argument("--operations", type=int, help="file operations for each case, spread evenly; all without it")
    names = (*ALGORITHMS, FIT_REWARD)
    parser.add_argument("--algos", nargs="*", choices=names, default=names, help="algorithms, and fit-reward")
    parser.add_argument("--envs", nargs="*", choices=ENVIRONMENTS, default=list(ENVIRONMENTS), help="embedded worlds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of the results")
    options = parser.parse_args(arguments)
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else []
    outcomes = {row["case"]: Outcome(**row) for row in known}
    console = Console(file=sys.stdout)  # also where the output of the runs is silent
    with ExitStack() as stack:
        choices = make_choices(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        cases = [training_case(algo, env) for env in options.envs for algo in options.algos if algo != FIT_REWARD]
        cases += [fit_case(choices)] * (FIT_REWARD in options.algos)
        wanted = [case for case in cases if not _is_known(outcomes.get(case.name), options)]
        with silent():
            warm_up(wanted)
        for case in wanted:
            with silent():
                outcomes[case.name] = run_case(case, options.kills, options.operations, partial(say, console))
            write_text(options.out, json.dumps([asdict(outcome) for outcome in outcomes.values()], indent=1) + "\n")
    shown = [outcomes[case.name] for case in cases]
    show(shown, console)
    return int(any(outcome.failures for outcome in shown))


def _is_known(outcome: Outcome | None, options: argparse.Namespace) -> bool:
    """Returns whether the results have a case with as many kills; without a limit, it has all operations."""
    return outcome is not None and outcome.kills == options.kills and options.operations in (None, outcome.operations)


if __name__ == "__main__":
    sys.exit(main())
