"""The quality of the reward ``shapes-preference``: ``python -m benchmarks.preference``.

It draws images that the reward was not fitted to, and prints three tables:

- the agreement with fresh choices of the simulated person, and with what the person meant before it erred;
- the calibration: the reward's probabilities beside the choices;
- how well the reward tells fully aligned images of the pre-trained model from others for the same prompt, for each
  category of prompts and for single prompts. The area under the ROC curve is the share of such pairs that it orders
  rightly.

Letters used for shapes: N choices or images.
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

from agents.cli.tables import calibration_table
from agents.common.evaluation import Evaluation, cycle_prompts, sample_images
from dpok_gym.prompts import load_prompts
from dpok_gym.rewards.preference.data import load_comparisons
from dpok_gym.rewards.preference.fit import log_odds, measure
from dpok_gym.rewards.preference.reward import PreferenceReward
from dpok_gym.shapes import PREFERENCE
from dpok_gym.shapes.captions import CATEGORIES, parse_prompt
from dpok_gym.shapes.choices import compare_images, draw_images
from dpok_gym.vector_env import DenoisingVectorEnv

#: The single prompts.
PROMPTS = (
    "a red star",
    "three green squares",
    "a purple circle and a yellow square",
    "a red circle above a blue square",
)

#: Most prompts of a category, so that there are several images of each.
MAX_PROMPTS = 16

#: Names of the groups of choices that are no categories.
_HARD, _EASY, _ALL = "about one scene (hard)", "about two scenes (easy)", "all"


def fresh_choices(reward: PreferenceReward, folder: Path, batches: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """Draws images, and lets the simulated person choose.

    Args:
        reward: the reward to measure.
        folder: for images and choices.
        batches: number of batches, of 200 images and choices each.

    Returns:
        The log-odds (N,) that the reward gives to the choices, and the lines of their file.
    """
    seed = 1  # the reward was fitted to choices with seed 0
    draw_images(folder, seed, batches)
    path = compare_images(folder, seed, batches)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return log_odds(reward, load_comparisons(path, reward.network.config.image_size)), rows


def agreement_table(odds: Tensor, rows: list[dict[str, Any]]) -> Table:
    """Returns a table of the agreement, by category, and by whether the two images are about the same scene.

    Args:
        odds: (N,) log-odds of the choices.
        rows: the lines of the N choices.
    """
    erred = torch.tensor([(row["utilities"][1] > row["utilities"][0]) != row["preferred"] for row in rows])
    agrees, agrees_with_meant = odds > 0, torch.where(erred, -odds, odds) > 0
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        # The name of an image is that of its scene, and a number.
        first, second = (name.rpartition("-")[0] for name in row["images"])
        groups[parse_prompt(row["prompt"]).category].append(index)
        groups[_HARD if first == second else _EASY].append(index)
        groups[_ALL].append(index)
    table = Table("choices", title="agreement with fresh choices", title_justify="left")
    for heading in ("number", "as chosen", "as meant"):
        table.add_column(heading, justify="right")
    for name in (*CATEGORIES, _HARD, _EASY, _ALL):
        of_group = torch.tensor(groups[name], dtype=torch.long)
        shares = [agreement[of_group].float().mean() for agreement in (agrees, agrees_with_meant)]
        table.add_row(name, str(len(of_group)), *(f"{share:.1%}" for share in shares))
    return table


def area_under_curve(evaluation: Evaluation, scores: NDArray[np.float64]) -> float:
    """Computes the share of pairs, of an aligned image and another one for the same prompt, that are ordered rightly.

    Args:
        evaluation: N images with a judge's verdict.
        scores: (N,) the reward's scores of the images; ties count half.

    Returns:
        The share over the pairs of all prompts; NaN if there are no pairs.
    """
    assert evaluation.aligned is not None  # the judge was asked
    n_right = n_pairs = 0.0
    prompts = np.array(evaluation.prompts)
    for prompt in set(evaluation.prompts):
        aligned = scores[(prompts == prompt) & evaluation.aligned]
        others = scores[(prompts == prompt) & ~evaluation.aligned]
        if len(aligned) and len(others):
            n_right += mannwhitneyu(aligned, others).statistic
            n_pairs += len(aligned) * len(others)
    return n_right / n_pairs if n_pairs else float("nan")


def alignment_table(reward: PreferenceReward, n_images: int, seed: int) -> Table:
    """Returns a table of how well the score tells aligned images of the pre-trained model from others.

    Args:
        reward: the reward to measure.
        n_images: images for each category and single prompt.
        seed: of the first image.
    """

    def preference(images: Tensor, prompts: list[str]) -> Tensor:
        return reward(images, prompts)

    env = DenoisingVectorEnv(
        min(n_images, 64),
        reward={preference: 1.0, "shapes-alignment": 0.0},
        num_inference_steps=10,
        decode_batch_size=16,
    )
    table = Table("prompts", title=f"aligned or not, {n_images} images each", title_justify="left")
    for heading in ("aligned", "score if so", "if not", "area under curve"):
        table.add_column(heading, justify="right")
    for prompts in (*CATEGORIES, *PROMPTS):
        few = cycle_prompts(load_prompts(prompts).train, MAX_PROMPTS)
        evaluation = sample_images(env.process, env, cycle_prompts(few, n_images), seed)
        scores, aligned = evaluation.rewards["preference"], evaluation.aligned
        assert aligned is not None
        means = [f"{scores[rows].mean():.2f}" for rows in (aligned, ~aligned)]
        table.add_row(prompts, f"{aligned.mean():.1%}", *means, f"{area_under_curve(evaluation, scores):.3f}")
    return table


def main() -> None:
    """Draws, judges and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", type=Path, default=PREFERENCE, help="folder of the reward")
    parser.add_argument("--work", type=Path, default=Path("runs/preference"), help="folder for images and choices")
    parser.add_argument("--batches", type=int, default=10, help="of 200 images and choices each")
    parser.add_argument("--images", type=int, default=256, help="for each category and single prompt")
    parser.add_argument("--seed", type=int, default=5_000_000, help="of those images")
    options = parser.parse_args()
    reward = PreferenceReward.load(options.reward)
    odds, rows = fresh_choices(reward, options.work, options.batches)
    console = Console()
    console.print(agreement_table(odds, rows))
    console.print(calibration_table(measure(odds, torch.ones(len(odds)))))
    console.print(alignment_table(reward, options.images, options.seed))


if __name__ == "__main__":
    main()
