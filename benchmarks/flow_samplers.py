"""The spread of the points that each flow-matching sampler draws: ``python -m benchmarks.flow_samplers``.

The data are the mixtures of the mixture world. A small network learns their velocity with the loss of flow matching.
The exact velocity stands beside it, so that what the network adds can be told from what the sampler adds. The measure
is the standard deviation of the points around the nearest mode, divided by that of the data: 1 is right. With few steps
some points stay between the modes, which makes it larger. The command prints two tables and writes
``flow_samplers.json``. It takes about four minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dpok_gym.mixture.data import GaussianMixture
from dpok_gym.mixture.model import MixtureModel
from dpok_gym.samplers import DenoisingProcess

RESULTS = Path(__file__).parent / "results"
SAMPLERS: list[tuple[Any, float]] = [
    ("ode", 0.0),
    ("ddim", 1.0),
    ("ddim", 0.5),
    ("flow-sde", 0.7),
    ("dance-sde", 0.3),
    ("precise", 1.5),
    ("cps", 0.8),
]


class ExactVelocity(nn.Module):
    """E[eps - x_0 | x_s, z] of Gaussian mixtures.

    x_s / sqrt((1 - s)^2 + s^2) is a state of a variance-preserving diffusion, whose posterior mean is known.
    """

    def __init__(self, mixtures: Sequence[GaussianMixture]) -> None:
        super().__init__()
        self.mixtures = GaussianMixture.stack(mixtures)

    def forward(self, latents: Tensor, timesteps: Tensor, mixture: Tensor) -> Tensor:
        """Predicts the velocity (B, 1, 1, d) for mixtures of some numbers (B,)."""
        s, x = timesteps.double() / 1000, latents.flatten(1).double()
        scale = ((1 - s) ** 2 + s**2).sqrt()
        clean, _ = self.mixtures[mixture].posterior(x / scale[:, None], ((1 - s) / scale) ** 2)
        return ((x - clean) / s[:, None]).float().reshape(latents.shape)


class LearnedVelocity(nn.Module):
    """A multilayer perceptron on x_s, s and the number of the prompt."""

    def __init__(self, dims: int, n_prompts: int, hidden: int = 256) -> None:
        super().__init__()
        self.n_prompts = n_prompts
        width = dims + 1 + n_prompts
        self.layers = nn.Sequential(
            *(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()),
            *(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dims)),
        )

    def forward(self, latents: Tensor, timesteps: Tensor, mixture: Tensor) -> Tensor:
        """Predicts the velocity (B, 1, 1, d) for mixtures of some numbers (B,)."""
        prompt = nn.functional.one_hot(mixture, self.n_prompts)
        columns = [latents.flatten(1), timesteps[:, None] / 1000, prompt]
        return self.layers(torch.cat(columns, dim=1)).reshape(latents.shape)


class FlowMixtureModel(MixtureModel):
    """The mixture world under flow matching, in two dimensions.

    Args:
        denoiser: predicts the velocity; None for the exact one.
    """

    denoiser: Any

    def __init__(self, denoiser: nn.Module | None = None) -> None:
        super().__init__("mixture")
        self.name = "the mixture world under flow matching"
        self.scheduler_config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
        self.denoiser = denoiser or ExactVelocity(list(self.mixtures.values()))


def draw_data(mixtures: GaussianMixture, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a point of each of some mixtures, (B, d) float32."""
    chosen = mixtures[numbers]
    component = torch.multinomial(chosen.log_weights.exp(), 1, generator=generator)[:, 0]
    rows = torch.arange(len(numbers))
    noise = torch.randn(chosen.means[rows, component].shape, generator=generator, dtype=torch.float64)
    along = chosen.variances[rows, component].sqrt() * noise
    return (chosen.means[rows, component] + (chosen.axes[rows, component] @ along[..., None])[..., 0]).float()


def train(n_steps: int, seed: int, batch_size: int = 1024) -> LearnedVelocity:
    """Learns the velocity: minimises || v(x_s, s, z) - (eps - x_0) ||^2, s ~ U(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    mixtures = GaussianMixture.stack(list(MixtureModel("mixture").mixtures.values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LearnedVelocity(2, len(mixtures.log_weights))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        numbers = torch.randint(network.n_prompts, (batch_size,), generator=generator)
        clean = draw_data(mixtures, numbers, generator)
        noise = torch.randn(clean.shape, generator=generator)
        s = torch.rand(batch_size, generator=generator)
        noisy = (1 - s[:, None]) * clean + s[:, None] * noise
        loss = (network(noisy, 1000 * s, numbers) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def spread(process: DenoisingProcess, prompt: str, n_points: int, seed: int) -> float:
    """Returns the std of samples around the nearest mode, divided by that of the data."""
    assert isinstance(process.model, FlowMixtureModel)
    generator = torch.Generator().manual_seed(seed)
    shape = (n_points, *process.model.latent_shape)

    def noise(index: int = 0) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = noise()
    for step in process.denoise(latents, process.encode([prompt] * n_points), noise):
        latents = step.next_latents
    data = process.model.mixtures[prompt]
    generator = torch.Generator().manual_seed(seed)
    truth = draw_data(GaussianMixture.stack([data]), torch.zeros(100_000, dtype=torch.int64), generator)
    return (_distance(latents.flatten(1), data) / _distance(truth, data)) ** 0.5


def _distance(points: Tensor, data: GaussianMixture) -> float:
    """Mean square of the distance (B, d) to the nearest mode."""
    return torch.cdist(points.double(), data.means).amin(1).square().mean().item()


def measure(
    denoiser: nn.Module | None, prompts: Sequence[str], numbers_of_steps: Sequence[int], n_points: int, seed: int
) -> list[dict[str, Any]]:
    """Measures every sampler; the spread is the mean over the prompts."""
    model, rows = FlowMixtureModel(denoiser), []
    for sampler, eta in SAMPLERS:
        for n_steps in numbers_of_steps:
            process = DenoisingProcess(model, sampler, n_steps, eta)
            spreads = [spread(process, prompt, n_points, seed) for prompt in prompts]
            mean = sum(spreads) / len(spreads)
            rows.append({"sampler": sampler, "eta": eta, "num_inference_steps": n_steps, "spread": mean})
    return rows


def main() -> None:
    """Trains, draws, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training-steps", type=int, default=8000)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100, 300], help="denoising steps, T")
    parser.add_argument("--points", type=int, default=4000, help="of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of flow_samplers.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    prompts = ["two modes", "three modes"]
    console, results = Console(width=120), {}
    for name, denoiser in (("exact", None), ("learned", train(options.training_steps, options.seed))):
        rows = results[name] = measure(denoiser, prompts, options.steps, options.points, options.seed)
        table = Table("sampler", "eta", *(f"T = {n}" for n in options.steps), title=f"spread, {name} velocity")
        for first in range(0, len(rows), len(options.steps)):
            cells = rows[first : first + len(options.steps)]
            table.add_row(cells[0]["sampler"], str(cells[0]["eta"]), *(f"{cell['spread']:.3f}" for cell in cells))
        console.print(table)
    (options.out / "flow_samplers.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
