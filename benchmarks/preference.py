"""How good ``shapes-preference`` is: ``python -m benchmarks.preference``.

Draws pictures that it was not fitted to, and prints three tables: how often it agrees with fresh choices of the
simulated person, and with what the person meant before it erred; how its probabilities compare with what was chosen;
and how well it tells fully aligned pictures of the pre-trained model from others for the same prompt (the area under
the ROC curve: the share of such pairs that it orders rightly), for each category of prompts and for single prompts.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import mannwhitneyu
from torch import Tensor

from agents.common.evaluation import Evaluation, draw, spread
from agents.cli.tables import calibration_table
from dpok_gym.prompts import SHAPES_CATEGORIES, load_prompts
from dpok_gym.rewards.preference.reward import PreferenceReward
from dpok_gym.rewards.preference.data import load_comparisons
from dpok_gym.rewards.preference.fit import log_odds, measure
from dpok_gym.shapes import PREFERENCE
from dpok_gym.shapes.captions import parse_prompt
from dpok_gym.shapes.choices import compare_pictures, draw_pictures
from dpok_gym.vector_env import DenoisingVectorEnv

PROMPTS = (
    "a red star",
    "three green squares",
    "a purple circle and a yellow square",
    "a red circle above a blue square",
)

AT_MOST = 16  # prompts of a category


def fresh_choices(reward: PreferenceReward, folder: Path, batches: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """The log-odds (N,) that the reward gives to the choices made, and the lines of their file."""
    seed = 1  # the reward was fitted to choices with seed 0
    draw_pictures(folder, seed, batches)
    path = compare_pictures(folder, seed, batches)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return log_odds(reward, load_comparisons(path, reward.network.config.picture_size)), rows


def agreement_table(odds: Tensor, rows: list[dict[str, Any]]) -> Table:
    """By category, and by whether the two pictures are about the same scene."""
    erred = torch.tensor([(row["utilities"][1] > row["utilities"][0]) != row["preferred"] for row in rows])
    meant = torch.where(erred, -odds, odds) > 0
    groups: dict[str, list[int]] = defaultdict(list)
    for k, row in enumerate(rows):
        first, second = (name.rpartition("-")[0] for name in row["pictures"])
        groups[parse_prompt(row["prompt"]).category].append(k)
        groups["about one scene (hard)" if first == second else "about two scenes (easy)"].append(k)
        groups["all"].append(k)
    table = Table("choices", title="agreement with fresh choices", title_justify="left")
    for heading in ("number", "as chosen", "as meant"):
        table.add_column(heading, justify="right")
    for name in (*SHAPES_CATEGORIES, "about one scene (hard)", "about two scenes (easy)", "all"):
        chosen = torch.tensor(groups[name], dtype=torch.long)
        shares = ((odds[chosen] > 0).float().mean(), meant[chosen].float().mean())
        table.add_row(name, str(len(chosen)), *(f"{share:.1%}" for share in shares))
    return table


def area_under_curve(found: Evaluation, scores: NDArray[np.float64]) -> float:
    """Share of the pairs of an aligned picture and one that is not, for the same prompt, that it orders rightly."""
    assert found.aligned is not None  # the judge was asked
    above = pairs = 0.0
    for prompt in set(found.prompts):
        of_prompt = np.array(found.prompts) == prompt
        aligned, other = scores[of_prompt & found.aligned], scores[of_prompt & ~found.aligned]
        if len(aligned) and len(other):
            above += mannwhitneyu(aligned, other).statistic
            pairs += len(aligned) * len(other)
    return above / pairs if pairs else float("nan")


def alignment_table(reward: PreferenceReward, n_pictures: int, seed: int) -> Table:
    """How well the score tells aligned pictures of the pre-trained model from others."""

    def preference(images: Tensor, prompts: list[str]) -> Tensor:
        return reward(images, prompts)

    env = DenoisingVectorEnv(
        min(n_pictures, 64),
        reward={preference: 1.0, "shapes-alignment": 0.0},
        num_inference_steps=10,
        decode_batch_size=16,
    )
    table = Table("prompts", title=f"aligned or not, {n_pictures} pictures each", title_justify="left")
    for heading in ("aligned", "score if so", "if not", "area under curve"):
        table.add_column(heading, justify="right")
    for spec in (*SHAPES_CATEGORIES, *PROMPTS):
        few = spread(load_prompts(spec).train, AT_MOST)  # so that there are several pictures for each
        found = draw(env.pretrained_transition, env, spread(few, n_pictures), seed)
        scores, aligned = found.rewards["preference"], found.aligned
        assert aligned is not None
        means = (f"{scores[chosen].mean():.2f}" for chosen in (aligned, ~aligned))
        table.add_row(spec, f"{aligned.mean():.1%}", *means, f"{area_under_curve(found, scores):.3f}")
    return table


def main() -> None:
    """Draws, judges and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reward", type=Path, default=PREFERENCE, help="folder of the reward")
    parser.add_argument("--work", type=Path, default=Path("runs/preference"), help="folder for pictures and choices")
    parser.add_argument("--batches", type=int, default=10, help="of 200 pictures and choices each")
    parser.add_argument("--pictures", type=int, default=256, help="for each category and prompt")
    parser.add_argument("--seed", type=int, default=5_000_000, help="of those pictures")
    options = parser.parse_args()
    reward = PreferenceReward.load(options.reward)
    odds, rows = fresh_choices(reward, options.work, options.batches)
    console = Console()
    console.print(agreement_table(odds, rows))
    console.print(calibration_table(measure(odds)))
    console.print(alignment_table(reward, options.pictures, options.seed))


if __name__ == "__main__":
    main()
