"""One training run in the embedded world, as the comparisons of this folder make hundreds of.

A run is described by a dict that is plain JSON, and so is what comes out of it. Runs of a sweep are lines of a file,
appended as they finish: an interrupted sweep goes on where it stopped, and runs whose description is there are not made
again.
"""

from __future__ import annotations

import json
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

from agents.config import ALGORITHMS, AT_A_TIME
from agents.evaluation import Evaluation, evaluate, spread
from agents.on_policy import DenoisingAlgorithm
from dpok_gym.prompts import load_prompts, unseen_prompts
from dpok_gym.vector_env import DenoisingVectorEnv

#: Rejection sampling: best of n pictures of the pre-trained model, without training.
REJECTION = "rejection"

#: What the judge says of a picture; scored, never trained on.
JUDGE = ("shapes-alignment", "shapes-quality")

#: Pictures of the evaluations within a run of a supervised algorithm, whose curve rollouts do not tell.
_FEW = 64


def run(description: dict[str, Any], pictures: Path | None = None) -> dict[str, Any]:
    """Trains and evaluates.

    Args:
        description: ``algorithm`` (a name of ``dpok train``, or "rejection"), ``settings`` of it, ``prompts``,
            ``reward`` ({name: weight}), ``pictures`` (the budget), ``n_envs``, ``num_inference_steps``,
            ``eval_pictures``, ``held_out`` (whether to score on unseen prompts too), ``seed``.
        pictures: file for a row of pictures of the trained model.

    Returns:
        The description, and ``curve`` (a list of points), ``scores`` (by set of prompts), ``before`` (the pre-trained
        model's), ``network_calls`` per picture, ``seconds`` of training.
    """
    prompts = load_prompts(description["prompts"])
    settings = dict(description["settings"])
    n_envs = settings.pop("n_envs", description["n_envs"])
    kwargs: dict[str, Any] = {
        "prompts": prompts,
        "reward": dict.fromkeys(JUDGE, 0.0) | description["reward"],
        "num_inference_steps": description["num_inference_steps"],
        "decode_batch_size": 16,
        "device": "cpu",
    }
    env = DenoisingVectorEnv(n_envs, **kwargs)
    best_of = settings.pop("n") if description["algorithm"] == REJECTION else 1
    algorithm: Callable[..., DenoisingAlgorithm] = ALGORITHMS.get(description["algorithm"], ALGORITHMS["dpok"])
    agent = algorithm("DenoisingPolicy", env, seed=description["seed"], device="cpu", **settings)
    judge = DenoisingVectorEnv(AT_A_TIME, **kwargs)
    curve = Curve(judge, description["seed"])
    if description["algorithm"] != REJECTION:
        agent.learn(description["pictures"] * len(env.schedule), curve)
    sets = {"training": prompts.train} | ({"held_out": unseen_prompts(prompts)} if description["held_out"] else {})
    seed = 1_000_000 * (description["seed"] + 1)
    scores = {}
    for name, texts in sets.items():
        chosen = spread(texts, description["eval_pictures"])
        found = evaluate(agent.policy, judge, chosen, seed, best_of=best_of)
        scores[name] = summary(found)
        if pictures is not None and name == "training":
            pictures.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate(found.pictures[:8], axis=1)).save(pictures)
    return description | {
        "scores": scores,
        "curve": curve.points,
        "network_calls_to_draw": best_of * len(env.schedule),
        "seconds": round(curve.seconds, 1),
    }


def summary(found: Evaluation) -> dict[str, float]:
    """Means over the pictures: aligned (share), alignment, quality, reward, kl (nats), and diversity if any."""
    components = {name.removeprefix("shapes-"): found.mean(name) for name in JUDGE}
    means = {"aligned": found.aligned_share, **components, "reward": found.reward.mean(), "kl": found.kl.mean()}
    means["diversity"] = diversity(found.pictures, found.prompts)
    return {name: float(value) for name, value in means.items() if value is not None}


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
    """Notes how a run gets on: after each rollout, and at times within a supervised fit by pictures of its own.

    Args:
        judge: draws these; neither their time nor their network calls count.
        seed: of the run.
    """

    def __init__(self, judge: DenoisingVectorEnv, seed: int) -> None:
        super().__init__()
        self._judge, self._seed, self._fits = judge, seed, 0
        self._started, self._apart = time.perf_counter(), 0.0
        self.points: list[dict[str, float]] = []

    @property
    def seconds(self) -> float:
        """Of the run so far, without these evaluations."""
        return time.perf_counter() - self._started - self._apart

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        logged = self.logger.name_to_value
        names = ("alignment", "quality")
        means = {name: float(logged[key]) for name in names if (key := f"rollout/shapes-{name}") in logged}
        if means:
            means["reward"] = float(np.mean([episode["r"] for episode in self._latest()]))
        else:
            self._fits += 1
            if self._fits % 5:
                return
            means = self._evaluate()
        policy: Any = self.model.policy
        pictures = self.model.num_timesteps // len(policy.schedule)
        at = {"pictures": pictures, "network_calls": policy.network_calls, "seconds": round(self.seconds, 1)}
        self.points.append(at | {name: round(value, 4) for name, value in means.items()})

    def _latest(self) -> list[dict[str, float]]:
        episodes = self.model.ep_info_buffer
        assert episodes is not None
        return list(episodes)[-self.training_env.num_envs :]

    def _evaluate(self) -> dict[str, float]:
        policy: Any = self.model.policy
        started, calls = time.perf_counter(), policy.network_calls
        prompts = spread(self._judge.prompts.train, _FEW)
        found = summary(evaluate(policy, self._judge, prompts, 500_000_000 + self._seed))
        self._apart += time.perf_counter() - started
        policy.network_calls = calls
        return {name: found[name] for name in ("alignment", "quality", "reward")}


def sweep(descriptions: Sequence[dict[str, Any]], file: Path, processes: int) -> list[dict[str, Any]]:
    """Makes the runs that are missing in a file of JSON lines, and returns all that were asked for.

    Args:
        descriptions: of the runs.
        file: to read and append to; rows of pictures of the runs with the lowest seed go into a folder beside it.
        processes: runs side by side, each with one thread.
    """
    done = {_key(record): record for record in read_runs(file)}
    missing = [description for description in descriptions if _key(description) not in done]
    if missing:
        file.parent.mkdir(parents=True, exist_ok=True)
        first = min(description["seed"] for description in descriptions)
        context = multiprocessing.get_context("spawn")
        # A fresh process for each run: the LoRAs of earlier ones would stay in the shared network.
        one_thread: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
        with ProcessPoolExecutor(processes, context, max_tasks_per_child=1, **one_thread) as pool:
            futures = []
            for description in missing:
                names = description["task"], description["label"]
                row = file.parent / "pictures" / f"{'-'.join(names)}.png" if description["seed"] == first else None
                futures.append(pool.submit(run, description, row))
            try:
                for future in tqdm(as_completed(futures), total=len(futures), unit=" runs"):
                    record = future.result()
                    with open(file, "a", encoding="utf-8") as lines:
                        lines.write(json.dumps(record) + "\n")
                    done[_key(record)] = record
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [done[_key(description)] for description in descriptions]


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The runs in a file, none if there is no such file; a last line that was cut off is left out.

    Raises:
        ValueError: if another line is no JSON.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    lines = text.split("\n")
    if lines[-1]:
        file.write_text(text[: len(text) - len(lines[-1])], encoding="utf-8")
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} of {file} is no JSON: {error}; remove it to make that run again"
            ) from error
    return found


def default_processes() -> int:
    """As many runs side by side as there are cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_RESULTS = ("scores", "curve", "network_calls_to_draw", "seconds")


def _key(record: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in record.items() if name not in _RESULTS}, sort_keys=True)
