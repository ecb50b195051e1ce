"""The bound of DPOK's Lemma 4.2, measured along training: ``python -m benchmarks.kl_bound``.

The lemma bounds the KL of the finished pictures' distributions, which nobody knows, by the sum over the denoising steps
of the expected KL of the transitions, which DPOK charges for. In one dimension both can be integrated on a grid: data
with modes at -1 and 1, r = 0.5 x, T = 20, with the KL in the reward and in the loss. Prints a table, draws
``kl_bound.png`` and writes ``kl_bound.json``. Takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback

from agents.common.algorithm import DenoisingAlgorithm
from benchmarks.mixture import N_ENVS, RESULTS, half_reward, on_grid, show, train
from dpok_gym.mixture.exact import GridPolicy, best_policy

PROMPT, N_STEPS = "two modes", 20


class MeasureKL(BaseCallback):
    """Integrates both sides of the bound for the policy of every fourth rollout.

    Attributes:
        rows: pictures drawn so far, the sum of the step KLs and the KL of the finished pictures, in nats.
    """

    def __init__(self, every: int = 4) -> None:
        super().__init__()
        self._every, self._rollouts = every, 0
        self._pretrained: GridPolicy | None = None
        self.rows: list[dict[str, float]] = []

    def optimum(self, beta: float, charge_later_kl: bool) -> dict[str, float]:
        """Both sides for the exact policy that training should come to."""
        assert self._pretrained is not None
        policy = best_policy(self._pretrained, half_reward, beta, charge_later_kl)
        return {"bound": float(policy.step_kl(self._pretrained).sum()), "KL of x_0": policy.final_kl(self._pretrained)}

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._rollouts % self._every == 0:
            self.measure()
        self._rollouts += 1

    def measure(self) -> None:
        """Adds a row for the policy as it is."""
        assert isinstance(self.model, DenoisingAlgorithm)
        if self._pretrained is None:
            self._pretrained = on_grid(self.model.policy, PROMPT, reference=True)
        policy = on_grid(self.model.policy, PROMPT)
        bound, true = policy.step_kl(self._pretrained).sum(), policy.final_kl(self._pretrained)
        pictures = self.model.num_timesteps // N_STEPS
        self.rows.append({"pictures": pictures, "bound": float(bound), "KL of x_0": true})


def draw_figure(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Both sides against the pictures drawn, a panel for each place of the KL; dotted, those of the exact policy."""
    figure = Figure(figsize=(4 * len(found), 3), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (kl_in, measured) in zip(panels, found.items(), strict=True):
        rows = measured["training"]
        for name, colour, label in (
            ("bound", "#D55E00", "sum of the steps' KL"),
            ("KL of x_0", "#0072B2", "KL of the finished points"),
        ):
            axes.plot([row["pictures"] for row in rows], [row[name] for row in rows], color=colour, label=label)
            axes.axhline(measured["exact"][name], color=colour, linestyle=":", linewidth=1)
        axes.set_title(f"KL in the {kl_in}", fontsize=10)
        axes.set(xlabel="pictures drawn", xlim=(0, None), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nats")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Trains twice, measures, prints, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beta", type=float, default=0.25, help="kl_coef, per nat; less lets the model go further")
    parser.add_argument("--iterations", type=int, default=100, help=f"rollouts of {N_ENVS} pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kl_bound.png and kl_bound.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for kl_in in ("reward", "loss"):
        measure = MeasureKL()
        reward = {"mixture-linear": 0.5}
        train(
            PROMPT,
            reward,
            options.beta,
            N_STEPS,
            options.seed,
            "mixture-1d",
            options.iterations,
            measure,
            kl_in=kl_in,
        )
        measure.measure()
        found[kl_in] = {"training": measure.rows, "exact": measure.optimum(options.beta, kl_in == "reward")}
        print(f"exact: {found[kl_in]['exact']}")
        show(
            f"KL in the {kl_in}, beta = {options.beta}",
            measure.rows[:: max(1, len(measure.rows) // 8)],
            Console(width=120),
        )
    draw_figure(found, options.out / "kl_bound.png")
    (options.out / "kl_bound.json").write_text(json.dumps({"beta": options.beta, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
