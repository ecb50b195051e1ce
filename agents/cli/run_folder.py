"""The folder of a run: what ``dpok train`` writes there, and the agent that is in it."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from agents.cli import plots
from agents.cli.config import Config
from agents.cli.environments import EVALUATION_BATCH_SIZE, evaluation_rewards
from agents.cli.interrupts import InterruptCallback
from agents.cli.logs import CSVLog, TensorBoardLog, make_logger, read_log
from agents.cli.tables import say, scores_of, scores_table, write_json
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.callbacks import ProgressCallback
from agents.common.checkpoint import (
    CheckpointCallback,
    find_checkpoint,
    load_checkpoint,
    remove_later_checkpoints,
    save_checkpoint,
)
from agents.common.evaluation import Evaluation, cycle_prompts, evaluate
from dpok_gym.utils.files import replacing
from dpok_gym.vector_env import DenoisingVectorEnv

SUMMARY, LOG, TENSORBOARD, LORA = "summary.json", "progress.csv", "tensorboard", "lora"
EVALUATION_BEFORE = "evaluation_before.npz"


class Run:
    """One training in its folder.

    Args:
        folder: the run folder; :meth:`begin` makes it.
        config: the settings.
        checkpoint: the checkpoint to resume from; None for a new training.

    Raises:
        ValueError: if the run is complete already.
    """

    def __init__(self, folder: Path, config: Config, checkpoint: Path | None = None) -> None:
        self.folder, self.config, self.console = folder, config, Console()
        self.env = config.make_env(config.n_envs)
        self.agent = config.make_agent(self.env)
        # What a checkpoint keeps of the run itself: the length of its log, and the seconds of training so far.
        self._extra_state: dict[str, Any] = {"log_rows": 0, "seconds": 0.0}
        self._checkpoint = checkpoint
        if checkpoint is not None:
            self._extra_state |= load_checkpoint(self.agent, checkpoint)
        self.prompts = cycle_prompts(self.env.prompts.train, config.eval_images)
        self.progress = ProgressCallback(self._total_images())
        self.interrupts = InterruptCallback()
        self.interrupted = False
        #: The command that resumes this run, for messages.
        self.resume_command = f"dpok train --resume --out {shlex.quote(str(folder))}"
        summary = _read_summary(folder)
        # A run that was killed between its last image and its evaluation is not complete yet.
        is_evaluated = summary.get("pictures") == self.agent.images_drawn and not summary["interrupted"]
        if is_evaluated and self.agent.is_done(self._total_timesteps()):
            raise ValueError(
                f"the run in {folder} has drawn its {self.agent.images_drawn} images; ask for more with --images"
            )

    def begin(self) -> None:
        """Makes the folder, and removes from it what is newer than the checkpoint."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"the run folder {self.folder} cannot be made ({error.strerror}); choose another --out"
            ) from error
        self.config.write(self.folder)
        say(self.console, f"writing to {self.folder}")
        if self._checkpoint is None:
            # It may be of an earlier run with other settings, which was killed before its first checkpoint.
            (self.folder / EVALUATION_BEFORE).unlink(missing_ok=True)
        else:
            say(self.console, f"resuming from {self._checkpoint}, with {self.agent.images_drawn} images drawn")
        remove_later_checkpoints(self.folder, self.agent)
        n_rows = self._extra_state["log_rows"]
        self._csv = CSVLog(self.folder / LOG, n_rows)
        self._tensorboard = TensorBoardLog(self.folder / TENSORBOARD, n_rows)

    def evaluate_before(self, n_images: int | None = None) -> Evaluation:
        """Evaluates the pre-trained model; reads the evaluation instead if the run folder has it.

        Args:
            n_images: number of images, the first ones of the evaluation; None for all.
        """
        n_images = n_images or len(self.prompts)
        path = self.folder / EVALUATION_BEFORE
        if path.is_file():
            known = load_evaluation(path)
            # --eval-images may have changed since.
            if known.prompts == self.prompts:
                return known[:n_images]
        evaluation = self._evaluate(n_images, "pre-trained")
        if n_images == len(self.prompts):  # only a whole evaluation is worth keeping
            save_evaluation(evaluation, path)
        return evaluation

    def evaluate_after(self, n_images: int | None = None) -> Evaluation:
        """Evaluates the fine-tuned model; see :meth:`evaluate_before`."""
        return self._evaluate(n_images or len(self.prompts), "fine-tuned")

    def _evaluate(self, n_images: int, model: str) -> Evaluation:
        say(self.console, f"drawing {n_images} images with the {model} model")
        # An environment of its own: it also computes the judge's rewards, which training may not have.
        reward = evaluation_rewards(self.env.world, self.config.env_kwargs["reward"])
        # With the prompts that are loaded already: reading a file of a million takes seconds.
        env = self.config.make_env(min(n_images, EVALUATION_BATCH_SIZE), reward=reward, prompts=self.env.prompts)
        prompts, seed = self.prompts[:n_images], self.config.evaluation_seed
        return evaluate(self.agent.policy, env, prompts, seed, reference=model == "pre-trained")

    def learn(self) -> None:
        """Trains until all images are drawn and learned from."""
        steps, total = self.config.checkpointing_steps, self._total_timesteps()
        save = CheckpointCallback(self.folder, steps, self.config.checkpoints_total_limit, self._state)
        self.agent.set_logger(make_logger(self.folder, self._csv, self._tensorboard))
        with self.interrupts:
            # The checkpoint callback comes before the interrupts: Ctrl-C must not cost a checkpoint that is due.
            # learn() counts the steps of this call; num_timesteps those of the whole run.
            self.agent.learn(
                max(total - self.agent.num_timesteps, 0),
                [self.progress, save, self.interrupts],
                reset_num_timesteps=not self.agent.num_timesteps,
            )

    def save(self) -> None:
        """Saves a checkpoint, the LoRA, the learning curve, and a summary without evaluations."""
        self.progress.close()
        save_checkpoint(self.agent, self.folder, self._state(), self.config.checkpoints_total_limit)
        if self.agent.policy.lora is not None:
            # Written beside its place and then moved, so that the folder never has half a LoRA.
            part = self.folder / f"{LORA}.part"
            written = self.agent.save_lora(part)
            (self.folder / LORA).mkdir(exist_ok=True)
            os.replace(written, self.folder / LORA / written.name)
            shutil.rmtree(part)
        self._write_summary(None, None)
        plots.learning_curve(read_log(self.folder / LOG), self.folder / "learning_curve.png", self._title)

    def report(self, before: Evaluation, after: Evaluation) -> None:
        """Writes the summary and the images before and after, and prints a table."""
        summary = self._write_summary(before, after)
        labels = ("pre-trained", f"{self.config.algo.upper()},\n{self.agent.images_drawn:,} images")
        plots.before_after(before, after, self.folder / "before_after.png", self._title, labels)
        table = scores_table(f"{self._title} (means of {len(before)} images)", summary)
        table.add_section()
        table.add_row("images drawn in training", "", f"{self.agent.images_drawn:,}")
        table.add_row("seconds of training", "", f"{summary['seconds']:,}")
        self.console.print(table)
        if self.interrupted:
            say(self.console, f"interrupted; resume with: {self.resume_command}")

    @property
    def is_sound(self) -> bool:
        """True if the agent is worth saving: it has learned, no update is half done, and its weights are finite."""
        weights = self.agent.policy.parameters()
        return (
            self.agent.images_drawn > 0
            and not self.interrupts.updating
            and all(bool(values.isfinite().all()) for values in weights)
        )

    def close(self) -> None:
        """Ends the progress bar and the logs."""
        self.progress.close()
        self._csv.close()
        self._tensorboard.close()

    def _total_images(self) -> int:
        """Returns the images of the whole training: the budget, rounded up to whole iterations."""
        per_iteration = self.config.algo_kwargs.get("images_per_iteration") or self.config.n_envs
        return math.ceil(self.config.images / per_iteration) * per_iteration

    def _total_timesteps(self) -> int:
        return self.config.images * self.env.process.num_inference_steps

    def _state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the run beside the agent."""
        # The rows must be on the disk before a checkpoint says that they are.
        self._csv.flush()
        return {"log_rows": self._csv.n_rows, "seconds": self._seconds}

    @property
    def _seconds(self) -> float:
        # Those before the checkpoint, and those of this process.
        return self._extra_state["seconds"] + self.progress.seconds_so_far

    @property
    def _title(self) -> str:
        return f"{self.config.algo.upper()} on {self.config.env}, seed {self.config.seed}"

    def _write_summary(self, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
        config, prompts = self.config, self.env.prompts
        summary = {
            "env": config.env,
            "algo": config.algo,
            "preset": config.preset,
            "prompts": prompts.train[0] if prompts.name == "text" else prompts.name,
            "model": config.env_kwargs["model"],
            "seed": config.seed,
            "pictures": self.agent.images_drawn,
            "seconds": round(self._seconds, 1),
            "interrupted": self.interrupted or after is None,
        }
        # A summary without evaluations has None for every score, so its keys are always the same.
        summary |= scores_of(before, after)
        write_json(self.folder / SUMMARY, summary)
        return summary


def load_run(folder: str | Path, device: str = "auto", model: str | Path | None = None) -> DenoisingAlgorithm:
    """Loads the agent of a run from its newest checkpoint.

    Args:
        folder: a run folder of ``dpok train``.
        device: device of the networks: "auto", "cpu", "cuda", ...
        model: the folder of the run's model, if it has moved; None for the model in the run's config.

    Returns:
        The agent. Its ``env`` is the run's environment.

    Raises:
        FileNotFoundError: if the folder is no run folder, or has no checkpoint.
        ValueError: if a file in the folder is damaged.
    """
    config = Config.read(Path(folder))
    find_checkpoint(folder)  # for its error, before a model is loaded
    changes = {} if model is None else {"model": str(model)}
    return load_agent(Path(folder), config, config.make_env(config.n_envs, device=device, **changes), device)


def load_agent(folder: Path, config: Config, env: DenoisingVectorEnv, device: str) -> DenoisingAlgorithm:
    """Returns the agent of a run's newest checkpoint, in an environment with the run's model and sampler."""
    checkpoint = find_checkpoint(folder)
    agent = config.make_agent(env, device)
    load_checkpoint(agent, checkpoint)
    return agent


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Writes an evaluation as arrays, without pickle."""
    arrays: dict[str, Any] = {f"rewards/{name}": values for name, values in evaluation.rewards.items()}
    for name, value in vars(evaluation).items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
    names = [evaluation.alignment_reward or "", evaluation.quality_reward or ""]  # an array of texts has no None
    with replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, prompts=np.array(evaluation.prompts), judge=np.array(names), **arrays)


def load_evaluation(path: Path) -> Evaluation:
    """Reads what :func:`save_evaluation` wrote.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return _read_evaluation(path)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged; remove it, and the pre-trained model is evaluated again when the run is resumed"
        ) from error


def _read_evaluation(path: Path) -> Evaluation:
    with np.load(path, allow_pickle=False) as arrays:
        rewards = {name.removeprefix("rewards/"): arrays[name] for name in arrays.files if name.startswith("rewards/")}
        alignment, quality = (str(name) or None for name in arrays["judge"])
        return Evaluation(
            prompts=arrays["prompts"].tolist(),
            images=arrays["images"],
            reward=arrays["reward"],
            rewards=rewards,
            step_kl=arrays["step_kl"],
            step_mse=arrays["step_mse"],
            exploring=arrays["exploring"],
            alignment_reward=alignment,
            quality_reward=quality,
        )


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
