"""Several ranks train as one process does, and end together."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from agents.common import distributed
from tests.agents.common import ranks
from tests.support import wait_for_end

#: One algorithm of each kind of update, among them DPOK with either critic.
NAMES = [
    "DPOK",
    "DPOK, critic on rewards",
    "DDPO-IS",
    "GRPO",
    "SFT, KL-O",
    "DiffusionNFT",
    "AWM",
    "DiffusionDPO",
    "DRaFT",
]


def start_ranks(n_ranks: int, *words: str) -> list[subprocess.Popen[str]]:
    """Starts the processes as a launcher does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(n_ranks):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
        env = os.environ | of_rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.agents.common.ranks", *words]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    return processes


def run_ranks(n_ranks: int, *words: str) -> None:
    """Runs the processes to their end; none of them may fail."""
    processes = start_ranks(n_ranks, *words)
    for process, errors in zip(processes, wait_for_end(*processes), strict=True):
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def alone(tiny_sd_folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What one process learns."""
    return {name: ranks.train(name, tiny_sd_folder) for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize(("n_ranks", "names"), [(2, NAMES), (4, ["DPOK", "AWM"])], ids=["2", "4"])
def test_ranks_learn_what_one_process_learns(
    alone: dict[str, dict[str, torch.Tensor]], tiny_sd_folder: Path, tmp_path: Path, n_ranks: int, names: list[str]
) -> None:
    """The same images, and the same weights, optimiser, critic and log, after three iterations."""
    run_ranks(n_ranks, str(tiny_sd_folder), str(tmp_path), *names)
    for name in names:
        assert_close(tmp_path / f"{name}.safetensors", alone[name])


@pytest.mark.slow
def test_a_model_that_is_spread_over_the_ranks(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """The frozen weights under a LoRA, and the whole denoiser that is trained, with its optimiser.

    A rank without a gradient to compute still calls the denoiser as often as the other one.
    """
    names = [f"sharded: {name}" for name in ("DPOK", "DRaFT")]
    names += ["sharded, one at a time: AWM", "sharded, whole: DPOK"]
    run_ranks(2, str(tiny_sd_folder), str(tmp_path), *names)
    for path in tmp_path.iterdir():
        how, _, name = path.stem.rpartition(": ")
        assert_close(path, ranks.train(name, tiny_sd_folder, **ranks.CHANGES[how] | {"shard": False}))


def assert_close(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Asserts that ranks have learned what is expected."""
    together = load_file(path)
    assert together.keys() == expected.keys()
    assert 0 < expected["valid"].sum() <= ranks.N
    for key, values in expected.items():
        # The weights move by 1e-3 in each step; the critic on rewards solves a regression of its own.
        limit = 1e-6 if key.startswith(("lora", "old", "optimizer")) else 1e-4
        limit = 5e-6 if key.startswith("denoiser") else limit  # a million weights, of which one rounds worst
        what = f"{path.stem} {key}"
        torch.testing.assert_close(together[key], values, rtol=1e-4, atol=limit, equal_nan=True, msg=what)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"rank 1 ended with ZeroDivisionError: the reward is broken"),
        ("kill", r"rank 1 has ended without a word|rank 1 has given no sign of life"),
    ],
)
def test_a_rank_that_dies_ends_the_others(tiny_sd_folder: Path, tmp_path: Path, how: str, message: str) -> None:
    processes = start_ranks(3, str(tiny_sd_folder), str(tmp_path), f"{how}: DDPO-IS")
    for rank, errors in enumerate(wait_for_end(*processes)):
        assert processes[rank].returncode != 0
        if rank != 1:
            assert re.search(message, errors), errors


@pytest.mark.slow
def test_ranks_with_different_seeds_do_not_train(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """Without an argument, each rank has drawn a seed of its own."""
    processes = start_ranks(2, str(tiny_sd_folder), str(tmp_path), "without a seed: DDPO-IS")
    for process, errors in zip(processes, wait_for_end(*processes), strict=True):
        assert process.returncode != 0
        assert re.search(r"ValueError: the ranks have different seeds \(\d+, \d+\)", errors), errors


@pytest.fixture
def make_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], distributed._Watch]]:
    """Makes the watch of rank 0 of two, in an attempt of the launcher, whose store goes on."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))

    def make(attempt: int) -> distributed._Watch:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        return distributed._Watch(0, 2)

    yield make
    del store


def run_to_its_end(watch: distributed._Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a watch that has hardly any patience run until it would end the process."""
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        watch._over.set()

    for name in ("_BEAT", "SILENCE", "GRACE"):
        monkeypatch.setattr(distributed, name, 0.01)
    monkeypatch.setattr(distributed.os, "_exit", end)
    watch.start()
    watch.join(20)
    watch.stop()
    assert ended == [2]


def test_the_failure_of_an_attempt_does_not_end_the_next_one(make_watch: Callable[[int], distributed._Watch]) -> None:
    first = make_watch(0)
    first.report("ZeroDivisionError: the reward is broken")
    assert "rank 0 ended with ZeroDivisionError" in first._failure()
    assert "ZeroDivisionError" in make_watch(0)._failure()  # the other ranks of the attempt hear of it
    assert make_watch(1)._failure() == ""


def test_a_store_that_is_gone_at_once_ends_the_rank(
    make_watch: Callable[[int], distributed._Watch],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Gone:
        def set(self, *words: str) -> None:
            raise dist.DistNetworkError("the connection was closed")

    watch = make_watch(0)
    monkeypatch.setattr(watch, "_store", Gone())
    run_to_its_end(watch, monkeypatch)
    assert "the launcher or rank 0 has ended" in capsys.readouterr().err


def test_a_rank_that_hangs_ends_the_others(
    make_watch: Callable[[int], distributed._Watch],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 1 gives no sign of life here. Rank 0 notices it, and tells the others."""
    watch, other = make_watch(0), make_watch(0)
    run_to_its_end(watch, monkeypatch)
    assert "rank 1 has given no sign of life for " in capsys.readouterr().err
    assert "rank 1 has given no sign of life for " in other._failure()


@pytest.mark.parametrize(
    ("explained", "message"),
    [("rank 1 has ended", "^rank 1 has ended$"), ("", "^the exchange between the ranks failed: the network is down$")],
)
def test_an_exchange_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, explained: str, message: str) -> None:
    def fail() -> None:
        raise RuntimeError("the network is down")

    monkeypatch.setattr(distributed, "bytes_given", 0)
    monkeypatch.setattr(distributed, "_watch", SimpleNamespace(explain=lambda: explained))
    with pytest.raises(distributed.RankError, match=message):
        distributed._call(fail, torch.zeros(2))


def test_a_single_process_is_all_there_is() -> None:
    values = torch.arange(6.0)
    assert (distributed.count(), distributed.index(), distributed.is_main()) == (1, 0, True)
    assert distributed.share(6) == range(6)
    assert distributed.equal_share(7, group_size=2) == range(7)  # the last group is half: that is not the ranks' matter
    assert distributed.gather(values, 6) is values
    assert distributed.total(values) is values
    assert distributed.any_of(True)
    assert not distributed.any_of(False)
    assert distributed.gather_texts("a") == ["a"]
    distributed.start()
    distributed.check_equal([values])
    distributed.stop()


def test_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "index", lambda rank=rank: rank)
        shares.append(list(distributed.share(10)))
        assert list(distributed.equal_share(16, group_size=4)) == [4 * rank + i for i in range(4)]
    assert [number for share in shares for number in share] == list(range(10))
    assert {len(share) for share in shares} == {2, 3}
    with pytest.raises(ValueError, match=r"16 images .* 4 ranks in groups of 3: .* multiple of 12"):
        distributed.equal_share(16, group_size=3)
