"""A killed run that is resumed ends with the same bits: weights, log and summary of an uninterrupted run."""

import errno
import json
import os
import shutil
import signal
from functools import partial

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import load_run, register_algorithm
from agents.algorithms.registry import ALGORITHMS
from agents.cli.logs import read_log
from agents.cli.samples import list_samples
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.checkpoint import find_checkpoint, list_checkpoints
from benchmarks.kill import (
    Case,
    Outcome,
    differences,
    fingerprint,
    in_child,
    kill_at_operation,
    operations_of,
    try_kill,
)
from dpok_gym.utils import files
from dpok_gym.utils.files import locked
from dpok_gym.vector_env import DenoisingVectorEnv
from tests.agents.cli.support import TINY, read_summary, train
from tests.support import assert_same

OPTIONS = [*TINY, "--images", "8", "--checkpointing-steps", "2", "--seed", "3", "--target-modules", "attention"]
FIT = ["--n-gradient-steps", "5", "--log-every", "1", "--batch-size", "2"]


def _kill_in_update(number, *words):
    """Trains in a child, which is killed without any warning in an update."""
    step, calls = DenoisingAlgorithm.optimizer_step, []

    def killed(self):
        calls.append(0)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    def training():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DenoisingAlgorithm, "optimizer_step", killed)
            return train(*words)

    assert in_child(training) == -signal.SIGKILL


def _tensors(folder):
    return {path.name: load_file(path) for path in find_checkpoint(folder).glob("*.safetensors")}


def assert_same_run(one, other):
    """Asserts that two runs ended alike, but for the times."""
    assert not differences(fingerprint(one), fingerprint(other))


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
def test_a_run_that_is_killed_in_its_fourth_update(tmp_path, fresh_models, algo, options):
    words = ["--algo", algo, *OPTIONS, "--batch-size", "64", *options]
    _kill_in_update(4, tmp_path / "killed", *words)
    assert train(tmp_path / "whole", *words) == 0
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


#: File operations at which a run is killed: one of each kind, and those that were once not survived.
_KILLS = (
    "write config.yaml.part",
    "write progress.csv",
    "write checkpoint-4.part/optimizer.safetensors.part",
    "rename checkpoint-2",
    "write lora/pytorch_lora_weights.safetensors.part",
    "write samples/00001-2-images.png.part",
    "write index.html.part",
    "rename summary.json.part",
    "remove .lock",
)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_a_run_that_is_killed_at_a_file_operation(tmp_path):
    """All operations, all algorithms and random moments are in ``benchmarks.kill``."""
    options = [*OPTIONS, "--images", "4", "--checkpointing-steps", "1", "--checkpoints-total-limit", "1"]
    case, whole = Case("killed", ["train", *options]), tmp_path / "whole"
    operations, outcome = operations_of(case, whole), Outcome("killed", len(_KILLS), 0)
    for operation in _KILLS:
        number = 1 + operations.index(operation)
        kill = partial(kill_at_operation, case, tmp_path / "run", number)
        try_kill(outcome, case, tmp_path / "run", whole, kill, operation)
    assert outcome.failures == []
    assert outcome.killed == outcome.equal == len(_KILLS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(folder, *OPTIONS) == 0
    return folder


def _tensorboard(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


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
    # The last row of images of the shorter run is gone, as it was no multiple of the checkpoints.
    assert [sample.iteration for sample in list_samples(folder / "samples")] == [0, 2, 4, 5]
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
@pytest.mark.parametrize("name", ["optimizer.safetensors", "trainer_state.json", "progress.csv"])
def test_a_checkpoint_that_lacks_a_file(finished, tmp_path, capsys, name):
    """The message names the file and the checkpoints that are still whole; nothing starts anew in silence."""
    folder = shutil.copytree(finished, tmp_path / "run")
    newest, older = list_checkpoints(folder)[-1], list_checkpoints(folder)[0]
    (newest / name).unlink()
    assert train(folder, "--resume", "--images", "10") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{newest} has no {name}; resume from another one: --resume-from-checkpoint {older.name}" in error
    assert train(folder, "--resume-from-checkpoint", older.name, "--images", "10") == 0


@pytest.mark.slow
def test_checkpoints_that_were_removed(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    assert train(folder, "--resume") == 2
    assert "has no checkpoint any more" in capsys.readouterr().err
    assert train(folder, *OPTIONS) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [False, True])
def test_what_learning_does_not_need_is_made_anew(finished, tmp_path, capsys, zeros):
    """Logs, evaluation, figures and summary are cut off, or full of zeros as after a power cut."""
    folder = shutil.copytree(finished, tmp_path / "run")
    names = ["progress.csv", "summary.json", "evaluation_before.npz", "learning_curve.png", "before_after.png"]
    names += ["held_out.png", "index.html"]
    paths = [folder / name for name in names] + list((folder / "tensorboard").iterdir())
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)) if zeros else content[: len(content) // 2])
    assert train(folder, "--resume") == 0
    printed = capsys.readouterr().out
    assert f"{folder / 'summary.json'} is damaged; it is written anew\n" in printed
    assert f"{folder / 'evaluation_before.npz'} is damaged; the pre-trained model is evaluated again\n" in printed
    assert_same_run(folder, finished)


@pytest.mark.slow
def test_a_damaged_log_in_the_checkpoint(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    log = find_checkpoint(folder) / "progress.csv"
    log.write_bytes(bytes(100))
    assert train(folder, "--resume", "--images", "10") == 0
    assert f"{log} is damaged: " in capsys.readouterr().out
    assert [row["rollout/images"] for row in read_log(folder / "progress.csv")] == [10]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["before_after.png", "index.html", "lora", "tensorboard"])
def test_a_result_that_is_missing_is_made_anew(finished, tmp_path, name):
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(folder, "--resume") == 0
    assert_same_run(folder, finished)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [("DPOK-Shapes-v0", "DPOK-Shapes-Many-v0"), ("algo: dpok", "algo: dpok2")])
def test_a_config_of_another_run(finished, tmp_path, monkeypatch, capsys, old, new):
    """Its settings fit the agent, but it learns something else."""
    monkeypatch.setattr(ALGORITHMS, "_entries", dict(ALGORITHMS._entries))
    register_algorithm("dpok2", "agents:DPOK")
    folder = shutil.copytree(finished, tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(old, new))
    before = fingerprint(folder)
    assert train(folder, "--resume", "--images", "10") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{config} says {'algo: dpok2' if 'algo' in new else 'env: ' + new}, but the checkpoint" in error
    assert fingerprint(folder) == before


@pytest.mark.slow
def test_two_processes_do_not_share_a_folder(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    with locked(folder):
        assert train(folder, "--resume", "--images", "10") == 2
    captured = capsys.readouterr()
    assert f"another process is writing to {folder}" in captured.err
    assert "drawing" not in captured.out
    assert_same_run(folder, finished)


@pytest.mark.slow
def test_the_seconds_and_the_iterations_go_on(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    state = find_checkpoint(folder) / "trainer_state.json"
    saved = json.loads(state.read_text())
    state.write_text(json.dumps(saved | {"run": saved["run"] | {"seconds": 1000.0}}))
    assert train(folder, "--resume", "--images", "10") == 0
    rows = read_log(folder / "progress.csv")
    assert [row["time/iterations"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["time/time_elapsed"] >= 1000
    assert read_summary(folder)["seconds"] > 1000


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_images_of_an_iteration_that_was_interrupted_are_not_counted(tmp_path, monkeypatch):
    """Interrupted and resumed again and again, a run learns from as many images as it counts."""
    folder, judge = tmp_path / "run", DenoisingVectorEnv.judge
    words = ["--normalize-rewards", *OPTIONS, "--images", "12"]
    for number in range(4):
        calls: list[int] = []

        def interrupted(self, latents, prompts, calls=calls, number=number):
            calls.append(0)
            if len(calls) == 2 + (not number):  # the first process evaluates
                raise KeyboardInterrupt
            return judge(self, latents, prompts)

        with monkeypatch.context() as patched:
            patched.setattr(DenoisingVectorEnv, "judge", interrupted)
            assert train(folder, *(["--resume"] if number else words)) == 130
        summary = read_summary(folder)
        assert (summary["pictures"], summary["interrupted"]) == (2 * (number + 1), True)
    assert train(folder, "--resume") == 0
    assert train(tmp_path / "whole", *words) == 0
    assert_same(_tensors(folder), _tensors(tmp_path / "whole"))
    assert read_log(folder / "progress.csv")[-1]["train/n_updates"] == 6


@pytest.mark.slow
def test_checkpoints_do_not_grow_with_the_number_of_environments(tmp_path):
    """But for a few of the latest rewards, which the log's mean goes over."""
    sizes = []
    for n_envs in (2, 64):
        folder = tmp_path / str(n_envs)
        words = ["--env", "DPOK-Mixture-v0", "--n-envs", str(n_envs), "--images", "1", "--num-inference-steps", "2"]
        assert train(folder, *words, "--eval-images", "1", "--device", "cpu") == 0
        sizes.append({path.name: path.stat().st_size for path in find_checkpoint(folder).glob("*.safetensors")})
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_a_full_disk(tmp_path, monkeypatch, capsys):
    """The error names the file; a line says what is kept, and the run can be resumed."""
    folder, flush = tmp_path / "run", files.flush_to_disk

    def fails(path):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "flush_to_disk", fails)
        assert train(folder, *OPTIONS, "--checkpointing-steps", "1") == 2
    captured = capsys.readouterr()
    assert f"{folder / 'checkpoint-2'} is kept, resume with: dpok train --resume" in captured.out
    assert "checkpoint-4.part/" in captured.err
    assert "cannot be written: No space left on device" in captured.err
    assert captured.err.count("\n") == 1
    assert not list(folder.glob("*.part"))
    assert train(folder, "--resume") == 0


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    assert train(tmp_path / "run", *OPTIONS) == 2
    assert capsys.readouterr().err == (
        f"dpok: error: the folder {tmp_path / 'run'} cannot be written: Permission denied; choose another one\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "is_folder"), [("summary.json", True), ("before_after.png", True), ("lora", False)])
def test_something_else_where_a_result_goes(tmp_path, capsys, name, is_folder):
    """It is found before anything is drawn."""
    folder = tmp_path / "run"
    folder.mkdir()
    place = folder / name
    if is_folder:
        place.mkdir()
    else:
        place.write_text("")
    assert train(folder, *OPTIONS) == 2
    error = capsys.readouterr().err
    assert f"{place} is a {'folder' if is_folder else 'file'}" in error or "already holds a run" in error
    assert not (folder / "evaluation_before.npz").exists()


def test_a_run_that_has_spent_its_kl_is_complete(tmp_path, capsys):
    run, reward = tmp_path / "run", "tests.agents.cli.support:Brightness"
    options = ["--algo", "draft", "--reward", reward, "--max-kl", "1e-9", "--learning-rate", "0.1", "--trust"]
    assert train(run, *options[:-1], "--images", "8", *TINY) == 0
    assert "above max_kl=1e-09: training ends here" in capsys.readouterr().out
    assert train(run, "--resume", "--trust", "--images", "16") == 2
    assert "it has spent its --max-kl, so train anew with a larger one" in capsys.readouterr().err
