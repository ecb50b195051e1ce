"""Draws the images of one iteration with the agent's policy, and fills the buffer with their trajectories.

Letters used for shapes: N images of the iteration, n of them side by side, T denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents.common.buffer import TrajectoryBuffer
from agents.common.randomness import ImageNoise, Purpose, make_generator
from dpok_gym import diffusion
from dpok_gym.judging import Outcome, make_info
from dpok_gym.rewards import RewardBatch

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm


@torch.no_grad()
def draw_rollout(agent: DenoisingAlgorithm, buffer: TrajectoryBuffer, callback: BaseCallback) -> bool:
    """Draws N images and their rewards into the buffer; logs what they are like.

    Image k of the run is the same whatever n is: its prompt, x_T and noise are functions of the seed and of k.

    Args:
        agent: its ``drawing_transition`` draws.
        buffer: of N images.
        callback: asked after each denoising step, as SB3 asks after each environment step.

    Returns:
        False if the callback ended the training; the rollout is then not complete.
    """
    started = time.perf_counter()
    batches: list[RewardBatch] = []
    for rows in _chunks(len(buffer), agent.n_envs):
        batch = _draw_images(agent, buffer, callback, rows)
        if batch is None:
            return False
        batches.append(batch)
    rewards = _join(batches)
    if agent.reward_normalizer:
        # All at once, so that the statistics do not depend on how many images are drawn side by side.
        buffer.rewards[:, -1] = agent.reward_normalizer(rewards).to(buffer.rewards)
    seconds = time.perf_counter() - started
    agent.logger.record("rollout/images", agent.images_drawn + len(buffer))
    agent.logger.record("rollout/valid_share", buffer.valid.float().mean().item())
    agent.logger.record("time/rollout_images_per_second", len(buffer) / seconds)
    components = {name: values[rewards.valid] for name, values in rewards.components.items()}
    for column, values in zip(shorten_names(list(components)), components.values(), strict=True):
        if len(values):  # perhaps no image has a valid reward
            agent.logger.record(f"rollout/{column}", values.mean().item())
    return True


def _draw_images(
    agent: DenoisingAlgorithm, buffer: TrajectoryBuffer, callback: BaseCallback, rows: slice
) -> RewardBatch | None:
    """Draws n images side by side; returns their rewards, or None if the callback ended the training."""
    process, policy, env = agent.process, agent.policy, agent.denoising_env
    images = range(agent.images_drawn + rows.start, agent.images_drawn + rows.stop)
    prompts = draw_prompts(agent, images)
    # Once for the whole episode; the update finds it in the buffer.
    conditioning = process.encode(prompts)
    noise = ImageNoise.for_training(
        agent.run_seed, images, process.model.latent_shape, process.model.device, agent.initial_noise_of(images)
    )
    latents = noise.initial_latents()
    buffer.begin(rows, prompts, conditioning)
    for step in process.denoise(latents, conditioning, noise, agent.drawing_transition):
        latents = step.next_latents
        buffer.add(rows, step)
        if agent.records_reference_kl:
            reference_mean, _ = policy.reference_transition(step.state)
            buffer.kl[rows, step.index] = diffusion.kl_divergence(step.mean, reference_mean, step.std)
        agent.num_timesteps += len(images)
        is_last = step.index == process.num_inference_steps - 1
        if is_last:
            outcome = env.judge(latents, prompts)
            infos = _finish(agent, buffer, rows, outcome)
        else:
            infos = [{} for _ in images]
        rewards, dones = buffer.rewards[rows, -1] * is_last, np.full(len(images), is_last)
        # Here the LoRA is off: callbacks find the pre-trained model where they look for it.
        callback.update_locals({"infos": infos, "rewards": rewards.cpu().numpy(), "dones": dones})
        if not callback.on_step():
            return None
    return outcome.rewards


def _finish(agent: DenoisingAlgorithm, buffer: TrajectoryBuffer, rows: slice, outcome: Outcome) -> list[dict[str, Any]]:
    """Stores the rewards of finished images; returns their infos, with SB3's ``episode`` entry."""
    rewards = outcome.rewards
    buffer.finish(rows, rewards.total, rewards.valid)
    infos = [make_info(outcome, i, prompt) for i, prompt in enumerate(buffer.prompts[rows])]
    for info, reward in zip(infos, rewards.total.tolist(), strict=True):
        info["episode"] = {
            "r": reward,
            "l": agent.process.num_inference_steps,
            "t": time.time() - agent.start_time / 1e9,
        }
    # SB3 logs the mean reward from these.
    agent._update_info_buffer([info for info in infos if info["reward_valid"]])
    return infos


def draw_prompts(agent: DenoisingAlgorithm, images: range) -> list[str]:
    """Draws the prompt of each image, keyed by the image's group."""
    prompts = agent.denoising_env.prompts
    drawn = []
    for image in images:
        rng = make_generator(agent.run_seed, Purpose.PROMPT, agent.group_of(image))
        drawn.append(prompts.sample(rng, 1)[0])
    return drawn


def _chunks(n: int, size: int) -> Iterator[slice]:
    for first in range(0, n, size):
        yield slice(first, min(first + size, n))


def _join(batches: list[RewardBatch]) -> RewardBatch:
    """Returns the rewards of all images as one batch."""
    components = {}
    for name in batches[0].components:
        components[name] = torch.cat([batch.components[name] for batch in batches])
    total, valid = torch.cat([batch.total for batch in batches]), torch.cat([batch.valid for batch in batches])
    return RewardBatch(total, components, valid, batches[0].weights)


def shorten_names(names: list[str]) -> list[str]:
    """Makes names short enough for SB3's console: the ends of long ones, numbered where these are equal."""
    ends = [name[-28:] for name in names]
    columns = []
    for index, end in enumerate(ends):
        number = ends[:index].count(end) + 1
        columns.append(end if number == 1 else f"{end[4:]} ({number})")
    return columns
