"""A check-up of a training before it starts: minutes on this model, reward and prompts, before hours are spent."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from agents.common import distributed
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.doctor.costs import Meter, check_memory, check_throughput
from agents.common.doctor.finding import Finding as Finding
from agents.common.doctor.finding import Status as Status
from agents.common.doctor.finding import judge
from agents.common.doctor.inputs import check_pipeline, check_reward, total_of
from agents.common.doctor.inputs import check_prompts as check_prompts
from agents.common.doctor.inputs import find_refused as find_refused
from agents.common.doctor.learning import check_length, check_reward_change, check_start, check_step
from agents.common.doctor.trial import Trial, restored
from agents.common.rollouts import draw_prompts
from dpok_gym.utils.sharding import is_sharded
from dpok_gym.utils.validation import check_integer

#: Images that are drawn for each check, and the prompts that the reward is tried on.
N_IMAGES, N_PROMPTS = 16, 4
#: Iterations of a training whose length is not known.
_ITERATIONS = 100


def diagnose(
    agent: DenoisingAlgorithm, total_images: int | None = None, eval_images: int = 0, n_images: int = N_IMAGES
) -> list[Finding]:
    """Checks an agent, its model, reward and prompts by drawing a few images and learning from them once.

    Afterwards the agent is as it was: nothing is learned, and no image of the training is used up.

    Args:
        agent: an agent with an environment.
        total_images: images of the training that it is for; None if that is not known yet.
        eval_images: images of each of two evaluations, for an estimate of their time.
        n_images: images that are drawn for a check, at least 2; more take longer and see smaller effects.

    Returns:
        A finding for each check. A training is worth its time if none has failed.

    Raises:
        ValueError: if an argument is out of range, there are several ranks, or the agent has no environment. An error
            of the reward is raised as it is.
    """
    env = agent.denoising_env
    prompts = check_prompts(env.model, env.prompts.train, env.max_prompt_bytes)
    return [prompts, *examine(agent, total_images, eval_images, n_images)]


def examine(
    agent: DenoisingAlgorithm, total_images: int | None = None, eval_images: int = 0, n_images: int = N_IMAGES
) -> Iterator[Finding]:
    """Yields the findings of :func:`diagnose` but for the prompts; the agent is as it was once all are there."""
    check_integer("n_images", n_images, minimum=2)
    env = agent.denoising_env
    if distributed.count() > 1 or is_sharded(agent.process.model.denoiser):
        raise ValueError("the check-up runs in one process, with a denoiser that is not spread over ranks")
    if total_images is None:
        total_images = _ITERATIONS * (agent.images_per_iteration or n_images)
    with restored(agent):
        # Momentum of a training would hide the direction of a step.
        agent.policy.optimizer.state.clear()
        trial = Trial(agent, n_images, total_images)
        texts = _some_prompts(agent, n_images)
        images = trial.images(trial.draw_for(texts))
        of_reward = check_reward(env.reward, images, texts)
        yield from of_reward
        yield check_pipeline(agent.process, texts[:2], agent.run_seed)
        if len(of_reward) == 1:
            yield Finding("learning", "not checked", "the reward is not finite", "it is")
            return
        try:
            yield from _try_learning(trial, total_images, eval_images)
        except torch.OutOfMemoryError as error:
            advice = "take micro_batch_size='auto', gradient_checkpointing or dtype='bfloat16', or fewer n_envs"
            yield judge("memory", f"it ran out: {str(error).splitlines()[0]}", "it suffices", advice, True)


def _try_learning(trial: Trial, total_images: int, eval_images: int) -> Iterator[Finding]:
    """Draws the first images of the training, and learns from them."""
    agent, device = trial.agent, trial.process.model.device
    drawing, learning, side_by_side = Meter(device), Meter(device), Meter(device)
    with drawing:
        trial.draw()
    rewards = _rewards(trial, trial.drawn_by_policy())
    assert rewards is not None  # the reward's check has seen finite ones
    try:
        batch = trial.first_batch()
    except ValueError as error:  # an algorithm that cannot learn from these rewards
        advice = "take a reward that differs between images of a prompt, in the range that the algorithm asks for"
        yield judge("learning", str(error), "an optimiser step is taken", advice, True)
        return
    yield from check_start(trial, batch)
    with restored(agent):
        yield from check_step(trial, batch)
    agent.policy.optimizer.state.clear()
    before = agent._n_updates
    with learning:
        trial.update()
    n_steps = agent._n_updates - before
    yield check_length(trial)
    yield check_reward_change(rewards, _rewards(trial, trial.redraw()))
    with side_by_side:
        trial.draw_side_by_side()
    yield check_memory(device, max(drawing.peak, side_by_side.peak), learning.peak)
    yield check_throughput(agent, len(trial.buffer), n_steps, drawing, learning, total_images, eval_images)


def _rewards(trial: Trial, latents: Tensor) -> Tensor | None:
    """Returns the raw rewards (n,) float64 of x_0 (n, C, h, w); None if an image is not finite."""
    images = trial.images(latents)
    return total_of(trial.agent.denoising_env.reward, images, trial.buffer.prompts) if images.isfinite().all() else None


def _some_prompts(agent: DenoisingAlgorithm, n: int) -> list[str]:
    """Returns n prompts, a few of those that the training begins with, several times each."""
    images = range(agent.images_drawn, agent.images_drawn + n * agent.group_size)
    different = list(dict.fromkeys(draw_prompts(agent, images)))
    chosen = different[: max(min(N_PROMPTS, n // 2), 1)]
    return [chosen[number * len(chosen) // n] for number in range(n)]
