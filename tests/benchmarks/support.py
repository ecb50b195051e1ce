"""Descriptions and records of runs that several test modules share."""

from __future__ import annotations

from typing import Any

import numpy as np
import yaml

from benchmarks.runs import HERE

RESULTS = HERE / "results"
KL_SETTINGS = yaml.safe_load((HERE / "kl_analysis.yaml").read_text(encoding="utf-8"))

#: A run of a few seconds, but for "algorithm" and "settings".
TINY: dict[str, Any] = {
    "task": "count",
    "label": "ours",
    "prompts": "three green squares",
    "reward": {"jpeg-compressibility": 1.0},
    "images": 4,
    "n_envs": 2,
    "num_inference_steps": 1,
    "eval_images": 3,
    "held_out": True,
    "seed": 0,
}

PROMPTS = ("training", "held_out")


def fake_records(descriptions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns runs in which no two figures are the same."""
    rng = np.random.default_rng(0)
    names = ("aligned", "alignment", "quality", "reward", "kl", "late_drift", "diversity")
    axes = ("images", "num_function_evaluations", "seconds", "alignment", "quality", "reward", "kl")
    records = []
    for description in descriptions:
        scores = {}
        for prompts in PROMPTS:
            scores[prompts] = {"step_kl": [1.0, 3.0]} | {name: rng.random() for name in names}
        curve = [dict.fromkeys(axes, float(k)) for k in range(3)]
        results = {"scores": scores, "curve": curve, "seconds": 2.0}
        results |= {"num_function_evaluations": 100, "num_function_evaluations_to_draw": 10}
        records.append(description | results)
    return records


def mean_score(records: list[dict[str, Any]], prompts: str, name: str) -> float:
    return float(np.mean([record["scores"][prompts][name] for record in records]))


def values(line: str) -> list[str]:
    """Returns the cells of a table's line without its label, without intervals."""
    return [cell.strip().partition(" [")[0] for cell in line.strip("| \n").split("|")[1:]]


def points(*rewards: float, step: float = 100) -> list[dict[str, float]]:
    """Returns a curve whose points cost as much as each other; the last one is the evaluation."""
    curve = []
    for n, reward in enumerate(rewards):
        costs = {"images": n * step, "num_function_evaluations": n * step, "num_gradient_evaluations": n * step}
        curve.append(costs | {"seconds": float(n), "reward": reward, "alignment": reward / 2, "quality": 1 - reward})
    return curve
