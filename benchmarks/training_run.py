"""One training run in the shapes world, with its scores: the sweeps of this folder make hundreds of them.

A run is described by a dict of plain JSON values, and so is its result.

Letters used for shapes: N images, H x W an image.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.distance import pdist
from stable_baselines3.common.callbacks import BaseCallback

from agents.algorithms.registry import load_algorithm
from agents.cli.environments import EVALUATION_BATCH_SIZE, evaluation_rewards
from agents.common.evaluation import Evaluation, cycle_prompts, evaluate
from agents.common.steering import UNSTEERED, BestOf
from dpok_gym.prompts import PromptSet, load_prompts
from dpok_gym.shapes.prompts import unseen_prompts
from dpok_gym.shapes.world import WORLD
from dpok_gym.vector_env import DenoisingVectorEnv

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm

#: The "algorithm" of runs without training: the best of n images of the pre-trained model.
REJECTION = "rejection"

#: Images of each evaluation within a supervised fit, which draws none by itself.
_CURVE_IMAGES = 64

#: Images in the row that shows a run.
_ROW_LENGTH = 8


def run(description: dict[str, Any], row_file: Path | None = None) -> dict[str, Any]:
    """Trains and evaluates.

    Args:
        description: ``algorithm`` (a registered name, or "rejection"), ``settings`` of it, ``prompts``, ``reward``
            ({name: weight}), ``images`` (the budget), ``n_envs``, ``num_inference_steps``, ``eval_images``,
            ``held_out`` (True to evaluate on unseen prompts too), ``seed``; and perhaps ``environment``, further
            arguments of the environment.
        row_file: file for a row of images of the trained model; None for no file.

    Returns:
        The description, and ``scores`` (by set of prompts, see :func:`summarize`), ``curve`` (a list of points, see
        :class:`Curve`; the last one is the final evaluation), ``num_function_evaluations`` and ``seconds`` of the
        training, and ``num_function_evaluations_to_draw`` one image.
    """
    prompts = load_prompts(description["prompts"])
    settings = dict(description["settings"])
    n_envs = settings.pop("n_envs", description["n_envs"])
    env, evaluation_env = _make_env(description, prompts, n_envs), _make_env(description, prompts)
    trains = description["algorithm"] != REJECTION
    # Without training, an untrained agent gives access to the pre-trained model; SFT takes steps without noise too.
    name = description["algorithm"] if trains else "sft"
    steering = UNSTEERED if trains else BestOf(settings.pop("n"))
    algorithm: Any = load_algorithm(name)
    agent: DenoisingAlgorithm = algorithm(env=env, seed=description["seed"], device="cpu", **settings)
    curve = Curve(evaluation_env, description["seed"])
    if trains:
        agent.learn(description["images"] * agent.process.num_inference_steps, curve)
    cost = curve.cost()
    scores = {}
    for name, texts in _prompts_to_evaluate(prompts, description["held_out"]).items():
        chosen = cycle_prompts(texts, description["eval_images"])
        # Far from the seeds that training and the curve use, and the same for all algorithms.
        seed = 1_000_000 * (description["seed"] + 1)
        evaluation = evaluate(agent.policy, evaluation_env, chosen, seed, reference=not trains, steering=steering)
        scores[name] = summarize(evaluation)
        if not trains:
            # The KL of the evaluation is that of the sampler, before the best image is chosen. This is the bound for
            # the chosen images, see agents.common.steering.BestOf.
            scores[name]["kl"] = math.log(steering.n_particles) - (steering.n_particles - 1) / steering.n_particles
        if row_file is not None and name == "training":
            _save_row(evaluation, row_file)
    if trains:
        curve.add(cost, scores["training"])
    return description | {
        "scores": scores,
        "curve": curve.points,
        "num_function_evaluations": cost["num_function_evaluations"],
        "num_function_evaluations_to_draw": steering.denoiser_calls(agent.process.num_inference_steps),
        "seconds": cost["seconds"],
    }


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


def _prompts_to_evaluate(prompts: PromptSet, held_out: bool) -> dict[str, Sequence[str]]:
    """Returns the sets of prompts that a run is evaluated on, by name."""
    sets: dict[str, Sequence[str]] = {"training": prompts.train}
    if held_out:
        sets["held_out"] = unseen_prompts(prompts)
    return sets


def _save_row(evaluation: Evaluation, path: Path) -> None:
    """Writes a few images side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = evaluation.images[choose_row(evaluation.prompts)]
    Image.fromarray(np.concatenate(chosen, axis=1)).save(path)


def prompts_of_row(description: dict[str, Any]) -> list[str]:
    """Returns the prompts of the images that show a run."""
    prompts = cycle_prompts(load_prompts(description["prompts"]).train, description["eval_images"])
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
        ``aligned`` (share), ``alignment``, ``quality``, ``reward``, ``kl`` (nats of the steps that explore),
        ``late_drift`` of the others, ``step_kl`` (nats of each step), and ``diversity`` if there are two images of a
        prompt.
    """
    means: dict[str, Any] = {"aligned": evaluation.aligned_share}
    for name in WORLD.evaluation_rewards:
        means[name.removeprefix("shapes-")] = evaluation.mean(name)
    means |= {"reward": evaluation.mean_reward, "kl": evaluation.kl.mean(), "late_drift": evaluation.late_drift}
    means["diversity"] = diversity(evaluation.images, evaluation.prompts)
    scores: dict[str, Any] = {name: float(value) for name, value in means.items() if value is not None}
    scores["step_kl"] = [round(float(value), 4) for value in evaluation.step_kl.mean(axis=0)]
    return scores


def diversity(images: NDArray[np.uint8], prompts: Sequence[str]) -> float | None:
    """Computes the mean distance of two images of the same prompt.

    The distance is the root mean square over pixels in [0, 1].

    Args:
        images: (N, H, W, 3).
        prompts: N; prompts with only one image do not count.

    Returns:
        The mean over prompts; None if no prompt has two images.
    """
    names = np.array(prompts)
    means = []
    for name in dict.fromkeys(prompts):
        of_prompt = images[names == name]
        if len(of_prompt) > 1:
            pixels = of_prompt.reshape(len(of_prompt), -1) / 255
            means.append(pdist(pixels).mean() / np.sqrt(pixels.shape[1]))
    return float(np.mean(means)) if means else None


class Curve(BaseCallback):
    """Collects the points of a learning curve.

    A point has the means of ``alignment``, ``quality`` and ``reward`` over some images, and the ``kl`` of the update
    before them if the algorithm has one. It also has the cost of the training until then: ``images``,
    ``num_function_evaluations`` and ``seconds``. The images are those of each rollout.
    A supervised fit has no rollouts, so images are drawn for the curve.

    Args:
        env: draws the images within fits; neither their time nor their function evaluations count.
        seed: of the run.

    Attributes:
        points: the points so far.
    """

    _SHOWN = ("alignment", "quality", "reward")

    model: DenoisingAlgorithm

    def __init__(self, env: DenoisingVectorEnv, seed: int) -> None:
        super().__init__()
        self._env, self._seed = env, seed
        self._started, self._evaluation_seconds = math.nan, 0.0
        self._cost_before_rollout: dict[str, float] = {}
        self.points: list[dict[str, float]] = []

    def cost(self) -> dict[str, float]:
        """Returns the cost of the run so far, without the evaluations; all 0 if there was no training."""
        if math.isnan(self._started):
            return {"images": 0, "num_function_evaluations": 0, "seconds": 0.0}
        seconds = time.perf_counter() - self._started - self._evaluation_seconds
        return {
            "images": self.model.images_drawn,
            "num_function_evaluations": self.model.process.num_function_evaluations,
            "seconds": round(seconds, 1),
        }

    def add(self, cost: dict[str, float], means: dict[str, Any]) -> None:
        """Adds a point."""
        rounded = {name: round(means[name], 4) for name in self._SHOWN}
        self.points.append(cost | rounded)

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._cost_before_rollout = self.cost()

    def _on_rollout_end(self) -> None:
        logged = self.logger.name_to_value
        means = {}
        for name in WORLD.evaluation_rewards:
            if f"rollout/{name}" in logged:
                means[name.removeprefix("shapes-")] = float(logged[f"rollout/{name}"])
        if means:
            buffer = self.model.rollout_buffer
            means["reward"] = buffer.final_rewards[buffer.valid].mean().item()
            kl = self.model.latest_metrics.get("kl_to_reference")
            # The images are of the model before this rollout's update.
            self.add(self._cost_before_rollout | ({} if kl is None else {"kl": round(kl, 4)}), means)
        else:  # within a supervised fit
            self.add(self.cost(), self._evaluate())

    def _evaluate(self) -> dict[str, Any]:
        """Returns the scores of the model as it is, at no cost."""
        process = self.model.process
        started, evaluations_before = time.perf_counter(), process.num_function_evaluations
        prompts = cycle_prompts(self._env.prompts.train, _CURVE_IMAGES)
        scores = summarize(evaluate(self.model.policy, self._env, prompts, 500_000_000 + 1000 * self._seed))
        self._evaluation_seconds += time.perf_counter() - started
        process.num_function_evaluations = evaluations_before
        return scores
