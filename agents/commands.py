"""What the commands do whose options are in :mod:`agents.options`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.logger import CSVOutputFormat, Logger, TensorBoardOutputFormat
from stable_baselines3.common.save_util import load_from_zip_file

from agents import plots
from agents.callbacks import ProgressCallback, SaveCallback, save_agent
from agents.config import (
    ALGORITHMS,
    AT_A_TIME,
    CONFIG,
    ENV_OPTIONS,
    SHAPES_REWARDS,
    Config,
    default_env_kwargs,
    given,
    is_shapes,
    make_env,
    parse_reward,
)
from agents.evaluation import Evaluation, draw, spread
from agents.evaluation import evaluate as evaluate_policy
from agents.on_policy import DenoisingAlgorithm
from agents.options import MIXTURE, SHAPES, Evaluate, FitReward, Sample, ServeReward, Train
from dpok_gym.checks import integer
from dpok_gym.files import replacing
from dpok_gym.models.lora import LoRA
from dpok_gym.prompts import unseen_prompts
from dpok_gym.rewards import preference
from dpok_gym.rewards.preference_data import load_comparisons
from dpok_gym.rewards.preference_fit import Measured, fit
from dpok_gym.rewards.server import serve
from dpok_gym.vector_env import DenoisingVectorEnv

MODEL, SUMMARY, LOG = "model.zip", "summary.json", "progress.csv"

_FEW = 16  # pictures of the evaluation of a run that was interrupted


def train(options: Train) -> int:
    """Trains, evaluates before and after, and writes the run folder."""
    run = _Run(*_begin(options))
    run.begin()
    try:
        before = run.draw("pre-trained")
        run.learn()
        after = run.draw("fine-tuned")
    except KeyboardInterrupt:
        run.interrupted = True
        _say(run.console, "interrupted: saving what there is (Ctrl-C again leaves at once)")
        # In this order a second interruption costs only what is not written yet.
        run.save()
        run.evaluate_on(run.prompts[:_FEW])
        before, after = run.draw("pre-trained"), run.draw("fine-tuned")
    except Exception:  # a reward's server has gone, for example
        run.interrupted = True
        if run.agent.num_timesteps and all(weights.isfinite().all() for weights in run.agent.policy.parameters()):
            run.save()
            _say(run.console, f"stopped by an error; what was learned is kept: {run.how_to_go_on}")
        raise
    finally:
        run.progress.close()
    run.report(before, after)
    return 130 if run.interrupted else 0


class _Run:
    """One training in its folder.

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
        self.prompts, self._judge = prompts, self.config.make_evaluation_env(len(prompts))

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write(self.folder)
        _say(self.console, f"writing to {self.folder}")
        save_agent(self.agent, self.folder)

    def draw(self, model: str) -> Evaluation:
        """The evaluation of the "pre-trained" model or the "fine-tuned" one."""
        _say(self.console, f"drawing {len(self.prompts)} pictures with the {model} model")
        seed = self.config.evaluation_seed
        return evaluate_policy(self.agent.policy, self._judge, self.prompts, seed, reference=model == "pre-trained")

    def learn(self) -> None:
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
        _write_json(self.folder / SUMMARY, self._summary(None, None))
        _draw_curve(self.folder, self.config)

    def report(self, before: Evaluation, after: Evaluation) -> None:
        """Summary, figures, and a table on the screen."""
        summary = self._summary(before, after)
        _write_json(self.folder / SUMMARY, summary)
        _draw_curve(self.folder, self.config)
        title, labels = _title(self.config), ("pre-trained", f"{self.config.algo.upper()},\n{self.pictures:,} pictures")
        plots.before_after(before, after, self.folder / "before_after.png", title, labels)
        table = _table(f"{title} (means of {len(before)} pictures)", summary)
        table.add_section()
        table.add_row("pictures drawn in training", "", f"{self.pictures:,}")
        table.add_row("seconds of training", "", f"{summary['seconds']:,}")
        self.console.print(table)
        if self.interrupted:
            _say(self.console, f"interrupted; go on with: {self.how_to_go_on}")

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
        } | _scores(before, after)


def sample(options: Sample) -> int:
    """Draws pictures into a labelled grid."""
    integer("--n", options.n)
    integer("--seed", options.seed, least=0)
    lora, run = options.lora, None
    if lora is not None:
        run = next((folder for folder in (lora, lora.parent) if (folder / CONFIG).is_file()), None)
        lora = lora / "lora" if run == lora else lora
    config = Config.read(run) if run is not None else None
    env_id = options.env or (config.env if config else SHAPES)
    kwargs = config.env_kwargs if config and options.env is None else default_env_kwargs(env_id)
    kwargs = kwargs | given(options, *ENV_OPTIONS) | {"device": options.device, "prompts": [options.prompt]}
    kwargs["reward"] = SHAPES_REWARDS[0] if is_shapes(env_id, kwargs) else _no_reward
    env = make_env(env_id, min(options.n, AT_A_TIME), **kwargs)
    prompts = [options.prompt] * options.n
    if lora is None:
        drawn = draw(env.pretrained_transition, env, prompts, options.seed)
    elif run is not None and config is not None and lora == run / "lora" and not lora.is_dir():  # it has trained it all
        if options.dtype:
            raise ValueError("a run that trained the whole denoiser draws in its own precision; leave out --dtype")
        agent = _load_agent(config, run, env, options.device)
        drawn = draw(partial(env.pretrained_transition, denoiser=agent.policy.denoiser), env, prompts, options.seed)
    else:
        with LoRA.from_folder(env.model.denoiser, lora).switched_on():
            drawn = draw(env.pretrained_transition, env, prompts, options.seed)
    labels = [f"seed {options.seed + k}" for k in range(options.n)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plots.picture_grid(drawn.pictures, labels, options.out, f"“{options.prompt}”", drawn.aligned)
    share = "" if drawn.aligned_share is None else f", {drawn.aligned_share:.0%} of them fully aligned"
    _say(Console(), f"{options.n} pictures{share}: {options.out}")
    return 0


def evaluate(options: Evaluate) -> int:
    """Scores a run on training and on held-out prompts."""
    config = Config.read(options.run)
    integer("--pictures", options.pictures)
    config = replace(config, **given(options, "seed"))
    if options.reward:
        also = tuple(parse_reward(options.reward))
    elif config.is_shapes:
        also = ("shapes-preference",)
    else:
        trained_on_size = any(name.startswith("jpeg-") for name in config.env_kwargs["reward"])
        also = () if config.env == MIXTURE or trained_on_size else ("jpeg-compressibility",)
    env = config.make_evaluation_env(options.pictures, also, device=options.device, **given(options, "model"))
    agent = _load_agent(config, options.run, env, options.device)
    sets = {
        "training": env.prompts.train,
        "held-out": unseen_prompts(env.prompts) if config.is_shapes else env.prompts.held_out,
    }
    console, found = Console(), {}
    for name, texts in sets.items():
        if not texts:
            console.print(f"there are no {name} prompts")
            continue
        prompts = spread(texts, options.pictures)
        before = evaluate_policy(agent.policy, env, prompts, config.evaluation_seed, reference=True)
        after = evaluate_policy(agent.policy, env, prompts, config.evaluation_seed)
        found[name] = {"n_prompts": len(set(texts))} | _scores(before, after)
        console.print(_table(f"{name} prompts (means of {options.pictures} pictures)", found[name]))
    trained = list(config.env_kwargs["reward"])
    result = {"seed": config.seed, "pictures": options.pictures, "trained_on": trained, "prompts": found}
    _write_json(options.run / "evaluation.json", result)
    return 0


def fit_reward(options: FitReward) -> int:
    """Fits a reward to choices and measures it."""
    if (options.out / preference.CONFIG).exists():
        raise FileExistsError(f"{options.out} already holds a reward; choose another --out")
    integer("--seed", options.seed, least=0)
    console = Console()
    start = preference.PreferenceReward.load(options.start).network if options.start else None
    picture_size = options.picture_size or (start.config.picture_size if start else 64)
    if start and picture_size != start.config.picture_size:
        raise ValueError(
            f"{options.start} takes pictures of {start.config.picture_size} pixels; leave out --picture-size"
        )
    comparisons = load_comparisons(options.choices, picture_size)
    console.print(f"{len(comparisons)} choices between {len(comparisons.pictures)} pictures")

    def log(row: dict[str, Any]) -> None:
        numbers = f"loss {row['loss']:.3f}, held-out {row['held_out_loss']:.3f}, agreement {row['agreement']:.1%}"
        console.print(f"epoch {row['epoch']}: {numbers}", highlight=False)

    checkpoint = options.out / "checkpoint.pt"
    found = fit(
        comparisons,
        network=start,
        **given(options, "epochs", "held_out", "seed", "batch_size", "learning_rate", "device"),
        checkpoint=checkpoint,
        log=log,
    )
    found.reward.save(options.out)
    checkpoint.unlink()
    held_out = found.held_out
    written = {"choices": str(options.choices), "trained_on": found.trained_on, "epoch": found.epoch}
    _write_json(options.out / "fit.json", written | {"held_out": asdict(held_out)})
    plots.calibration(held_out, options.out / "calibration.png", f"{held_out.choices:,} choices held out")
    console.print(calibration_table(held_out))
    console.print(
        f"agreement {held_out.agreement:.1%}, loss {held_out.loss:.3f} nats, expected calibration error "
        f"{held_out.calibration_error:.3f}; use it with: dpok train --reward {options.out}",
        highlight=False,
    )
    return 130 if found.interrupted else 0


def serve_reward(options: ServeReward) -> int:
    """Serves a reward until Ctrl-C."""
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, got {options.port}")
    serve(parse_reward(options.reward), options.host, options.port, options.max_batch)
    return 130  # only Ctrl-C ends it, which uvicorn sometimes keeps to itself


def _begin(options: Train) -> tuple[Path, Config]:
    """The run folder, which is not made yet, and the config of the run."""
    stamp = time.strftime("%Y%m%d-%H%M%S")  # several seeds may be started at once
    name = f"{options.env}-{options.algo}-seed{options.seed}-{stamp}"
    folder = options.out or Path("runs") / name.replace("/", "-").replace(":", "-")
    if options.resume:
        if options.out is None:
            raise ValueError("--resume needs the run folder to go on with: --out FOLDER")
        config = Config.read(folder)
        changed = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
        changed = [f"--{name.replace('_', '-')}" for name in changed if name not in ("out", "resume", "pictures")]
        if changed:
            raise ValueError(f"--resume goes on with the run's own settings; leave out {', '.join(changed)}")
        return folder, replace(config, **given(options, "pictures"))
    if (folder / CONFIG).exists() or (folder / MODEL).exists():
        raise FileExistsError(
            f"{folder} already holds a run; choose another --out, or go on with it: dpok train --resume --out {folder}"
        )
    return folder, Config.of(options)


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


def _load_agent(config: Config, folder: Path, env: DenoisingVectorEnv, device: str) -> DenoisingAlgorithm:
    """The agent of a run, on the environment's model, which may lie elsewhere now."""
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(f"the run in {folder} has no {MODEL}: it ended before there was one")
    data, _, _ = load_from_zip_file(folder / MODEL, device="cpu")
    assert data is not None
    sampler = data["sampler"] | {name: env.sampler[name] for name in ("model", "model_kwargs")}
    return ALGORITHMS[config.algo].load(folder / MODEL, device=device, custom_objects={"sampler": sampler})


def _no_reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.zeros(len(prompts))


def _scores(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """What the two evaluations say, means over the pictures; None for what was not measured."""
    scores: dict[str, Any] = {"eval_pictures": len(after) if after else 0}
    for when, found in {"before": before, "after": after}.items():
        scores[f"aligned_{when}"] = found.aligned_share if found else None
        scores[f"quality_{when}"] = found.mean("shapes-quality") if found else None
        scores[f"reward_{when}"] = found.mean_reward if found else None
        scores[f"rewards_{when}"] = {name: found.mean(name) for name in found.rewards} if found else {}
    scores["kl_to_pretrained"] = float(after.kl.mean()) if after else None
    return scores


def _rows(scores: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if scores["aligned_before"] is not None:
        yield "fully aligned pictures", f"{scores['aligned_before']:.1%}", f"{scores['aligned_after']:.1%}"
    for name, value in scores["rewards_before"].items():
        yield name, f"{value:.3f}", f"{scores['rewards_after'][name]:.3f}"
    yield "reward trained on", f"{scores['reward_before']:.3f}", f"{scores['reward_after']:.3f}"
    yield "KL to pre-trained, nats per picture", "0", f"{scores['kl_to_pretrained']:.2f}"


def _table(title: str, scores: dict[str, Any]) -> Table:
    table = Table("", title=title, title_justify="left")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    for row in _rows(scores):
        table.add_row(*row)
    return table


def calibration_table(held_out: Measured) -> Table:
    """Predicted against observed."""
    title = f"how often the favourite was chosen ({held_out.choices} choices held out)"
    table = Table(title=title, title_justify="left")
    for heading in ("predicted", "observed", "choices"):
        table.add_column(heading, justify="right")
    for predicted, observed, count in zip(held_out.predicted, held_out.observed, held_out.counts, strict=True):
        table.add_row(f"{predicted:.1%}", f"{observed:.1%}", str(count))
    return table


def _say(console: Console, text: str) -> None:
    """A line as it is: folders may have brackets, and a command is to be copied."""
    console.print(text, markup=False, soft_wrap=True)


def _title(config: Config) -> str:
    return f"{config.algo.upper()} on {config.env}, seed {config.seed}"


def _draw_curve(folder: Path, config: Config) -> None:
    rows = plots.read_log(folder / LOG) if (folder / LOG).is_file() else []
    plots.learning_curve(rows, folder / "learning_curve.png", _title(config))


def _read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).is_file() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
