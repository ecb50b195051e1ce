"""PPO of TorchRL on a denoising environment.

python docs/recipes/torchrl_ppo.py
python docs/recipes/torchrl_ppo.py --env DPOK-Shapes-v0 --reward jpeg-compressibility --block-size 8
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import torch
import tyro
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.vector import FlattenObservation
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.envs import DoubleToFloat, GymWrapper, TransformedEnv
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import dpok_gym

EPOCHS, BATCH_SIZE, LEARNING_RATE = 4, 128, 3e-3


def make_env(env_id: str, num_envs: int = 64, block_size: int = 1, **task: Any) -> VectorEnv:
    """Makes an environment whose actions are noise, and whose observations are vectors: latent, text features, step."""
    env: Any = gymnasium.make_vec(env_id, num_envs=num_envs, autoreset_mode="Disabled", **task)
    env = dpok_gym.VectorCoarseLatent(dpok_gym.VectorNoiseAction(env, block_size=block_size), block_size)
    env = FlattenObservation(dpok_gym.VectorTextFeatures(env))
    env.autoreset_mode = env.metadata["autoreset_mode"]  # TorchRL asks the outermost wrapper, which does not have it
    return env


def make_network(n_inputs: int, n_outputs: int) -> MLP:
    """Makes a network whose outputs are 0 at first, so that training starts as the pre-trained model."""
    network = MLP(n_inputs, n_outputs, num_cells=[64, 64], activation_class=nn.Tanh)
    for parameter in network[-1].parameters():
        nn.init.zeros_(parameter)
    return network


def train(env: VectorEnv, images: int, seed: int) -> Callable[[Any], Any]:
    """Trains an agent; returns its policy, a function from observations to actions."""
    torch.manual_seed(seed)
    env.reset(seed=seed)
    n_envs, *shape = env.action_space.shape or ()
    n_steps = dpok_gym.wrappers.get_batch(env).process.num_inference_steps
    n_inputs = gymnasium.spaces.flatdim(env.single_observation_space)
    # The mean is 0 and the standard deviation is 1 at first.
    network = make_network(n_inputs, 2 * math.prod(shape))
    gaussian = nn.Sequential(network, nn.Unflatten(-1, (*shape[:-1], 2 * shape[-1])), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(gaussian, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        distribution_kwargs={"event_dim": len(shape)},  # the numbers of an action have one density
        default_interaction_type="random",
        return_log_prob=True,
    )
    critic = ValueOperator(make_network(n_inputs, 1))
    advantage = GAE(gamma=1.0, lmbda=1.0, value_network=critic)
    loss = ClipPPOLoss(actor, critic, entropy_bonus=False, normalize_advantage=True, loss_critic_type="l2")
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE)
    torch_env = TransformedEnv(GymWrapper(env), DoubleToFloat())
    for first in range(0, images, n_envs):
        # All episodes last T steps, so a rollout is one episode of each environment.
        rollout = advantage(torch_env.rollout(n_steps, actor).detach())
        print(f"{first + n_envs:6} images   mean reward {rollout['next', 'reward'].sum(1).mean():.3f}", flush=True)
        for indices in torch.cat([torch.randperm(rollout.numel()) for _ in range(EPOCHS)]).split(BATCH_SIZE):
            losses = loss(rollout.reshape(-1)[indices])
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
            optimizer.step()

    def act(observation: Any) -> Any:
        states = torch.as_tensor(observation, dtype=torch.float32)
        return actor(TensorDict(observation=states))["action"].detach().numpy()

    return act


def main(
    env: str = "DPOK-Mixture-v0", reward: str = "mixture-bump", images: int = 2560, seed: int = 0, block_size: int = 1
) -> None:
    """Trains, and prints the mean reward of each rollout."""
    torch.set_num_threads(1)
    train(make_env(env, block_size=block_size, reward=reward), images, seed)


if __name__ == "__main__":
    tyro.cli(main)
