"""Gaussian mixtures: density, posterior and tilt against torch's own and against sums over a grid."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dpok_gym.mixture.data import MIXTURES, GaussianMixture

ALL = [(d, prompt) for d, mixtures in MIXTURES.items() for prompt in mixtures]


def torch_mixture(data: GaussianMixture, alpha_bar: float) -> MixtureSameFamily:
    """The same noised mixture, by torch's own classes."""
    identity = torch.eye(data.means.shape[-1]).double()
    parts = MultivariateNormal(alpha_bar**0.5 * data.means, alpha_bar * data.covariances + (1 - alpha_bar) * identity)
    return MixtureSameFamily(Categorical(logits=data.log_weights), parts)


@pytest.mark.parametrize(("d", "prompt"), ALL)
@pytest.mark.parametrize("alpha_bar", [0.999, 0.4, 0.005])
def test_log_density_is_that_of_torch(d: int, prompt: str, alpha_bar: float) -> None:
    x = (2 * torch.randn(50, d)).double()
    noised = MIXTURES[d][prompt].noised(torch.tensor(alpha_bar, dtype=torch.float64))
    torch.testing.assert_close(noised.log_prob(x), torch_mixture(MIXTURES[d][prompt], alpha_bar).log_prob(x))


@pytest.mark.parametrize("alpha_bar", [0.999, 0.4, 0.005])
def test_posterior_is_that_of_bayes(alpha_bar: float) -> None:
    data, x, level = (
        MIXTURES[1]["two modes"],
        torch.tensor([-1.2, 0.05, 0.7]).double(),
        torch.tensor(alpha_bar, dtype=torch.float64),
    )
    clean = torch.linspace(-4, 4, 80001).double()
    likelihood = torch.distributions.Normal(alpha_bar**0.5 * clean, (1 - alpha_bar) ** 0.5).log_prob(x[:, None])
    weights = (data.log_prob(clean[:, None]) + likelihood).softmax(1)
    mean, covariance = data.posterior(x[:, None], level.expand(3))
    torch.testing.assert_close(mean[:, 0], weights @ clean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(covariance[:, 0, 0], weights @ clean**2 - (weights @ clean) ** 2, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prompt", MIXTURES[2])
def test_tilted_density(prompt: str) -> None:
    data, slope = MIXTURES[2][prompt], torch.tensor([0.5, -1.0]).double()
    x = torch.randn(20, 2).double()
    change = data.tilted(slope).log_prob(x) - data.log_prob(x) - x @ slope
    torch.testing.assert_close(change, change[:1].expand(20))
    side = 0.05 * torch.arange(-100, 101).double()
    plane = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)
    assert 0.05**2 * data.tilted(slope).log_prob(plane).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_responsibilities_by_hand() -> None:
    data = GaussianMixture.of([0.25, 0.75], [[-1.0], [1.0]], torch.ones(2, 1, 1))
    odds = 3 * math.exp(2 * 0.5)  # of the right one at 0.5
    assert data.responsibilities(torch.tensor([0.5]).double())[1].item() == pytest.approx(odds / (1 + odds))


def test_components_of_weight_zero_do_not_matter() -> None:
    small, large = MIXTURES[2]["one gaussian"], MIXTURES[2]["ring of six"]
    stacked = GaussianMixture.stack([small, large])
    x = torch.randn(20, 2).double()
    for index, alone in enumerate((small, large)):
        padded = stacked[torch.full((20,), index)]
        torch.testing.assert_close(padded.log_prob(x), alone.log_prob(x))
        level = torch.full((20,), 0.4).double()
        for ours, theirs in zip(padded.posterior(x, level), alone.posterior(x, level), strict=True):
            torch.testing.assert_close(ours, theirs)
