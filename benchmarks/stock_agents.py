"""What agents of Stable-Baselines3 learn on the first task of dpok train: ``python -m benchmarks.stock_agents``.

The task is one prompt, "three green squares", with T = 10. Most agents see text features and act by noise:

- ``ppo-bytes``: PPO with the stock MultiInputPolicy, which reads the prompt's bytes as magnitudes;
- ``ppo``: the same with text features;
- ``ppo-residual``: PPO with ``agents.ResidualActorPolicy``, which starts as the pre-trained model;
- ``ppo-lora``: PPO with the policy of this library's own agents, a LoRA of the pre-trained model; it acts by latents;
- ``sac-unsquashed``: SAC with actions within +-10, of which its first ones fill the whole range;
- ``sac``: SAC with squashed noise actions, of which its first ones are about the pre-trained model's noise.

Before and after training, ``--eval-images`` images of the same seeds are drawn and judged. "Saturated" is the share of
the first layer's tanh units above 0.99 along the first images, before training. Each run adds one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import torch
from gymnasium.vector import VectorEnv
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from agents import GymnasiumVecEnv
from agents.common.evaluation import Evaluation
from agents.common.policy import DenoisingPolicy
from agents.common.residual_actor import ResidualActorPolicy
from benchmarks.score import score_policy
from dpok_gym import VectorNoiseAction, VectorTextFeatures, reference_policy
from dpok_gym.registration import DEFAULT_ENVIRONMENT, FIRST_TASKS
from dpok_gym.utils.validation import check_integer
from dpok_gym.wrappers import get_batch

RESULTS = Path(__file__).parent / "results" / "stock_agents.jsonl"
N_ENVS = 64
#: Seed of the first image of an evaluation.
EVALUATION_SEED = 1_000_000

_PPO: dict[str, Any] = {"n_steps": 10, "batch_size": 128, "n_epochs": 4, "gamma": 1.0, "gae_lambda": 1.0}
_SAC: dict[str, Any] = {
    "learning_starts": 640,
    "buffer_size": 20_000,
    "gamma": 1.0,
    "gradient_steps": 32,
    "batch_size": 256,
    "ent_coef": 0.001,
}


@dataclass(frozen=True)
class Agent:
    """A stock agent.

    Attributes:
        algorithm: of Stable-Baselines3.
        policy: its policy.
        settings: its other arguments.
        actions: "noise", "squashed" noise, or "latent".
        features: whether it sees text features, and not bytes.
    """

    algorithm: Callable[..., BaseAlgorithm]
    policy: Any
    settings: dict[str, Any]
    actions: Literal["noise", "squashed", "latent"] = "noise"
    features: bool = True


AGENTS: dict[str, Agent] = {
    "ppo-bytes": Agent(PPO, "MultiInputPolicy", _PPO, features=False),
    "ppo": Agent(PPO, "MultiInputPolicy", _PPO),
    "ppo-residual": Agent(PPO, ResidualActorPolicy, _PPO),
    "ppo-lora": Agent(PPO, DenoisingPolicy, _PPO | {"batch_size": 64, "n_epochs": 1}, "latent", features=False),
    "sac-unsquashed": Agent(SAC, "MultiInputPolicy", _SAC),
    "sac": Agent(SAC, "MultiInputPolicy", _SAC, "squashed"),
}


def make_env(agent: Agent, num_envs: int) -> VectorEnv:
    """Makes the first task's environment, in the agent's wrappers."""
    task = FIRST_TASKS[DEFAULT_ENVIRONMENT]
    env: Any = gymnasium.make_vec(DEFAULT_ENVIRONMENT, num_envs=num_envs, **task)
    if agent.actions != "latent":
        env = VectorNoiseAction(env, squashed=agent.actions == "squashed")
    return VectorTextFeatures(env) if agent.features else env


def evaluate(model: BaseAlgorithm, env: VectorEnv, n_images: int) -> Evaluation:
    """Draws images of fixed seeds with an agent, and scores them."""
    torch.manual_seed(0)  # of the agent's own noise
    prompts = list(get_batch(env).prompts.train) * n_images
    return score_policy(env, lambda observation: model.predict(observation)[0], prompts, EVALUATION_SEED)


@torch.no_grad()
def saturated_share(model: BaseAlgorithm, env: VectorEnv) -> float | None:
    """Returns the share of saturated tanh units in a stock PPO's first layer; None for other networks."""
    extractor = getattr(model.policy, "mlp_extractor", None)
    if not hasattr(extractor, "policy_net"):
        return None
    policy = reference_policy(env, seed=0)
    observation, _ = env.reset(seed=0)
    shares = []
    for _ in range(get_batch(env).process.num_inference_steps):
        tensors, _ = model.policy.obs_to_tensor(observation)
        first: Any = extractor.policy_net[0]  # type: ignore[union-attr]
        hidden = first(model.policy.extract_features(tensors, model.policy.features_extractor)).tanh()
        shares.append((hidden.abs() > 0.99).float().mean().item())
        observation, *_ = env.step(policy(observation))
    return sum(shares) / len(shares)


def run(name: str, images: int, eval_images: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """Trains an agent, and returns what it reached.

    Args:
        name: one of :data:`AGENTS`.
        images: images drawn in training, a multiple of 64.
        eval_images: images of an evaluation, a multiple of 64.
        seed: of the training.
        learning_rate: of the agent.
    """
    agent = AGENTS[name]
    env = make_env(agent, N_ENVS)
    settings = agent.settings | {"learning_rate": learning_rate, "seed": seed, "device": "cpu"}
    if agent.policy is DenoisingPolicy:
        adapter = {"process": get_batch(env).process, "lora_rank": 16, "target_modules": "all", "use_critic": True}
        settings["policy_kwargs"] = adapter
    model = agent.algorithm(agent.policy, GymnasiumVecEnv(env), **settings)
    saturated, before = saturated_share(model, env), evaluate(model, env, eval_images)
    started = time.process_time()
    model.learn(images * get_batch(env).process.num_inference_steps)
    seconds = time.process_time() - started
    after = evaluate(model, env, eval_images)
    row: dict[str, Any] = {"agent": name, "images": images, "seed": seed, "learning_rate": learning_rate}
    for when, evaluation in (("before", before), ("after", after)):
        row[when] = {
            "alignment": evaluation.mean("shapes-alignment"),
            "aligned": evaluation.aligned_share,
            "quality": evaluation.mean_quality,
        }
    return row | {"saturated": saturated, "seconds": round(seconds)}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the runs."""
    table = Table("agent", "images", "seed", "saturated", "alignment", "aligned", "quality", "seconds")
    for row in rows:
        pairs = [
            f"{row['before'][name]:.3f} -> {row['after'][name]:.3f}" for name in ("alignment", "aligned", "quality")
        ]
        saturated = "" if row["saturated"] is None else f"{row['saturated']:.0%}"
        table.add_row(row["agent"], str(row["images"]), str(row["seed"]), saturated, *pairs, str(row["seconds"]))
    console.print(table)


def main() -> None:
    """Trains, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=["ppo", "ppo-residual", "sac"])
    parser.add_argument("--images", type=int, default=3072, help="drawn in training, rounded up to a multiple of 64")
    parser.add_argument("--eval-images", type=int, default=256, help="drawn before and after, a multiple of 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that gets a line for each run")
    options = parser.parse_args()
    check_integer("--images", options.images, minimum=0)
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.agents:
        row = run(name, options.images, options.eval_images, options.seed, options.learning_rate)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    show(rows, Console(width=120))


if __name__ == "__main__":
    main()
