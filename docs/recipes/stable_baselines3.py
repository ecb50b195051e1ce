"""Stock agents of Stable-Baselines3, PPO and A2C, on a denoising environment.

    python docs/recipes/stable_baselines3.py --algo ppo --env DPOK-Mixture-v0 --images 15360
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import torch
import tyro
from gymnasium.vector import VectorEnv
from stable_baselines3 import A2C, PPO

import agents
import dpok_gym

#: Images that the agent draws before each update.
NUM_ENVS = {"ppo": 128, "a2c": 32}

# An episode has a fixed length and one reward at its end, so nothing is discounted, and the return of an action is the
# reward itself (lambda = 1). A rollout is one episode of each environment.
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"batch_size": 256, "n_epochs": 4, "learning_rate": 1e-3, "gamma": 1.0, "gae_lambda": 1.0},
    "a2c": {"learning_rate": 1e-3, "normalize_advantage": True, "gamma": 1.0, "gae_lambda": 1.0},
}


def make_env(env_id: str, num_envs: int, **task: Any) -> VectorEnv:
    """Makes an environment whose actions are noise and whose prompts are text features."""
    env = gymnasium.make_vec(env_id, num_envs=num_envs, **task)
    return dpok_gym.VectorTextFeatures(dpok_gym.VectorNoiseAction(env))


def train(env: VectorEnv, images: int, seed: int, algo: Literal["ppo", "a2c"] = "ppo") -> Callable[[Any], Any]:
    """Trains an agent; returns its policy, a function from observations to actions."""
    n_steps = env.single_observation_space["step"].n
    algorithm = {"ppo": PPO, "a2c": A2C}[algo]
    model = algorithm(
        "MultiInputPolicy", agents.GymnasiumVecEnv(env), n_steps=n_steps, seed=seed, verbose=1, device="cpu",
        **SETTINGS[algo],
    )
    model.learn(images * n_steps)
    return lambda observation: model.predict(observation)[0]


def main(
    env: str = "DPOK-Mixture-v0", images: int = 15_360, seed: int = 0, algo: Literal["ppo", "a2c"] = "ppo"
) -> None:
    """Trains, and prints the mean reward as training goes on."""
    torch.set_num_threads(1)
    train(make_env(env, NUM_ENVS[algo]), images, seed, algo)


if __name__ == "__main__":
    tyro.cli(main)
