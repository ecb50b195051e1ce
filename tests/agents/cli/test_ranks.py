"""``torchrun -m agents train``: rank 0 writes the run of all ranks, and any number of ranks goes on with it."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from agents.cli.logs import read_log
from agents.common.checkpoint import find_checkpoint
from tests.agents.cli.support import FEW_LAYERS, TINY, Brightness, list_written, read_summary, train
from tests.support import wait_for_end

# A larger eps than the default, with which Adam would enlarge differences of rounding.
OPTIONS = [*TINY, *FEW_LAYERS, "--images-per-iteration", "4", "--images", "12", "--checkpointing-steps", "1"]
OPTIONS += [
    "--reward",
    "tests.agents.cli.test_ranks:EndsRank1",
    "--algo",
    "ddpo",
    "--optimizer-kwargs",
    "eps=0.0001",
    "--seed",
    "3",
]


class EndsRank1(Brightness):
    """The brightness; rank 1 sends itself a signal in one of its calls: in the evaluation, or in an iteration."""

    calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == int(os.environ.get("CALL", "3")) and os.environ.get("RANK") == "1" and "SIGNAL" in os.environ:
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return self.score(images, prompts)


def start(folder, n_ranks, *options, **env):
    """Starts ranks with torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks), "-m", "agents", "train"]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(
        [*command, "--out", str(folder), *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_same_run(one, other):
    """Asserts that two runs have learned the same, but for the rounding of sums."""
    assert find_checkpoint(one).name == find_checkpoint(other).name
    for path in find_checkpoint(one).glob("*.safetensors"):
        theirs = load_file(find_checkpoint(other) / path.name)
        for name, values in load_file(path).items():
            torch.testing.assert_close(values, theirs[name], rtol=1e-4, atol=1e-6)
    assert len(read_log(one / "progress.csv")) == len(read_log(other / "progress.csv")) == 3
    assert list_written(one) == list_written(other)
    ours, theirs = read_summary(one), read_summary(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name != "seconds":
            is_number = isinstance(value, float | dict)
            assert value == (pytest.approx(theirs[name], rel=1e-3) if is_number else theirs[name]), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train(folder, *OPTIONS) == 0
    return folder


@pytest.mark.slow
def test_two_ranks_write_the_run_of_one_process(alone, tmp_path):
    process = start(tmp_path / "run", 2, *OPTIONS)
    (output,) = wait_for_end(process)
    assert process.returncode == 0, output
    assert output.count("writing to") == 1
    assert output.count("images drawn in training") == 1
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "rank 1 has ended without a word"),
        (signal.SIGTERM, "interrupted: the run is saved, resume with"),
    ],
)
def test_one_rank_ends_and_one_process_goes_on(alone, tmp_path, number, message):
    """The rank is killed, or gets a signal that asks it to end, in the second iteration."""
    folder = tmp_path / "run"
    process = start(folder, 2, *OPTIONS, SIGNAL=str(int(number)))
    (output,) = wait_for_end(process)
    assert process.returncode != 0
    assert find_checkpoint(folder).name == ("checkpoint-4" if number == signal.SIGKILL else "checkpoint-8")
    # torchrun ends the other rank as soon as it sees that one is dead, perhaps before the rank does.
    assert message in output or number == signal.SIGKILL
    assert train(folder, "--resume", "--trust") == 0
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_all_ranks(tmp_path):
    process = start(tmp_path / "run", 2, *OPTIONS, SIGNAL=str(int(signal.SIGTERM)), CALL="1")
    (output,) = wait_for_end(process)
    assert process.returncode != 0
    assert "what is under way is finished first" in output
    assert "interrupted: there is no checkpoint yet, resume with" in output
    assert (tmp_path / "run" / "evaluation_before.npz").is_file()
