"""What the commands do whose options are in :mod:`agents.options`."""

from __future__ import annotations

import time
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from agents import plots
from agents.callbacks import MODEL
from agents.config import (
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
from agents.evaluation import draw, spread
from agents.evaluation import evaluate as evaluate_policy
from agents.options import MIXTURE, SHAPES, Evaluate, FitReward, Sample, ServeReward, Train
from agents.report import calibration_table, say, scores_of, scores_table, write_json
from agents.run_folder import Run, load_agent
from dpok_gym.checks import integer
from dpok_gym.models.lora import LoRA
from dpok_gym.prompts import unseen_prompts
from dpok_gym.rewards import preference
from dpok_gym.rewards.preference_data import load_comparisons
from dpok_gym.rewards.preference_fit import fit
from dpok_gym.rewards.server import serve

_FEW = 16  # pictures of the evaluation of a run that was interrupted


def train(options: Train) -> int:
    """Trains, evaluates before and after, and writes the run folder."""
    run = Run(*_begin(options))
    run.begin()
    try:
        before = run.draw("pre-trained")
        run.learn()
        after = run.draw("fine-tuned")
    except KeyboardInterrupt:
        run.interrupted = True
        say(run.console, "interrupted: saving what there is (Ctrl-C again leaves at once)")
        # In this order a second interruption costs only what is not written yet.
        run.save()
        run.evaluate_on(run.prompts[:_FEW])
        before, after = run.draw("pre-trained"), run.draw("fine-tuned")
    except Exception:  # a reward's server has gone, for example
        run.interrupted = True
        if run.agent.num_timesteps and all(weights.isfinite().all() for weights in run.agent.policy.parameters()):
            run.save()
            say(run.console, f"stopped by an error; what was learned is kept: {run.how_to_go_on}")
        raise
    finally:
        run.progress.close()
    run.report(before, after)
    return 130 if run.interrupted else 0


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
        agent = load_agent(config, run, env, options.device)
        drawn = draw(partial(env.pretrained_transition, denoiser=agent.policy.denoiser), env, prompts, options.seed)
    else:
        with LoRA.from_folder(env.model.denoiser, lora).switched_on():
            drawn = draw(env.pretrained_transition, env, prompts, options.seed)
    labels = [f"seed {options.seed + k}" for k in range(options.n)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plots.picture_grid(drawn.pictures, labels, options.out, f"“{options.prompt}”", drawn.aligned)
    share = "" if drawn.aligned_share is None else f", {drawn.aligned_share:.0%} of them fully aligned"
    say(Console(), f"{options.n} pictures{share}: {options.out}")
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
    agent = load_agent(config, options.run, env, options.device)
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
        found[name] = {"n_prompts": len(set(texts))} | scores_of(before, after)
        console.print(scores_table(f"{name} prompts (means of {options.pictures} pictures)", found[name]))
    trained = list(config.env_kwargs["reward"])
    result = {"seed": config.seed, "pictures": options.pictures, "trained_on": trained, "prompts": found}
    write_json(options.run / "evaluation.json", result)
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
    write_json(options.out / "fit.json", written | {"held_out": asdict(held_out)})
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


def _no_reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.zeros(len(prompts))
