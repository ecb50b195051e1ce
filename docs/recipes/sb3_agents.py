"""Stock agents of Stable-Baselines3, PPO and A2C, on a denoising environment.

python docs/recipes/sb3_agents.py --algo ppo
python docs/recipes/sb3_agents.py --algo ppo --env DPOK-Shapes-v0 --reward jpeg-compressibility --block-size 8
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import torch
import tyro
from gymnasium.vector import VectorEnv
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecMonitor

import agents
import dpok_gym

Algo = Literal["ppo", "a2c"]

ALGORITHMS: dict[Algo, Any] = {"ppo": PPO, "a2c": A2C}
# An episode has a fixed length and one reward, at its end. So nothing is discounted, and the return of each action is
# the reward itself (lambda = 1).
_ALL_RETURN = {"gamma": 1.0, "gae_lambda": 1.0}
SETTINGS: dict[Algo, dict[str, Any]] = {
    "ppo": _ALL_RETURN | {"learning_rate": 3e-3, "n_epochs": 4, "batch_size": 128},
    "a2c": _ALL_RETURN | {"learning_rate": 2e-3, "normalize_advantage": True},
}


def make_env(env_id: str, num_envs: int = 64, block_size: int = 1, **task: Any) -> VectorEnv:
    """Makes an environment whose actions are noise and whose prompts are text features."""
    env = gymnasium.make_vec(env_id, num_envs=num_envs, **task)
    env = dpok_gym.VectorCoarseLatent(dpok_gym.VectorNoiseAction(env, block_size=block_size), block_size)
    return dpok_gym.VectorTextFeatures(env)


def train(env: VectorEnv, images: int, seed: int, algo: Algo = "ppo") -> Callable[[Any], Any]:
    """Trains an agent; returns its policy, a function from observations to actions."""
    n_steps = int(env.single_observation_space["step"].n)  # type: ignore[index]
    # A rollout is one episode of each environment.
    vec_env = VecMonitor(agents.GymnasiumVecEnv(env))
    model = ALGORITHMS[algo](
        "MultiInputPolicy", vec_env, n_steps=n_steps, seed=seed, verbose=1, device="cpu", **SETTINGS[algo]
    )
    model.learn(images * n_steps, log_interval=5)
    return lambda observation: model.predict(observation)[0]


def main(
    algo: Algo = "ppo",
    env: str = "DPOK-Mixture-v0",
    reward: str = "mixture-bump",
    images: int = 2560,
    seed: int = 0,
    block_size: int = 1,
) -> None:
    """Trains, and prints the mean reward of the last hundred images, ep_rew_mean, as training goes on."""
    torch.set_num_threads(1)
    train(make_env(env, block_size=block_size, reward=reward), images, seed, algo)


if __name__ == "__main__":
    tyro.cli(main)
