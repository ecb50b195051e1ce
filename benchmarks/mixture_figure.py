"""The figure of :mod:`benchmarks.mixture`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from agents.common.policy import DenoisingPolicy
from benchmarks.mixture_policies import model_of, sample_trajectories

#: Colours of the pre-trained (True) and the fine-tuned model, as in the figures of a run.
COLOURS = {True: "#0072B2", False: "#D55E00"}


def scatter(policies: dict[str, DenoisingPolicy], path: Path, n: int = 500, columns: int = 6) -> None:
    """Draws the states of the pre-trained and the fine-tuned model over the denoising steps, from the same noise.

    The reward is r = 0.5 x_1. Contours, at 10, 40 and 80 % of the highest density, are those of the data for the
    pre-trained model, and of the data tilted by exp(r) for the fine-tuned one, with the noise of that step.

    Args:
        policies: by prompt.
        path: file to write.
        n: points.
        columns: denoising steps that are shown.
    """
    figure = Figure(figsize=(1.6 * columns + 0.4, 3.4 * len(policies) + 0.7), layout="constrained")
    cells = figure.subplots(2 * len(policies), columns, sharex=True, sharey=True)
    for number, (prompt, policy) in enumerate(policies.items()):
        for row, reference in ((2 * number, True), (2 * number + 1, False)):
            _scatter_row(cells[row], policy, prompt, n, reference)
            model = "pre-trained" if reference else "DPOK"
            cells[row, 0].set_ylabel(f"“{prompt}”\n{model}", fontsize=9)
    for axes, step in zip(cells[0], _shown_steps(next(iter(policies.values())), columns), strict=True):
        title = f"after {step} steps" if step else "noise"
        axes.set_title(title, fontsize=9)
    figure.suptitle(f"{n} points of each model, from the same noise; r = 0.5 x_1, beta = 1", fontsize=11)
    figure.supxlabel("lines: the exact density, at 10, 40 and 80 % of its largest value", fontsize=9)
    figure.savefig(path, dpi=130)


def _shown_steps(policy: DenoisingPolicy, columns: int) -> list[int]:
    """Returns evenly spaced numbers of denoising steps, from 0 to T."""
    return np.linspace(0, policy.process.num_inference_steps, columns).round().astype(int).tolist()


def _scatter_row(cells: Any, policy: DenoisingPolicy, prompt: str, n: int, reference: bool) -> None:
    """Draws the points and the contours of one model; ``cells`` are the axes, one for each step."""
    side = torch.linspace(-2.9, 2.9, 117).double()
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)
    model, table = model_of(policy), policy.process.table
    target = model.mixtures[prompt]
    if not reference:
        target = target.tilted(torch.tensor([0.5, 0.0]).double())
    states = sample_trajectories(policy, prompt, n, seed=0, reference=reference)
    alphas = model.denoiser.alphas_cumprod.double()
    # The sampler ends at the least noise that the model was trained with, timestep 0.
    for axes, step in zip(cells, _shown_steps(policy, len(cells)), strict=True):
        timestep = table.timesteps[step] if step < len(table) else 0
        density = target.noised(alphas[timestep]).log_prob(plane).exp()
        axes.scatter(*states[step].T, s=2, color=COLOURS[reference], alpha=0.5, linewidths=0)
        levels = [share * density.max().item() for share in (0.1, 0.4, 0.8)]
        axes.contour(side, side, density, levels, colors="#262626", linewidths=0.5)
        axes.set(aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2], xlim=(-2.9, 2.9), ylim=(-2.9, 2.9))
