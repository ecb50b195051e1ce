"""One training run in the embedded world, as the comparisons of this folder make hundreds of.

A run is described by a dict that is plain JSON, and so is what comes out of it. Runs of a sweep are lines of a file,
appended as they finish: an interrupted sweep goes on where it stopped, and runs whose description is there are not made
again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.distance import pdist
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from agents.cli.config import ALGORITHMS, AT_A_TIME, SHAPES_REWARDS
from agents.common.evaluation import Evaluation, evaluate, spread
from agents.common.algorithm import DenoisingAlgorithm
from dpok_gym.prompts import load_prompts, unseen_prompts
from dpok_gym.vector_env import DenoisingVectorEnv

#: Rejection sampling: best of n pictures of the pre-trained model, without training.
REJECTION = "rejection"

#: Pictures of the evaluations within a run of a supervised algorithm, whose curve rollouts do not tell.
_FEW = 64

#: Pictures of a row in the grids.
_ROW = 8


def run(description: dict[str, Any], pictures: Path | None = None) -> dict[str, Any]:
    """Trains and evaluates.

    Args:
        description: ``algorithm`` (a name of ``dpok train``, or "rejection"), ``settings`` of it, ``prompts``,
            ``reward`` ({name: weight}), ``pictures`` (the budget), ``n_envs``, ``num_inference_steps``,
            ``eval_pictures``, ``held_out`` (whether to score on unseen prompts too), ``seed``.
        pictures: file for a row of pictures of the trained model.

    Returns:
        The description, and ``scores`` (by set of prompts, see :func:`summary`), ``curve`` (a list of points, see
        :class:`Curve`), ``network_calls`` and ``seconds`` of the training, ``network_calls_to_draw`` a picture.
    """
    prompts = load_prompts(description["prompts"])
    settings = dict(description["settings"])
    n_envs = settings.pop("n_envs", description["n_envs"])
    kwargs: dict[str, Any] = {
        "prompts": prompts,
        "reward": dict.fromkeys(SHAPES_REWARDS, 0.0) | description["reward"],
        "num_inference_steps": description["num_inference_steps"],
        "decode_batch_size": 16,
        "device": "cpu",
    }
    env = DenoisingVectorEnv(n_envs, **kwargs)
    trained = description["algorithm"] != REJECTION
    best_of = 1 if trained else settings.pop("n")
    algorithm: Callable[..., DenoisingAlgorithm] = ALGORITHMS.get(description["algorithm"], ALGORITHMS["dpok"])
    agent = algorithm("DenoisingPolicy", env, seed=description["seed"], device="cpu", **settings)
    judge = DenoisingVectorEnv(AT_A_TIME, **kwargs)
    curve = Curve(judge, description["seed"])
    if trained:
        agent.learn(description["pictures"] * len(env.schedule), curve)
    cost = curve.cost()
    sets = {"training": prompts.train} | ({"held_out": unseen_prompts(prompts)} if description["held_out"] else {})
    seed = 1_000_000 * (description["seed"] + 1)
    scores = {}
    for name, texts in sets.items():
        chosen = spread(texts, description["eval_pictures"])
        found = evaluate(agent.policy, judge, chosen, seed, reference=not trained, best_of=best_of)
        scores[name] = summary(found)
        if not trained:  # the choice's own KL, or rather a bound of it: see evaluate()
            scores[name]["kl"] = math.log(best_of) - (best_of - 1) / best_of
        if pictures is not None and name == "training":
            pictures.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate(found.pictures[_row(found.prompts)], axis=1)).save(pictures)
    if trained:
        curve.add(cost, scores["training"])
    return description | {
        "scores": scores,
        "curve": curve.points,
        "network_calls": cost["network_calls"],
        "network_calls_to_draw": best_of * len(env.schedule),
        "seconds": cost["seconds"],
    }


def summary(found: Evaluation) -> dict[str, Any]:
    """Means over the pictures.

    Returns:
        ``aligned`` (share), ``alignment``, ``quality``, ``reward``, ``kl`` (nats), ``step_kl`` (nats of each denoising
        step), and ``diversity`` if there are two pictures of a prompt.
    """
    components = {name.removeprefix("shapes-"): found.mean(name) for name in SHAPES_REWARDS}
    means = {"aligned": found.aligned_share, **components, "reward": found.mean_reward, "kl": found.kl.mean()}
    means["diversity"] = diversity(found.pictures, found.prompts)
    by_step = [round(float(value), 4) for value in found.step_kl.mean(axis=0)]
    return {name: float(value) for name, value in means.items() if value is not None} | {"step_kl": by_step}


def _row(prompts: Sequence[str]) -> list[int]:
    """Which pictures to show: of different prompts, if there are as many."""
    first = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)]
    return first[:: len(first) // _ROW][:_ROW] if len(first) >= _ROW else list(range(min(_ROW, len(prompts))))


def diversity(pictures: NDArray[np.uint8], prompts: Sequence[str]) -> float | None:
    """Mean distance of two pictures of the same prompt: root mean square over pixels in [0, 1].

    Args:
        pictures: (N, H, W, 3).
        prompts: N; those with one picture only do not count, and if there are no others, the answer is None.
    """
    names = np.array(prompts)
    means = []
    for name in dict.fromkeys(prompts):
        flat = pictures[names == name].reshape((names == name).sum(), -1) / 255
        if len(flat) > 1:
            means.append(pdist(flat).mean() / np.sqrt(flat.shape[1]))
    return float(np.mean(means)) if means else None


class Curve(BaseCallback):
    """Notes how a run gets on: what each rollout's pictures are worth, and in a supervised fit some of its own.

    A point has the means of ``alignment``, ``quality`` and ``reward``, and what the model that drew the pictures had
    cost until then: ``pictures`` and ``network_calls`` in all, and ``seconds``.

    Args:
        judge: draws the pictures in supervised fits; neither their time nor their network calls count.
        seed: of the run.
    """

    _SHOWN = ("alignment", "quality", "reward")

    def __init__(self, judge: DenoisingVectorEnv, seed: int) -> None:
        super().__init__()
        self._judge, self._seed = judge, seed
        self._started, self._apart = math.nan, 0.0
        self._before: dict[str, float] = {}
        self.points: list[dict[str, float]] = []

    def cost(self) -> dict[str, float]:
        """Of the run so far, without these evaluations; nothing if there was no training."""
        if math.isnan(self._started):
            return {"pictures": 0, "network_calls": 0, "seconds": 0.0}
        policy: Any = self.model.policy
        return {
            "pictures": self.model.num_timesteps // len(policy.schedule),
            "network_calls": policy.network_calls,
            "seconds": round(time.perf_counter() - self._started - self._apart, 1),
        }

    def add(self, cost: dict[str, float], means: dict[str, Any]) -> None:
        """Adds a point."""
        self.points.append(cost | {name: round(means[name], 4) for name in self._SHOWN})

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._before = self.cost()

    def _on_rollout_end(self) -> None:
        logged = self.logger.name_to_value
        means = {name: float(logged[key]) for name in self._SHOWN if (key := f"rollout/shapes-{name}") in logged}
        if means:
            self.add(self._before, means | {"reward": float(np.mean([episode["r"] for episode in self._latest()]))})
        else:  # within a supervised fit
            self.add(self.cost(), self._evaluate())

    def _latest(self) -> list[dict[str, float]]:
        episodes = self.model.ep_info_buffer
        assert episodes is not None
        return list(episodes)[-self.training_env.num_envs :]

    def _evaluate(self) -> dict[str, Any]:
        policy: Any = self.model.policy
        started, calls = time.perf_counter(), policy.network_calls
        prompts = spread(self._judge.prompts.train, _FEW)
        found = summary(evaluate(policy, self._judge, prompts, 500_000_000 + 1000 * self._seed))
        self._apart += time.perf_counter() - started
        policy.network_calls = calls
        return found


def sweep_options(documentation: str | None, settings: Path) -> argparse.ArgumentParser:
    """The options of a command that makes a sweep.

    Args:
        documentation: of the command.
        settings: the file that it has its settings from, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=Path, default=settings)
    parser.add_argument("--out", type=Path, help="folder for runs, table and figures")
    parser.add_argument("--report", action="store_true", help="make no runs: table and figures of those there are")
    parser.add_argument("--processes", type=int, default=default_processes(), help="runs side by side")
    return parser


def sweep_and_report(
    descriptions: Sequence[dict[str, Any]],
    file: Path,
    options: argparse.Namespace,
    report: Callable[[list[dict[str, Any]]], None],
    pictures: bool = True,
) -> None:
    """Makes the runs that are missing, and reports those there are, even if interrupted.

    Args:
        descriptions, file, pictures: see :func:`sweep`.
        options: see :func:`sweep_options`.
        report: what to do with the runs; not called if there are none.
    """
    try:
        if not options.report:
            sweep(descriptions, file, options.processes, pictures)
    finally:
        made = [record for record in known(descriptions, file) if record]
        if made:
            report(made)
        print(f"{len(made)} of {len(descriptions)} runs are in {file}")


def sweep(descriptions: Sequence[dict[str, Any]], file: Path, processes: int, pictures: bool = True) -> None:
    """Makes the runs that are missing in a file of JSON lines.

    Args:
        descriptions: of the runs.
        file: to read and append to.
        processes: runs side by side, each with one thread.
        pictures: whether rows of pictures of the runs with the lowest seed go into a folder beside the file.

    Raises:
        RuntimeError: if runs failed, once all others are made.
    """
    missing = [
        description for description, record in zip(descriptions, known(descriptions, file), strict=True) if not record
    ]
    if not missing:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_off_line(file)
    first = min(description["seed"] for description in descriptions)
    context = multiprocessing.get_context("spawn")
    failures = []
    # A fresh process for each run, so that it is the same whatever was made before it.
    one_thread: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1, **one_thread) as pool:
        futures = {}
        for description in missing:
            name = f"{description['task']}, {description['label']}, seed {description['seed']}"
            row = file.parent / "pictures" / f"{description['task']}-{description['label']}.png"
            shown = row if pictures and description["seed"] == first else None
            futures[pool.submit(run, description, shown)] = name
        try:
            for future in tqdm(as_completed(futures), total=len(futures), unit=" runs"):
                error = future.exception()
                if error is not None:
                    failures.append(f"{futures[future]}: {error}")
                    tqdm.write(f"failed: {failures[-1]}")
                    continue
                with open(file, "a", encoding="utf-8") as lines:
                    lines.write(json.dumps(future.result()) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise RuntimeError("\n".join(["runs failed; the others are kept:", *failures]))


def known(descriptions: Sequence[dict[str, Any]], file: Path) -> list[dict[str, Any] | None]:
    """The run in a file for each description; None where there is none."""
    done = {_key(record): record for record in read_runs(file)}
    return [done.get(_key(description)) for description in descriptions]


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The runs in a file, none if there is no such file; a last line that was cut off is left out.

    Raises:
        ValueError: if another line is no JSON.
    """
    found = []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} of {file} is no JSON: {error}; remove it to make that run again"
            ) from error
    return found


def _drop_cut_off_line(file: Path) -> None:
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def default_processes() -> int:
    """As many runs side by side as there are cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_RESULTS = ("scores", "curve", "network_calls", "network_calls_to_draw", "seconds")


def _key(record: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in record.items() if name not in _RESULTS}, sort_keys=True)
