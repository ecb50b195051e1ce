"""A killed run that is resumed ends with the same bits: weights, log and summary of an uninterrupted run."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import load_run
from agents.cli.logs import read_log
from agents.common.checkpoint import find_checkpoint, list_checkpoints
from tests.agents.cli.support import TINY, list_written, read_summary, train
from tests.support import assert_same

OPTIONS = [*TINY, "--images", "8", "--checkpointing-steps", "2", "--seed", "3", "--target-modules", "attention"]
FIT = ["--n-gradient-steps", "5", "--log-every", "1", "--batch-size", "2"]

#: Runs the command line, and kills itself without any warning at the n-th call of a function.
KILLED = """
import os, signal, sys
import torch
from agents.cli.main import main
from agents.common import checkpoint
from agents.common.algorithm import DenoisingAlgorithm

torch.set_num_threads(1)  # as the tests have it
place, n, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
owner = {"optimizer_step": DenoisingAlgorithm, "flush_to_disk": checkpoint}[place]
function, calls = getattr(owner, place), []

def killed(*args):
    calls.append(0)
    if len(calls) == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)

setattr(owner, place, killed)
main(words)
"""


def _kill(place, n_calls, folder, *options):
    words = ["train", "--out", str(folder), *options]
    ended = subprocess.run([sys.executable, "-c", KILLED, place, str(n_calls), *words], check=False)
    assert ended.returncode == -signal.SIGKILL


def _without_times(rows):
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def _tensorboard(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        if not name.startswith("time/"):
            scalars[name] = [(event.step, event.value) for event in events.Scalars(name)]
    return scalars


def _tensors(folder):
    return {path.name: load_file(path) for path in find_checkpoint(folder).glob("*.safetensors")}


def assert_same_run(one, other):
    """Asserts that two runs ended alike, but for the times."""
    assert find_checkpoint(one).name == find_checkpoint(other).name
    assert_same(_tensors(one), _tensors(other))
    assert_same(_without_times(read_log(one / "progress.csv")), _without_times(read_log(other / "progress.csv")))
    assert _tensorboard(one) == _tensorboard(other)
    assert read_summary(one) | {"seconds": 0} == read_summary(other) | {"seconds": 0}
    assert list_written(one) == list_written(other)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("dpok", ["--use-critic", "--target-kl", "0.5", "--normalize-rewards"]),
        ("ddpo", ["--prompts", "colour"]),
        ("sft", FIT),
    ],
)
def test_a_run_that_is_killed_in_its_fourth_update(tmp_path, algo, options):
    words = ["--algo", algo, *OPTIONS, "--batch-size", "64", *options]
    assert train(tmp_path / "whole", *words) == 0
    _kill("optimizer_step", 4, tmp_path / "killed", *words)
    checkpoint = find_checkpoint(tmp_path / "killed")
    assert checkpoint.name == {"dpok": "checkpoint-4", "ddpo": "checkpoint-4", "sft": "checkpoint-8-2"}[algo]
    n_rows = len(read_log(tmp_path / "killed" / "progress.csv"))
    assert n_rows == {"dpok": 3, "ddpo": 3, "sft": 7}[algo]  # a row more than the checkpoint's
    # What a process that is killed while it writes a checkpoint leaves:
    shutil.copytree(checkpoint, tmp_path / "killed" / "checkpoint-6.part")
    (tmp_path / "killed" / "checkpoint-6.part" / "trainer_state.json").unlink()
    evaluated = (tmp_path / "killed" / "evaluation_before.npz").stat().st_mtime_ns
    assert train(tmp_path / "killed", "--resume") == 0
    assert (tmp_path / "killed" / "evaluation_before.npz").stat().st_mtime_ns == evaluated  # it was not drawn again
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("n_calls", "newest"), [(9, "checkpoint-2"), (11, "checkpoint-2"), (12, "checkpoint-4")])
def test_a_run_that_is_killed_while_it_saves(finished, tmp_path, n_calls, newest):
    """A file of the second checkpoint, its folder, or the run folder is not on the disk yet."""
    options = [*OPTIONS, "--checkpointing-steps", "1", "--checkpoints-total-limit", "1"]
    assert train(tmp_path / "whole", *options) == 0
    _kill("flush_to_disk", n_calls, tmp_path / "killed", *options)
    assert find_checkpoint(tmp_path / "killed").name == newest
    assert train(tmp_path / "killed", "--resume") == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert_same(_tensors(tmp_path / "killed"), _tensors(finished))  # saving more often changes nothing


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(folder, *OPTIONS) == 0
    return folder


@pytest.mark.slow
def test_a_run_goes_on_from_an_older_checkpoint(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4", "checkpoint-8"]
    assert train(folder, "--resume-from-checkpoint", "checkpoint-4") == 0
    assert_same_run(folder, finished)


@pytest.mark.slow
def test_a_copy_of_a_checkpoint_elsewhere(finished, tmp_path):
    """It is a path; the run keeps the checkpoints before it."""
    folder = shutil.copytree(finished, tmp_path / "run")
    copy = shutil.copytree(folder / "checkpoint-8", tmp_path / "backup")
    assert train(folder, "--resume-from-checkpoint", str(copy), "--images", "10") == 0
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-8", "checkpoint-10"]


@pytest.mark.slow
def test_an_evaluation_with_other_settings_is_drawn_again(finished, tmp_path):
    """The run died before its first checkpoint, and is started with other settings in the same folder."""
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "evaluation_before.npz", tmp_path / "run")
    assert train(tmp_path / "run", *OPTIONS, "--num-inference-steps", "3", "--images", "2") == 0
    before = read_summary(tmp_path / "run")["quality_before"]
    assert before != pytest.approx(read_summary(finished)["quality_before"], rel=1e-6)


@pytest.mark.slow
def test_more_images(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert train(folder, "--resume", "--images", "10") == 0
    assert [row["rollout/images"] for row in read_log(folder / "progress.csv")] == [2, 4, 6, 8, 10]
    assert [step for step, _ in _tensorboard(folder)["rollout/images"]] == [1, 2, 3, 4, 5]
    summary = read_summary(folder)
    assert summary["pictures"] == 10
    assert summary["aligned_before"] == read_summary(finished)["aligned_before"]
    assert summary["seconds"] > read_summary(finished)["seconds"]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-8", "checkpoint-10"]


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint(finished, tmp_path):
    """The same command resumes the run, and so does --resume."""
    for words in (OPTIONS, ["--resume"]):
        folder = tmp_path / words[0].strip("-")
        folder.mkdir()
        shutil.copy(finished / "config.yaml", folder)
        (folder / "progress.csv").write_text("rollout/images\n2\n")
        assert train(folder, *words) == 0
        assert_same_run(folder, finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume"], "ask for more with --images"),
        (["--resume", "--kl-coef", "0.5"], "leave out --kl-coef"),
        (["--resume", "--lora-rank", "4", "--n-epochs", "2"], "leave out --n-epochs, --lora-rank"),
        (["--resume", "--algo", "grpo"], "leave out --algo"),
        (["--resume", "--images", "-5"], "images must be an integer of at least 1, got -5"),
        (["--resume-from-checkpoint", "checkpoint-5"], "did you mean 'checkpoint-8'"),
        (["--resume", "--group-size", "4"], "unknown option --group-size"),
        ([], "already holds a run"),
    ],
)
def test_mistakes(finished, tmp_path, capsys, words, message):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert train(finished, *words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("dpok: error: ")
    assert message in error
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.slow
def test_resume_needs_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "nothing", "--resume") == 2
    assert "is no run folder" in capsys.readouterr().err
    from agents.cli.main import main

    assert main(["train", "--resume"]) == 2
    assert "--resume needs the run folder: --out FOLDER" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_load_run(finished, tmp_path):
    agent = load_run(finished, device="cpu")
    assert agent.images_drawn == 8
    assert_same(dict(agent.policy.lora.state_dict()), agent.state_dict()["tensors"]["lora"])
    saved = load_file(find_checkpoint(finished) / "pytorch_lora_weights.safetensors")
    assert_same({f"unet.{name}": value for name, value in agent.policy.lora.state_dict().items()}, saved)
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        load_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_checkpoint_that_lacks_a_file(finished, tmp_path, capsys, name):
    """The message names the checkpoints that are still whole."""
    folder = shutil.copytree(finished, tmp_path / "run")
    newest, older = list_checkpoints(folder)[-1], list_checkpoints(folder)[0]
    (newest / name).unlink()
    assert train(folder, "--resume", "--images", "10") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--resume-from-checkpoint {older.name}" in error or "no lora" in error
    assert train(folder, "--resume-from-checkpoint", older.name, "--images", "10") == 0


@pytest.mark.slow
def test_a_damaged_evaluation_of_the_pre_trained_model(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "evaluation_before.npz").write_bytes(b"junk")
    assert train(folder, "--resume", "--images", "10") == 2
    assert "evaluation_before.npz is damaged; remove it" in capsys.readouterr().err
    (folder / "evaluation_before.npz").unlink()
    assert train(folder, "--resume") == 0
    assert read_summary(folder)["pictures"] == 10


@pytest.mark.slow
def test_rows_that_are_lost_are_reported(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "progress.csv").write_text("")
    with pytest.warns(UserWarning, match="has 0 of the 4 rows that the run had logged"):
        assert train(folder, "--resume", "--images", "10") == 0
