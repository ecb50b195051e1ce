"""Checkpoints of a training: folders of safetensors and JSON files, without pickle.

A checkpoint is a folder ``checkpoint-<images drawn>`` in the run folder; once a forward-process algorithm fits,
``checkpoint-<images drawn>-<optimiser steps>``. It holds

- ``pytorch_lora_weights.safetensors``, which diffusers can load, or ``denoiser.safetensors`` if all weights are
  trained;
- a file of tensors for every other part of the agent: ``critic``, ``old`` (weights that follow the trained ones),
  ``optimizer``, ``images`` (of algorithms that learn from a fixed set);
- files of the run itself, such as its log so far;
- ``trainer_state.json``: the agent's counters and statistics, what the run itself needs to resume, and the names of the
  other files.

It is written into a folder beside it, which is renamed when all is on the disk. So a checkpoint is whole or not there,
and one that lacks a file was damaged later.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents.common import distributed
from dpok_gym.models.lora_files import FILE_NAME as LORA_FILE
from dpok_gym.rewards import NonFiniteError
from dpok_gym.utils.files import flush_to_disk, naming, replacing, write_text
from dpok_gym.utils.reading import read_json
from dpok_gym.utils.sharding import whole
from dpok_gym.utils.tensors import load_tensors, save_tensors
from dpok_gym.utils.validation import check_integer, check_mapping, check_positive, suggest

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm

TRAINER_STATE = "trainer_state.json"
#: The file of a denoiser whose weights are all trained.
DENOISER = "denoiser.safetensors"

#: Endings of a folder that is being written, and of one that is being removed.
_PART, _OLD = ".part", ".old"
#: The images drawn, and perhaps the optimiser steps of a fit.
_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?")


def save_checkpoint(
    agent: DenoisingAlgorithm,
    run_folder: str | Path,
    extra_state: Mapping[str, Any] | None = None,
    total_limit: int | None = None,
    extra_files: Iterable[Path] = (),
) -> Path:
    """Saves an agent between two iterations. Every rank must call this; rank 0 writes.

    Old checkpoints beyond the limit are removed once the new one is in place.

    Args:
        agent: the agent.
        run_folder: the folder that gets the checkpoint; it must exist.
        extra_state: JSON-able values of the run, which :func:`load_checkpoint` returns.
        total_limit: number of checkpoints to keep, at least 1; None keeps all.
        extra_files: files of the run that are copied into the checkpoint; those that are not there are left out.

    Returns:
        The checkpoint's folder. If one of the same state is there already, nothing is written.

    Raises:
        ValueError: if the limit is below 1.
        NonFiniteError: if a weight is infinite or NaN; the checkpoints that there are stay.
        WriteError: if a file cannot be written; the checkpoints that there are stay.
    """
    if total_limit is not None:
        check_integer("checkpoints_total_limit", total_limit)
    if not has_finite_weights(agent):  # it would take the place of one that a run can go on from
        raise NonFiniteError(
            "the weights are infinite or NaN, so no checkpoint of them is written: take a smaller learning_rate, or "
            "float32"
        )
    run_folder = Path(run_folder)
    saved = agent.state_dict()  # on every rank, as a model that is spread over the ranks is gathered here
    state: dict[str, Any] = saved["state"]
    images_drawn, n_fitted = _progress(agent)
    folder = run_folder / f"checkpoint-{images_drawn}"
    if n_fitted:
        folder = run_folder / f"{folder.name}-{n_fitted}"
    if not distributed.is_main():
        return folder
    remove_leftovers(run_folder)
    if not _has_state(folder, state):
        part = folder.with_name(folder.name + _PART)
        try:
            with naming(folder):
                part.mkdir()
                _write(agent, saved["tensors"], {"agent": state, "run": dict(extra_state or {})}, extra_files, part)
                if folder.is_dir():
                    remove_checkpoint(folder)
                part.rename(folder)
                flush_to_disk(run_folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # it may have filled the disk
            raise
    if total_limit is not None:
        for old in list_checkpoints(run_folder)[:-total_limit]:
            remove_checkpoint(old)
    return folder


def has_finite_weights(agent: DenoisingAlgorithm) -> bool:
    """Returns whether no weight is infinite or NaN. Every rank must call this."""
    return all(bool(whole(values.isfinite().all())) for values in agent.policy.parameters())


def _write(
    agent: DenoisingAlgorithm,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    extra_files: Iterable[Path],
    folder: Path,
) -> None:
    """Writes the files of a checkpoint."""
    for group, named in tensors.items():
        if group == "lora":
            agent.save_lora(folder)
        else:
            save_tensors(folder / f"{group}.safetensors", named)
    for file in extra_files:
        if file.is_file():
            with replacing(folder / file.name) as copy:
                shutil.copyfile(file, copy)
    state["files"] = sorted(file.name for file in folder.iterdir())
    write_text(folder / TRAINER_STATE, json.dumps(state, indent=2) + "\n")


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """Returns a run's checkpoints, the oldest first."""
    folders = [path for path in Path(run_folder).glob("checkpoint-*") if _is_checkpoint(path)]
    return sorted(folders, key=progress_of)


def progress_of(checkpoint: Path) -> tuple[int, int]:
    """Returns the images drawn until a checkpoint, and the optimiser steps of a fit, of which its name tells."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None  # list_checkpoints returns no other folders
    return int(match[1]), int(match[2] or 0)


def find_checkpoint(run_folder: str | Path, which: str | Path = "latest") -> Path:
    """Finds a checkpoint of a run.

    Args:
        run_folder: the run folder.
        which: "latest", the name of a checkpoint in the run folder, or a path.

    Raises:
        FileNotFoundError: if there is no such checkpoint; the message names the nearest one, or says how to get one.
    """
    known = list_checkpoints(run_folder)
    if str(which) == "latest":
        if not known:
            raise FileNotFoundError(
                f"{run_folder} has no checkpoint: the run ended before the first one; train again, perhaps with a "
                "smaller --checkpointing-steps"
            )
        return known[-1]
    for candidate in (Path(run_folder) / which, Path(which)):
        if candidate.is_dir():
            return candidate
    advice = suggest(str(which), [path.name for path in known]) if known else "it has none"
    raise FileNotFoundError(f"{run_folder} has no checkpoint {str(which)!r}; {advice}")


def load_checkpoint(agent: DenoisingAlgorithm, folder: str | Path) -> dict[str, Any]:
    """Puts an agent into the state of a checkpoint.

    Args:
        agent: an agent with the settings of the one that was saved.
        folder: the checkpoint.

    Returns:
        The ``extra_state`` that was saved with it.

    Raises:
        FileNotFoundError: if the folder lacks a file; the message names it.
        ValueError: if a file in it is damaged, or it is of another agent.
    """
    folder = Path(folder)
    _check_files(folder, [TRAINER_STATE])
    try:
        saved = check_mapping(f"the content of {TRAINER_STATE}", read_json(folder / TRAINER_STATE))
        state, files = check_mapping("agent", saved["agent"]), saved["files"]
        extra_state = dict(check_mapping("run", saved["run"]))
        _check_files(folder, files)
        tensors = {Path(name).stem: load_tensors(folder / name)[0] for name in files if name.endswith(".safetensors")}
        # The file has the names of diffusers, with the denoiser's prefix; the agent's state has them without it.
        lora = tensors.pop(Path(LORA_FILE).stem, None)
        if lora is not None:
            prefix = agent.process.model.lora_prefix
            tensors["lora"] = {name.removeprefix(prefix): values for name, values in lora.items()}
        agent.load_state_dict({"tensors": tensors, "state": state})
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"the checkpoint {folder} cannot be loaded: {reason}; {_advice(folder)}") from error
    return extra_state


def _check_files(folder: Path, names: Iterable[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"the checkpoint {folder} has no {' and no '.join(missing)}; {_advice(folder)}")


def _advice(folder: Path) -> str:
    """Returns what to do without a checkpoint; it names the older ones."""
    older = [path.name for path in list_checkpoints(folder.parent) if path.name != folder.name]
    if older:
        return f"resume from another one: --resume-from-checkpoint {' or '.join(older)}"
    return "there is no other one in its run, which has to begin anew"


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint."""
    # Renamed first: if the removal is interrupted, no half of a checkpoint looks like a whole one.
    old = folder.with_name(folder.name + _OLD)
    _remove(old)
    folder.rename(old)
    _remove(old)


def remove_later_checkpoints(run_folder: str | Path, agent: DenoisingAlgorithm) -> None:
    """Removes the checkpoints of a run that are newer than the agent, which was loaded from an older one.

    Args:
        run_folder: the run folder.
        agent: the agent; its images drawn and its optimiser steps tell which checkpoints are newer.
    """
    for folder in list_checkpoints(run_folder):
        if progress_of(folder) > _progress(agent):
            remove_checkpoint(folder)


class CheckpointCallback(BaseCallback):
    """Saves a checkpoint before an iteration begins, when nothing is half done.

    Args:
        run_folder: the folder that gets the checkpoints.
        every: iterations between two checkpoints, at least 1; None for any number.
        total_limit: number of checkpoints to keep, at least 1; None keeps all.
        extra_state: returns what is saved beside the agent; see :func:`save_checkpoint`.
        extra_files: files that are copied into each checkpoint; see there.
        minutes: minutes after which a checkpoint is due even if fewer iterations have passed, above 0; None for no such
            limit.

    Raises:
        ValueError: if one of the numbers is out of range.
    """

    def __init__(
        self,
        run_folder: str | Path,
        every: int | None = 10,
        total_limit: int | None = 2,
        extra_state: Callable[[], Mapping[str, Any]] = dict,
        extra_files: Iterable[Path] = (),
        minutes: float | None = None,
    ) -> None:
        super().__init__()
        self._minutes = None if minutes is None else check_positive("checkpointing_minutes", minutes)
        self._saved_at = time.monotonic()
        self._folder = Path(run_folder)
        self._every = None if every is None else check_integer("checkpointing_steps", every)
        if total_limit is not None:
            check_integer("checkpoints_total_limit", total_limit)
        self._total_limit, self._extra_state, self._extra_files = total_limit, extra_state, tuple(extra_files)

    def _on_training_start(self) -> None:
        self._saved_at = time.monotonic()

    def _on_rollout_start(self) -> None:
        agent: Any = self.model
        is_late, is_due = False, self._every is not None and agent.iteration % self._every == 0
        if self._minutes is not None:  # the clocks of the ranks differ, and they save together
            is_late = distributed.any_of(time.monotonic() - self._saved_at >= 60 * self._minutes)
        # At iteration 0 there is nothing to save yet.
        if agent.iteration and (is_late or is_due):
            self._saved_at = time.monotonic()
            distributed.check_equal(list(agent.policy.parameters()))
            save_checkpoint(agent, self._folder, self._extra_state(), self._total_limit, self._extra_files)

    def _on_step(self) -> bool:
        return True


def remove_leftovers(run_folder: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for ending in (_PART, _OLD):
        for path in run_folder.glob(f"checkpoint-*{ending}"):
            _remove(path)


def _remove(path: Path) -> None:
    """Removes a folder, a file or a link, if it is there; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_checkpoint(folder: Path) -> bool:
    return _NAME.fullmatch(folder.name) is not None and folder.is_dir()


def _progress(agent: DenoisingAlgorithm) -> tuple[int, int]:
    """Returns the images drawn, and the optimiser steps of a fit, in which a forward-process algorithm draws none."""
    return agent.images_drawn, getattr(agent, "n_fitted", 0)


def _has_state(folder: Path, state: Mapping[str, Any]) -> bool:
    """Returns whether a checkpoint holds the agent in this state."""
    try:
        saved = read_json(folder / TRAINER_STATE)
        is_whole = all((folder / name).is_file() for name in saved["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # As text, since nan is not equal to itself.
    return is_whole and json.dumps(saved.get("agent"), sort_keys=True) == json.dumps(state, sort_keys=True)
