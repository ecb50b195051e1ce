"""PPO in plain torch, in the manner of CleanRL, on a denoising environment.

    python docs/recipes/cleanrl_ppo.py --env DPOK-Mixture-v0 --images 15360

Letters used for shapes: T denoising steps, n environments, O numbers of an observation, D numbers of an action.
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
from torch import Tensor, nn
from torch.distributions import Normal

NUM_ENVS = 128
EPOCHS, BATCH_SIZE, LEARNING_RATE, CLIP_RANGE = 4, 256, 1e-3, 0.2


def make_env(env_id: str, num_envs: int, **task: Any) -> VectorEnv:
    """Makes an environment whose actions are noise, and whose observations (n, O) are latent, prompt and step."""
    env = gymnasium.make_vec(env_id, num_envs=num_envs, autoreset_mode="Disabled", **task)
    return FlattenObservation(dpok_gym.VectorTextFeatures(dpok_gym.VectorNoiseAction(env)))


class Agent(nn.Module):
    """A Gaussian policy of the noise, which is about N(0, I) at first, and a value function."""

    def __init__(self, env: VectorEnv) -> None:
        super().__init__()
        n_inputs, n_actions = env.single_observation_space.shape[0], int(np.prod(env.single_action_space.shape))
        self.mean, self.value = self._network(n_inputs, n_actions), self._network(n_inputs, 1)
        self.log_std = nn.Parameter(torch.zeros(n_actions))

    @staticmethod
    def _network(n_inputs: int, n_outputs: int) -> nn.Sequential:
        last = nn.Linear(64, n_outputs)
        nn.init.zeros_(last.weight)  # so that training starts as the pre-trained model
        return nn.Sequential(nn.Linear(n_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), last)

    def policy(self, observation: Tensor) -> Normal:
        """Returns the distribution of actions (..., D) for observations (..., O)."""
        return Normal(self.mean(observation), self.log_std.exp())


def train(env: VectorEnv, images: int, seed: int) -> Callable[[Any], Any]:
    """Trains an agent; returns its policy, a function from observations to actions."""
    torch.manual_seed(seed)
    agent = Agent(env)
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    n_steps = dpok_gym.wrappers.get_batch(env).process.num_inference_steps

    def act(observation: Any) -> Any:
        with torch.no_grad():
            return agent.policy(torch.as_tensor(observation).float()).sample().reshape(env.action_space.shape).numpy()

    env.reset(seed=seed)
    for iteration in range(-(-images // env.num_envs)):
        # All episodes last T steps, so a rollout is one episode of each environment.
        observation, _ = env.reset()
        all_observations, all_actions, returns = [], [], np.zeros(env.num_envs)
        for _ in range(n_steps):
            action = act(observation)
            all_observations.append(torch.as_tensor(observation).float())
            all_actions.append(torch.as_tensor(action).flatten(1))
            observation, reward, *_ = env.step(action)
            returns += reward
        print(f"{(iteration + 1) * env.num_envs:6} images   mean reward {returns.mean():.3f}", flush=True)

        # Without a discount, the return of every step is the sum of its episode's rewards, which come at the end.
        states, actions = torch.stack(all_observations), torch.stack(all_actions)  # (T, n, O), (T, n, D)
        targets = torch.as_tensor(returns, dtype=torch.float32).expand(n_steps, -1).flatten()
        states, actions = states.flatten(0, 1), actions.flatten(0, 1)
        with torch.no_grad():
            old_log_prob = agent.policy(states).log_prob(actions).sum(1)
            advantage = targets - agent.value(states).squeeze(1)
        for batch in torch.cat([torch.randperm(len(states)) for _ in range(EPOCHS)]).split(BATCH_SIZE):
            ratio = (agent.policy(states[batch]).log_prob(actions[batch]).sum(1) - old_log_prob[batch]).exp()
            a = (advantage[batch] - advantage[batch].mean()) / (advantage[batch].std() + 1e-8)
            policy_loss = -torch.min(a * ratio, a * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)).mean()
            value_loss = (agent.value(states[batch]).squeeze(1) - targets[batch]).square().mean()
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
    return act


def main(env: str = "DPOK-Mixture-v0", images: int = 15_360, seed: int = 0) -> None:
    """Trains, and prints the mean reward as training goes on."""
    torch.set_num_threads(1)
    train(make_env(env, NUM_ENVS), images, seed)


if __name__ == "__main__":
    tyro.cli(main)
