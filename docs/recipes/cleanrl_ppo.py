"""PPO in plain torch, in the manner of CleanRL, on a denoising environment.

    python docs/recipes/cleanrl_ppo.py
    python docs/recipes/cleanrl_ppo.py --env DPOK-Shapes-v0 --reward jpeg-compressibility --block-size 8

Letters used for shapes: T denoising steps, n environments, O numbers of an observation, D numbers of an action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.vector import FlattenObservation
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import dpok_gym

EPOCHS, BATCH_SIZE, LEARNING_RATE, CLIP_RANGE = 4, 128, 3e-3, 0.2


def make_env(env_id: str, num_envs: int = 64, block_size: int = 1, **task: Any) -> VectorEnv:
    """Makes an environment whose actions are noise, and whose observations (n, O) are latent, text features, step."""
    env = gymnasium.make_vec(env_id, num_envs=num_envs, autoreset_mode="Disabled", **task)
    env = dpok_gym.VectorCoarseLatent(dpok_gym.VectorNoiseAction(env, block_size=block_size), block_size)
    return FlattenObservation(dpok_gym.VectorTextFeatures(env))


def make_network(n_inputs: int, n_outputs: int) -> nn.Sequential:
    """Makes a network whose outputs are 0 at first, so that training starts as the pre-trained model."""
    last = nn.Linear(64, n_outputs)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.Linear(n_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), last)


def train(env: VectorEnv, images: int, seed: int) -> Callable[[Any], Any]:
    """Trains an agent; returns its policy, a function from observations to actions."""
    torch.manual_seed(seed)
    n_envs, n_inputs = env.num_envs, gymnasium.spaces.flatdim(env.single_observation_space)
    n_actions = gymnasium.spaces.flatdim(env.single_action_space)
    n_steps = dpok_gym.wrappers.get_batch(env).process.num_inference_steps
    mean, value = make_network(n_inputs, n_actions), make_network(n_inputs, 1)
    log_std = nn.Parameter(torch.zeros(n_actions))
    parameters = [*mean.parameters(), *value.parameters(), log_std]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=1e-5)
    env.reset(seed=seed)

    def policy(states: Tensor) -> Independent:  # of actions (..., D) in states (..., O)
        return Independent(Normal(mean(states), log_std.exp()), 1)

    @torch.no_grad()
    def act(observation: Any) -> Any:
        action = policy(torch.as_tensor(observation, dtype=torch.float32)).sample()
        return action.reshape(env.action_space.shape or ()).numpy()

    for first in range(0, images, n_envs):
        # All episodes last T steps, so a rollout is one episode of each environment.
        observation, _ = env.reset()
        observations, actions, total = [], [], np.zeros(n_envs, np.float32)
        for _ in range(n_steps):
            observations.append(observation)
            actions.append(act(observation))
            observation, reward, *_ = env.step(actions[-1])
            total += reward
        print(f"{first + n_envs:6} images   mean reward {total.mean():.3f}", flush=True)
        states = torch.as_tensor(np.concatenate(observations), dtype=torch.float32)  # (T * n, O)
        taken = torch.as_tensor(np.concatenate(actions)).flatten(1)  # (T * n, D)
        returns = torch.as_tensor(total).repeat(n_steps)  # of each step: nothing is discounted
        with torch.no_grad():
            old_log_prob, advantages = policy(states).log_prob(taken), returns - value(states).squeeze(1)
        for batch in torch.cat([torch.randperm(len(states)) for _ in range(EPOCHS)]).split(BATCH_SIZE):
            ratio = (policy(states[batch]).log_prob(taken[batch]) - old_log_prob[batch]).exp()
            a = (advantages[batch] - advantages[batch].mean()) / (advantages[batch].std() + 1e-8)
            policy_loss = -torch.minimum(a * ratio, a * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)).mean()
            value_loss = (value(states[batch]).squeeze(1) - returns[batch]).square().mean()
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss).backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
    return act


def main(
    env: str = "DPOK-Mixture-v0", reward: str = "mixture-bump", images: int = 2560, seed: int = 0, block_size: int = 1
) -> None:
    """Trains, and prints the mean reward of each rollout."""
    torch.set_num_threads(1)
    train(make_env(env, block_size=block_size, reward=reward), images, seed)


if __name__ == "__main__":
    tyro.cli(main)
