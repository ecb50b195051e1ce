"""The Gaussian of a denoising step against torch.distributions and numbers computed by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as torch_kl

from dpok_gym import diffusion


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: Tensor, std: Tensor) -> Independent:
    """N(mean, std^2 I) in float64; mean (B, C, h, w), std (B,)."""
    spread = std.double().reshape(-1, 1, 1, 1).expand_as(mean)
    return Independent(Normal(mean.double(), spread), 3)


def test_log_prob_and_kl_equal_torch_distributions() -> None:
    mean, other, noise = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), randn(3, 4, 8, 8, seed=2)
    std = torch.tensor([0.03, 0.5, 1.7])
    sample = diffusion.sample(mean, std, noise)
    log_prob = diffusion.log_prob(sample, mean, std)
    expected = gaussian(mean, std).log_prob(sample.double())
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-3)
    expected_kl = torch_kl(gaussian(mean, std), gaussian(other, std))
    kl = diffusion.kl_divergence(mean, other, std)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-5, atol=1e-5)


def test_log_ratio_is_exact_where_differences_of_sums_are_not() -> None:
    old_mean = 30 * randn(2, 4, 64, 64)
    mean = old_mean + 1e-5 * randn(2, 4, 64, 64, seed=1)
    std = torch.tensor([0.05, 0.9])
    sample = diffusion.sample(old_mean, std, randn(2, 4, 64, 64, seed=2))
    exact = diffusion.log_prob(sample.double(), mean.double(), std.double()) - diffusion.log_prob(
        sample.double(), old_mean.double(), std.double()
    )
    ours = diffusion.log_ratio(sample, mean, old_mean, std).double()
    naive = (diffusion.log_prob(sample, mean, std) - diffusion.log_prob(sample, old_mean, std)).double()
    assert (ours - exact).abs().max() < 0.1 * (naive - exact).abs().max()


def test_equal_means_have_exactly_no_distance() -> None:
    mean, std = 30 * randn(2, 4, 64, 64), torch.tensor([0.05, 0.9])
    sample = diffusion.sample(mean, std, randn(2, 4, 64, 64, seed=2))
    assert diffusion.log_ratio(sample, mean, mean.clone(), std).tolist() == [0.0, 0.0]
    assert diffusion.kl_divergence(mean, mean.clone(), std).tolist() == [0.0, 0.0]


def test_numbers_by_hand() -> None:
    sample, mean, old_mean = (torch.tensor([[value, value]]) for value in (1.0, 0.5, 0.0))
    std = torch.tensor([2.0])
    # per dimension: -(0.5/2)^2/2 - log 2 - log(2 pi)/2 = -0.03125 - 0.693147 - 0.918939
    assert diffusion.log_prob(sample, mean, std).item() == pytest.approx(-3.286672, abs=1e-5)
    # per dimension: (1 - 0.25) / 8 difference of squares = 0.09375
    assert diffusion.log_ratio(sample, mean, old_mean, std).item() == pytest.approx(0.1875)
    # per dimension: 0.5^2 / (2 * 4) = 0.03125
    assert diffusion.kl_divergence(mean, old_mean, std).item() == pytest.approx(0.0625)
    # 0.5 + 2 * 1.5
    assert diffusion.sample(mean, std, torch.full((1, 2), 1.5)).tolist() == [[3.5, 3.5]]


def test_each_row_has_its_own_std() -> None:
    mean, noise = torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1)
    std = torch.tensor([0.5, 2.0])
    assert diffusion.sample(mean, std, noise)[:, :, 0, 0].tolist() == [[0.5] * 3, [2.0] * 3]
    expected = [-3 * (0.5 + math.log(each) + 0.5 * math.log(2 * math.pi)) for each in (0.5, 2.0)]
    log_prob = diffusion.log_prob(diffusion.sample(mean, std, noise), mean, std)
    assert log_prob.tolist() == pytest.approx(expected, rel=1e-5)


def test_noise_is_recovered() -> None:
    mean, noise = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    std = torch.tensor([0.2, 1.0, 3.0])
    sample = diffusion.sample(mean, std, noise)
    torch.testing.assert_close(diffusion.recover_noise(sample, mean, std), noise, rtol=1e-5, atol=1e-5)


def test_a_deterministic_step_has_no_density() -> None:
    """All that would come from one is 0, and so is its gradient; the other rows are as ever."""
    std = torch.tensor([0.0, 0.5])
    mean, other, noise = randn(2, 3).requires_grad_(), randn(2, 3, seed=1), randn(2, 3, seed=2)
    sample = diffusion.sample(mean, std, noise)
    assert torch.equal(sample[0], mean[0])
    for function, arguments in (
        (diffusion.log_prob, (sample.detach(), mean, std)),
        (diffusion.log_ratio, (sample.detach(), mean, other, std)),
        (diffusion.kl_divergence, (mean, other, std)),
        (diffusion.recover_noise, (sample.detach(), mean, std)),
    ):
        values = function(*arguments)
        assert not values[0].any()
        rows = [argument[1:] for argument in arguments]
        torch.testing.assert_close(values[1:], function(*rows))
        (gradient,) = torch.autograd.grad(values.sum(), mean)
        assert not gradient[0].any()
        assert gradient[1].all()
        assert gradient.isfinite().all()


def test_expand_and_reduce() -> None:
    values = torch.tensor([1.0, 2.0])
    assert diffusion.expand(values, torch.zeros(2, 4, 8, 8)).shape == (2, 1, 1, 1)
    assert diffusion.expand(values, torch.zeros(2)).shape == (2,)
    latents = torch.arange(8.0).reshape(2, 2, 2)
    assert diffusion.reduce(latents, "sum").tolist() == [6.0, 22.0]
    assert diffusion.reduce(latents, "mean").tolist() == [1.5, 5.5]


def test_gradients_equal_finite_differences() -> None:
    mean, other, sample = (randn(2, 3, seed=seed).double() for seed in range(3))
    std = torch.tensor([0.5, 2.0], dtype=torch.float64)
    mean.requires_grad_()
    assert torch.autograd.gradcheck(lambda mean: diffusion.log_prob(sample, mean, std), mean)
    assert torch.autograd.gradcheck(lambda mean: diffusion.log_ratio(sample, mean, other, std), mean)
    assert torch.autograd.gradcheck(lambda mean: diffusion.kl_divergence(mean, other, std), mean)


def test_bad_reduction() -> None:
    with pytest.raises(ValueError, match=r"reduction over a latent's dimensions must be one of 'mean', 'sum'.*'no"):
        diffusion.reduce(torch.zeros(1, 2), "none")
