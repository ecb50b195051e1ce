"""An evolution strategy in NumPy on a denoising environment.

    python docs/recipes/evolution.py
    python docs/recipes/evolution.py --env DPOK-Shapes-v0 --reward jpeg-compressibility --block-size 8

It needs no gradient, no critic and no density of the actions (Salimans et al. 2017, "Evolution strategies as a scalable
alternative to reinforcement learning").

Letters used for shapes: n environments, T denoising steps, D numbers of a latent and of an action, F text features;
O = D + T + F inputs of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv

import dpok_gym

#: SIGMA is the standard deviation of the changes to the weights that are tried.
SIGMA, LEARNING_RATE = 0.2, 0.2


def make_env(env_id: str, num_envs: int = 64, block_size: int = 1, **task: Any) -> VectorEnv:
    """Makes an environment whose actions are noise and whose prompts are text features."""
    env = gymnasium.make_vec(env_id, num_envs=num_envs, autoreset_mode="Disabled", **task)
    env = dpok_gym.VectorCoarseLatent(dpok_gym.VectorNoiseAction(env, block_size=block_size), block_size)
    return dpok_gym.VectorTextFeatures(env)


def features_of(observation: Any, n_steps: int) -> Any:
    """Returns what the policy sees, (n, O): the latent, the step as a one-hot vector, and text features of length 1."""
    latent, prompt = observation["latent"], observation["prompt"]
    unit_prompt = prompt / np.linalg.norm(prompt, axis=1, keepdims=True)
    return np.concatenate([latent.reshape(len(latent), -1), np.eye(n_steps)[observation["step"]], unit_prompt], axis=1)


def train(env: VectorEnv, images: int, seed: int) -> Callable[[Any], Any]:
    """Trains a linear policy; returns it, a function from observations to actions."""
    rng = np.random.default_rng(seed)
    n_envs, n_actions = env.num_envs, math.prod(env.single_action_space.shape or ())
    batch = dpok_gym.wrappers.get_batch(env)
    n_steps = batch.process.num_inference_steps
    # (D, O); with weights of 0 the policy is the pre-trained model.
    weights = np.zeros((n_actions, n_actions + n_steps + batch.model.text_width))

    def act(observation: Any, changes: Any = 0.0, noise: Any = None) -> Any:
        """Returns weights @ features + N(0, I); changes (n, D, O) are added to the weights."""
        noise = rng.standard_normal((n_envs, n_actions)) if noise is None else noise
        every = np.broadcast_to(weights + changes, (n_envs, *weights.shape))
        actions = np.einsum("bij,bj->bi", every, features_of(observation, n_steps)) + noise
        return actions.reshape(env.action_space.shape).astype(np.float32)

    for first in range(0, images, n_envs):
        # Two environments beside each other try the same change with both signs. They have the same prompt, x_T and
        # noise, because they have the same seed. So the change alone makes the difference of their rewards.
        changes = np.repeat(SIGMA * rng.standard_normal((n_envs // 2, *weights.shape)), 2, axis=0)
        changes[1::2] *= -1
        seeds: Any = np.repeat(rng.integers(2**32, size=n_envs // 2), 2).tolist()
        observation, _ = env.reset(seed=seeds)
        total = np.zeros(n_envs)
        for _ in range(n_steps):
            noise = np.repeat(rng.standard_normal((n_envs // 2, n_actions)), 2, axis=0)
            observation, reward, *_ = env.step(act(observation, changes, noise))
            total += reward
        print(f"{first + n_envs:6} images   mean reward {total.mean():.3f}", flush=True)
        difference = total[::2] - total[1::2]
        slope = np.einsum("p,pdo->do", difference / difference.std(), changes[::2] / SIGMA) / len(difference)
        weights += LEARNING_RATE * slope
    return act


def main(
    env: str = "DPOK-Mixture-v0", reward: str = "mixture-bump", images: int = 2560, seed: int = 0, block_size: int = 1
) -> None:
    """Trains, and prints the mean reward of each generation."""
    torch.set_num_threads(1)
    train(make_env(env, block_size=block_size, reward=reward), images, seed)


if __name__ == "__main__":
    tyro.cli(main)
