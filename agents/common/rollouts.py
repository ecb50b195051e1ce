"""Draws the images of one iteration with the agent's policy, and fills the buffer with their trajectories.

Letters used for shapes: N images of the iteration, n of them on this rank, T denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents.common import distributed
from agents.common.buffer import TrajectoryBuffer
from agents.common.image_statistics import describe_images, equal_share, summarise_images, variance_within
from agents.common.randomness import ImageNoise, Purpose, make_generator
from dpok_gym import diffusion
from dpok_gym.judging import Outcome, make_info
from dpok_gym.rewards import RewardBatch
from dpok_gym.rewards.workers import check_same_components

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm


@torch.no_grad()
def draw_rollout(agent: DenoisingAlgorithm, buffer: TrajectoryBuffer, callback: BaseCallback) -> bool:
    """Draws N images and their rewards into the buffer; logs what they are like.

    Image k of the run is the same, however many are drawn side by side and by however many ranks: its prompt, x_T and
    noise are functions of the seed and of k. The ranks meet once, at the end, to gather the rewards.

    Args:
        agent: its ``drawing_transition`` draws.
        buffer: of N images.
        callback: asked after each denoising step, as SB3 asks after each environment step.

    Returns:
        False if the callback ended the training; the rollout is then not complete.
    """
    started = time.perf_counter()
    timesteps = agent.num_timesteps
    buffer.prompts = draw_prompts(agent, range(agent.images_drawn, agent.images_drawn + len(buffer)))
    batches: list[RewardBatch] = []
    seen: list[Tensor] = []
    for rows in _chunks(len(buffer.own), agent.n_envs):
        outcome = _draw_images(agent, buffer, callback, rows)
        if outcome is None:
            break
        batches.append(outcome.rewards)
        seen.append(_look_at(agent, buffer, rows, outcome.images))
    # One rank may have been stopped, and the others not.
    if distributed.any_of(outcome is None):
        return False
    agent.num_timesteps = timesteps + len(buffer) * agent.process.num_inference_steps
    rewards = _gather(buffer, _join(batches))
    # All at once, so that the statistics do not depend on how many images are drawn side by side.
    total = agent.reward_normalizer(rewards) if agent.reward_normalizer else rewards.total
    buffer.finish(total, rewards.valid)
    _record_rewards(agent, buffer.prompts, rewards)
    _record_images(agent, buffer.prompts, buffer.gather(torch.cat(seen)))
    _note_episodes(agent, rewards)
    seconds = time.perf_counter() - started
    agent.logger.record("rollout/images", agent.images_drawn + len(buffer))
    agent.logger.record("rollout/valid_share", buffer.valid.float().mean().item())
    agent.logger.record("time/rollout_images_per_second", len(buffer) / seconds)
    return True


def _record_rewards(agent: DenoisingAlgorithm, prompts: Sequence[str], rewards: RewardBatch) -> None:
    """Logs the mean of each component, the mean of the total and how it differs within a prompt; all raw."""
    valid = rewards.valid
    if not valid.any():
        return
    components = {name: values[valid] for name, values in rewards.components.items()}
    for column, values in zip(shorten_names(list(components)), components.values(), strict=True):
        agent.logger.record(f"rollout/{column}", values.mean().item())
    world = agent.denoising_env.world
    if world is not None and world.alignment_reward in components:
        agent.logger.record("rollout/aligned_share", (components[world.alignment_reward] == 1).double().mean().item())
    total, prompts = rewards.total[valid], [prompts[row] for row in torch.nonzero(valid).flatten().tolist()]
    agent.logger.record("rollout/total_reward", total.double().mean().item())
    variance, equal = variance_within(total[:, None], prompts), equal_share(total, prompts)
    if variance is not None and equal is not None:
        agent.logger.record("rollout/reward_std", variance.sqrt().item())
        agent.logger.record("rollout/equal_share", equal)


def _look_at(agent: DenoisingAlgorithm, buffer: TrajectoryBuffer, rows: slice, images: NDArray[np.uint8]) -> Tensor:
    """Returns what some of this rank's images are like, after their held-out rewards, (B, ...)."""
    of_all = range(buffer.own.start + rows.start, buffer.own.start + rows.stop)
    held_out = agent.held_out(images, buffer.own_prompts[rows], of_all, len(buffer))
    return torch.cat([held_out.float(), describe_images(images)], dim=1)


def _record_images(agent: DenoisingAlgorithm, prompts: Sequence[str], seen: Tensor) -> None:
    """Logs what the images of an iteration are like, from what :func:`_look_at` returned for all of them, (N, ...)."""
    names = agent.held_out.names
    for name, value in summarise_images(seen[:, len(names) :], prompts).items():
        agent.logger.record(f"images/{name}", value)
    held_out = seen[:, : len(names)].double()
    held_out = held_out[held_out.isfinite().all(dim=1)]
    if names and len(held_out):
        agent.logger.record("rollout/held_out_reward", agent.held_out.total(held_out).mean().item())
        for column, mean in zip(agent.held_out.columns, held_out.mean(dim=0).tolist(), strict=True):
            agent.logger.record(column, mean)
        share = agent.held_out.aligned_share(held_out)
        if share is not None:
            agent.logger.record("rollout/aligned_share", share)


def _draw_images(
    agent: DenoisingAlgorithm, buffer: TrajectoryBuffer, callback: BaseCallback, rows: slice
) -> Outcome | None:
    """Draws n images side by side; returns them and their rewards, or None if the callback ended the training."""
    process, policy, env = agent.process, agent.policy, agent.denoising_env
    first = agent.images_drawn + buffer.own.start
    images, prompts = range(first + rows.start, first + rows.stop), buffer.own_prompts[rows]
    # Once for the whole episode; the update finds it in the buffer.
    conditioning = process.encode(prompts)
    noise = ImageNoise.for_training(
        agent.run_seed, images, process.model.latent_shape, process.model.device, agent.initial_noise_of(images)
    )
    latents = noise.initial_latents()
    buffer.begin(rows, conditioning)
    for step in process.denoise(latents, conditioning, noise, agent.drawing_transition):
        latents = step.next_latents
        buffer.add(rows, step)
        if agent.records_reference_kl:
            reference_mean, _ = policy.reference_transition(step.state)
            of_all = slice(buffer.own.start + rows.start, buffer.own.start + rows.stop)
            buffer.kl[of_all, step.index] = diffusion.kl_divergence(step.mean, reference_mean, step.std)
        agent.num_timesteps += len(images) * distributed.count()
        infos: list[dict[str, Any]] = [{} for _ in images]
        rewards, dones = np.zeros(len(images), np.float32), np.zeros(len(images), bool)
        if step.index == process.num_inference_steps - 1:
            outcome = env.judge(latents, prompts)
            infos = _episodes(agent, outcome.rewards, [make_info(outcome, i, text) for i, text in enumerate(prompts)])
            rewards, dones = outcome.rewards.total.numpy(), ~dones
        # Here the LoRA is off: callbacks find the pre-trained model where they look for it.
        callback.update_locals({"infos": infos, "rewards": rewards, "dones": dones})
        if not callback.on_step():
            return None
    return outcome


def _episodes(agent: DenoisingAlgorithm, rewards: RewardBatch, infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns infos of finished images with SB3's ``episode`` entry."""
    seconds = time.time() - agent.start_time / 1e9
    for info, reward in zip(infos, rewards.total.tolist(), strict=True):
        info["episode"] = {"r": reward, "l": agent.process.num_inference_steps, "t": seconds}
    return infos


def _note_episodes(agent: DenoisingAlgorithm, rewards: RewardBatch) -> None:
    """Notes the images of an iteration, those of all ranks: SB3 logs the mean reward of the latest ones."""
    infos = _episodes(agent, rewards, [{} for _ in rewards.total])
    agent._update_info_buffer([info for info, valid in zip(infos, rewards.valid.tolist(), strict=True) if valid])


def _gather(buffer: TrajectoryBuffer, own: RewardBatch) -> RewardBatch:
    """Returns the rewards of all ranks' images; the KLs of the buffer become those of all images too."""
    if distributed.count() > 1:
        of_all = slice(buffer.own.start, buffer.own.stop)
        buffer.kl = buffer.gather(buffer.kl[of_all])
    # Sorted: the reward of one rank may name them in another order than that of another one.
    names = sorted(own.components)
    check_same_components(text.split("\n") for text in distributed.gather_texts("\n".join(names)))
    components = {name: buffer.gather(own.components[name]) for name in names}
    return RewardBatch(buffer.gather(own.total), components, buffer.gather(own.valid), own.weights)


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
    check_same_components(batch.components for batch in batches)
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
