"""The benchmark of killed runs: it sees what a run does with files, and what differs between two folders."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agents.cli.logs import TensorBoardLog
from benchmarks import kill
from benchmarks.kill import Case, FileOperations, Outcome, differences, fingerprint, in_child, try_kill
from dpok_gym.utils.files import write_text
from dpok_gym.utils.tensors import save_tensors

OPERATIONS = ["mkdir .", "open a.txt.part", "write a.txt.part", "rename a.txt.part"]
OPERATIONS += ["open b.safetensors.part", "write b.safetensors.part", "rename b.safetensors.part", "mkdir c", "rmdir c"]


def work(folder: Path) -> int:
    """Does one of each file operation in a folder, and some elsewhere."""
    folder.mkdir(exist_ok=True)
    write_text(folder / "a.txt", "0123456789")
    save_tensors(folder / "b.safetensors", {})
    (folder / "c").mkdir()
    shutil.rmtree(folder / "c")
    write_text(folder.parent / "elsewhere.txt", "0123456789")
    return 0


def test_the_operations_in_a_folder_are_seen(tmp_path: Path) -> None:
    def watched() -> int:
        operations = FileOperations(tmp_path / "run")
        work(tmp_path / "run")
        (tmp_path / "seen.json").write_text(json.dumps(operations.seen))
        return 0

    assert in_child(watched) == 0
    assert json.loads((tmp_path / "seen.json").read_text()) == OPERATIONS


@pytest.mark.parametrize(
    ("number", "left"),
    [(1, {}), (2, {}), (3, {"a.txt.part": "01234"}), (4, {"a.txt.part": "0123456789"}), (5, {"a.txt": "0123456789"})],
)
def test_a_process_is_killed_at_an_operation(tmp_path: Path, number: int, left: dict[str, str]) -> None:
    """Before it, or in the middle of what is written."""

    def killed() -> int:
        FileOperations(tmp_path / "run", number)
        return work(tmp_path / "run")

    assert in_child(killed) == -signal.SIGKILL
    assert (tmp_path / "run").is_dir() == (number > 1)
    assert {path.name: path.read_text() for path in (tmp_path / "run").glob("*")} == left


def _write_tensorboard(folder: Path, png: bytes) -> None:
    log = TensorBoardLog(folder / "tensorboard")
    log.add_image("images", png, 2)
    log.close()


def test_what_two_folders_have_in_common(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "checkpoint-2").mkdir(parents=True)
    (one / "progress.csv").write_text("a,time/fps\n1,2\n")
    (one / "summary.json").write_text(json.dumps({"pictures": 2, "seconds": 3}))
    (one / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"agent": {"n": 1}, "run": {"seconds": 1}}))
    (one / "index.html").write_text("2 images in 3 seconds of training")
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(one / "figure.png")
    shutil.copytree(one, other)
    for folder in (one, other):
        _write_tensorboard(folder, (one / "figure.png").read_bytes())
    (other / "progress.csv").write_text("a,time/fps\n1,5\n")  # times may differ
    (other / "summary.json").write_text(json.dumps({"pictures": 2, "seconds": 8}))
    (other / "index.html").write_text("2 images in 1,008 seconds of training")
    assert differences(fingerprint(one), fingerprint(other)) == []
    (other / "progress.csv").write_text("a,time/fps\n2,5\n")
    (other / "summary.json").write_text(json.dumps({"pictures": 4, "seconds": 8}))
    (other / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"agent": {"n": 2}, "run": {}}))
    Image.fromarray(np.ones((2, 2, 3), np.uint8)).save(other / "figure.png")
    (other / "more.part").touch()
    (other / "index.html").write_text("4 images in 8 seconds of training")
    _write_tensorboard(other, (other / "figure.png").read_bytes())
    names = ["checkpoint-2/trainer_state.json", "figure.png", "index.html", "more.part", "progress.csv", "summary.json"]
    names.append("tensorboard")
    assert differences(fingerprint(one), fingerprint(other)) == names


class Fragile(Case):
    """A command that cannot go on."""

    def start(self, folder: Path) -> int:
        """Fails if the folder is there."""
        folder.mkdir()
        write_text(folder / "a.txt", "0")
        return 0


def test_a_run_that_does_not_go_on_is_reported(tmp_path: Path) -> None:
    case, whole, folder = Fragile("fragile", [""]), tmp_path / "whole", tmp_path / "run"
    operations, outcome = kill.operations_of(case, whole), Outcome("fragile", 2, 0)
    for number in (1, 3):  # before the folder is made, and later
        try_kill(outcome, case, folder, whole, partial(kill.kill_at_operation, case, folder, number), "there")
    assert operations[:3] == ["mkdir .", "open a.txt.part", "write a.txt.part"]
    assert (outcome.killed, outcome.resumed, outcome.equal) == (2, 1, 1)
    assert outcome.failures == ["there: exit code 1, differs in a.txt, a.txt.part"]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kill.json"
    words = ["--algos", "fit-reward", "--kills", "1", "--operations", "2", "--out", str(out)]
    assert kill.main(words) == 0
    (row,) = json.loads(out.read_text())
    assert row["case"] == "fit-reward"
    assert row["operations"] == 2
    assert row["killed"] == row["resumed"] == row["equal"] >= 2
    assert row["failures"] == []
    changed = os.stat(out).st_mtime_ns
    assert kill.main(words) == 0  # it is there already
    assert os.stat(out).st_mtime_ns == changed
    assert "fit-reward" in capsys.readouterr().out
