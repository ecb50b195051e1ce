"""The table of DDIM against diffusers' own DDIM step."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch import Tensor

from dpok_gym import diffusion
from dpok_gym.samplers import TransitionTable, make_ddim_table

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # the first x_t is noise alone
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("steps", "eta"), [(50, 1.0), (20, 1.0), (7, 0.3), (1, 1.0)])
def test_transitions_equal_diffusers(prediction_type: str, spacing: str, steps: int, eta: float) -> None:
    config = STABLE_DIFFUSION | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    table = make_ddim_table(config, steps, eta)
    assert len(table) == steps
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    for index, timestep in enumerate(scheduler.timesteps):
        latents, output, noise = (randn(2, 4, 8, 8, seed=3 * index + k) for k in range(3))
        expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        step = torch.full((2,), index)
        sample = diffusion.sample(table.mean(step, latents, output), table.std[step], noise)
        torch.testing.assert_close(sample, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("prediction_type", "changes"),
    [("epsilon", {}), ("v_prediction", {}), ("sample", {}), ("v_prediction", ZERO_SNR)],
)
def test_noise_and_targets_equal_diffusers(prediction_type: str, changes: dict[str, Any]) -> None:
    config = STABLE_DIFFUSION | {"prediction_type": prediction_type} | changes
    table, scheduler = make_ddim_table(config, 10), DDIMScheduler.from_config(config)
    step = torch.arange(20) % 10
    clean, noise = randn(20, 4, 8, 8), randn(20, 4, 8, 8, seed=1)
    timesteps = table.timesteps[step]
    noisy = table.add_noise(step, clean, noise)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timesteps), rtol=1e-5, atol=1e-6)
    expected = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, timesteps),
        "sample": clean,
    }[prediction_type]
    # The last step has little noise: what is left of it has lost two digits.
    torch.testing.assert_close(table.target(step, clean, noisy), expected, rtol=1e-5, atol=2e-5)


def test_zero_terminal_snr_with_v_prediction() -> None:
    config = STABLE_DIFFUSION | ZERO_SNR | {"prediction_type": "v_prediction"}
    table = make_ddim_table(config, 10)
    for column in columns(table):
        assert column.isfinite().all()
    assert table.signal[0] == 0
    with pytest.raises(ValueError, match="zero terminal SNR"):
        make_ddim_table(config | {"prediction_type": "epsilon"}, 10)


def columns(table: TransitionTable) -> list[Tensor]:
    return list(vars(table).values())


def test_columns() -> None:
    table = make_ddim_table(STABLE_DIFFUSION, 10)
    timesteps, *others = columns(table)
    assert timesteps.dtype == torch.int64
    assert (timesteps.diff() < 0).all()
    assert {column.dtype for column in others} == {torch.float32}
    assert {column.shape for column in others} == {(10,)}
    assert (table.std > 0).all()
    torch.testing.assert_close(table.signal**2 + table.noise**2, torch.ones(10))


def test_less_eta_is_less_noise() -> None:
    full, less = make_ddim_table(STABLE_DIFFUSION, 10), make_ddim_table(STABLE_DIFFUSION, 10, 0.25)
    torch.testing.assert_close(less.std, 0.25 * full.std)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_without_noise(prediction_type: str) -> None:
    """An eta of 0, and a window: diffusers' deterministic DDIM outside of it."""
    config = STABLE_DIFFUSION | {"prediction_type": prediction_type}
    whole, none = make_ddim_table(config, 10), make_ddim_table(config, 10, 0.0)
    window = make_ddim_table(config, 10, 1.0, (3, 2))
    assert not none.stochastic.any()
    assert window.stochastic.tolist() == [False] * 3 + [True] * 2 + [False] * 5
    for name in ("sample_coef", "output_coef", "std"):
        expected = torch.where(window.stochastic, getattr(whole, name), getattr(none, name))
        assert torch.equal(getattr(window, name), expected)
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(10)
    for index, timestep in enumerate(scheduler.timesteps):
        latents, output, step = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.full((2,), index)
        expected = scheduler.step(output, timestep, latents, eta=0.0).prev_sample
        torch.testing.assert_close(none.mean(step, latents, output), expected, rtol=2e-4, atol=2e-5)


def test_a_clean_end_is_deterministic() -> None:
    table = make_ddim_table(STABLE_DIFFUSION | {"set_alpha_to_one": True}, 10)
    assert table.stochastic.tolist() == [True] * 9 + [False]


def test_reads_the_config_of_other_schedulers() -> None:
    pndm = PNDMScheduler.from_config(STABLE_DIFFUSION | {"skip_prk_steps": True})
    ours, expected = make_ddim_table(pndm.config, 50), make_ddim_table(STABLE_DIFFUSION, 50)
    for column, other in zip(columns(ours), columns(expected), strict=True):
        torch.testing.assert_close(column, other)


def test_the_predicted_sample_is_never_clipped() -> None:
    """Whatever the config says: with clipping, the mean would not be linear in the output."""
    clipped = make_ddim_table(STABLE_DIFFUSION | {"clip_sample": True, "thresholding": True}, 10)
    for column, other in zip(columns(clipped), columns(make_ddim_table(STABLE_DIFFUSION, 10)), strict=True):
        assert torch.equal(column, other)


def test_numpy_numbers() -> None:
    ours = make_ddim_table(STABLE_DIFFUSION, np.int64(10), np.float64(0.5))
    expected = make_ddim_table(STABLE_DIFFUSION, 10, 0.5)
    assert torch.equal(ours.std, expected.std)


@pytest.mark.parametrize(
    ("changes", "steps", "eta", "message"),
    [
        ({}, 10, -0.1, "eta must lie in"),
        ({}, 10, 1.5, "eta must lie in"),
        ({}, 10, float("nan"), "eta must lie in"),
        ({}, 0, 1.0, "num_inference_steps must be an integer of at least 1, got 0"),
        ({}, 2.5, 1.0, "num_inference_steps must be an integer"),
        ({}, 1001, 1.0, "num_inference_steps must be an integer of at most 1,000, got 1001"),
        (
            {"timestep_spacing": "linspace"},
            10,
            1.0,
            "the model with timestep_spacing='leading' or 'trailing' \\(--time",
        ),
        ({"prediction_type": "flow"}, 10, 1.0, "prediction_type 'flow'"),
        ({}, 1000, 1.0, "spacing, 'leading' with offset 1, does not find 1000 of the 1000 training timesteps"),
        ({"timestep_spacing": "trailing"}, 61, 1.0, "another num_inference_steps, such as 60"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 10, 1.0, "a FlowMatchEulerDiscreteScheduler, whose"),
        ({"_class_name": "EDMEulerScheduler"}, 10, 1.0, "a EDMEulerScheduler, whose diffusion is not"),
    ],
)
def test_bad_input(changes: dict[str, Any], steps: int, eta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_ddim_table(STABLE_DIFFUSION | changes, steps, eta)
