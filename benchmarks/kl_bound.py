"""The bound of DPOK's Lemma 4.2, measured along training: ``python -m benchmarks.kl_bound``.

The lemma bounds the KL between the distributions of finished images, which is unknown for real models. The bound is the
expected KL of the transitions, summed over the denoising steps: this is the KL that DPOK penalises. In one dimension
both can be integrated on a grid. The data have modes at -1 and 1, r = 0.5 x, T = 20; the KL is once in the reward and
once in the loss. The command prints a table and whether the training has converged, draws ``kl_bound.png`` and
writes ``kl_bound.json``. It takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback

from agents.common.algorithm import DenoisingAlgorithm
from benchmarks.mixture_policies import half_reward, on_grid, show, train_exactly
from dpok_gym.mixture.exact import GridPolicy, best_policy

RESULTS = Path(__file__).parent / "results"
PROMPT, N_STEPS = "two modes", 20

#: A training has converged if its bound is as near to the exact policy's.
CONVERGED = 0.05

#: Names of the two sides, in the table and in the file.
BOUND, TRUE_KL = "bound", "KL of x_0"


class MeasureKL(BaseCallback):
    """Integrates both sides of the bound for the policy of every fourth iteration.

    Args:
        every: iterations between two measurements.

    Attributes:
        rows: images drawn so far, the sum of the step KLs and the KL of the finished images, in nats.
    """

    model: DenoisingAlgorithm

    def __init__(self, every: int = 4) -> None:
        super().__init__()
        self._every = every
        self._reference: GridPolicy | None = None
        self.rows: list[dict[str, float]] = []

    def optimum(self, beta: float, charge_later_kl: bool) -> dict[str, float]:
        """Computes both sides for the exact policy that training should come to.

        Args:
            beta: kl_coef.
            charge_later_kl: True for the KL in the reward; see :func:`dpok_gym.mixture.exact.best_policy`.
        """
        assert self._reference is not None
        policy = best_policy(self._reference, half_reward, beta, charge_later_kl)
        return _both_sides(policy, self._reference)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.model.iteration % self._every == 0:
            self.measure()

    def measure(self) -> None:
        """Adds a row for the policy as it is."""
        if self._reference is None:
            self._reference = on_grid(self.model.policy, PROMPT, reference=True)
        policy = on_grid(self.model.policy, PROMPT)
        self.rows.append({"images": self.model.images_drawn, **_both_sides(policy, self._reference)})


def _both_sides(policy: GridPolicy, reference: GridPolicy) -> dict[str, float]:
    return {BOUND: float(policy.step_kl(reference).sum()), TRUE_KL: policy.final_kl(reference)}


def draw_figure(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws both sides against the images drawn, with a panel for each place of the KL. The exact policy's are dotted.

    Args:
        results: ``training`` (rows), ``exact`` (both sides) and ``missing`` (share) of each place of the KL.
        path: file to write.
    """
    figure = Figure(figsize=(4 * len(results), 3.7), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    curves = ((BOUND, "#D55E00", "sum of the steps' KL"), (TRUE_KL, "#0072B2", "KL of the finished points"))
    for axes, (placement, measured) in zip(panels, results.items(), strict=True):
        rows = measured["training"]
        for name, colour, label in curves:
            points = np.array([(row["images"], row[name]) for row in rows])
            axes.plot(*points.T, color=colour, label=label)
            style: dict[str, Any] = {"color": colour, "linestyle": ":", "linewidth": 1.2}
            axes.axhline(measured["exact"][name], label=f"{label}, exact policy", **style)
        axes.set_title(f"KL in the {placement}", fontsize=10)
        axes.set(xlabel="images drawn", xlim=(0, None), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL to pre-trained, nats per image")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"“{PROMPT}”: the KL of the steps bounds that of the images (Lemma 4.2)", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Trains twice, measures, prints, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beta", type=float, default=0.25, help="kl_coef, per nat; less lets the model go further")
    parser.add_argument("--images", type=int, default=30_720, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kl_bound.png and kl_bound.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console = Console(width=120)
    reward = {"mixture-linear": 0.5}
    results: dict[str, dict[str, Any]] = {}
    for placement in ("reward", "loss"):
        measure = MeasureKL()
        settings = (options.beta, N_STEPS, options.seed, options.images, "mixture-1d")
        train_exactly(PROMPT, reward, *settings, measure, kl_placement=placement)
        measure.measure()
        exact = measure.optimum(options.beta, charge_later_kl=placement == "reward")
        missing = 1 - measure.rows[-1][BOUND] / exact[BOUND]
        results[placement] = {"training": measure.rows, "exact": exact, "missing": missing}
        verdict = "has converged" if abs(missing) < CONVERGED else "has not converged"
        print(f"exact: {exact}; the training {verdict}: {missing:.1%} of the bound are missing")
        every = max(1, len(measure.rows) // 8)
        show(f"KL in the {placement}, beta = {options.beta}", measure.rows[::every], console)
    draw_figure(results, options.out / "kl_bound.png")
    text = json.dumps({"beta": options.beta, **results}, indent=1) + "\n"
    (options.out / "kl_bound.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
