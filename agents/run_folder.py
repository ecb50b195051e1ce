"""The folder of a run: what ``dpok train`` writes there, and the agent that is in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from stable_baselines3.common.logger import CSVOutputFormat, Logger, TensorBoardOutputFormat
from stable_baselines3.common.save_util import load_from_zip_file

from agents import plots
from agents.callbacks import MODEL, ProgressCallback, SaveCallback, save_agent
from agents.config import ALGORITHMS, Config
from agents.evaluation import Evaluation, evaluate, spread
from agents.on_policy import DenoisingAlgorithm
from agents.report import say, scores_of, scores_table, write_json
from dpok_gym.vector_env import DenoisingVectorEnv

SUMMARY, LOG = "summary.json", "progress.csv"


class Run:
    """One training in its folder.

    Args:
        folder: which :meth:`begin` makes; a run that is there is gone on with.
        config: of the run.

    Raises:
        ValueError: if it is complete already.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config, self.console = folder, config, Console()
        self.env = config.make_env(config.n_envs)
        self.agent = _make_agent(config, folder, self.env)
        self.evaluate_on(spread(self.env.prompts.train, config.eval_pictures))
        self.progress = ProgressCallback(math.ceil(config.pictures / config.n_envs) * config.n_envs)
        self.interrupted = False
        self.how_to_go_on = f"dpok train --resume --out {folder}"
        self._last, self._drawn_before = _read_summary(folder), self.pictures
        is_evaluated = self._last.get("pictures") == self.pictures and not self._last["interrupted"]
        if is_evaluated and self.agent.is_done(config.pictures * len(self.env.schedule)):
            raise ValueError(
                f"the run in {folder} has drawn its {self.pictures} pictures; ask for more with --pictures"
            )

    @property
    def pictures(self) -> int:
        """Drawn in training so far."""
        return self.agent.num_timesteps // len(self.env.schedule)

    def evaluate_on(self, prompts: list[str]) -> None:
        """Sets what is drawn for the evaluations."""
        self.prompts, self._judge = prompts, self.config.make_evaluation_env(len(prompts))

    def begin(self) -> None:
        """Makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write(self.folder)
        say(self.console, f"writing to {self.folder}")
        save_agent(self.agent, self.folder)

    def draw(self, model: str) -> Evaluation:
        """The evaluation of the "pre-trained" model or the "fine-tuned" one."""
        say(self.console, f"drawing {len(self.prompts)} pictures with the {model} model")
        seed = self.config.evaluation_seed
        return evaluate(self.agent.policy, self._judge, self.prompts, seed, reference=model == "pre-trained")

    def learn(self) -> None:
        """Trains until all pictures are drawn."""
        self.agent.set_logger(_make_logger(self.folder, self._drawn_before, self.agent._n_updates))
        self.agent.learn(
            max(self.config.pictures - self._drawn_before, 0) * len(self.env.schedule),
            [self.progress, SaveCallback(self.folder)],
            reset_num_timesteps=not self._drawn_before,
        )
        self.agent.logger.close()
        save_agent(self.agent, self.folder)

    def save(self) -> None:
        """What there is, without evaluations."""
        self.progress.close()
        save_agent(self.agent, self.folder)
        write_json(self.folder / SUMMARY, self._summary(None, None))
        _draw_curve(self.folder, self.config)

    def report(self, before: Evaluation, after: Evaluation) -> None:
        """Summary, figures, and a table on the screen."""
        summary = self._summary(before, after)
        write_json(self.folder / SUMMARY, summary)
        _draw_curve(self.folder, self.config)
        title, labels = _title(self.config), ("pre-trained", f"{self.config.algo.upper()},\n{self.pictures:,} pictures")
        plots.before_after(before, after, self.folder / "before_after.png", title, labels)
        table = scores_table(f"{title} (means of {len(before)} pictures)", summary)
        table.add_section()
        table.add_row("pictures drawn in training", "", f"{self.pictures:,}")
        table.add_row("seconds of training", "", f"{summary['seconds']:,}")
        self.console.print(table)
        if self.interrupted:
            say(self.console, f"interrupted; go on with: {self.how_to_go_on}")

    def _summary(self, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
        config, prompts = self.config, self.env.prompts
        return {
            "env": config.env,
            "algo": config.algo,
            "preset": config.preset,
            "prompts": prompts.train[0] if prompts.name == "text" else prompts.name,
            "model": config.env_kwargs["model"],
            "seed": config.seed,
            "pictures": self.pictures,
            "seconds": round(self._last.get("seconds", 0.0) + self.progress.seconds, 1),
            "interrupted": self.interrupted,
        } | scores_of(before, after)


def load_agent(config: Config, folder: Path, env: DenoisingVectorEnv, device: str) -> DenoisingAlgorithm:
    """The agent of a run, on the environment's model, which may lie elsewhere now.

    Raises:
        FileNotFoundError: if the folder has no agent.
    """
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(f"the run in {folder} has no {MODEL}: it ended before there was one")
    data, _, _ = load_from_zip_file(folder / MODEL, device="cpu")
    assert data is not None
    sampler = data["sampler"] | {name: env.sampler[name] for name in ("model", "model_kwargs")}
    return ALGORITHMS[config.algo].load(folder / MODEL, device=device, custom_objects={"sampler": sampler})


def _make_agent(config: Config, folder: Path, env: DenoisingVectorEnv) -> DenoisingAlgorithm:
    """The agent that the folder holds, or a new one."""
    algorithm: Callable[..., DenoisingAlgorithm] = ALGORITHMS[config.algo]
    if (folder / MODEL).is_file():
        return ALGORITHMS[config.algo].load(folder / MODEL, env, device=config.device)
    return algorithm("DenoisingPolicy", env, seed=config.seed, device=config.device, **config.algo_kwargs)


def _make_logger(folder: Path, pictures: int, n_updates: int) -> Logger:
    """Logs into the folder, after the rows that are there already and belong to what the agent has done so far."""
    log = folder / LOG
    rows = plots.read_log(log) if log.is_file() else []
    writer = CSVOutputFormat(str(log))  # which empties the file
    for row in rows:
        if row.get("rollout/pictures", 0) <= pictures and row.get("train/n_updates", 0) <= n_updates:
            writer.write(dict(row), {})
    return Logger(str(folder), [writer, TensorBoardOutputFormat(str(folder / "tensorboard"))])


def _read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).is_file() else {}


def _draw_curve(folder: Path, config: Config) -> None:
    rows = plots.read_log(folder / LOG) if (folder / LOG).is_file() else []
    plots.learning_curve(rows, folder / "learning_curve.png", _title(config))


def _title(config: Config) -> str:
    return f"{config.algo.upper()} on {config.env}, seed {config.seed}"
