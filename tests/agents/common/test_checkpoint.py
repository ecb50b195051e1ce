"""Checkpoints of a stand-in for an agent: what is written, what is kept, and what a killed process leaves."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agents.common.checkpoint import (
    CheckpointCallback,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_later_checkpoints,
    save_checkpoint,
)
from dpok_gym.rewards import NonFiniteError
from dpok_gym.utils import files
from dpok_gym.utils.files import WriteError
from tests.support import assert_same


class Agent:
    """Has what a checkpoint needs of an agent."""

    def __init__(self, images_drawn=0, n_updates=0, seed=0, trains_all=False):
        generator = torch.Generator().manual_seed(seed)
        weights = "denoiser" if trains_all else "lora"
        self.tensors = {
            weights: {"down.weight": torch.randn(2, 3, generator=generator)},
            "critic": {"0.bias": torch.randn(4, generator=generator)},
            "optimizer": {"0.step": torch.tensor(3.0), "0.exp_avg": torch.randn(3, 2, generator=generator).T},
        }
        self.policy = torch.nn.Module()  # the ranks compare its parameters; here are none
        self.images_drawn, self._n_updates = images_drawn, n_updates
        self.iteration, self.n_fitted = 0, 0
        self.process = SimpleNamespace(model=SimpleNamespace(lora_prefix="unet."))

    def state_dict(self):
        counters = {"images_drawn": self.images_drawn, "n_updates": self._n_updates, "statistics": [0.1, float("nan")]}
        return {"tensors": self.tensors, "state": counters}

    def load_state_dict(self, saved):
        self.tensors = saved["tensors"]
        self.images_drawn, self._n_updates = saved["state"]["images_drawn"], saved["state"]["n_updates"]

    def save_lora(self, folder):
        path = Path(folder) / "pytorch_lora_weights.safetensors"
        save_file({f"unet.{name}": values for name, values in self.tensors["lora"].items()}, path)
        return path


@pytest.mark.parametrize("trains_all", [False, True])
def test_what_is_saved_comes_back_to_the_last_bit(tmp_path, trains_all):
    agent = Agent(64, 5, trains_all=trains_all)
    folder = save_checkpoint(agent, tmp_path, {"log_rows": 3, "seconds": 0.1})
    assert folder == tmp_path / "checkpoint-64"
    weights = "denoiser.safetensors" if trains_all else "pytorch_lora_weights.safetensors"
    assert {path.name for path in folder.iterdir()} == {
        weights,
        "critic.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    }
    other = Agent(seed=1, trains_all=trains_all)
    assert load_checkpoint(other, folder) == {"log_rows": 3, "seconds": 0.1}
    assert_same(other.tensors, agent.tensors)
    assert (other.images_drawn, other._n_updates) == (64, 5)


def test_the_lora_is_in_the_format_of_diffusers(tmp_path):
    agent = Agent()
    folder = save_checkpoint(agent, tmp_path)
    saved = load_file(folder / "pytorch_lora_weights.safetensors")
    assert_same(saved, {"unet.down.weight": agent.tensors["lora"]["down.weight"]})


def test_old_checkpoints_are_removed(tmp_path):
    for images in (0, 100, 20):
        save_checkpoint(Agent(images), tmp_path, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]
    save_checkpoint(Agent(120), tmp_path, total_limit=None)
    assert len(list_checkpoints(tmp_path)) == 3
    with pytest.raises(ValueError, match="checkpoints_total_limit must be an integer of at least 1"):
        save_checkpoint(Agent(140), tmp_path, total_limit=0)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "critic.safetensors", "progress.csv"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, name):
    (tmp_path / "progress.csv").write_text("a\n1\n")
    save_checkpoint(Agent(10), tmp_path, total_limit=1)
    flush = files.flush_to_disk

    def fails(path):
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "flush_to_disk", fails)
        with pytest.raises(WriteError, match=f"{name} cannot be written: No space left on device"):
            save_checkpoint(Agent(20), tmp_path, total_limit=1, extra_files=[tmp_path / "progress.csv"])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "progress.csv"]  # the new one takes no space
    save_checkpoint(Agent(20), tmp_path, total_limit=1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-20", "progress.csv"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_old_checkpoint(tmp_path, value):
    save_checkpoint(Agent(10), tmp_path, total_limit=1)
    agent = Agent(20)
    agent.policy.weight = torch.nn.Parameter(torch.tensor([0.0, value]))
    with pytest.raises(NonFiniteError, match="the weights are infinite or NaN, so no checkpoint of them is written"):
        save_checkpoint(agent, tmp_path, total_limit=1)
    assert os.listdir(tmp_path) == ["checkpoint-10"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    save_checkpoint(Agent(10), tmp_path)
    for name in ("checkpoint-20.part", "checkpoint-5.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.safetensors").write_bytes(b"half of it")
    (tmp_path / "checkpoint-30.part").touch()
    assert find_checkpoint(tmp_path).name == "checkpoint-10"
    save_checkpoint(Agent(20), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-20"]


def test_a_checkpoint_that_was_moved_to_another_disk(tmp_path):
    """A link in its place is removed like any other checkpoint; what it points to is the user's."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    save_checkpoint(Agent(10), run).rename(elsewhere)
    (run / "checkpoint-10").symlink_to(elsewhere)
    save_checkpoint(Agent(20), run, total_limit=1)
    assert os.listdir(run) == ["checkpoint-20"]
    assert (elsewhere / "trainer_state.json").is_file()


def test_a_fit_without_new_images_gets_new_names(tmp_path):
    """A forward-process algorithm draws all of its images first, and then takes optimiser steps."""
    names = []
    for n_fitted in (0, 50, 100, 100):
        agent = Agent(64, n_fitted)
        agent.n_fitted = n_fitted
        names.append(save_checkpoint(agent, tmp_path).name)
    assert names == ["checkpoint-64", "checkpoint-64-50", "checkpoint-64-100", "checkpoint-64-100"]
    assert find_checkpoint(tmp_path).name == "checkpoint-64-100"
    assert [path.name for path in list_checkpoints(tmp_path)] == names[:3]


def test_the_same_state_is_not_written_again(tmp_path):
    folder = save_checkpoint(Agent(64), tmp_path, {"seconds": 1.0})
    written = (folder / "trainer_state.json").stat().st_mtime_ns
    assert save_checkpoint(Agent(64), tmp_path, {"seconds": 2.0}) == folder
    assert (folder / "trainer_state.json").stat().st_mtime_ns == written


def test_another_state_of_the_same_name_is_replaced(tmp_path):
    save_checkpoint(Agent(64, 5), tmp_path)
    folder = save_checkpoint(Agent(64, 6, seed=1), tmp_path)
    loaded = Agent()
    load_checkpoint(loaded, folder)
    assert loaded._n_updates == 6
    assert os.listdir(tmp_path) == ["checkpoint-64"]


def test_later_checkpoints_are_removed(tmp_path):
    for images, n_fitted in ((32, 0), (64, 0), (64, 50), (64, 100), (128, 0)):
        agent = Agent(images, n_fitted)
        agent.n_fitted = n_fitted
        save_checkpoint(agent, tmp_path)
    agent = Agent(64)
    agent.n_fitted = 50
    remove_later_checkpoints(tmp_path, agent)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-32", "checkpoint-64", "checkpoint-64-50"]


def test_find_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="the run ended before the first one"):
        find_checkpoint(tmp_path)
    for images in (10, 20):
        save_checkpoint(Agent(images), tmp_path)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-20"
    assert find_checkpoint(tmp_path, "checkpoint-10") == tmp_path / "checkpoint-10"
    assert find_checkpoint("elsewhere", tmp_path / "checkpoint-10") == tmp_path / "checkpoint-10"
    with pytest.raises(FileNotFoundError, match="did you mean 'checkpoint-10'"):
        find_checkpoint(tmp_path, "checkpoint-1")


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_damaged_checkpoint_is_refused(tmp_path, name, zeros):
    folder = save_checkpoint(Agent(10), tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes(len(content)) if zeros else content[:20])
    with pytest.raises(ValueError, match="checkpoint-10 cannot be loaded"):
        load_checkpoint(Agent(), folder)


@pytest.mark.parametrize(("key", "value"), [("run", 5), ("run", None), ("agent", [1]), ("files", 5)])
def test_a_state_of_another_kind_is_refused(tmp_path, key, value):
    folder = save_checkpoint(Agent(10), tmp_path)
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps(state | {key: value}))
    with pytest.raises(ValueError, match="checkpoint-10 cannot be loaded"):
        load_checkpoint(Agent(), folder)


@pytest.mark.parametrize(
    "name",
    [
        "trainer_state.json",
        "optimizer.safetensors",
        "critic.safetensors",
        "pytorch_lora_weights.safetensors",
        "progress.csv",
    ],
)
def test_a_file_that_is_missing_is_named(tmp_path, name):
    """It is the newest checkpoint all the same: nothing goes on from an older one, or from 0, in silence."""
    (tmp_path / "progress.csv").write_text("a\n1\n")
    for images in (10, 20):
        folder = save_checkpoint(Agent(images), tmp_path, extra_files=[tmp_path / "progress.csv"])
    (folder / name).unlink()
    assert find_checkpoint(tmp_path) == folder
    with pytest.raises(
        FileNotFoundError, match=rf"checkpoint-20 has no {name}; .*--resume-from-checkpoint checkpoint-10"
    ):
        load_checkpoint(Agent(), folder)
    assert save_checkpoint(Agent(20), tmp_path) == folder  # written again
    load_checkpoint(Agent(), folder)


def test_a_state_of_another_agent(tmp_path):
    folder = save_checkpoint(Agent(10), tmp_path)

    class Other(Agent):
        def load_state_dict(self, saved):
            raise ValueError("the state is of Agent, and the agent is Other")

    with pytest.raises(ValueError, match="checkpoint-10 cannot be loaded: the state is of Agent"):
        load_checkpoint(Other(), folder)


def test_no_file_can_run_code(tmp_path):
    """No pickle: every file is safetensors or JSON."""
    for path in save_checkpoint(Agent(10), tmp_path).iterdir():
        if path.suffix == ".json":
            assert set(json.loads(path.read_text())) == {"agent", "run", "files"}
        else:
            assert load_file(path)


def test_the_callback_saves_before_an_iteration(tmp_path):
    agent: Any = Agent()
    rows: list[int] = []
    save = CheckpointCallback(tmp_path, every=2, total_limit=3, extra_state=lambda: {"log_rows": len(rows)})
    save.model = agent
    for iteration in range(6):
        agent.iteration, agent.images_drawn = iteration, 8 * iteration
        save.on_rollout_start()
        rows.append(iteration)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-16", "checkpoint-32"]
    assert load_checkpoint(Agent(), tmp_path / "checkpoint-32") == {"log_rows": 4}
    for wrong in ({"every": 0}, {"total_limit": 0}):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            CheckpointCallback(tmp_path, **wrong)


def test_the_callback_saves_by_time_too(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    agent: Any = Agent()
    save = CheckpointCallback(tmp_path, every=4, total_limit=None, minutes=2.0)
    save.model = agent
    # Iteration 2 begins after 140 seconds; the next one is due at 260. Iteration 4 is due by count.
    for iteration, seconds in enumerate([0.0, 70, 140, 210, 230, 340, 349, 360]):
        agent.iteration, agent.images_drawn, now[0] = iteration, 8 * iteration, seconds
        save.on_rollout_start()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-16", "checkpoint-32", "checkpoint-56"]
    now[0] = 0.0
    by_time_alone = CheckpointCallback(tmp_path / "time", every=None, minutes=2.0)
    (tmp_path / "time").mkdir()
    by_time_alone.model = agent
    for iteration, seconds in enumerate([0.0, 100, 200, 300, 400]):
        agent.iteration, agent.images_drawn, now[0] = iteration, 8 * iteration, seconds
        by_time_alone.on_rollout_start()
    assert [path.name for path in list_checkpoints(tmp_path / "time")] == ["checkpoint-16", "checkpoint-32"]
    with pytest.raises(ValueError, match="checkpointing_minutes must be"):
        CheckpointCallback(tmp_path, minutes=0.0)


def test_the_agents_arrays_need_not_be_contiguous(tmp_path):
    agent = Agent(1)
    assert not agent.tensors["optimizer"]["0.exp_avg"].is_contiguous()
    loaded = Agent(seed=1)
    load_checkpoint(loaded, save_checkpoint(agent, tmp_path))
    np.testing.assert_array_equal(loaded.tensors["optimizer"]["0.exp_avg"], agent.tensors["optimizer"]["0.exp_avg"])
