"""Draws images under fixed seeds and scores them, so that two policies can be compared image by image.

Letters used for shapes: N images, n environments, T denoising steps, C x h x w a latent, H x W an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.common import distributed
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import ImageNoise, Purpose, make_generator
from agents.common.steering import UNSTEERED, ParticleFilter, Steering
from agents.common.vec_env import find_denoising_env
from dpok_gym import diffusion
from dpok_gym.rewards import RewardBatch
from dpok_gym.rewards.workers import check_same_components
from dpok_gym.samplers import DenoisingProcess, DenoisingStep, State, Transition
from dpok_gym.utils.validation import check_integer, shorten
from dpok_gym.vector_env import DenoisingVectorEnv


@dataclass
class Evaluation:
    """Images and their rewards.

    Attributes:
        prompts: N texts.
        images: (N, H, W, 3) uint8.
        reward: (N,) float64, the environment's reward: the weighted sum of the components; NaN where one of them is not
            finite.
        rewards: each component by name, (N,) float64, before weighting.
        step_kl: (N, T) float64, nats: KL(policy || reference) of each denoising step along the image's own trajectory.
        step_mse: (N, T) float64: the mean squared difference of the two networks' outputs at each of these steps.
        exploring: (T,) bool, the steps that the KL of an image counts, see
            :attr:`dpok_gym.samplers.TransitionTable.exploring`.
        alignment_reward: the component that is 1 if an image shows all that was asked for and nothing else; None if
            there is no such judge.
        quality_reward: the component that says how clean an image is; None if there is no such judge.
    """

    prompts: list[str]
    images: NDArray[np.uint8]
    reward: NDArray[np.float64]
    rewards: dict[str, NDArray[np.float64]]
    step_kl: NDArray[np.float64]
    step_mse: NDArray[np.float64]
    exploring: NDArray[np.bool_]
    alignment_reward: str | None = None
    quality_reward: str | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def kl(self) -> NDArray[np.float64]:
        """(N,) nats: the sum over the steps that explore.

        Its mean is an unbiased estimate of their KL. The other steps hardly have noise, so their nats would say how
        much the output trembles, and not how much the images have changed; :attr:`late_drift` is about them.
        """
        return self.step_kl[:, self.exploring].sum(axis=1)

    @property
    def late_drift(self) -> float:
        """Root mean square difference of the two networks' outputs at the steps that do not explore; 0 without any."""
        late = self.step_mse[:, ~self.exploring]
        return float(np.sqrt(late.mean())) if late.size else 0.0

    @property
    def aligned(self) -> NDArray[np.bool_] | None:
        """(N,) whether a judge finds all of the prompt in the image and nothing else; None without a judge."""
        alignment = self.rewards.get(self.alignment_reward or "")
        return None if alignment is None else alignment == 1

    @property
    def aligned_share(self) -> float | None:
        """Share of fully aligned images, in [0, 1]; None without a judge."""
        return None if self.aligned is None else float(self.aligned.mean())

    @property
    def mean_quality(self) -> float | None:
        """Mean quality in [0, 1]; None without a judge."""
        return self.mean(self.quality_reward or "")

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Evaluation:
        """Returns some of the images."""
        return replace(
            self,
            prompts=[self.prompts[row] for row in np.arange(len(self))[rows]],
            images=self.images[rows],
            reward=self.reward[rows],
            rewards={name: values[rows] for name, values in self.rewards.items()},
            step_kl=self.step_kl[rows],
            step_mse=self.step_mse[rows],
        )

    def gather(self, n: int) -> Evaluation:
        """Returns the images of all ranks, of which this is the share of one; see :func:`distributed.gather`.

        Args:
            n: images of all ranks.
        """
        if distributed.count() == 1:
            return self

        names = sorted(self.rewards)  # the reward of one rank may name them in another order than that of another one
        check_same_components(text.split("\n") for text in distributed.gather_texts("\n".join(names)))

        def gathered(values: NDArray[Any]) -> NDArray[Any]:
            return distributed.gather(torch.from_numpy(values), n).numpy()

        return replace(
            self,
            images=gathered(self.images),
            reward=gathered(self.reward),
            rewards={name: gathered(self.rewards[name]) for name in names},
            step_kl=gathered(self.step_kl),
            step_mse=gathered(self.step_mse),
        )

    @property
    def mean_reward(self) -> float:
        """Mean of the reward over the images that have one."""
        return _finite_mean(self.reward)

    def mean(self, component: str) -> float | None:
        """Mean of a component over the images that have it; None if there is no such component."""
        return _finite_mean(self.rewards[component]) if component in self.rewards else None


def evaluate(
    policy: DenoisingPolicy,
    env: Any,
    prompts: Sequence[str],
    seed: int,
    reference: bool = False,
    steering: Steering = UNSTEERED,
) -> Evaluation:
    """Draws one image for each prompt with a policy, or with the pre-trained model that it started from.

    Image k takes all of its random numbers from generators keyed by ``seed + k``: before and after training, only the
    model differs. No other random state is read or changed.

    Args:
        policy: of the environment's model and sampler.
        env: a denoising environment, whose reward scores the images; it is not stepped.
        prompts: N texts.
        seed: of the first image, at least 0.
        reference: draw with the pre-trained model; the KL is 0 then.
        steering: how each image is chosen among several on their way, by the environment's reward: ``BestOf(n)``,
            ``FKSteering(...)`` or ``SVDD(...)``; see :mod:`agents.common.steering`. The KL then leaves out what the
            choice itself adds.

    Raises:
        TypeError: if the policy is no DenoisingPolicy, or ``steering`` no method of steering.
        ValueError: if there are no prompts, the environment samples in another way, or ``steering`` copies particles
            and no step has noise.
    """
    if not isinstance(policy, DenoisingPolicy):
        raise TypeError(
            f"the policy must be a DenoisingPolicy, such as the .policy of an agent, not {policy!r}; with "
            "reference=True it draws with the pre-trained model"
        )
    env = find_denoising_env(env)
    # The environment only judges, but an image of another size or sampler would not be comparable.
    policy.process.config.check_equal(env.process.config)
    if reference:
        return sample_images(policy.process, env, prompts, seed, policy.reference_transition, steering=steering)
    return sample_images(
        policy.process, env, prompts, seed, policy.transition, policy.reference_transition, steering=steering
    )


@torch.no_grad()
def sample_images(
    process: DenoisingProcess,
    env: Any,
    prompts: Sequence[str],
    seed: int,
    transition: Transition | None = None,
    reference: Transition | None = None,
    steering: Steering = UNSTEERED,
) -> Evaluation:
    """Draws and scores images as :func:`evaluate` does, with any transition.

    Args:
        process: the denoising process that draws the images.
        env: the environment that scores them, ``num_envs`` images or particles of images at a time.
        prompts: N texts.
        seed: of the first image, at least 0.
        transition: mean and std of the next latents; None for the process's own.
        reference: the transition that the KL is taken to; None for a KL of 0.
        steering: as for :func:`evaluate`. All particles of an image are drawn side by side.

    Raises:
        TypeError: if ``steering`` is no method of steering.
        ValueError: if there are no prompts, one cannot be read, or ``steering`` copies particles and no step has noise.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):
        raise ValueError(f"the prompts to evaluate on are a list of texts; give at least one, not {shorten(prompts)}")
    if not isinstance(steering, Steering):
        raise TypeError(f"steering must be BestOf(n), FKSteering(...) or SVDD(...), not {steering!r}")
    check_integer("seed", seed, minimum=0, maximum=2**62)
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"the prompts to evaluate on must be texts, got {shorten(prompts)}")
    if any(map(steering.is_due, range(process.num_inference_steps))) and not process.table.stochastic.any():
        raise ValueError(
            f"{type(steering).__name__} copies promising particles, and only noise makes copies different images: no "
            f"step of this sampler draws any, so use BestOf({steering.n_particles}), or a sampler with noise"
        )
    env = find_denoising_env(env)
    process.model.check_prompts(prompts)
    parts, size = [], max(env.num_envs // steering.n_particles, 1)
    for first in range(0, len(prompts), size):
        chunk = list(prompts[first : first + size])
        # A seed for each image: it looks the same, however many are drawn side by side.
        seeds = [seed + first + i for i in range(len(chunk))]
        parts.append(_sample_chunk(process, env, chunk, seeds, transition, reference, steering))
    world = env.world
    check_same_components(part.rewards for part in parts)
    rewards = {name: np.concatenate([part.rewards[name] for part in parts]) for name in parts[0].rewards}
    return Evaluation(
        prompts=list(prompts),
        images=np.concatenate([part.images for part in parts]),
        reward=np.concatenate([part.reward for part in parts]),
        rewards=rewards,
        step_kl=np.concatenate([part.step_kl for part in parts]),
        step_mse=np.concatenate([part.step_mse for part in parts]),
        exploring=parts[0].exploring,
        alignment_reward=world.alignment_reward if world else None,
        quality_reward=world.quality_reward if world else None,
    )


def denoise_seeds(
    process: DenoisingProcess, prompts: Sequence[str], seeds: Sequence[int], transition: Transition | None = None
) -> Iterator[DenoisingStep]:
    """Draws the images of some seeds step by step, with the noise that :func:`evaluate` gives to them.

    Args:
        process: the denoising process.
        prompts: of the B images.
        seeds: of the B images, at least 0.
        transition: mean and std of the next latents; None for the process's own.

    Yields:
        Each denoising step; the last one has ``next_latents`` x_0.
    """
    noise = ImageNoise.for_evaluation(seeds, process.model.latent_shape, process.model.device)
    yield from process.denoise(noise.initial_latents(), process.encode(prompts), noise, transition)


def _sample_chunk(
    process: DenoisingProcess,
    env: DenoisingVectorEnv,
    prompts: list[str],
    seeds: list[int],
    transition: Transition | None,
    reference: Transition | None,
    steering: Steering,
) -> Evaluation:
    """Draws and scores the images of some seeds side by side."""
    k = steering.n_particles
    texts = [prompt for prompt in prompts for _ in range(k)]

    def value(state: State, mean: Tensor) -> Tensor:
        return _total(env.judge(process.predicted_clean(state, mean), texts).rewards)

    def uniforms(step: int) -> Tensor:
        numbers = [make_generator(seed, Purpose.STEERING, step).random() for seed in seeds]
        return torch.tensor(numbers, dtype=torch.float64)

    particles = ParticleFilter(steering, len(prompts), value, uniforms)
    noise = ImageNoise.for_evaluation(seeds, process.model.latent_shape, process.model.device, k)
    latents = noise.initial_latents()
    kl, mse = np.zeros((2, len(texts), process.num_inference_steps))
    for step in process.denoise(latents, process.encode(texts), noise, transition, select=particles):
        latents = step.next_latents
        if step.parents is not None:
            kl, mse = kl[step.parents.cpu().numpy()], mse[step.parents.cpu().numpy()]
        if reference is not None:
            reference_mean, _ = reference(step.state)
            kl[:, step.index] = diffusion.kl_divergence(step.mean, reference_mean, step.std).cpu()
            mse[:, step.index] = process.table.output_mse(step.state.step, step.mean, reference_mean).cpu()
    images, rewards = env.judge(latents, texts)
    components = {name: values.double().numpy() for name, values in rewards.components.items()}
    reward = _total(rewards)
    chosen = particles.finish(reward, process.num_inference_steps).numpy()
    exploring = process.table.exploring.cpu().numpy()
    return Evaluation(texts, images, reward.numpy(), components, kl, mse, exploring)[chosen]


def _total(rewards: RewardBatch) -> Tensor:
    """Returns the reward of each image, (B,) float64; nan where a component is not finite."""
    is_finite = torch.stack([values.isfinite() for values in rewards.components.values()]).all(dim=0)
    # A masked image has the reward 0, which would count as a bad image.
    return rewards.total.double().masked_fill(~is_finite, math.nan)


def _finite_mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def cycle_prompts(prompts: Sequence[str], n: int) -> list[str]:
    """Returns ``n`` prompts, the same at every call: all of them in turn, or evenly spaced ones if there are more."""
    size = len(prompts)
    if n >= size:
        return [prompts[k % size] for k in range(n)]
    return [prompts[k * size // n] for k in range(n)]


def shown_images(prompts: Sequence[str], n: int) -> list[int]:
    """Returns the numbers of the images to show of an evaluation: evenly chosen, of as many prompts as possible.

    Args:
        prompts: of the images, in turn, as :func:`cycle_prompts` returns them.
        n: images to show at most.
    """
    n, size = min(n, len(prompts)), len(set(prompts))
    return [k * size // n for k in range(n)] if size > n else list(range(n))
