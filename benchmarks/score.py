"""Scores any policy on a registered task: ``python -m benchmarks.score --env DPOK-Shapes-Count-v0 --lora FOLDER``.

Without a policy, it scores the pre-trained model; with ``--best-of N``, the best of N images by the task's reward.
Otherwise it scores one of these:

- ``--lora FOLDER``: a LoRA in diffusers' format, such as the folder ``lora`` of a run;
- ``--run FOLDER``: a run folder of ``dpok train``;
- ``--policy MODULE:NAME``: a function that takes the vector environment and returns a function from observations to
  actions, as ``dpok_gym:reference_policy`` is one. ``--wrap noise features`` puts it into wrappers first.

Image k is drawn for the k-th prompt of the task, in turn, and starts from an x_T that depends on ``--seed`` plus k
only. Each call adds one line of JSON to the results file, in which anybody may add lines:

    task, version          the environment id, and the version of dpok_gym
    method, author         texts
    images_used            images that training drew; 0 if nothing was trained
    score, interval        mean reward, and its 95 % interval over the images
    aligned, quality       the judge's means; null in a world without a judge
    kl                     nats an image to the pre-trained model; null if it is not known
    images, seed, command  how the line can be made again

Letters used for shapes: N images, C x h x w a latent.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dpok_gym
from agents.cli.environments import (
    EVALUATION_BATCH_SIZE,
    environment_kwargs,
    evaluation_rewards,
    make_env,
    parse_reward,
)
from agents.cli.run_folder import load_run
from agents.common.evaluation import Evaluation, cycle_prompts, evaluate, sample_images
from agents.common.randomness import ImageNoise
from agents.common.steering import BestOf
from dpok_gym.models.lora import LoRA
from dpok_gym.registration import TASKS
from dpok_gym.samplers import State
from dpok_gym.utils.validation import check_integer
from dpok_gym.vector_env import DenoisingVectorEnv
from dpok_gym.worlds import find_world

RESULTS = Path(__file__).parent / "results" / "scores.jsonl"

#: The names of ``--wrap``.
WRAPPERS: dict[str, Callable[[VectorEnv], VectorEnv]] = {
    "noise": dpok_gym.VectorNoiseAction,
    "squashed-noise": lambda env: dpok_gym.VectorNoiseAction(env, squashed=True),
    "features": dpok_gym.VectorTextFeatures,
}

#: From a vector environment to a function from its observations to actions.
PolicyFactory = Callable[[Any], Callable[[Any], Any]]


def make_task(env_id: str, num_envs: int) -> DenoisingVectorEnv:
    """Makes a task's environment, which computes the judge's rewards too."""
    kwargs = environment_kwargs(env_id)
    reward = evaluation_rewards(find_world(kwargs["model"]), parse_reward(kwargs["reward"]))
    return make_env(env_id, num_envs, reward=reward)


def score_pretrained(env: DenoisingVectorEnv, prompts: Sequence[str], seed: int, best_of: int = 1) -> Evaluation:
    """Scores the pre-trained model, or the best of its images for each prompt."""
    return sample_images(env.process, env, prompts, seed, steering=BestOf(best_of))


def score_lora(env: DenoisingVectorEnv, folder: Path, prompts: Sequence[str], seed: int) -> Evaluation:
    """Scores the model with a LoRA in diffusers' format."""
    process = env.process
    lora = LoRA.from_folder(process.model.denoiser, folder, process.model.lora_prefix)

    def tuned(state: State) -> tuple[Tensor, Tensor]:
        with lora.enabled():
            return process.transition(state)

    return sample_images(process, env, prompts, seed, tuned, process.transition)


def score_policy(env: VectorEnv, act: Callable[[Any], Any], prompts: Sequence[str], seed: int) -> Evaluation:
    """Scores any policy by stepping the environment.

    Args:
        env: the denoising vector environment in any wrappers.
        act: takes observations of ``env``, and returns actions.
        prompts: N texts, a multiple of the number of environments.
        seed: of the first image.

    Raises:
        ValueError: if N is no multiple of the number of environments.
    """
    n = env.num_envs
    if len(prompts) % n:
        raise ValueError(
            f"the number of images must be a multiple of {n}, which are drawn at a time; got {len(prompts)}"
        )
    batch = dpok_gym.wrappers.get_batch(env)
    shape, n_steps = batch.model.latent_shape, batch.process.num_inference_steps
    parts = []
    for first in range(0, len(prompts), n):
        noise = ImageNoise.for_evaluation([seed + first + i for i in range(n)], shape, "cpu")
        options = {"prompt": list(prompts[first : first + n]), "latent": noise.initial_latents().numpy()}
        observation, _ = env.reset(seed=seed + first, options=options)
        total = np.zeros(n)
        for _ in range(n_steps):
            observation, rewards, _, _, infos = env.step(act(observation))
            total += rewards
        parts.append((total, infos.get("final_info", infos)))  # "Disabled" does not begin the next episodes
    names = [name for name in parts[0][1]["rewards"] if not name.startswith("_")]
    world = batch.world
    return Evaluation(
        prompts=list(prompts),
        images=np.concatenate([np.stack(info["image"]) for _, info in parts]),
        reward=np.concatenate([total for total, _ in parts]),
        rewards={name: np.concatenate([info["rewards"][name] for _, info in parts]) for name in names},
        step_kl=np.full((len(prompts), n_steps), np.nan),
        step_mse=np.full((len(prompts), n_steps), np.nan),
        exploring=np.ones(n_steps, bool),
        alignment_reward=world.alignment_reward if world else None,
        quality_reward=world.quality_reward if world else None,
    )


def make_row(evaluation: Evaluation, task: str, seed: int, **given: Any) -> dict[str, Any]:
    """Returns the line of a result; ``given`` are method, author, images_used, best_of (1 if none) and command."""
    score, best_of = evaluation.mean_reward, given.get("best_of", 1)
    # The evaluation has the KL of drawing the images, not that of choosing one of them.
    kl = BestOf(best_of).kl_bound if best_of > 1 else float(evaluation.kl.mean())
    error = 1.96 * float(np.nanstd(evaluation.reward, ddof=1)) / np.sqrt(len(evaluation))
    return {
        "task": task,
        "version": dpok_gym.__version__,
        **{name: given[name] for name in ("method", "author", "images_used")},
        "score": round(score, 4),
        "interval": [round(score - error, 4), round(score + error, 4)],
        "aligned": evaluation.aligned_share,
        "quality": evaluation.mean_quality,
        "kl": None if np.isnan(kl) else round(kl, 3),
        "images": len(evaluation),
        "seed": seed,
        "command": given["command"],
    }


def add_row(row: dict[str, Any], path: Path) -> None:
    """Adds a line to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path, task: str) -> list[dict[str, Any]]:
    """Returns the lines of a task, best first.

    Raises:
        ValueError: if a line is no JSON, or lacks a key.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if row["task"] == task:
                rows.append((-row["score"], row["interval"], row["method"], row))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} is no result as benchmarks.score writes it: {error!r}"
            ) from error
    return [row for *_, row in sorted(rows, key=lambda entry: entry[0])]


def show(rows: Sequence[dict[str, Any]], task: str, console: Console) -> None:
    """Prints the lines of a task beside its reference score and threshold."""
    known = TASKS[task]
    title = f"{task}: pre-trained {known.reference_score:.3f}, threshold {known.threshold:.3f}"
    table = Table("method", "author", "images used", "score", "aligned", "quality", "KL, nats", "solved", title=title)
    for row in rows:
        low, high = row["interval"]
        optional = ["" if row[name] is None else f"{row[name]:.3g}" for name in ("aligned", "quality", "kl")]
        solved = "yes" if row["score"] >= known.threshold else "no"
        score = f"{row['score']:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(row["method"], row["author"], str(row["images_used"]), score, *optional, solved)
    console.print(table)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--lora", type=Path, help="folder of a LoRA")
    what.add_argument("--run", type=Path, help="run folder of dpok train")
    what.add_argument("--policy", help="MODULE:NAME of a function that makes a policy")
    what.add_argument("--best-of", type=int, default=1, help="images of the pre-trained model to choose from")
    parser.add_argument("--wrap", nargs="*", default=[], choices=WRAPPERS, help="wrappers for --policy, inside first")
    parser.add_argument("--method", help="name in the results; by default, what is scored")
    parser.add_argument("--author", default="dpok-gym", help="who made it")
    parser.add_argument("--images-used", type=int, default=0, help="images that its training drew")
    parser.add_argument("--images", type=int, default=256, help="images to score")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--beta", type=float, help="show E[r] - beta KL beside the optimum, where it is known")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results file")
    return parser.parse_args(argv)


def evaluate_chosen(options: argparse.Namespace, env: DenoisingVectorEnv) -> tuple[str, Evaluation]:
    """Scores what the command line chose; returns a name for it and the evaluation."""
    prompts = cycle_prompts(env.prompts.train, options.images)
    if options.lora:
        return f"LoRA {options.lora.name}", score_lora(env, options.lora, prompts, options.seed)
    if options.run:
        return f"run {options.run.name}", evaluate(load_run(options.run).policy, env, prompts, options.seed)
    if options.policy:
        module, _, name = options.policy.partition(":")
        factory: PolicyFactory = getattr(importlib.import_module(module), name)
        wrapped: Any = env
        for wrapper in options.wrap:
            wrapped = WRAPPERS[wrapper](wrapped)
        return options.policy, score_policy(wrapped, factory(wrapped), prompts, options.seed)
    name = "pre-trained" if options.best_of == 1 else f"pre-trained, best of {options.best_of}"
    return name, score_pretrained(env, prompts, options.seed, options.best_of)


def main(argv: Sequence[str] | None = None) -> None:
    """Scores, adds the line and prints the task's lines."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse_arguments(words)
    check_integer("--images", options.images, minimum=2)
    torch.set_num_threads(1)
    env = make_task(options.env, min(options.images, EVALUATION_BATCH_SIZE))
    name, evaluation = evaluate_chosen(options, env)
    if "--out" in words:  # where the line is written does not change it
        del words[words.index("--out") : words.index("--out") + 2]
    command = shlex.join(["python", "-m", "benchmarks.score", *words])
    given = {
        "author": options.author,
        "images_used": options.images_used,
        "best_of": options.best_of,
        "command": command,
    }
    row = make_row(evaluation, options.env, options.seed, method=options.method or name, **given)
    add_row(row, options.out)
    console = Console(width=120)
    show(read_rows(options.out, options.env), options.env, console)
    if options.beta is not None:
        reached = (
            "not known, as the KL is not" if row["kl"] is None else f"{row['score'] - options.beta * row['kl']:.4f}"
        )
        best = env.optimal_value(options.beta)
        console.print(f"E[r] - {options.beta} KL: {reached}; the best possible: {best:.4f}", markup=False)


if __name__ == "__main__":
    main()
