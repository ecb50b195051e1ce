"""One training of ``dpok train``: it draws, learns, evaluates, and writes its run folder."""

from __future__ import annotations

import math
import shlex
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from stable_baselines3.common.logger import KVWriter, Logger

from agents.cli import curves, plots
from agents.cli.config import FILE_NAME, Config
from agents.cli.environments import EVALUATION_BATCH_SIZE, evaluation_rewards, unseen_prompts
from agents.cli.interrupts import InterruptCallback, agree
from agents.cli.logs import CSVLog, TensorBoardLog, read_log
from agents.cli.optimum import compare_with_optimum
from agents.cli.page import DENOISING, TRAINING, write_page
from agents.cli.run_folder import (
    BEFORE_AFTER,
    EVALUATION_BEFORE,
    HELD_OUT,
    LEARNING_CURVE,
    LOG,
    LORA,
    OPTIMUM,
    PAGE,
    SAMPLES,
    SUMMARY,
    TENSORBOARD,
    load_evaluation,
    make_agent,
    save_evaluation,
)
from agents.cli.samples import N_SHOWN, Sample, SampleCallback, list_samples, remove_samples
from agents.cli.signals import SIGNALS
from agents.cli.tables import say, scores_of, scores_table, write_json
from agents.common import distributed
from agents.common.callbacks import ProgressCallback
from agents.common.checkpoint import (
    TRAINER_STATE,
    CheckpointCallback,
    has_finite_weights,
    list_checkpoints,
    load_checkpoint,
    remove_later_checkpoints,
    remove_leftovers,
    save_checkpoint,
)
from agents.common.evaluation import Evaluation, cycle_prompts, evaluate, shown_images
from agents.common.monitor import TrainingWarning
from agents.common.precision import bfloat16_speedup
from dpok_gym.models.lora_files import FILE_NAME as LORA_FILE
from dpok_gym.utils.files import flush_to_disk, replacing
from dpok_gym.utils.reading import read_json
from dpok_gym.utils.validation import check_non_negative
from dpok_gym.vector_env import DenoisingVectorEnv


class Run:
    """One training in its folder, which this process has locked.

    With several ranks all of them make the same calls. Rank 0 alone writes and prints, and knows what is in the folder.

    Args:
        folder: the run folder.
        config: the settings.
        checkpoint: the checkpoint to resume from; None for a new training.

    Raises:
        ValueError: if the run is complete already, or the checkpoint is of another environment or algorithm.
    """

    def __init__(self, folder: Path, config: Config, checkpoint: Path | None = None) -> None:
        self.folder, self.config, self.console = folder, config, Console(quiet=not distributed.is_main())
        self.env = config.make_env(config.n_envs)
        self.agent = make_agent(config, self.env, checkpoint)
        self._checkpoint, seconds = checkpoint, 0.0
        if checkpoint is not None:
            seconds = self._load(checkpoint)
        with _training_warnings(self.console):
            self.prepared = self.agent.prepare()  # now: an error after the first evaluation would be late
        self.prompts = cycle_prompts(self.env.prompts.train, config.eval_images)
        shown = shown_images(self.prompts, N_SHOWN)
        self.samples = SampleCallback(
            folder / SAMPLES,
            config.checkpointing_steps,
            [self.prompts[index] for index in shown],
            [config.evaluation_seed + index for index in shown],
            self._log_sample,
        )
        self.progress = ProgressCallback(self._total(), None if distributed.is_main() else True, seconds)
        self.interrupts = InterruptCallback()
        #: The command that resumes this run, for messages.
        self.resume_command = f"dpok train --resume --out {shlex.quote(str(folder))}{' --trust' * bool(config.code())}"
        is_evaluated = distributed.any_of(distributed.is_main() and self._is_evaluated())
        if self.agent.is_done(self._total_timesteps()) and is_evaluated:
            advice = "ask for more with --images" if self.agent.draws_images else "train anew, in another --out"
            if getattr(self.agent, "has_spent_kl", False):
                advice = "it has spent its --max-kl, so train anew with a larger one, in another --out"
            raise ValueError(f"the run in {folder} is complete, after {self._done}; {advice}")

    def _load(self, checkpoint: Path) -> float:
        """Puts the agent into the state of a checkpoint; returns the seconds of training until then."""
        state = load_checkpoint(self.agent, checkpoint)
        for name in ("env", "algo"):
            if state.get(name, getattr(self.config, name)) != getattr(self.config, name):
                raise ValueError(
                    f"{self.folder / FILE_NAME} says {name}: {getattr(self.config, name)}, but the checkpoint "
                    f"{checkpoint} is of {state[name]}; set it back, or train anew in another folder"
                )
        return check_non_negative(f"the seconds in {checkpoint / TRAINER_STATE}", state.get("seconds", 0.0))

    def _is_evaluated(self) -> bool:
        """Returns whether the summary, which is written last, is of this agent, and all other files are there."""
        summary = self._read_summary()
        if summary.get("interrupted") is not False or summary.get("pictures") != self.agent.images_drawn:
            return False
        names = [LOG, TENSORBOARD, EVALUATION_BEFORE, LEARNING_CURVE, BEFORE_AFTER, PAGE]
        if self.agent.policy.lora is not None:
            names.append(f"{LORA}/{LORA_FILE}")
        if unseen_prompts(self.env):
            names.append(HELD_OUT)
        return all((self.folder / name).exists() for name in names)

    def _read_summary(self) -> dict[str, Any]:
        path = self.folder / SUMMARY
        if not path.is_file():
            return {}
        try:
            return dict(read_json(path))
        except (ValueError, TypeError):
            say(self.console, f"{path} is damaged; it is written anew")
            return {}

    def begin(self) -> None:
        """Writes the config, starts the logs, and removes from the folder what is newer than the checkpoint."""
        distributed.barrier()  # the others may still read what is there
        self._csv = self._tensorboard = None
        if not distributed.is_main():
            if self._checkpoint is not None:
                save_checkpoint(self.agent, self.folder)  # with rank 0, below
            return
        self._check_places()
        self.config.write(self.folder)
        say(self.console, f"writing to {self.folder}")
        say(self.console, self.prepared)
        if self.agent.draws_images and self._total() != self.config.images:
            say(self.console, f"{self._total()} images will be drawn, in whole iterations")
        policy = self.agent.policy
        if policy.settings["precision"] == "auto":
            why = "as the run began"
            if self._checkpoint is None:
                why = f"bfloat16 is {bfloat16_speedup(policy):.2f} times as fast as float32 here"
            say(self.console, f"the denoiser runs in {policy.precision} ({why})")
        if self._checkpoint is None:
            # It may be of an earlier run with other settings, which was killed before its first checkpoint.
            (self.folder / EVALUATION_BEFORE).unlink(missing_ok=True)
        else:
            say(self.console, f"resuming from {self._checkpoint}, after {self._done}")
        for name in (DENOISING, TRAINING):  # they show the model as it was
            (self.folder / name).unlink(missing_ok=True)
        log = self.folder / LOG
        rows = self._restore_log(log)
        remove_samples(self.folder / SAMPLES, self.agent.iteration)
        remove_leftovers(self.folder)
        remove_later_checkpoints(self.folder, self.agent)
        if self._checkpoint is not None:  # which may be in another folder
            save_checkpoint(self.agent, self.folder, self._state(), extra_files=[log])
        self._csv = CSVLog(log)
        self._tensorboard = TensorBoardLog(self.folder / TENSORBOARD, rows)
        for sample in list_samples(self.folder / SAMPLES):
            self._log_sample(sample)

    def _log_sample(self, sample: Sample) -> None:
        """Shows a row of images in TensorBoard."""
        assert self._tensorboard is not None
        self._tensorboard.add_image("images of fixed seeds", sample.path.read_bytes(), sample.iteration)

    def _check_places(self) -> None:
        """Makes sure that nothing of another kind is where the run's files and folders go, before hours are spent."""
        for name in (LOG, SUMMARY, EVALUATION_BEFORE, LEARNING_CURVE, BEFORE_AFTER, HELD_OUT, OPTIMUM, PAGE):
            if (self.folder / name).is_dir():
                raise FileExistsError(f"{self.folder / name} is a folder, where a file of the run goes; remove it")
        for name in (TENSORBOARD, LORA, SAMPLES):
            if (self.folder / name).is_file():
                raise FileExistsError(f"{self.folder / name} is a file, where a folder of the run goes; remove it")

    def _restore_log(self, log: Path) -> list[dict[str, float]]:
        """Puts the log of the checkpoint in place of the run's; returns its rows."""
        if self._checkpoint is not None and (self._checkpoint / LOG).is_file():
            try:
                rows = read_log(self._checkpoint / LOG)
                with replacing(log) as part:
                    shutil.copyfile(self._checkpoint / LOG, part)
                return rows
            except ValueError as error:
                say(self.console, f"{error}; the log begins anew")
        log.unlink(missing_ok=True)
        return []

    def evaluate_before(self) -> Evaluation | None:
        """Evaluates the pre-trained model; reads the evaluation instead if the run folder has it.

        Returns:
            The evaluation; None on other ranks than rank 0 if it was read.
        """
        known = self._known_evaluation() if distributed.is_main() else None
        if distributed.any_of(known is not None):
            return known
        evaluation = self._evaluate("pre-trained", self.prompts)
        if distributed.is_main():
            save_evaluation(evaluation, self.folder / EVALUATION_BEFORE)
        return evaluation

    def _known_evaluation(self) -> Evaluation | None:
        """Returns the evaluation of the pre-trained model that is in the folder, if it is whole and of these images."""
        path = self.folder / EVALUATION_BEFORE
        if not path.is_file():
            return None
        try:
            known = load_evaluation(path)
        except ValueError as error:
            say(self.console, f"{error}; the pre-trained model is evaluated again")
            return None
        return known if known.prompts == self.prompts else None  # --eval-images may have changed since

    def evaluate_after(self) -> tuple[Evaluation, tuple[Evaluation, Evaluation] | None]:
        """Evaluates the fine-tuned model.

        Returns:
            The evaluation; and that of a few prompts which the training never showed, with the pre-trained and with the
            fine-tuned model, or None if there are no such prompts.
        """
        self.samples.draw(self.agent)
        after = self._evaluate("fine-tuned", self.prompts)
        unseen = unseen_prompts(self.env)
        if not unseen:
            return after, None
        prompts = cycle_prompts(unseen, min(N_SHOWN, len(self.prompts)))
        models = ("pre-trained", "fine-tuned")
        return after, (self._evaluate(models[0], prompts, "held-out "), self._evaluate(models[1], prompts, "held-out "))

    def _evaluate(self, model: str, of_prompts: Sequence[str], kind: str = "") -> Evaluation:
        """Draws images of some prompts with a model; each rank draws its share."""
        agree()
        n = len(of_prompts)
        say(self.console, f"drawing {n} {kind}images with the {model} model")
        own, largest = distributed.share(n), -(-n // distributed.count())
        # As many on every rank: they may have to call the model together. Those at the end are left out again.
        prompts = [of_prompts[min(number, n - 1)] for number in range(own.start, own.start + largest)]
        env = self._evaluation_env(min(largest, EVALUATION_BATCH_SIZE))
        seed = self.config.evaluation_seed + own.start
        drawn = evaluate(self.agent.policy, env, prompts, seed, reference=model == "pre-trained")[: len(own)]
        held_out = self.agent.held_out
        scores = held_out.score(drawn.images, drawn.prompts).T.numpy()
        others = {name: row for name, row in zip(held_out.names, scores, strict=True) if name not in drawn.rewards}
        drawn = replace(drawn, rewards=drawn.rewards | others)
        return replace(drawn.gather(n), prompts=list(of_prompts))

    def _evaluation_env(self, num_envs: int) -> DenoisingVectorEnv:
        """Makes an environment for an evaluation: it also computes the judge's rewards, which training may not have."""
        reward = evaluation_rewards(self.env.world, self.config.env_kwargs["reward"])
        # With the prompts that are loaded already: reading a file of a million takes seconds.
        return self.config.make_env(num_envs, reward=reward, prompts=self.env.prompts)

    def learn(self) -> None:
        """Trains until all images are drawn and learned from, or all choices are."""
        config, total = self.config, self._total_timesteps()
        save = CheckpointCallback(
            self.folder,
            config.checkpointing_steps,
            config.checkpoints_total_limit,
            self._state,
            [self.folder / LOG],
            config.checkpointing_minutes,
        )
        logs: list[KVWriter] = [log for log in (self._csv, self._tensorboard) if log is not None]
        self.agent.set_logger(Logger(None, logs))
        try:
            # The checkpoint callback comes before the interrupts: a signal must not cost a checkpoint that is due.
            # learn() counts the steps of this call; num_timesteps those of the whole run.
            with _training_warnings(self.console):
                self.agent.learn(
                    max(total - self.agent.num_timesteps, 0),
                    [self.progress, save, self.samples, self.interrupts],
                    reset_num_timesteps=self._checkpoint is None,
                )
        finally:
            SIGNALS.deferred = distributed.count() > 1

    def save(self) -> None:
        """Saves a checkpoint."""
        self.progress.close()
        distributed.check_equal(list(self.agent.policy.parameters()))
        self._save()

    def _save(self) -> None:
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.agent, self.folder, self._state(), limit, [self.folder / LOG])

    def keep(self) -> str:
        """Saves what was learned when the training cannot go on; returns a line that says what was kept.

        Nothing is evaluated: the reward may be the reason why the training cannot go on.
        """
        distributed.take_time()
        if self.is_sound:
            try:
                self._save()
                self.write_results()
                return f"the run is saved, resume with: {self.resume_command}"
            except OSError as error:  # a full disk, for example
                say(self.console, f"the run could not be saved: {error}")
        checkpoints = list_checkpoints(self.folder)
        kept = f"{checkpoints[-1]} is kept" if checkpoints else "there is no checkpoint yet"
        return f"{kept}, resume with: {self.resume_command}"

    def write_results(
        self,
        before: Evaluation | None = None,
        after: Evaluation | None = None,
        held_out: tuple[Evaluation, Evaluation] | None = None,
    ) -> None:
        """Writes the LoRA, the figures, the summary and the page that shows them, and prints a table.

        Args:
            before: the evaluation of the pre-trained model; None if the run has not come to its end.
            after: that of the fine-tuned model.
            held_out: those of prompts that the training never showed, with either model.
        """
        if self._tensorboard is None:
            return  # rank 0 writes
        if self.agent.policy.lora is not None:
            self.agent.save_lora(self.folder / LORA)
        rows = read_log(self.folder / LOG)
        summary = self._summarise(before, after)
        names = self.agent.held_out.names
        curves.learning_curve(rows, self.folder / LEARNING_CURVE, self._title, before, after, names)
        if before and after:
            labels = ("pre-trained", f"{self.config.algorithm_name},\n{self._done}")
            pairs = {BEFORE_AFTER: ((before, after), self.config.heading)}
            if held_out is not None:
                pairs[HELD_OUT] = (held_out, f"{self.config.heading}: prompts that the training never showed")
            for name, (evaluations, title) in pairs.items():
                figure = plots.before_after(*evaluations, self.folder / name, title, labels)
                self._tensorboard.add_image(figure.stem.replace("_", " "), figure.read_bytes(), len(rows))
        for path in (self.folder / LOG, self._tensorboard.path):
            if path.is_file():
                flush_to_disk(path)
        write_page(self.folder, summary, self.config)
        write_json(self.folder / SUMMARY, summary)  # last: a run that has it is complete
        if after:
            from_choices = summary["choices"] is not None
            table = scores_table(f"{self.config.heading} (means of {len(after)} images)", summary, from_choices)
            table.add_section()
            if from_choices:
                table.add_row("choices learned from", "", f"{summary['choices']:,}")
            else:
                table.add_row("images drawn in training", "", f"{summary['pictures']:,}")
            table.add_row("seconds of training", "", f"{summary['seconds']:,}")
            self.console.print(table)

    @property
    def is_sound(self) -> bool:
        """True if the agent is worth saving: it has learned, no update is half done, and its weights are finite."""
        return self.agent.iteration > 0 and not self.interrupts.updating and has_finite_weights(self.agent)

    def close(self) -> None:
        """Ends the progress bar and the logs."""
        self.progress.close()
        for log in (self._csv, self._tensorboard):
            if log is not None:
                log.close()

    @property
    def _done(self) -> str:
        """The images or optimiser steps of the training so far."""
        agent: Any = self.agent
        return f"{agent.images_drawn:,} images" if agent.draws_images else f"{agent.n_fitted:,} optimiser steps"

    def _total(self) -> int:
        """Returns the images of the whole training, rounded up to whole iterations; or its optimiser steps."""
        if not self.agent.draws_images:
            return self.config.algo_kwargs["n_gradient_steps"]
        per_iteration = self.config.algo_kwargs.get("images_per_iteration") or self.config.n_envs
        return math.ceil(self.config.images / per_iteration) * per_iteration

    def _total_timesteps(self) -> int:
        return self.config.images * self.env.process.num_inference_steps

    def _state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the run beside the agent and the log."""
        return {"env": self.config.env, "algo": self.config.algo, "seconds": self.progress.seconds}

    @property
    def _title(self) -> str:
        """The heading, and what is drawn."""
        prompts = self.env.prompts
        shown = f"“{prompts.train[0]}”" if len(prompts.train) == 1 else f"{len(prompts.train)} prompts: {prompts.name}"
        return f"{self.config.heading}\n{shown}"

    def _summarise(self, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
        config, prompts, agent = self.config, self.env.prompts, cast(Any, self.agent)
        summary = {
            "env": config.env,
            "algo": config.algo,
            "preset": config.preset,
            "prompts": prompts.train[0] if prompts.name == "text" else prompts.name,
            "model": config.env_kwargs["model"],
            "seed": config.seed,
            "pictures": agent.images_drawn,
            "choices": None if agent.draws_images else len(agent.pairs()),
            "seconds": round(self.progress.seconds, 1),
            "interrupted": after is None,
            "warnings": list(agent.monitor.warned.values()),
            "objective": None,
        }
        if before and after:
            env, seed = self._evaluation_env(EVALUATION_BATCH_SIZE), config.evaluation_seed
            place, label = self.folder / OPTIMUM, f"{self.config.algorithm_name}, {self._done}"
            summary["objective"] = compare_with_optimum(agent, env, before, after, seed, place, self._title, label)
        # A summary without evaluations has None for every score, so its keys are always the same.
        return summary | scores_of(before, after)


@contextmanager
def _training_warnings(console: Console) -> Iterator[None]:
    """Within the block, what an agent warns of is a line on the console."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", TrainingWarning)
        show = warnings.showwarning

        def show_line(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, TrainingWarning):
                say(console, f"warning: {message}")
            else:
                show(message, category, *where)

        warnings.showwarning = show_line  # type: ignore[assignment]
        yield
