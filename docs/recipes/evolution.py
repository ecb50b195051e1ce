"""An evolution strategy in NumPy on a denoising environment.

    python docs/recipes/evolution.py --env DPOK-Mixture-v0 --images 15360

It learns from finished images only: no gradient, no critic, no density of actions. See Salimans et al. 2017, "Evolution
strategies as a scalable alternative to reinforcement learning".

Letters used for shapes: n environments, O numbers of an observation, D numbers of an action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dpok_gym
import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.vector import FlattenObservation

NUM_ENVS = 64
#: Standard deviation of the changes that are tried, and the learning rate of Adam.
SIGMA, LEARNING_RATE = 0.1, 0.03


def make_env(env_id: str, num_envs: int, **task: Any) -> VectorEnv:
    """Makes an environment whose actions are noise, and whose observations (n, O) are latent, prompt and step."""
    env = gymnasium.make_vec(env_id, num_envs=num_envs, autoreset_mode="Disabled", **task)
    return FlattenObservation(dpok_gym.VectorTextFeatures(dpok_gym.VectorNoiseAction(env)))


def train(env: VectorEnv, images: int, seed: int) -> Callable[[Any], Any]:
    """Trains a linear policy; returns it, a function from observations to actions."""
    rng = np.random.default_rng(seed)
    n_envs, n_actions = env.action_space.shape[0], int(np.prod(env.single_action_space.shape))
    n_steps = dpok_gym.wrappers.get_batch(env).process.num_inference_steps
    weights = np.zeros((n_actions, env.single_observation_space.shape[0]))  # (D, O); 0 is the pre-trained model
    first_moment, second_moment = np.zeros_like(weights), np.zeros_like(weights)

    def act(observation: Any, weights: Any, noise: Any) -> Any:
        shift = np.einsum("...do,no->nd", weights, observation) if weights.ndim == 2 else None
        return (shift + noise).reshape(env.action_space.shape)

    return act
