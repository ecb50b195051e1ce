"""Does DPOK find the known answers of DPOK-Mixture-v0? ``python -m benchmarks.mixture --seeds 3``.

Trains and compares with the exact answers: Gaussian data with their closed form; mixtures in two dimensions with the
sampler's own samples, weighted by exp(r / beta); a mixture in one dimension with the best policy there is, by dynamic
programming, with the KL in the reward and in the loss. Prints a table of each, draws the pre-trained and the fine-tuned
model over the denoising steps into ``mixture.png`` and writes every number to ``mixture.json``.

Each training draws 15,360 pictures; seconds are of the process's own computing, on one core.

Letters used for shapes: n points, K components, T denoising steps, d dimensions.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents import DPOK
from agents.cli.options import CLASSROOM
from agents.common.policy import DenoisingPolicy
from dpok_gym import diffusion, make_reward
from dpok_gym.mixture.exact import Array, GaussianSampler, GridPolicy, best_policy, tilted_density
from dpok_gym.mixture.model import MixtureModel
from dpok_gym.mixture.image import REACH, draw_dots

RESULTS = Path(__file__).parent / "results"
GRID = np.linspace(-6, 6, 601)

#: The settings of ``dpok train`` for this model, whatever beta is.
SETTINGS: dict[str, Any] = CLASSROOM | {"micro_batch_size": None, "device": "cpu"}
N_ENVS = SETTINGS.pop("n_envs")
ITERATIONS = SETTINGS.pop("pictures") // N_ENVS
del SETTINGS["kl_coef"]


def train(
    prompt: str,
    reward: dict[str, float],
    beta: float,
    n_steps: int,
    seed: int,
    model: str = "mixture",
    iterations: int = ITERATIONS,
    callback: BaseCallback | None = None,
    **changes: Any,
) -> tuple[DenoisingPolicy, float]:
    """The policy that DPOK learns, and the seconds of computing it took."""
    env = gymnasium.make_vec(
        "DPOK-Mixture-v0",
        num_envs=N_ENVS,
        vectorization_mode="vector_entry_point",
        model=model,
        prompts=[prompt],
        reward=reward,
        num_inference_steps=n_steps,
    )
    agent = DPOK("DenoisingPolicy", env, seed=seed, kl_coef=beta, **SETTINGS | changes)
    started = time.process_time()
    agent.learn(iterations * N_ENVS * n_steps, callback)
    return agent.policy, time.process_time() - started


def model_of(policy: DenoisingPolicy) -> MixtureModel:
    """The mixture model that a policy is of."""
    assert isinstance(policy.model, MixtureModel)
    return policy.model


@torch.no_grad()
def draw(policy: DenoisingPolicy, prompt: str, n: int, seed: int, reference: bool = False) -> Tensor:
    """States x_T, ..., x_0 of n trajectories, (T + 1, n, d) float64."""
    model, schedule = policy.model, policy.schedule
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *model.latent_shape, generator=generator)
    conditioning = {name: told.expand(n) for name, told in model.encode(model.tokenize([prompt])).items()}
    states = [x]
    for t in range(len(schedule)):
        step = torch.full((n,), t)
        denoiser = None if reference else policy.denoiser
        output = model.predict(x, schedule.timesteps[step], conditioning, denoiser=denoiser)
        noise = torch.randn(x.shape, generator=generator)
        x, _ = diffusion.sample_with_log_prob(schedule.mean(step, x, output), schedule.std[step], noise)
        states.append(x)
    return torch.stack(states).flatten(2).double()


def on_grid(policy: DenoisingPolicy, prompt: str, reference: bool = False) -> GridPolicy:
    """A policy of one dimension at the points of the grid."""
    tokens = policy.model.tokenize([prompt]).expand(len(GRID), -1)

    def mean(t: int, latents: Tensor) -> Tensor:
        steps = torch.full((len(latents),), t)
        return policy.transition({"latent": latents, "step": steps, "prompt": tokens}, reference)[0]

    return GridPolicy.of(mean, policy.schedule.std, GRID)


def gaussian(seeds: int, beta: float = 0.5, n: int = 100_000) -> list[dict[str, Any]]:
    """One Gaussian, r = x_1, T = 20: the mean in standard deviations and the variance over the optimum's."""
    rows = []
    for seed in range(seeds):
        policy, seconds = train("one gaussian", {"mixture-linear": 1.0}, beta, 20, seed)
        data = model_of(policy).mixtures["one gaussian"]
        sampler = GaussianSampler.of(data, policy.schedule, model_of(policy).denoiser.alphas_cumprod)
        found = draw(policy, "one gaussian", n, seed)[-1]
        std = sampler.covariance.diagonal().sqrt()
        shift = sampler.optimal_shift(torch.tensor([1.0, 0.0]).double(), beta)
        rows.append(
            {
                "seed": seed,
                "shift / sd": (shift / std).tolist(),
                "mean error / sd": ((found.mean(0) - sampler.mean - shift) / std).tolist(),
                "variance / exact": (found.var(0) / sampler.covariance.diagonal()).tolist(),
                "seconds": seconds,
            }
        )
    return rows


def components(policy: DenoisingPolicy, prompt: str, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (K,) and means (K, d) of weighted points, each of which counts for its most probable component."""
    data = model_of(policy).mixtures[prompt]
    nearest = data.responsibilities(points).argmax(1)
    members = torch.nn.functional.one_hot(nearest, len(data.log_weights)).double() * weights[:, None]
    return members.sum(0) / weights.sum(), (members.T @ points) / members.sum(0)[:, None]


#: Prompt and reward of the mixtures; beta is 1.
MIXTURES: tuple[tuple[str, dict[str, float]], ...] = (
    ("two modes", {"mixture-linear": 0.5}),
    ("ring of six", {"mixture-linear": 0.5}),
    ("ring of six", {"mixture-quadratic": 0.3}),
)


def tilts(policy: DenoisingPolicy, points: Tensor, reward: dict[str, float], beta: float) -> Tensor:
    """exp(r / beta) of points (n, d), up to a factor, with the reward of their pictures, (n,)."""
    judge = make_reward(reward)
    rewards = [judge(draw_dots(part), [""] * len(part)).total.double() for part in points.split(1000)]
    return (torch.cat(rewards) / beta).softmax(0)


def mixtures(seeds: int, n: int = 100_000) -> tuple[list[dict[str, Any]], dict[str, DenoisingPolicy]]:
    """Mixtures at T = 50 against the tilt of the sampler's own samples; and the first policy of each linear case."""
    rows: list[dict[str, Any]] = []
    policies: dict[str, DenoisingPolicy] = {}
    for prompt, reward in MIXTURES:
        for seed in range(seeds):
            policy, seconds = train(prompt, reward, 1.0, 50, seed)
            ((name, weight),) = reward.items()
            if name == "mixture-linear":
                policies.setdefault(prompt, policy)
            sampled = draw(policy, prompt, 2 * n, seed=1, reference=True)[-1]
            exact_weights, exact_means = components(policy, prompt, sampled, tilts(policy, sampled, reward, 1.0))
            weights, means = components(policy, prompt, draw(policy, prompt, n, seed=2)[-1], torch.ones(n).double())
            std = model_of(policy).mixtures[prompt].variances.min().sqrt()
            rows.append(
                {
                    "case": f"{prompt}, {weight} {name}",
                    "seed": seed,
                    "exact weights": exact_weights.tolist(),
                    "weights": weights.tolist(),
                    "largest weight error": (weights - exact_weights).abs().max().item(),
                    "largest mean error / sd": ((means - exact_means).norm(dim=1) / std).max().item(),
                    "seconds": seconds,
                }
            )
    return rows, policies


def half_reward(x: Array) -> Array:
    """r = 0.5 x, as far as positions can be seen in the picture."""
    return 0.5 * np.minimum(np.maximum(x, -REACH), REACH)


def one_dimension(seeds: int) -> list[dict[str, Any]]:
    """Modes at -1 and 1, r = 0.5 x, beta = 1: the weight of the right mode, and the objective E[r] - beta KL."""
    rows: list[dict[str, Any]] = []

    def add(name: str, policy: GridPolicy, **more: Any) -> None:
        right = policy.expectation(lambda x: (x > 0).astype(np.float64))
        kl = policy.step_kl(pretrained).sum()
        objective = policy.expectation(half_reward) - kl
        rows.append({"T": n_steps, "policy": name, "right": right, "KL": kl, "objective": objective, **more})

    for n_steps in (10, 20, 50):
        learned = {
            (kl_in, seed): train("two modes", {"mixture-linear": 0.5}, 1.0, n_steps, seed, "mixture-1d", kl_in=kl_in)
            for kl_in in ("reward", "loss")
            for seed in range(seeds)
        }
        pretrained = on_grid(learned["reward", 0][0], "two modes", reference=True)
        tilt = tilted_density(pretrained, half_reward, 1.0)
        rows.append({"T": n_steps, "policy": "tilt", "right": float(tilt[GRID > 0].sum() * (GRID[1] - GRID[0]))})
        for kl_in in ("reward", "loss"):
            add(f"KL in {kl_in}, exact", best_policy(pretrained, half_reward, 1.0, kl_in == "reward"))
            for seed in range(seeds):
                policy, seconds = learned[kl_in, seed]
                add(f"KL in {kl_in}, learned", on_grid(policy, "two modes"), seed=seed, seconds=seconds)
    return rows


#: Of the figure: blue before and orange after, as in the figures of a run.
COLOURS = {True: "#0072B2", False: "#D55E00"}


def scatter(policies: dict[str, DenoisingPolicy], path: Path, n: int = 500, columns: int = 6) -> None:
    """The same noise through the pre-trained and the fine-tuned model over the denoising steps, r = 0.5 x_1.

    Contours, at 10, 40 and 80 % of the highest density, are those of the data before and of the data tilted by exp(r)
    after, with the noise of that step.
    """
    figure = Figure(figsize=(1.6 * columns + 0.4, 3.4 * len(policies)), layout="constrained")
    cells = figure.subplots(2 * len(policies), columns, sharex=True, sharey=True)
    side = torch.linspace(-2.9, 2.9, 117).double()
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)
    for k, (prompt, policy) in enumerate(policies.items()):
        data = model_of(policy).mixtures[prompt]
        alphas = model_of(policy).denoiser.alphas_cumprod.double()
        shown = np.linspace(0, len(policy.schedule), columns).round().astype(int)
        for row, reference in ((2 * k, True), (2 * k + 1, False)):
            states = draw(policy, prompt, n, seed=0, reference=reference)
            target = data if reference else data.tilted(torch.tensor([0.5, 0.0]).double())
            for axes, t in zip(cells[row], shown, strict=True):
                alpha_bar = alphas[policy.schedule.timesteps[t]] if t < len(policy.schedule) else alphas[0]
                density = target.noised(alpha_bar).log_prob(plane).exp()
                axes.scatter(*states[t].T, s=2, color=COLOURS[reference], alpha=0.5, linewidths=0)
                levels = [share * density.max().item() for share in (0.1, 0.4, 0.8)]
                axes.contour(side, side, density, levels, colors="#262626", linewidths=0.5)
                axes.set(aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2], xlim=(-2.9, 2.9), ylim=(-2.9, 2.9))
                if row == 0:
                    axes.set_title(f"after {t} steps" if t else "noise", fontsize=9)
            cells[row, 0].set_ylabel(f"“{prompt}”\n" + ("pre-trained" if reference else "DPOK"), fontsize=9)
    figure.savefig(path, dpi=130)


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Prints rows as a table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_text(row.get(name, "")) for name in names))
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Trains, compares, prints, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of mixture.png and mixture.json")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {options.seeds}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console = Console(width=120)
    found = {"gaussian": gaussian(options.seeds)}
    show("one Gaussian, r = x_1, beta = 0.5, T = 20", found["gaussian"], console)
    found["mixtures"], policies = mixtures(options.seeds)
    show("mixtures, beta = 1, T = 50, against the tilted samples of the sampler", found["mixtures"], console)
    found["one dimension"] = one_dimension(options.seeds)
    show("modes at -1 and 1, r = 0.5 x, beta = 1: weight of the right one", found["one dimension"], console)
    scatter(policies, options.out / "mixture.png")
    (options.out / "mixture.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
