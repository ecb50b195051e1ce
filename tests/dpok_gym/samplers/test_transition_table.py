"""A transition table's algebra, with numbers by hand and gradients by torch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpok_gym import diffusion
from dpok_gym.samplers import TransitionTable, make_ddim_table

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def by_hand() -> TransitionTable:
    """A table of two steps; no sampler has these numbers."""
    return TransitionTable(
        timesteps=torch.tensor([7, 3]),
        sample_coef=torch.tensor([2.0, 3.0]),
        output_coef=torch.tensor([-1.0, 0.5]),
        std=torch.tensor([0.5, 0.25]),
        signal=torch.tensor([0.6, 0.8]),
        noise=torch.tensor([0.8, 0.6]),
        clean_sample_coef=torch.tensor([1.0, 4.0]),
        clean_output_coef=torch.tensor([-2.0, 0.5]),
    )


def test_numbers_by_hand() -> None:
    table, step = by_hand(), torch.tensor([1, 0, 0])
    assert len(table) == 2
    sample, output = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0], [30.0]])
    # 3 * 1 + 0.5 * 10;  2 * 2 - 20;  2 * 3 - 30
    assert table.mean(step, sample, output).tolist() == [[8.0], [-16.0], [-24.0]]
    # 0.8 * 1 + 0.6 * 10;  0.6 * 2 + 0.8 * 20;  0.6 * 3 + 0.8 * 30
    noisy = table.add_noise(step, sample, output)
    torch.testing.assert_close(noisy, torch.tensor([[6.8], [17.2], [25.8]]))
    # (10 - 4 * 1) / 0.5;  (20 - 2) / -2;  (30 - 3) / -2
    assert table.target(step, output, sample).tolist() == [[12.0], [-9.0], [-13.5]]
    # ((8 - 6) / 0.5)^2;  ((0 - 3) / -1)^2;  0
    mean, other = torch.tensor([[8.0], [0.0], [1.0]]), torch.tensor([[6.0], [3.0], [1.0]])
    assert table.output_mse(step, mean, other).tolist() == [16.0, 9.0, 0.0]
    # 0.5 / 1 and 0.25 / 0.5, which are equal
    assert table.output_weights().tolist() == [0.5, 0.5]


def test_mean_of_half_precision_is_float32() -> None:
    sample, output = randn(2, 4).bfloat16(), randn(2, 4, seed=1).half()
    mean = by_hand().mean(torch.tensor([0, 1]), sample, output)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, by_hand().mean(torch.tensor([0, 1]), sample.float(), output.float()))


def test_to_another_device_moves_every_column() -> None:
    moved = by_hand().to("meta")
    assert {column.device.type for column in vars(moved).values()} == {"meta"}
    assert len(moved) == 2
    again = by_hand().to("cpu")
    for name, column in vars(by_hand()).items():
        assert torch.equal(getattr(again, name), column)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_perfect_output_leads_to_the_posterior(prediction_type: str) -> None:
    """With x_0 known, the mean is that of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 7), at eta = 1."""
    table = make_ddim_table(STABLE_DIFFUSION | {"prediction_type": prediction_type}, 10)
    step = torch.arange(9)  # all but the last, whose x_{t-1} is outside the table
    clean, noise = randn(9, 4, 8, 8), randn(9, 4, 8, 8, seed=1)
    noisy = table.add_noise(step, clean, noise)
    mean = table.mean(step, noisy, table.target(step, clean, noisy))
    alpha_bar, previous = table.signal[:-1].double() ** 2, table.signal[1:].double() ** 2
    alpha = alpha_bar / previous
    of_clean = previous.sqrt() * (1 - alpha) / (1 - alpha_bar)
    of_noisy = alpha.sqrt() * (1 - previous) / (1 - alpha_bar)
    expected = diffusion.expand(of_clean, clean) * clean + diffusion.expand(of_noisy, clean) * noisy
    torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-4)
    variance = (1 - alpha) * (1 - previous) / (1 - alpha_bar)
    torch.testing.assert_close(table.std[:-1].double() ** 2, variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("prediction_type", "share"), [("epsilon", 0.73), ("v_prediction", 0.86)])
def test_output_weights_make_every_step_equally_strong(prediction_type: str, share: float) -> None:
    table = make_ddim_table(STABLE_DIFFUSION | {"prediction_type": prediction_type}, 20)
    sample, output = randn(20, 4, 8, 8), randn(20, 4, 8, 8, seed=1).requires_grad_()
    mean = table.mean(torch.arange(20), sample, output)
    # The Fisher information of a Gaussian about its mean is 1 / std^2; about the output, (dmean / doutput / std)^2.
    (gradient,) = torch.autograd.grad(mean.sum(), output)
    information = (gradient[:, 0, 0, 0] / table.std).square()
    assert (information[-2] / information.sum()).item() == pytest.approx(share, abs=0.005)
    weighted = table.output_weights().square() * information
    torch.testing.assert_close(weighted, weighted[0].expand(20), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_output_mse_is_that_of_the_outputs(prediction_type: str) -> None:
    table = make_ddim_table(STABLE_DIFFUSION | {"prediction_type": prediction_type}, 10)
    step = torch.arange(9)
    sample, output, other = (randn(9, 4, 8, 8, seed=seed) for seed in range(3))
    found = table.output_mse(step, table.mean(step, sample, output), table.mean(step, sample, other))
    torch.testing.assert_close(found, (output - other).square().mean((1, 2, 3)), rtol=1e-3, atol=0)


def test_steps_that_explore() -> None:
    assert by_hand().exploring.tolist() == [True, True]
    assert replace(by_hand(), std=torch.tensor([0.5, 0.05])).exploring.tolist() == [True, True]
    assert replace(by_hand(), std=torch.tensor([0.5, 0.04])).exploring.tolist() == [True, False]


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("n_steps", [10, 20, 50])
def test_stable_diffusions_last_two_steps_do_not_explore(n_steps: int, eta: float) -> None:
    """And one of them has a KL out of all proportion."""
    table = make_ddim_table(STABLE_DIFFUSION, n_steps, eta)
    assert table.exploring.tolist() == [True] * (n_steps - 2) + [False] * 2
    if eta == 1:
        nats = (table.output_coef / table.std).square()
        assert nats[-2] > 5 * nats[table.exploring].max()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_errors_in_other_spaces(prediction_type: str) -> None:
    """The x_0 and the velocity that two outputs stand for differ by the scale times the outputs' difference."""
    table = make_ddim_table({**STABLE_DIFFUSION, "prediction_type": prediction_type}, 5)
    step = torch.arange(5)
    sample, outputs = randn(5, 3), (randn(5, 3, seed=1), randn(5, 3, seed=2))
    signal, noise = table.signal[:, None], table.noise[:, None]
    clean = [table.clean_sample_coef[:, None] * sample + table.clean_output_coef[:, None] * each for each in outputs]
    velocity = [signal * (sample - signal * each) / noise - noise * each for each in clean]  # signal eps - noise x_0
    for space, values in (("output", outputs), ("clean", clean), ("velocity", velocity)):
        expected = (values[0] - values[1]).abs() / (outputs[0] - outputs[1]).abs()
        scale = table.error_scale(space)[step]  # type: ignore[arg-type]
        torch.testing.assert_close(scale[:, None].expand_as(expected), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="the space of errors must be"):
        table.error_scale("score")  # type: ignore[arg-type]
