"""One training run in the shapes world, with its scores: the sweeps of this folder make hundreds of them.

A run is described by a dict of plain JSON values, and so is its result.

Letters used for shapes: N images, H x W an image.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from stable_baselines3.common.callbacks import BaseCallback

from agents.algorithms.registry import load_algorithm
from agents.cli.environments import EVALUATION_BATCH_SIZE, evaluation_rewards
from agents.cli.steering import SteeringOptions, make_steering
from agents.common.checkpoint import CheckpointCallback, find_checkpoint, list_checkpoints, load_checkpoint
from agents.common.evaluation import Evaluation, cycle_prompts, evaluate
from agents.common.steering import BestOf
from benchmarks.diversity import pixel_diversity, scene_diversity
from benchmarks.prompt_splits import prompts_of
from dpok_gym.prompts import PromptSet, load_prompts
from dpok_gym.rewards import NonFiniteError
from dpok_gym.shapes.choices import QUALITY_WEIGHT
from dpok_gym.shapes.prompts import unseen_prompts
from dpok_gym.shapes.world import WORLD
from dpok_gym.vector_env import DenoisingVectorEnv

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm
    from agents.common.policy import DenoisingPolicy
    from dpok_gym.samplers.process import DenoisingProcess

#: Keys of a record that are no part of its run's description.
_RESULTS = {
    "scores",
    "curve",
    "agreement",
    "seconds",
    "num_function_evaluations",
    "num_gradient_evaluations",
    "num_function_evaluations_to_draw",
    "diverged",
    "made_by",
}

#: The "algorithm" of runs without training.
UNTRAINED = "untrained"

#: Images of each evaluation within a supervised fit, which draws none by itself.
_CURVE_IMAGES = 64

#: Images of a prompt from which the entropy of its scenes can be told.
_IMAGES_FOR_ENTROPY = 16

#: Minutes after which a training that is not over is saved.
_MINUTES = 5.0

#: Images in the row that shows a run.
_ROW_LENGTH = 8


def run(description: dict[str, Any], row_file: Path | None = None, unfinished: Path | None = None) -> dict[str, Any]:
    """Trains and evaluates.

    Args:
        description: ``algorithm`` (a registered name, or :data:`UNTRAINED`), ``settings`` of it, ``prompts``,
            ``reward`` ({name: weight}), ``images`` (the budget), ``n_envs``, ``num_inference_steps``, ``eval_images``,
            ``held_out`` (True to evaluate on unseen prompts too), ``seed``; and perhaps

            - ``environment``: further arguments of the environment;
            - ``splits``: kinds of prompts, see :mod:`benchmarks.prompt_splits`, in place of ``prompts`` and
              ``held_out``: it trains on the first one, and is evaluated on all;
            - ``draw``: how the images are drawn in the end, see :func:`evaluate_drawing`;
            - ``also``: further ways to draw, by name. They are evaluated on the prompts of the training.
        row_file: file for a row of images of the trained model; None for no file.
        unfinished: folder with one for each run that is not over. It gets a checkpoint every five minutes, from which
            the same run goes on later. None for no checkpoints.

    Returns:
        The description, and ``scores`` (by set of prompts, or way to draw; see :func:`summarize`), ``curve`` (a list of
        points, see :class:`Curve`; the last one is the final evaluation), ``num_function_evaluations``,
        ``num_gradient_evaluations`` and ``seconds`` of the training, and ``num_function_evaluations_to_draw`` one
        image. A run whose model draws no finite numbers any more has ``diverged``: what was wrong, and no scores.
    """
    prompts = _training_prompts(description)
    settings = dict(description["settings"])
    n_envs = settings.pop("n_envs", description["n_envs"])
    trains = description["algorithm"] != UNTRAINED
    # Without training, an untrained agent gives access to the pre-trained model; SFT takes steps without noise too.
    name = description["algorithm"] if trains else "sft"
    draw = description.get("draw", {})
    environment = description.get("environment", {}) | draw.get("environment", {})
    of_env = description | {"environment": environment}
    env = _make_env(of_env, prompts, n_envs)
    algorithm: Any = load_algorithm(name)
    checkpoints = (
        None if unfinished is None else unfinished / hashlib.sha256(key_of(description).encode()).hexdigest()[:16]
    )
    agent: DenoisingAlgorithm = algorithm(env=env, seed=description["seed"], device="cpu", **settings)
    curve = Curve(_make_env(description, prompts), description["seed"])
    record: dict[str, Any] = {"scores": {}, "curve": curve.points}
    try:
        try:
            if trains:
                _train(agent, description["images"], curve, checkpoints)
        finally:
            cost = curve.cost()
        for name, texts in _prompts_to_evaluate(description, prompts).items():
            evaluation, record["scores"][name] = evaluate_drawing(agent.policy, of_env, texts, draw, not trains)
            if row_file is not None and name == "training":
                _save_row(evaluation, row_file)
        for name, way in description.get("also", {}).items():
            with suppress(NonFiniteError):  # then this way has no scores
                record["scores"][name] = evaluate_drawing(agent.policy, description, prompts.train, way)[1]
    except NonFiniteError as error:
        record = {"scores": {}, "curve": [], "diverged": str(error)}
    else:
        record["num_function_evaluations_to_draw"] = record["scores"]["training"]["calls"]
        if trains:
            curve.add(cost, record["scores"]["training"])
    if checkpoints is not None:  # the run is over
        shutil.rmtree(checkpoints, ignore_errors=True)
    return description | record | {name: value for name, value in cost.items() if name != "images"}


def key_of(record: dict[str, Any]) -> str:
    """Returns a run's description as a text."""
    description = {name: value for name, value in record.items() if name not in _RESULTS}
    return json.dumps(description, sort_keys=True)


def _train(agent: DenoisingAlgorithm, images: int, curve: Curve, folder: Path | None) -> None:
    """Trains an agent.

    Args:
        agent: the agent.
        images: the budget.
        curve: collects its learning curve.
        folder: for checkpoints. If there is one, the training goes on from it. None for no checkpoints.
    """
    steps = images * agent.process.num_inference_steps
    if folder is None:
        agent.learn(steps, curve)
        return
    folder.mkdir(parents=True, exist_ok=True)
    goes_on = bool(list_checkpoints(folder))
    if goes_on:
        curve.load_state(load_checkpoint(agent, find_checkpoint(folder)), agent.process)
    save = CheckpointCallback(folder, every=None, total_limit=1, extra_state=curve.state, minutes=_MINUTES)
    agent.learn(max(steps - agent.num_timesteps, 0), [curve, save], reset_num_timesteps=not goes_on)


def evaluate_drawing(
    policy: DenoisingPolicy,
    description: dict[str, Any],
    prompts: Sequence[str],
    draw: dict[str, Any],
    reference: bool = False,
) -> tuple[Evaluation, dict[str, Any]]:
    """Draws images with a policy in some way, and scores them.

    Args:
        policy: the policy.
        description: of the run.
        prompts: each is drawn about equally often.
        draw: ``lora_scale`` (factor of what the LoRA changes), ``noise_scale`` (factor of the noise of each step), and
            the options of :class:`agents.cli.steering.SteeringOptions`; and ``environment``, further arguments of the
            environment (with a trained model, ``guidance_scale`` only). Each may be left out.
        reference: True for the pre-trained model.

    Returns:
        The evaluation, and its scores: see :func:`summarize`; and for one image ``calls`` of the denoiser,
        ``reward_calls``, and ``seconds`` of the processor.
    """
    others = ("environment", "lora_scale", "noise_scale")
    options = {name: value for name, value in draw.items() if name not in others}
    steering = make_steering(SteeringOptions(**options))
    environment = description.get("environment", {}) | draw.get("environment", {})
    env = _make_env(description | {"environment": environment}, _training_prompts(description))
    chosen = cycle_prompts(prompts, description["eval_images"])
    # Far from the seeds that training and the curve use, and the same for all algorithms.
    seed = 1_000_000 * (description["seed"] + 1)
    started = time.process_time()
    with (
        scaled_lora(policy, draw.get("lora_scale", 1.0)),
        scaled_noise(policy, draw.get("noise_scale", 1.0)),
        guided(policy, env.process.config.guidance_scale),
    ):
        evaluation = evaluate(policy, env, chosen, seed, reference=reference, steering=steering)
    scores = {"seconds": (time.process_time() - started) / len(chosen)} | summarize(evaluation)
    another_sampler = "environment" in draw or "noise_scale" in draw
    if reference and isinstance(steering, BestOf) and not another_sampler:
        # The KL of the evaluation is that of the sampler, before an image is chosen.
        scores["kl"] = steering.kl_bound
    elif reference or steering.n_particles > 1 or another_sampler:  # it is not known
        del scores["kl"]
    process = env.process
    scores["calls"] = steering.denoiser_calls(process.num_inference_steps)
    scores["calls"] *= process.model.num_forward_passes(process.config.guidance_scale)
    scores["reward_calls"] = steering.reward_calls(process.num_inference_steps)
    return evaluation, scores


@contextmanager
def scaled_noise(policy: DenoisingPolicy, scale: float) -> Iterator[None]:
    """Within the block, the noise of each step is so many times as large, around the same mean."""
    table = policy.process.table
    policy.process.table = replace(table, std=scale * table.std)
    try:
        yield
    finally:
        policy.process.table = table


@contextmanager
def guided(policy: DenoisingPolicy, scale: float) -> Iterator[None]:
    """Within the block, the policy draws with this scale of classifier-free guidance."""
    config = policy.process.config
    policy.process.config = replace(config, guidance_scale=scale)
    try:
        yield
    finally:
        policy.process.config = config


@contextmanager
def scaled_lora(policy: DenoisingPolicy, scale: float) -> Iterator[None]:
    """Within the block, what a policy's LoRA changes in the denoiser is so many times as large."""
    outer = [] if scale == 1 else [value for name, value in policy.adapter.items() if "lora_B" in name]
    kept = [value.detach().clone() for value in outer]
    with torch.no_grad():
        for value in outer:
            value.mul_(scale)
        try:
            yield
        finally:
            for value, before in zip(outer, kept, strict=True):
                value.copy_(before)


def _make_env(
    description: dict[str, Any], prompts: PromptSet, num_envs: int = EVALUATION_BATCH_SIZE
) -> DenoisingVectorEnv:
    """Makes the environment of a run; the judge scores all images, with weight 0 if it is not the reward."""
    return DenoisingVectorEnv(
        num_envs,
        prompts=prompts,
        reward=evaluation_rewards(WORLD, description["reward"]),
        num_inference_steps=description["num_inference_steps"],
        decode_batch_size=16,
        device="cpu",
        **description.get("environment", {}),
    )


def _training_prompts(description: dict[str, Any]) -> PromptSet:
    if "splits" in description:
        return prompts_of(description["splits"][0])
    return load_prompts(description["prompts"])


def _prompts_to_evaluate(description: dict[str, Any], prompts: PromptSet) -> dict[str, Sequence[str]]:
    """Returns the sets of prompts that a run is evaluated on, by name; the first one is that of the training."""
    if "splits" in description:
        others = {name: prompts_of(name).train for name in description["splits"][1:]}
        return {"training": prompts.train, **others}
    sets: dict[str, Sequence[str]] = {"training": prompts.train}
    if description["held_out"]:
        sets["held_out"] = unseen_prompts(prompts)
    return sets


def _save_row(evaluation: Evaluation, path: Path) -> None:
    """Writes a few images side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = evaluation.images[choose_row(evaluation.prompts)]
    Image.fromarray(np.concatenate(chosen, axis=1)).save(path)


def prompts_of_row(description: dict[str, Any]) -> list[str]:
    """Returns the prompts of the images that show a run."""
    prompts = cycle_prompts(_training_prompts(description).train, description["eval_images"])
    return [prompts[index] for index in choose_row(prompts)]


def choose_row(prompts: Sequence[str]) -> list[int]:
    """Returns the numbers of up to eight images to show: of different prompts, if there are as many."""
    first_of_each = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)]
    if len(first_of_each) < _ROW_LENGTH:
        return list(range(min(_ROW_LENGTH, len(prompts))))
    return first_of_each[:: len(first_of_each) // _ROW_LENGTH][:_ROW_LENGTH]


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """Computes means over the images.

    Returns:
        ``aligned`` (share), ``alignment``, ``quality``, ``reward``, ``judged`` (alignment and a fifth of the quality,
        as the simulated person sees an image), ``kl`` (nats of the steps that explore), ``late_drift`` of the others,
        ``step_kl`` (nats of each step), ``reward_std`` and ``judged_std`` (see :func:`spread`), and, if there are two
        images of a prompt, ``diversity`` (see :func:`~benchmarks.diversity.pixel_diversity`). If there are 16 images of
        each prompt, it has the entropies of :func:`~benchmarks.diversity.scene_diversity` too.
    """
    means: dict[str, Any] = {"aligned": evaluation.aligned_share}
    for name in WORLD.evaluation_rewards:
        means[name.removeprefix("shapes-")] = evaluation.mean(name)
    alignment, quality = (evaluation.rewards[name] for name in WORLD.evaluation_rewards)
    judged = alignment + QUALITY_WEIGHT * quality
    means |= {"judged": judged.mean(), "judged_std": spread(judged, evaluation.prompts)}
    means["reward_std"] = spread(evaluation.reward, evaluation.prompts)
    means |= {"reward": evaluation.mean_reward, "kl": evaluation.kl.mean(), "late_drift": evaluation.late_drift}
    means["diversity"] = pixel_diversity(evaluation.images, evaluation.prompts)
    if min(Counter(evaluation.prompts).values()) >= _IMAGES_FOR_ENTROPY:
        means |= scene_diversity(evaluation.images, evaluation.prompts)
    scores: dict[str, Any] = {name: float(value) for name, value in means.items() if value is not None}
    scores["step_kl"] = [round(float(value), 4) for value in evaluation.step_kl.mean(axis=0)]
    return scores


def spread(values: NDArray[Any], prompts: Sequence[str]) -> float:
    """Computes the standard deviation of numbers within prompts; over all of them, if no prompt has two.

    Args:
        values: (N,).
        prompts: N.
    """
    names, number = np.unique(prompts, return_inverse=True)
    if len(names) == len(values):
        return float(np.std(values))
    means = np.bincount(number, values) / np.bincount(number)
    return float(np.sqrt(np.square(values - means[number]).sum() / (len(values) - len(names))))


class Curve(BaseCallback):
    """Collects the points of a learning curve.

    A point has the means of ``aligned`` (share), ``alignment``, ``quality`` and ``reward`` over some images, and the
    ``kl`` of the update before them if the algorithm has one. It also has the cost of the training until then:
    ``images``, ``num_function_evaluations``, ``num_gradient_evaluations``, and ``seconds`` of the processor, so that
    other work on the machine does not count. The images are those of each rollout.
    A supervised fit has no rollouts, so images are drawn for the curve: such a point has ``drawn_for_it``.

    Args:
        env: draws the images within fits; neither their time nor their function evaluations count.
        seed: of the run.

    Attributes:
        points: the points so far.
    """

    _SHOWN = ("aligned", "alignment", "quality", "reward")

    model: DenoisingAlgorithm

    def __init__(self, env: DenoisingVectorEnv, seed: int) -> None:
        super().__init__()
        self._env, self._seed = env, seed
        self._started, self._evaluation_seconds, self._seconds_before = math.nan, 0.0, 0.0
        self._cost_before_rollout: dict[str, float] = {}
        self._kl: float | None = None
        self.points: list[dict[str, float]] = []

    def cost(self) -> dict[str, float]:
        """Returns the cost of the run so far, without the evaluations; all 0 if there was no training."""
        if math.isnan(self._started):
            return {"images": 0, "num_function_evaluations": 0, "num_gradient_evaluations": 0, "seconds": 0.0}
        seconds = self._seconds_before + time.process_time() - self._started - self._evaluation_seconds
        return {
            "images": self.model.images_drawn,
            "num_function_evaluations": self.model.process.num_function_evaluations,
            "num_gradient_evaluations": self.model.process.num_gradient_evaluations,
            "seconds": round(seconds, 1),
        }

    def state(self) -> dict[str, Any]:
        """Returns what a training that goes on later needs of the curve and of its cost."""
        return {"points": self.points, "cost": self.cost(), "kl": self._kl}

    def load_state(self, state: dict[str, Any], process: DenoisingProcess) -> None:
        """Goes on with what :meth:`state` returned; the process counts its evaluations on from there."""
        self.points += state["points"]
        self._seconds_before, self._kl = state["cost"]["seconds"], state["kl"]
        process.num_function_evaluations = state["cost"]["num_function_evaluations"]
        process.num_gradient_evaluations = state["cost"]["num_gradient_evaluations"]

    def add(self, cost: dict[str, float], means: dict[str, Any]) -> None:
        """Adds a point."""
        rounded = {name: round(means[name], 4) for name in self._SHOWN}
        self.points.append(cost | rounded)

    def _on_training_start(self) -> None:
        self._started = time.process_time()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._cost_before_rollout = self.cost()
        # Of the update before this rollout; a training that goes on has it from the state.
        self._kl = self.model.latest_metrics.get("kl_to_reference", self._kl)

    def _on_rollout_end(self) -> None:
        logged = self.logger.name_to_value
        means = {}
        for name in WORLD.evaluation_rewards:
            if f"rollout/{name}" in logged:
                means[name.removeprefix("shapes-")] = float(logged[f"rollout/{name}"])
        if means:
            buffer = self.model.rollout_buffer
            means["aligned"] = float(logged["rollout/aligned_share"])
            means["reward"] = buffer.final_rewards[buffer.valid].mean().item()
            # The images are of the model before this rollout's update.
            self.add(self._cost_before_rollout | ({} if self._kl is None else {"kl": round(self._kl, 4)}), means)
        else:  # within a supervised fit
            self.add(self.cost() | {"drawn_for_it": True}, self._evaluate())

    def _evaluate(self) -> dict[str, Any]:
        """Returns the scores of the model as it is, at no cost."""
        process = self.model.process
        started, evaluations_before = time.process_time(), process.num_function_evaluations
        prompts = cycle_prompts(self._env.prompts.train, _CURVE_IMAGES)
        scores = summarize(evaluate(self.model.policy, self._env, prompts, 500_000_000 + 1000 * self._seed))
        self._evaluation_seconds += time.process_time() - started
        process.num_function_evaluations = evaluations_before
        return scores
