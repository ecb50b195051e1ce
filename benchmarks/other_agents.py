"""The recipes of docs/recipes/ beside DPOK, with as many images: ``python -m benchmarks.other_agents``.

There are two tasks: ``DPOK-Mixture-v0``, and ``DPOK-Shapes-v0`` with the reward ``jpeg-compressibility``. Each agent is
trained with three seeds and 2,560 images. Afterwards images of fixed seeds are drawn and scored with the task's reward.

Some lines take one help away, to show what it is worth: "all numbers of the noise" acts by each of the 256 numbers of a
latent, not by one for each channel; "bytes" sees the bytes of the prompt, not text features. Two lines are PPO of
Stable-Baselines3 with a policy of this library: a small UNet that corrects the noise, and a LoRA of the denoiser.

The sweep goes on where it was stopped. ``--report`` makes the table of the runs that are there.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
from gymnasium.vector import VectorEnv
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO

import dpok_gym
from agents import GymnasiumVecEnv, ResidualActorPolicy
from agents.algorithms.presets import PRESETS
from agents.algorithms.registry import load_algorithm
from agents.common.evaluation import Evaluation, cycle_prompts, evaluate
from agents.common.policy import DenoisingPolicy
from benchmarks.markdown import markdown
from benchmarks.runs import Description, Record, sweep_and_report, sweep_options
from benchmarks.score import score_policy
from benchmarks.statistics import mean
from dpok_gym.registration import SUITABLE_PRESETS
from dpok_gym.wrappers import get_batch

RESULTS = Path(__file__).parent / "results" / "other_agents"
N_ENVS = 64
#: Seed of the first image of an evaluation, far from those of training.
EVALUATION_SEED = 1_000_000


class BenchmarkTask(NamedTuple):
    """A task.

    Attributes:
        env_id: of its environment.
        kwargs: of the environment.
        block_size: of the noise that agents of other libraries act by.
    """

    env_id: str
    kwargs: dict[str, Any]
    block_size: int


BENCHMARK_TASKS = {
    "mixture": BenchmarkTask("DPOK-Mixture-v0", {}, 1),
    "shapes": BenchmarkTask("DPOK-Shapes-v0", {"reward": "jpeg-compressibility"}, 8),
}

#: Trains on a task with a seed, and evaluates: images of a training, seed, images of an evaluation.
Runner = Callable[[BenchmarkTask, int, int, int], Evaluation]


def recipe(name: str, block_size: int | None = None, bytes_of_prompt: bool = False, **settings: Any) -> Runner:
    """Returns a runner of a recipe.

    Args:
        name: of its module in docs/recipes/.
        block_size: in place of the task's.
        bytes_of_prompt: True to leave out the text features.
        **settings: of its ``train``.
    """

    def run(task: BenchmarkTask, images: int, seed: int, eval_images: int) -> Evaluation:
        module = importlib.import_module(f"docs.recipes.{name}")
        env = module.make_env(task.env_id, N_ENVS, block_size or task.block_size, **task.kwargs)
        if bytes_of_prompt:
            env = env.env  # without the outermost wrapper
        return _score(env, module.train(env, images, seed, **settings), eval_images)

    return run


def residual_actor(task: BenchmarkTask, images: int, seed: int, eval_images: int) -> Evaluation:
    """A runner of PPO with :class:`agents.ResidualActorPolicy`."""
    env = gymnasium.make_vec(task.env_id, num_envs=N_ENVS, **task.kwargs)
    env = dpok_gym.VectorTextFeatures(dpok_gym.VectorNoiseAction(env))
    act = _train_ppo(env, ResidualActorPolicy, images, seed, learning_rate=3e-4, batch_size=128, n_epochs=4)
    return _score(env, act, eval_images)


def lora_policy(task: BenchmarkTask, images: int, seed: int, eval_images: int) -> Evaluation:
    """A runner of PPO with the policy of this library's own agents."""
    env: Any = gymnasium.make_vec(task.env_id, num_envs=N_ENVS, **task.kwargs)
    kwargs = {"process": env.process, "lora_rank": 16, "target_modules": "all", "use_critic": True}
    settings = {"policy_kwargs": kwargs, "learning_rate": 1e-3, "batch_size": 64, "n_epochs": 1}
    return _score(env, _train_ppo(env, DenoisingPolicy, images, seed, **settings), eval_images)


def _train_ppo(env: VectorEnv, policy: Any, images: int, seed: int, **settings: Any) -> Callable[[Any], Any]:
    """Trains Stable-Baselines3's PPO; returns its policy, a function from observations to actions."""
    n_steps = get_batch(env).process.num_inference_steps
    settings |= {"n_steps": n_steps, "gamma": 1.0, "gae_lambda": 1.0}
    model = PPO(policy, GymnasiumVecEnv(env), seed=seed, device="cpu", **settings).learn(images * n_steps)
    return lambda observation: model.predict(observation)[0]


def _score(env: VectorEnv, act: Callable[[Any], Any], eval_images: int) -> Evaluation:
    prompts = cycle_prompts(get_batch(env).prompts.train, eval_images)
    return score_policy(env, act, prompts, EVALUATION_SEED)


def dpok(trains: bool = True, **changes: Any) -> Runner:
    """Returns a runner of DPOK with the settings that ``dpok train`` takes for the task.

    Args:
        trains: False for the pre-trained model.
        **changes: to these settings.
    """

    def run(task: BenchmarkTask, images: int, seed: int, eval_images: int) -> Evaluation:
        env: Any = gymnasium.make_vec(task.env_id, num_envs=N_ENVS, **task.kwargs)
        kwargs = PRESETS[SUITABLE_PRESETS[task.env_id]].algorithm_kwargs("dpok") | changes
        agent = load_algorithm("dpok")(env=env, seed=seed, device="cpu", **kwargs)
        if trains:
            agent.learn(images * agent.process.num_inference_steps)
        prompts = cycle_prompts(env.prompts.train, eval_images)
        return evaluate(agent.policy, env, prompts, EVALUATION_SEED, reference=not trains)

    return run


LORA = "Stable-Baselines3, PPO, LoRA"
ALL_NUMBERS = "Stable-Baselines3, PPO, all numbers of the noise"
AGENTS: dict[str, Runner] = {
    "pre-trained": dpok(trains=False),
    "DPOK": dpok(),
    "DPOK, kl_coef=0": dpok(kl_coef=0.0),
    "Stable-Baselines3, PPO": recipe("sb3_agents", algo="ppo"),
    "Stable-Baselines3, A2C": recipe("sb3_agents", algo="a2c"),
    "plain torch, PPO": recipe("cleanrl_ppo"),
    "TorchRL, PPO": recipe("torchrl_ppo"),
    "evolution strategy": recipe("evolution"),
    "Stable-Baselines3, PPO, bytes": recipe("sb3_agents", bytes_of_prompt=True, algo="ppo"),
    ALL_NUMBERS: recipe("sb3_agents", block_size=1, algo="ppo"),
    "Stable-Baselines3, PPO, ResidualActorPolicy": residual_actor,
    LORA: lora_policy,
}


def make_descriptions(options: argparse.Namespace) -> Iterator[Description]:
    """Yields the descriptions of the runs that the command line asks for."""
    for seed in range(options.seeds):
        for name in options.tasks:
            for label in options.agents:
                if label == ALL_NUMBERS and BENCHMARK_TASKS[name].block_size == 1:
                    continue  # it is the agent without this change
                if label == LORA and name == "mixture":
                    continue  # its network has no layers for a LoRA
                sizes = {"images": options.images, "eval_images": options.eval_images}
                yield {"task": name, "label": label, **sizes, "seed": seed}


def run(description: Description, row_file: Path | None = None) -> Record:
    """Trains and evaluates.

    Args:
        description: ``task`` and ``label``, keys of :data:`BENCHMARK_TASKS` and :data:`AGENTS`; ``images`` of the
            training, ``eval_images`` and ``seed``.
        row_file: is not used.

    Returns:
        The description, and ``scores`` and the ``seconds`` of computing.
    """
    started = time.process_time()
    runner = AGENTS[description["label"]]
    given = (description[name] for name in ("images", "seed", "eval_images"))
    evaluation = runner(BENCHMARK_TASKS[description["task"]], *given)
    scores = {"reward": evaluation.mean_reward, "aligned": evaluation.aligned_share}
    return description | {"scores": scores, "seconds": round(time.process_time() - started)}


def report(records: Sequence[Record], folder: Path) -> None:
    """Prints the table, and writes it to ``table.md``: the mean reward over the seeds, and the seconds of computing.

    Args:
        records: of the runs.
        folder: for the file.
    """
    headings = [f"{name}: {what}" for name in BENCHMARK_TASKS for what in ("reward", "seconds")]
    rows: dict[str, list[str]] = {}
    for label in AGENTS:
        cells = []
        for name in BENCHMARK_TASKS:
            chosen = [record for record in records if (record["task"], record["label"]) == (name, label)]
            cells.append(f"{mean([r['scores']['reward'] for r in chosen]):.3f}" if chosen else "")
            cells.append(f"{sum(r['seconds'] for r in chosen) / len(chosen):.0f}" if chosen else "")
        if any(cells):
            rows[label] = cells
    table = Table("", *headings)
    for label, cells in rows.items():
        table.add_row(label, *cells)
    Console(width=150).print(table)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(rows, headings), encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = sweep_options(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=BENCHMARK_TASKS, default=list(BENCHMARK_TASKS))
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=list(AGENTS), metavar="AGENT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2560, help="images of a training, a multiple of 64")
    parser.add_argument("--eval-images", type=int, default=512, help="images to score, a multiple of 64")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, and the table."""
    options = parse_arguments(argv)
    folder = options.out or RESULTS
    descriptions = list(make_descriptions(options))
    file = folder / "runs.jsonl"
    sweep_and_report(descriptions, file, options, lambda records: report(records, folder), images=False, run=run)


if __name__ == "__main__":
    main()
