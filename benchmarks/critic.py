"""The share of the reward that critics explain, and the worth of it: ``python -m benchmarks.critic``.

The pre-trained model draws rollouts of 64 images. Before a critic learns from a rollout, its values are compared with
the rewards of that rollout: the explained variance is 1 - var(r - V) / var(r), at each denoising step. What can be
explained at most is measured by drawing several images from the same x_t.

``--images`` also trains DPOK with and without critic, and prints how many images each needs for the same reward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from agents import DPOK, PRESETS
from dpok_gym.utils.files import replacing
from dpok_gym.vector_env import DenoisingVectorEnv

N_IMAGES, N_STEPS = 64, 10

#: Arguments of the environment.
TASKS: dict[str, dict[str, Any]] = {
    "one prompt": {"prompts": "three green squares", "reward": {"shapes-alignment": 1.0, "shapes-quality": 0.2}},
    "many prompts": {"prompts": "shapes", "reward": "shapes-preference"},
    "many prompts, alignment": {"prompts": "shapes", "reward": "shapes-alignment"},
}

#: Arguments of DPOK.
CRITICS: dict[str, dict[str, Any]] = {
    "network": {"critic_kind": "network"},
    "network, 8 epochs": {"critic_kind": "network", "vf_epochs": 8, "vf_learning_rate": 1e-3},
    "reward": {"critic_kind": "reward"},
    "reward, no look": {"critic_kind": "reward", "policy_kwargs": {"critic_kwargs": {"look_fraction": 0.0}}},
}


class CriticOnly(DPOK):
    """DPOK without the update of the denoiser; it keeps the explained variances.

    Attributes:
        explained: (T,) for each rollout.
        others: agents with other critics, which see the same rollouts.
    """

    def __init__(self, *args: Any, others: Sequence[CriticOnly] = (), **kwargs: Any) -> None:
        self.explained: list[Tensor] = []
        self.others = others
        super().__init__(*args, **kwargs)

    def train(self) -> None:
        """Scores the critics on a rollout that they have not seen, and then fits them."""
        buffer = self.rollout_buffer
        buffer.advantages = self.advantages(buffer)
        error = (buffer.returns - buffer.values).var(dim=0, correction=0)
        self.explained.append(1 - error / buffer.returns.var(dim=0, correction=0))
        self._train_critic()
        for other in self.others:
            other.rollout_buffer, other.iteration = buffer, self.iteration
            other.set_logger(self.logger)
            with other._logged_update(len(buffer)):
                other.train()


def make_env(task: str) -> DenoisingVectorEnv:
    """Makes the environment of a task."""
    env = gymnasium.make_vec(
        "DPOK-Shapes-v0",
        num_envs=N_IMAGES,
        vectorization_mode="vector_entry_point",
        num_inference_steps=N_STEPS,
        decode_batch_size=16,
        device="cpu",
        **TASKS[task],
    )
    assert isinstance(env, DenoisingVectorEnv)
    return env


def explained_variances(
    task: str, critics: Sequence[str], n_rollouts: int, n_scored: int = 5
) -> dict[str, list[float]]:
    """Measures critics on rollouts of the pre-trained model.

    Args:
        task: of :data:`TASKS`.
        critics: of :data:`CRITICS`.
        n_rollouts: rollouts that the critics learn from before they are scored, at least 1.
        n_scored: further rollouts, over which the explained variance is averaged; they learn from these too.

    Returns:
        For each critic, the explained variance of each quarter of the steps.
    """
    env = make_env(task)
    agents: list[CriticOnly] = []
    for critic in critics:
        others = tuple(agents)  # the last one draws for all
        settings = {"seed": 0, "device": "cpu", "images_per_iteration": N_IMAGES} | CRITICS[critic]
        agents.append(CriticOnly(env=env, others=others if critic == critics[-1] else (), **settings))
    agents[-1].learn((n_rollouts + n_scored) * N_IMAGES * N_STEPS)
    explained = {}
    for critic, agent in zip(critics, agents, strict=True):
        explained[critic] = quarters(torch.stack(agent.explained[n_rollouts:]).mean(dim=0))
    return explained


@torch.no_grad()
def ceiling(task: str, n_states: int = 32, n_continuations: int = 16) -> list[float]:
    """Measures the share of the reward's variance that is decided at x_t, for each quarter of the steps.

    Images are drawn from the same x_t again and again (one-way analysis of variance).

    Args:
        task: of :data:`TASKS`.
        n_states: trajectories whose states are looked at.
        n_continuations: images drawn from each state.
    """
    env = make_env(task)
    process, generator = env.process, torch.Generator().manual_seed(0)
    np_random = np.random.default_rng(0)
    prompts = env.prompts.sample(np_random, n_states)
    again = [prompt for prompt in prompts for _ in range(n_continuations)]

    def noise_like(n: int) -> Tensor:
        return torch.randn(n, *process.model.latent_shape, generator=generator)

    shares = []
    for step in process.denoise(noise_like(n_states), process.encode(prompts), lambda _: noise_like(n_states)):
        start = step.state.latents.repeat_interleave(n_continuations, dim=0)
        latents = start
        for later in process.denoise(
            start, process.encode(again), lambda _: noise_like(len(again)), first_step=step.index
        ):
            latents = later.next_latents
        rewards = env.judge(latents, again).rewards.total.view(n_states, n_continuations)
        within = rewards.var(dim=1).mean()
        between = rewards.mean(dim=1).var() - within / n_continuations
        shares.append(between / (between + within))
    return quarters(torch.stack(shares))


def quarters(by_step: Tensor) -> list[float]:
    """Returns the means over each quarter of the steps of numbers (T,)."""
    quarter = torch.arange(len(by_step)) * 4 // len(by_step)
    return [round(by_step[quarter == number].mean().item(), 3) for number in range(4)]


def rewards_of_training(task: str, critic: str | None, seed: int, iterations: int) -> list[float]:
    """Trains with DPOK; returns the mean reward of each rollout.

    Args:
        task: of :data:`TASKS`.
        critic: of :data:`CRITICS`; None for none.
        seed: of the run.
        iterations: rollouts of 64 images.
    """
    settings = PRESETS["laptop"].algorithm_kwargs("dpok") | {"device": "cpu"}
    settings |= {"use_critic": False} if critic is None else {"use_critic": True} | CRITICS[critic]
    rewards: list[float] = []

    class Watched(DPOK):
        """DPOK that keeps the mean rewards."""

        def train(self) -> None:
            rewards.append(self.rollout_buffer.final_rewards.mean().item())
            super().train()

    Watched(env=make_env(task), seed=seed, **settings).learn(iterations * N_IMAGES * N_STEPS)
    return rewards


def images_needed(rewards: Sequence[float], level: float) -> int | None:
    """Returns the images drawn until the mean reward of three rollouts in a row reaches a level; None if it does not.

    Args:
        rewards: mean reward of each rollout.
        level: the reward to reach.
    """
    for last in range(3, len(rewards) + 1):
        if np.mean(rewards[last - 3 : last]) >= level:
            return last * N_IMAGES
    return None


def show_explained(n_rollouts: int, console: Console) -> None:
    """Prints what the critics explain."""
    for task in TASKS:
        headings = ("1st quarter", "2nd", "3rd", "4th")
        table = Table("critic", *headings, title=f"{task}: explained variance after {n_rollouts} rollouts")
        rows = explained_variances(task, list(CRITICS), n_rollouts) | {"at most": ceiling(task)}
        for name, shares in rows.items():
            table.add_row(name, *(f"{share:.2f}" for share in shares))
        console.print(table)


def show_images(seeds: int, iterations: int, out: Path, console: Console) -> None:
    """Trains, and prints the images needed for the reward that training without critic ends with."""
    for task in ("one prompt", "many prompts"):
        table = Table("seed", "reward without critic", "with", "images without", "with", title=task)
        for seed in range(seeds):
            curves = []
            for critic in (None, "reward"):
                file = out / f"{task} {critic} {seed} {iterations}.json"
                if not file.exists():
                    out.mkdir(parents=True, exist_ok=True)
                    with replacing(file) as part:
                        part.write_text(json.dumps(rewards_of_training(task, critic, seed, iterations)))
                curves.append(json.loads(file.read_text()))
            without, with_critic = curves
            ends = [float(np.mean(curve[-3:])) for curve in curves]
            needed = [images_needed(curve, ends[0]) for curve in (without, with_critic)]
            table.add_row(str(seed), *(f"{end:.3f}" for end in ends), *(str(images or "-") for images in needed))
        console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=10, help="rollouts to learn from before the critics are scored")
    parser.add_argument("--images", action="store_true", help="also train, to count images")
    parser.add_argument("--seeds", type=int, default=5, help="of the trainings")
    parser.add_argument("--iterations", type=int, default=20, help="of each training")
    parser.add_argument("--out", type=Path, default=Path("runs/critic"), help="folder of the finished trainings")
    options = parser.parse_args(arguments)
    console = Console()
    show_explained(options.rollouts, console)
    if options.images:
        show_images(options.seeds, options.iterations, options.out, console)


if __name__ == "__main__":
    main()
