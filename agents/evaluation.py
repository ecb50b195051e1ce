"""Draws pictures under fixed seeds and scores them, so that two policies can be compared picture by picture.

Letters used for shapes: N pictures, n environments, C x h x w a latent, H x W a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from numpy.typing import NDArray
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

from agents.policy import DenoisingPolicy
from dpok_gym import diffusion
from dpok_gym.checks import integer
from dpok_gym.vector_env import DenoisingVectorEnv, Observation

#: From an observation to the mean (n, C, h, w) and the std (n,) of the next latent.
Transition = Callable[[Observation], tuple[Tensor, Tensor]]


@dataclass
class Evaluation:
    """Pictures and what they are worth.

    Attributes:
        prompts: N texts.
        pictures: (N, H, W, 3) uint8.
        reward: (N,) float64, the environment's reward: the weighted sum of the components; NaN where one of them is not
            finite. Normalisation by running statistics is left out, and does not learn from these pictures: two
            evaluations are to be comparable.
        rewards: each component by name, (N,) float64, before weighting.
        step_kl: (N, T) float64, nats: KL(policy || pre-trained) of each denoising step along the picture's own
            trajectory.
    """

    prompts: list[str]
    pictures: NDArray[np.uint8]
    reward: NDArray[np.float64]
    rewards: dict[str, NDArray[np.float64]]
    step_kl: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def kl(self) -> NDArray[np.float64]:
        """(N,) nats: the sum over the steps, whose mean is an unbiased estimate of the KL of the trajectories."""
        return self.step_kl.sum(axis=1)

    @property
    def aligned(self) -> NDArray[np.bool_] | None:
        """(N,) whether the judge of the shapes world finds all of the prompt and nothing else; None without it."""
        alignment = self.rewards.get("shapes-alignment")
        return None if alignment is None else alignment == 1

    @property
    def aligned_share(self) -> float | None:
        """Share of fully aligned pictures, in [0, 1]; None if the judge of the shapes world was not asked."""
        return None if self.aligned is None else float(self.aligned.mean())

    def best_of(self, n: int) -> Evaluation:
        """Of every ``n`` pictures in a row the one with the highest reward; one without a valid reward comes last.

        Raises:
            ValueError: if they cannot be split so.
        """
        if n < 1 or len(self) % n:
            raise ValueError(f"{len(self)} pictures cannot be split into groups of {n}")
        groups = np.where(np.isfinite(self.reward), self.reward, -np.inf).reshape(-1, n)
        rows = np.arange(0, len(self), n) + groups.argmax(axis=1)
        return Evaluation(
            prompts=[self.prompts[row] for row in rows],
            pictures=self.pictures[rows],
            reward=self.reward[rows],
            rewards={name: values[rows] for name, values in self.rewards.items()},
            step_kl=self.step_kl[rows],
        )

    @property
    def mean_reward(self) -> float:
        """Mean of the reward over the pictures that have one."""
        return _finite_mean(self.reward)

    def mean(self, component: str) -> float | None:
        """Mean of a component over the pictures that have it; None if there is no such component."""
        return _finite_mean(self.rewards[component]) if component in self.rewards else None


def evaluate(
    policy: DenoisingPolicy,
    env: DenoisingVectorEnv,
    prompts: Sequence[str],
    seed: int,
    reference: bool = False,
    best_of: int = 1,
) -> Evaluation:
    """Draws one picture for each prompt with a policy, or with the pre-trained model that it started from.

    Picture k takes x_T and all of its noise from a generator seeded with ``seed + k``: before and after training, only
    the model differs. No other random state is read or changed.

    Args:
        policy: of the environment's model and sampler.
        env: its reward scores the pictures. It is left between episodes; its own generators are not used.
        prompts: N texts.
        seed: of the first picture, at least 0.
        reference: draw with the pre-trained model; the KL is 0 then.
        best_of: n pictures are drawn for each prompt, of consecutive seeds, and the one with the highest reward is
            kept: rejection sampling, at n times the cost. The KL then leaves out what the choice itself adds, for
            which log n - (n - 1) / n is a bound (Beirami et al. 2024).

    Raises:
        ValueError: if there are no prompts, ``best_of`` is not positive, or the policy takes another number of
            denoising steps.
    """
    if not isinstance(policy, DenoisingPolicy):
        raise TypeError(
            f"the policy must be a DenoisingPolicy, such as the .policy of an agent, not {policy!r}; with "
            "reference=True it draws with the pre-trained model"
        )
    _check_prompts(prompts)
    env = _unwrapped(env)
    if len(policy.schedule) != len(env.schedule):
        steps = f"{len(policy.schedule)} denoising steps, the environment {len(env.schedule)}"
        raise ValueError(f"the policy takes {steps}; make both with the same num_inference_steps")

    def transition(observation: Observation, reference: bool = False) -> tuple[Tensor, Tensor]:
        return policy.transition(obs_as_tensor(observation, policy.model.device), reference)  # type: ignore[arg-type]

    pretrained = partial(transition, reference=True)

    integer("best_of", best_of)
    repeated = [prompt for prompt in prompts for _ in range(best_of)]
    drawn = draw(pretrained, env, repeated, seed) if reference else draw(transition, env, repeated, seed, pretrained)
    return drawn if best_of == 1 else drawn.best_of(best_of)


@torch.no_grad()
def draw(
    transition: Transition,
    env: DenoisingVectorEnv,
    prompts: Sequence[str],
    seed: int,
    reference: Transition | None = None,
) -> Evaluation:
    """What :func:`evaluate` does, for anything that can tell the next latent's mean and standard deviation.

    Args:
        transition: draws the pictures.
        env: as there, and so on.
        prompts: N texts.
        seed: of the first picture.
        reference: what the KL is taken to; None for a KL of 0.
    """
    _check_prompts(prompts)
    env = _unwrapped(env)
    totals: list[float] = []
    divergences: list[NDArray[np.float64]] = []
    infos: list[dict[str, Any]] = []
    for first in range(0, len(prompts), env.num_envs):
        texts = list(prompts[first : first + env.num_envs])
        n_drawn = len(texts)
        texts += texts[-1:] * (env.num_envs - n_drawn)  # the environment draws num_envs at a time or none
        generators = [seeding.np_random(seed + first + i)[0] for i in range(env.num_envs)]
        observation, _ = env.begin_episodes(generators, {"prompt": texts})
        kl = np.zeros((env.num_envs, len(env.schedule)))
        for t in range(len(env.schedule)):
            mean, std = transition(observation)
            if reference is not None:
                kl[:, t] = diffusion.kl_divergence(mean, reference(observation)[0], std).double().cpu().numpy()
            noise = np.stack([rng.standard_normal(mean.shape[1:], np.float32) for rng in generators])
            action, _ = diffusion.sample_with_log_prob(mean, std, torch.from_numpy(noise).to(mean.device))
            with env.reward.evaluating():
                observation, total, _, judged = env.advance(action.cpu().numpy())
        totals += total[:n_drawn].tolist()
        divergences.append(kl[:n_drawn])
        infos += judged[:n_drawn]
    rewards = {name: np.array([info["rewards"][name] for info in infos]) for name in infos[0]["rewards"]}
    return Evaluation(
        prompts=list(prompts),
        pictures=np.stack([info["image"] for info in infos]),
        reward=np.where(np.isfinite(list(rewards.values())).all(axis=0), totals, np.nan),
        rewards=rewards,
        step_kl=np.concatenate(divergences),
    )


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"the prompts to evaluate on are a list of texts; give at least one, not {prompts!r}")


def _finite_mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _unwrapped(env: Any) -> DenoisingVectorEnv:
    inner = getattr(env, "unwrapped", env)
    if not isinstance(inner, DenoisingVectorEnv):
        raise TypeError(
            f"the environment must be one that gymnasium.make_vec makes, such as DPOK-Shapes-v0, not {env!r}"
        )
    return inner


def spread(prompts: Sequence[str], n: int) -> list[str]:
    """``n`` prompts, the same at every call: all of them in turn, or evenly spaced ones if there are more."""
    size = len(prompts)
    return [prompts[k % size if n >= size else k * size // n] for k in range(n)]
