"""Transitions against diffusers' own DDIM step, torch.distributions and numbers computed by hand."""

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as torch_kl

from dpok_gym import diffusion

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("steps", "eta"), [(50, 1.0), (20, 1.0), (7, 0.3), (1, 1.0)])
def test_transition_equals_diffusers(prediction_type: str, spacing: str, steps: int, eta: float) -> None:
    config = STABLE_DIFFUSION | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    schedule = diffusion.make_schedule(config, steps, eta)
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    for i, timestep in enumerate(scheduler.timesteps):
        x, output, noise = (randn(2, 4, 8, 8, seed=3 * i + k) for k in range(3))
        expected = scheduler.step(output, timestep, x, eta=eta, variance_noise=noise).prev_sample
        step = torch.full((2,), i)
        sample, _ = diffusion.sample_with_log_prob(schedule.mean(step, x, output), schedule.std[step], noise)
        torch.testing.assert_close(sample, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("prediction_type", "changes"),
    [
        ("epsilon", {}),
        ("v_prediction", {}),
        ("sample", {}),
        ("v_prediction", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),  # begins with noise alone
    ],
)
def test_noise_and_targets_equal_diffusers(prediction_type: str, changes: dict) -> None:
    config = STABLE_DIFFUSION | {"prediction_type": prediction_type} | changes
    schedule, scheduler = diffusion.make_schedule(config, 10), DDIMScheduler.from_config(config)
    step = torch.arange(20) % 10
    clean, noise = randn(20, 4, 8, 8), randn(20, 4, 8, 8, seed=1)
    timesteps = schedule.timesteps[step]
    noisy = schedule.add_noise(step, clean, noise)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timesteps), rtol=1e-5, atol=1e-6)
    expected = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, timesteps),
        "sample": clean,
    }[prediction_type]
    # The last step has little noise: what is left of it has lost two digits.
    torch.testing.assert_close(schedule.target(step, clean, noisy), expected, rtol=1e-5, atol=2e-5)


def test_zero_terminal_snr_with_v_prediction() -> None:
    config = STABLE_DIFFUSION | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    schedule = diffusion.make_schedule(config, 10)
    assert all(bool(table.isfinite().all()) for table in (schedule.sample_coef, schedule.output_coef, schedule.std))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        diffusion.make_schedule(config | {"prediction_type": "epsilon"}, 10)


def test_reads_the_config_of_other_schedulers() -> None:
    pndm = PNDMScheduler.from_config(STABLE_DIFFUSION | {"skip_prk_steps": True})
    ours, expected = diffusion.make_schedule(pndm.config, 50), diffusion.make_schedule(STABLE_DIFFUSION, 50)
    torch.testing.assert_close(ours.output_coef, expected.output_coef)


def test_log_prob_and_kl_equal_torch_distributions() -> None:
    mean, other, noise = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), randn(3, 4, 8, 8, seed=2)
    std = torch.tensor([0.03, 0.5, 1.7])
    sample, log_prob = diffusion.sample_with_log_prob(mean, std, noise)

    def gaussian(centre: torch.Tensor) -> Independent:
        return Independent(Normal(centre.double(), std.double().reshape(3, 1, 1, 1).expand_as(mean)), 3)

    torch.testing.assert_close(log_prob.double(), gaussian(mean).log_prob(sample.double()), rtol=1e-5, atol=1e-3)
    averaged = diffusion.log_prob(sample, mean, std, "mean")
    torch.testing.assert_close(averaged * 256, log_prob, rtol=1e-5, atol=1e-3)
    expected_kl = torch_kl(gaussian(mean), gaussian(other))
    torch.testing.assert_close(diffusion.kl_divergence(mean, other, std).double(), expected_kl, rtol=1e-5, atol=1e-5)


def test_log_ratio_is_exact_where_differences_of_sums_are_not() -> None:
    old_mean = 30 * randn(2, 4, 64, 64)
    mean = old_mean + 1e-5 * randn(2, 4, 64, 64, seed=1)
    std = torch.tensor([0.05, 0.9])
    sample, _ = diffusion.sample_with_log_prob(old_mean, std, randn(2, 4, 64, 64, seed=2))
    exact = diffusion.log_prob(sample.double(), mean.double(), std.double()) - diffusion.log_prob(
        sample.double(), old_mean.double(), std.double()
    )
    ours = diffusion.log_ratio(sample, mean, old_mean, std).double()
    naive = (diffusion.log_prob(sample, mean, std) - diffusion.log_prob(sample, old_mean, std)).double()
    assert (ours - exact).abs().max() < 0.1 * (naive - exact).abs().max()
    assert diffusion.log_ratio(sample, old_mean, old_mean, std).tolist() == [0.0, 0.0]


def test_numbers_by_hand() -> None:
    sample, mean, old_mean, std = (torch.tensor([[v, v]]) for v in (1.0, 0.5, 0.0, 0.0))
    std = torch.tensor([2.0])
    # per dimension: -(0.5/2)^2/2 - log 2 - log(2 pi)/2 = -0.03125 - 0.693147 - 0.918939
    assert diffusion.log_prob(sample, mean, std).item() == pytest.approx(-3.286672, abs=1e-5)
    # per dimension: (1 - 0.25) / 8 difference of squares = 0.09375
    assert diffusion.log_ratio(sample, mean, old_mean, std).item() == pytest.approx(0.1875)
    assert diffusion.log_ratio(sample, mean, old_mean, std, "mean").item() == pytest.approx(0.09375)
    assert diffusion.kl_divergence(mean, old_mean, std).item() == pytest.approx(0.0625)


@pytest.mark.parametrize(
    ("changes", "steps", "eta", "message"),
    [
        ({}, 10, 0.0, "eta must lie in"),
        ({}, 10, 1.5, "eta must lie in"),
        ({}, 0, 1.0, "num_inference_steps must be an integer from 1 to 1000"),
        ({}, 2.5, 1.0, "num_inference_steps must be an integer"),
        ({}, 1001, 1.0, "num_inference_steps must be an integer from 1 to 1000"),
        ({"set_alpha_to_one": True}, 10, 1.0, "set_alpha_to_one=False"),
        ({"timestep_spacing": "linspace"}, 10, 1.0, "last step adds no noise"),
        ({"prediction_type": "flow"}, 10, 1.0, "prediction_type 'flow'"),
        ({}, 1000, 1.0, "spacing, 'leading' with offset 1, does not find 1000 of the 1000 training timesteps"),
        ({"timestep_spacing": "trailing"}, 61, 1.0, "another num_inference_steps, such as 60"),
    ],
)
def test_bad_input(changes: dict, steps: int, eta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffusion.make_schedule(STABLE_DIFFUSION | changes, steps, eta)


@pytest.mark.parametrize(("prediction_type", "share"), [("epsilon", 0.73), ("v_prediction", 0.86)])
def test_output_weights_make_every_step_equally_strong(prediction_type: str, share: float) -> None:
    schedule = diffusion.make_schedule(STABLE_DIFFUSION | {"prediction_type": prediction_type}, 20)
    x, output = randn(20, 4, 8, 8), randn(20, 4, 8, 8, seed=1).requires_grad_()
    step = torch.arange(20)
    mean = schedule.mean(step, x, output)
    # The Fisher information of a Gaussian about its mean is 1 / std^2; about the output, (dmean / doutput / std)^2.
    (gradient,) = torch.autograd.grad(mean.sum(), output)
    information = (gradient[:, 0, 0, 0] / schedule.std).square()
    assert (information[-2] / information.sum()).item() == pytest.approx(share, abs=0.005)
    weighted = schedule.output_weights().square() * information
    torch.testing.assert_close(weighted, weighted[0].expand(20), rtol=1e-4, atol=0)
    assert schedule.output_weights().mean().item() == pytest.approx(1)


def test_bad_reduction() -> None:
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        diffusion.log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), "none")  # type: ignore[arg-type]


def test_noise_is_found_again() -> None:
    mean, noise = (torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    std = torch.tensor([0.2, 1.0, 3.0])
    sample, _ = diffusion.sample_with_log_prob(mean, std, noise)
    torch.testing.assert_close(diffusion.noise_of(sample, mean, std), noise, rtol=1e-5, atol=1e-5)
