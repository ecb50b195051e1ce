"""Policies of DPOK-Mixture-v0: their training, their samples, and their values on a grid.

Letters used for shapes: n points, T denoising steps, d dimensions.
"""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents.algorithms.presets import PRESETS
from agents.algorithms.registry import load_algorithm
from agents.common.policy import DenoisingPolicy
from dpok_gym.mixture.exact import Array, GridPolicy
from dpok_gym.mixture.image import REACH
from dpok_gym.mixture.model import MixtureModel
from dpok_gym.vector_env import DenoisingVectorEnv

GRID = np.linspace(-6, 6, 601)

#: What ``dpok train`` draws for this model.
IMAGES = PRESETS["exact-objective"].images
N_ENVS = 256


def make_env(prompt: str, reward: dict[str, float], n_steps: int, model: str = "mixture") -> DenoisingVectorEnv:
    """Makes an environment.

    Args:
        prompt: the only prompt.
        reward: weights by name.
        n_steps: T.
        model: "mixture" or "mixture-1d".
    """
    return DenoisingVectorEnv(
        N_ENVS,
        model=model,
        prompts=[prompt],
        reward=reward,
        num_inference_steps=n_steps,
        decode_batch_size=64,
        device="cpu",
    )


def train(
    env: DenoisingVectorEnv,
    algorithm: str,
    kwargs: dict[str, Any],
    seed: int,
    images: int = IMAGES,
    callback: BaseCallback | None = None,
) -> tuple[DenoisingPolicy, float]:
    """Trains.

    Args:
        env: of the mixture model.
        algorithm: registered name.
        kwargs: its arguments.
        seed: of the training.
        images: to draw.
        callback: for the training.

    Returns:
        The policy, and the seconds of computing.
    """
    agent = load_algorithm(algorithm)(env=env, seed=seed, device="cpu", **kwargs)
    started = time.process_time()
    agent.learn(images * agent.process.num_inference_steps, callback)
    return agent.policy, time.process_time() - started


def train_exactly(
    prompt: str,
    reward: dict[str, float],
    beta: float,
    n_steps: int,
    seed: int,
    images: int = IMAGES,
    model: str = "mixture",
    callback: BaseCallback | None = None,
    **changes: Any,
) -> tuple[DenoisingPolicy, float]:
    """Trains with DPOK, as ``dpok train --env DPOK-Mixture-v0`` does; arguments as for :func:`make_env` and
    :func:`train`.

    Args:
        prompt: the only prompt.
        reward: weights by name.
        beta: kl_coef.
        n_steps: T.
        seed: of the training.
        images: to draw.
        model: "mixture" or "mixture-1d".
        callback: for the training.
        **changes: to the settings of DPOK.
    """
    kwargs = PRESETS["exact-objective"].algorithm_kwargs("dpok") | {"kl_coef": beta} | changes
    return train(make_env(prompt, reward, n_steps, model), "dpok", kwargs, seed, images, callback)


def model_of(policy: DenoisingPolicy) -> MixtureModel:
    """Returns the mixture model that a policy belongs to."""
    assert isinstance(policy.model, MixtureModel)
    return policy.model


@torch.no_grad()
def sample_trajectories(policy: DenoisingPolicy, prompt: str, n: int, seed: int, reference: bool = False) -> Tensor:
    """Draws trajectories.

    Args:
        policy: of the mixture model.
        prompt: of all trajectories.
        n: number of trajectories.
        seed: of the noise.
        reference: True to draw with the pre-trained model.

    Returns:
        The states x_T, ..., x_0, (T + 1, n, d) float64.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (n, *policy.model.latent_shape)
    latents = torch.randn(shape, generator=generator)
    # All trajectories have the same prompt, so it is encoded once.
    conditioning = {name: values.expand(n) for name, values in policy.process.encode([prompt]).items()}
    transition = policy.reference_transition if reference else policy.transition
    states = [latents]

    def noise(index: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for step in policy.process.denoise(latents, conditioning, noise, transition):
        states.append(step.next_latents)
    return torch.stack(states).flatten(2).double()


def on_grid(policy: DenoisingPolicy, prompt: str, reference: bool = False) -> GridPolicy:
    """Returns a policy of one dimension at the points of the grid."""
    conditioning = policy.process.encode([prompt] * len(GRID))

    def mean(index: int, latents: Tensor) -> Tensor:
        return policy.transition(policy.process.state(latents, index, conditioning), reference)[0]

    return GridPolicy.of(mean, policy.process.table.std, GRID)


def half_reward(x: Array) -> Array:
    """Returns r = 0.5 x, with x cut off where positions can no longer be seen in the image."""
    return 0.5 * np.minimum(np.maximum(x, -REACH), REACH)


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Prints rows as a table."""
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    table = Table(*names, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_text(row.get(name, "")) for name in names))
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)
