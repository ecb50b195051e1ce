"""The tables of flow matching against numbers by other codes, diffusers' own steps, and Gaussian data."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LTXEulerAncestralRFScheduler
from torch import Tensor

from dpok_gym import diffusion
from dpok_gym.samplers import TransitionTable, make_flow_table
from dpok_gym.samplers.flow_matching import KERNELS

#: The schedulers of Stable Diffusion 3.5 and of FLUX.1.
SD35: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
MEAN_FORM = ["ddim", "cps", "precise", "ode"]


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def flux_table(n_steps: int, kernel: Any, eta: float | None = None, **arguments: Any) -> TransitionTable:
    """The table of FLUX for 1024 x 1024 pixels, on its pipeline's levels."""
    return make_flow_table(FLUX, n_steps, kernel, eta, sigmas="trailing", sequence_length=4096, **arguments)


# The numbers of the published codes for Stable Diffusion 3.5 in 4 and 10 steps, and for FLUX in 10.
PRINTED: list[tuple[str, int, str, float, list[list[float]]]] = [
    (
        "sd35",
        4,
        "flow-sde",
        0.7,
        [[0.755, 0.5601, 0.6347, 0.9978], [-0.1423, -0.3181, -0.7386, -0.0111], [0.7, 0.8687, 0.6633, 0.0063]],
    ),
    (
        "sd35",
        4,
        "precise",
        1.0,
        [[0.1423, 0.6996, 0.9918, 1], [-0.1423, -0.2983, -0.5965, -0.0089], [0.8577, 0.5211, 0.0089, 0]],
    ),
    (
        "sd35",
        10,
        "flow-sde",
        0.7,
        [
            [0.755, 0.7125, 0.8426, 0.8841, 0.9029, 0.912, 0.9155, 0.9145, 0.9087, 0.9978],
            [-0.0399, -0.0582, -0.0693, -0.0838, -0.1034, -0.1309, -0.1709, -0.2326, -0.3351, -0.0111],
            [0.7, 0.743, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.282, 0.2254, 0.0063],
        ],
    ),
    (
        "sd35",
        10,
        "dance-sde",
        0.3,
        [
            [0.9982, 0.9978, 0.9973, 0.9965, 0.9953, 0.9933, 0.9897, 0.9819, 0.9564, 0.955],
            [-0.0399, -0.0469, -0.0559, -0.0678, -0.0841, -0.1071, -0.1414, -0.1965, -0.3006, -0.0535],
            [0.0599, 0.0649, 0.0708, 0.0778, 0.0865, 0.0973, 0.1112, 0.1297, 0.1556, 0.0283],
        ],
    ),
    (
        "sd35",
        10,
        "cps",
        0.8,
        [
            [0.3366, 0.3689, 0.4073, 0.4539, 0.5113, 0.5839, 0.6788, 0.8079, 0.9938, 1],
            [-0.0399, -0.0719, -0.107, -0.145, -0.1855, -0.2269, -0.2651, -0.2896, -0.2736, -0.0089],
            [0.9131, 0.8686, 0.8157, 0.7517, 0.6727, 0.5727, 0.4421, 0.2644, 0.0085, 0],
        ],
    ),
    (
        "sd35",
        10,
        "ddim",
        1.0,
        [
            [0.0399, 0.4864, 0.6327, 0.7041, 0.746, 0.775, 0.802, 0.8452, 0.9913, 1],
            [-0.0399, -0.0673, -0.0875, -0.1094, -0.1363, -0.171, -0.2161, -0.2697, -0.2754, -0.0089],
            [0.9601, 0.8212, 0.7036, 0.6166, 0.5429, 0.4694, 0.3807, 0.2492, 0.0089, 0],
        ],
    ),
    (
        "flux",
        10,
        "flow-sde",
        0.7,
        [
            [0.755, 0.7162, 0.8459, 0.8876, 0.907, 0.9169, 0.9217, 0.9228, 0.9204, 0.914],
            [-0.034, -0.049, -0.0574, -0.0682, -0.0824, -0.1015, -0.1281, -0.1667, -0.2259, -0.3234],
            [0.7, 0.7405, 0.5344, 0.4449, 0.392, 0.3552, 0.3258, 0.298, 0.2649, 0.2113],
        ],
    ),
    (
        "flux",
        10,
        "ddim",
        1.0,
        [
            [0.034, 0.4852, 0.6331, 0.7051, 0.7468, 0.774, 0.7946, 0.8162, 0.8557, 1],
            [-0.034, -0.0569, -0.073, -0.09, -0.1103, -0.1359, -0.169, -0.212, -0.2621, -0.2598],
            [0.966, 0.8301, 0.7152, 0.6325, 0.5661, 0.5053, 0.4405, 0.3584, 0.2327, 0],
        ],
    ),
]


@pytest.mark.parametrize(("family", "n_steps", "kernel", "eta", "printed"), PRINTED)
def test_published_numbers(family: str, n_steps: int, kernel: Any, eta: float, printed: list[list[float]]) -> None:
    make = flux_table if family == "flux" else lambda *arguments: make_flow_table(SD35, *arguments)
    table = make(n_steps, kernel, eta)
    found = torch.stack([table.sample_coef, table.output_coef, table.std])
    torch.testing.assert_close(found, torch.tensor(printed), rtol=0, atol=6e-5)


def test_noise_levels_are_those_of_the_pipelines() -> None:
    sd35 = make_flow_table(SD35, 10)
    # The last jump is that of diffusers issue 13243: the smallest sigma is shifted twice.
    levels = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089]
    torch.testing.assert_close(sd35.noise, torch.tensor(levels), rtol=0, atol=6e-5)
    explicit = make_flow_table(SD35, 10, sigmas="trailing").noise[-2:].tolist()
    assert explicit == pytest.approx([0.4286, 0.25], abs=1e-4)
    flux = [1, 0.966, 0.9266, 0.8805, 0.8257, 0.7595, 0.678, 0.5751, 0.4412, 0.2598]
    torch.testing.assert_close(flux_table(10, "ddim").noise, torch.tensor(flux), rtol=0, atol=6e-5)


@pytest.mark.parametrize(("length", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15)])
def test_shift_by_the_images_size(length: int, mu: float) -> None:
    found = make_flow_table(FLUX, 4, sigmas="trailing", sequence_length=length).noise
    before = torch.tensor([1, 0.75, 0.5, 0.25])
    torch.testing.assert_close(found, math.exp(mu) / (math.exp(mu) + 1 / before - 1))
    assert make_flow_table(SD35, 4, sequence_length=length).noise.equal(make_flow_table(SD35, 4).noise)


@pytest.mark.parametrize(("length", "n_steps", "mu"), [(4096, 10, 2.2562), (4096, 50, 2.0233), (8192, 10, 1.8433)])
def test_empirical_shift(length: int, n_steps: int, mu: float) -> None:
    """FLUX.2's shift depends on the number of steps too, unless the image is large."""
    flux2 = FLUX | {"dynamic_shift": "empirical"}
    found = make_flow_table(flux2, n_steps, sigmas="trailing", sequence_length=length).noise
    before = torch.linspace(1, 1 / n_steps, n_steps)
    torch.testing.assert_close(found, math.exp(mu) / (math.exp(mu) + 1 / before - 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_columns(kernel: Any) -> None:
    table = make_flow_table(SD35, 10, kernel)
    timesteps, *others = vars(table).values()
    assert {column.dtype for column in (timesteps, *others)} == {torch.float32}
    assert {column.shape for column in others} == {(10,)}
    assert all(column.isfinite().all() for column in others)
    torch.testing.assert_close(timesteps, 1000 * table.noise)  # not whole numbers
    assert (table.signal + table.noise == 1).all()
    assert table.stochastic.tolist() == {"ode": [False] * 10, "flow-sde": [True] * 10, "dance-sde": [True] * 10}.get(
        kernel, [True] * 9 + [False]
    )
    assert (table.output_weights() > 0).equal(table.stochastic)
    assert not (table.exploring & ~table.stochastic).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_perfect_output_is_the_velocity(kernel: Any) -> None:
    """And from it, the mean-form kernels reach level n with exactly its signal and its noise."""
    table = flux_table(8, kernel)
    step, clean, noise = torch.arange(8), randn(8, 4, 6, 6), randn(8, 4, 6, 6, seed=1)
    noisy = table.add_noise(step, clean, noise)
    velocity = table.target(step, clean, noisy)
    torch.testing.assert_close(velocity, noise - clean, rtol=1e-4, atol=1e-4)
    next_noise = torch.cat([table.noise[1:], torch.zeros(1)])
    # The mean is (1 - n) x_0 + c eps for all kernels; c and std make the noise.
    left = table.mean(step, noisy, velocity) - diffusion.expand(1 - next_noise, clean) * clean
    old = (left * noise).sum((1, 2, 3)) / noise.square().sum((1, 2, 3))
    torch.testing.assert_close(left, diffusion.expand(old, noise) * noise, rtol=1e-3, atol=1e-4)
    total = (old.square() + table.std.square()).sqrt()
    if kernel in MEAN_FORM:
        torch.testing.assert_close(total, next_noise, rtol=1e-5, atol=1e-5)
    else:
        assert (total > next_noise + 1e-5).all()


def test_flow_sdes_excess_of_noise() -> None:
    """It is eta^2 h^2 / (1 - s) + eta^4 h^2 / (4 (1 - s)^2), in units of variance, after the first step."""
    table, eta = make_flow_table(SD35, 10, "flow-sde", 0.7), 0.7
    s, n = table.noise.double()[1:], torch.cat([table.noise.double()[2:], torch.zeros(1).double()])
    old = (table.output_coef[1:] + s * (1 - n)) / (1 - s)  # B = (1 - s) c - (1 - n) s
    excess = old**2 + table.std[1:].double() ** 2 - n**2
    h = s - n
    torch.testing.assert_close(excess, eta**2 * h**2 / (1 - s) + eta**4 * h**2 / (4 * (1 - s) ** 2), rtol=0, atol=1e-5)


def step_of(scheduler: Any, table: TransitionTable, index: int, output: Tensor, latents: Tensor, seed: int) -> Tensor:
    """A scheduler's own step, whose noise comes from the seed."""
    scheduler._step_index = index  # by its place: some schedules have a timestep twice
    timestep = table.timesteps[index]
    return scheduler.step(output, timestep, latents, generator=torch.Generator().manual_seed(seed)).prev_sample


@pytest.mark.parametrize(
    ("kernel", "eta", "stochastic_sampling"), [("ode", None, False), ("ddim", 0.0, False), ("cps", 1.0, True)]
)
@pytest.mark.parametrize("family", ["sd35", "flux"])
@pytest.mark.parametrize("n_steps", [1, 4, 28])
def test_equals_diffusers_euler(
    kernel: Any, eta: float | None, stochastic_sampling: bool, family: str, n_steps: int
) -> None:
    config, arguments = SD35, {}
    table = make_flow_table(SD35, n_steps, kernel, eta)
    if family == "flux":
        config, arguments = FLUX, {"mu": 1.15, "sigmas": np.linspace(1, 1 / n_steps, n_steps).tolist()}
        table = flux_table(n_steps, kernel, eta)
    known = {name: value for name, value in config.items() if name != "_class_name"}
    scheduler = FlowMatchEulerDiscreteScheduler(**known, stochastic_sampling=stochastic_sampling)
    scheduler.set_timesteps(n_steps, **arguments)
    assert torch.equal(table.timesteps, scheduler.timesteps)
    for index in range(n_steps):
        latents, output, noise = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2), randn(2, 4, 8, 8, seed=index)
        expected = step_of(scheduler, table, index, output, latents, index)
        step = torch.full((2,), index)
        found = diffusion.sample(table.mean(step, latents, output), table.std[step], noise)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("kernel", "eta"), [("ddim", 1.0), ("ddim", 0.3), ("cps", 0.5), ("precise", 1.5), ("ode", 0.0)]
)
def test_equals_diffusers_ancestral_step(kernel: Any, eta: float) -> None:
    """The ancestral scheduler keeps the levels too, so where it has as much noise, its mean is ours.

    It renews the noise by going down to level d and up again: (1 - n) d / (1 - d) of the old noise is left at level n.
    """
    table = make_flow_table(SD35, 10, kernel, eta)
    levels = torch.cat([table.noise, torch.zeros(1)]).double()
    for index in range(1, 9):  # at s = 1 all noise is one; at the last step both return x_0
        s, n, std = levels[index].item(), levels[index + 1].item(), table.std[index].item()
        old = math.sqrt(max(n**2 - std**2, 0))
        down = old / (1 - n + old)
        scheduler = LTXEulerAncestralRFScheduler(eta=(down / n - 1) / (n / s - 1))
        scheduler.set_timesteps(sigmas=levels.tolist())
        latents, output, noise = (randn(2, 4, 8, 8, seed=index + k) for k in (100, 200, 0))
        expected = step_of(scheduler, table, index, output, latents, index)
        step = torch.full((2,), index)
        found = diffusion.sample(table.mean(step, latents, output), table.std[step], noise)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 0.9])
def test_eta_is_that_of_ddim(eta: float) -> None:
    """x_s / sqrt((1 - s)^2 + s^2) is a variance-preserving diffusion; diffusers' DDIM takes the same steps there.

    Not with an eta of 1: where all noise is new, diffusers takes the root of a rounding error below 0.
    """
    n_steps = 8
    table = make_flow_table(SD35, n_steps, "ddim", eta)
    s = table.noise.double()
    scale = ((1 - s) ** 2 + s**2).sqrt()
    alphas = ((1 - s) / scale).square().flip(0)  # of the training timesteps, the cleanest one first
    betas = 1 - alphas / torch.cat([torch.ones(1).double(), alphas[:-1]])
    scheduler = DDIMScheduler(
        n_steps, trained_betas=betas.numpy().astype(np.float64), prediction_type="sample", clip_sample=False
    )
    scheduler.alphas_cumprod = alphas  # not rounded, and exactly 0 at s = 1
    scheduler.set_timesteps(n_steps)
    next_scale = torch.cat([scale[1:], torch.ones(1).double()])
    for index, timestep in enumerate(scheduler.timesteps):
        latents, velocity, noise = (randn(2, 4, seed=3 * index + k).double() for k in range(3))
        clean = latents - s[index] * velocity
        there = scheduler.step(clean, timestep, latents / scale[index], eta=eta, variance_noise=noise).prev_sample
        step = torch.full((2,), index)
        found = diffusion.sample(table.mean(step, latents, velocity), table.std[step], noise)
        torch.testing.assert_close(found.double(), there * next_scale[index], rtol=1e-4, atol=1e-5)


def test_precise_is_ddim_with_other_words() -> None:
    ddim, precise = make_flow_table(SD35, 10, "ddim", 1.0), make_flow_table(SD35, 10, "precise", math.sqrt(2))
    for column, other in zip(vars(ddim).values(), vars(precise).values(), strict=True):
        torch.testing.assert_close(column, other, rtol=1e-6, atol=1e-6)


def test_flow_sdes_eta_of_many_steps() -> None:
    """sqrt(2) for 'flow-sde' is 1 for 'ddim'."""
    ddim, flow = make_flow_table(SD35, 1000, "ddim", 1.0), make_flow_table(SD35, 1000, "flow-sde", math.sqrt(2))
    middle = slice(300, 900)
    torch.testing.assert_close(ddim.std[middle], flow.std[middle], rtol=0.02, atol=0)


def spread(table: TransitionTable) -> float:
    """The std of samples of N(0, 1) data, drawn with the exact velocity, which is linear in x_s."""
    s, variance = table.noise.double(), torch.tensor(1.0).double()
    velocity = (2 * s - 1) / ((1 - s) ** 2 + s**2)  # E[eps - x_0 | x_s] / x_s
    gains = table.sample_coef + table.output_coef * velocity
    for gain, std in zip(gains, table.std.double(), strict=True):
        variance = gain**2 * variance + std**2
    return variance.sqrt().item()


@pytest.mark.parametrize(
    ("kernel", "eta", "ten", "thousand"),
    [
        ("ode", 0.0, 0.818, 0.998),
        ("flow-sde", 0.7, 0.885, 1.001),
        ("dance-sde", 0.3, 0.824, 0.998),
        ("ddim", 1.0, 0.722, 0.995),
        ("ddim", 0.5, 0.801, 0.998),
        ("precise", 1.5, 0.713, 0.995),
        ("cps", 0.8, 0.674, 0.804),  # this one never has the variance of the data
    ],
)
def test_samples_of_many_steps_have_the_datas_spread(kernel: Any, eta: float, ten: float, thousand: float) -> None:
    found = [spread(make_flow_table(SD35, n_steps, kernel, eta)) for n_steps in (10, 1000)]
    assert found == pytest.approx([ten, thousand], abs=1e-3)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "ode"])
def test_a_window_of_stochastic_steps(kernel: Any) -> None:
    whole, ode = make_flow_table(SD35, 10, kernel), make_flow_table(SD35, 10, "ode")
    window = make_flow_table(SD35, 10, kernel, sde_steps=(2, 3))
    inside = torch.tensor([2 <= step < 5 for step in range(10)])
    assert window.stochastic.equal(inside)
    for name in ("sample_coef", "output_coef", "std"):
        expected = torch.where(inside, getattr(whole, name), getattr(ode, name))
        torch.testing.assert_close(getattr(window, name), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(make_flow_table(SD35, 10, kernel, sde_steps=[0, 10]).std, whole.std)


def test_the_noise_that_stays_in_the_image() -> None:
    """As the documentation of the kernels says."""
    assert flux_table(10, "flow-sde").std[-1].item() == pytest.approx(0.21, abs=5e-3)
    assert flux_table(10, "dance-sde").std[-1].item() == pytest.approx(0.15, abs=5e-3)
    assert make_flow_table(SD35, 10, "flow-sde").std[-2:].tolist() == pytest.approx([0.225, 0.006], abs=5e-4)
    assert make_flow_table(SD35, 10, "dance-sde").std[-1].item() == pytest.approx(0.03, abs=5e-3)
    for kernel in MEAN_FORM:
        assert flux_table(10, kernel).std[-1] == 0  # type: ignore[arg-type]


def test_one_step_is_deterministic() -> None:
    assert make_flow_table(SD35, 1).std.tolist() == [0]
    assert make_flow_table(SD35, 1, "flow-sde", 0.7).std.tolist() == pytest.approx([0.7])


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"kernel": "euler"}, "kernel of a flow-matching model must be one of 'ddim', 'flow-sde'"),
        ({}, {"eta": 1.5}, "eta must lie in \\[0, 1\\], got 1.5"),
        ({}, {"kernel": "cps", "eta": 1.5}, "eta must lie in \\[0, 1\\], got 1.5"),
        ({}, {"kernel": "flow-sde", "eta": -0.1}, "eta must be a number of at least 0, got -0.1"),
        ({}, {"kernel": "flow-sde", "eta": math.nan}, "eta must be a number of at least 0, got nan"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({}, {"num_inference_steps": 1001}, "num_inference_steps must be an integer of at most 1,000, got 1001"),
        ({"prediction_type": "epsilon"}, {}, "predict the flow's velocity, but its prediction_type is 'epsilon'"),
        ({"_class_name": "FlowMatchLCMScheduler"}, {}, "a FlowMatchLCMScheduler; the only flow-matching scheduler"),
        ({"_class_name": "DDIMScheduler"}, {}, "a DDIMScheduler; the only flow-matching scheduler"),
        ({"invert_sigmas": True}, {}, "schedulers with invert_sigmas, as Mochi has, are not supported"),
        (
            {"use_dynamic_shifting": True},
            {},
            "shifts the noise levels by the image's size \\(use_dynamic_shifting\\): give the s",
        ),
        ({"use_dynamic_shifting": True}, {"sequence_length": 0}, "sequence_length must be an integer of at least 1"),
        (
            {"use_dynamic_shifting": True, "dynamic_shift": "other"},
            {"sequence_length": 256},
            "dynamic_shift must be one of 'linear', 'empirical', got 'other'",
        ),
        ({}, {"sigmas": [1.0, 0.5]}, "one noise level for each of the 4 steps, got 2"),
        ({}, {"sigmas": [1.0, 0.5, 0.5, 0.2]}, "must fall at every step, but step 1 goes from 0.75 to 0.75"),
        ({}, {"sigmas": [0.2, 0.5, 0.7, 1.0]}, "must fall at every step, but step 0"),
        ({}, {"sigmas": [1.0, 0.5, 0.2, 0.0]}, "must fall at every step, but step 3 goes from 0 to 0"),
        ({"shift": 1.0}, {"sigmas": [1.2, 0.5, 0.2, 0.1]}, "must lie in \\[0, 1\\], got 0 to 1.2"),
        ({}, {"sigmas": [math.nan, 0.5, 0.2, 0.1]}, "must lie in \\[0, 1\\], got nan"),
        (
            {"shift": 1.0},
            {"sigmas": [0.9999, 0.75, 0.5, 0.25], "kernel": "flow-sde"},
            "'flow-sde' explodes at step 0, from sigma 0.9999 to 0.75: its variance is divided by 1 - sigma, which "
            "gives noise of 35; begin at sigma 1 exactly",
        ),
        (
            {},
            {"sde_steps": (3, 2)},
            "sde_steps=\\(3, 2\\) ends after step 4, but the last of the 4 denoising steps is s",
        ),
        ({}, {"sde_steps": (-1, 2)}, "the first of sde_steps must be an integer of at least 0, got -1"),
        ({}, {"sde_steps": (0, 0)}, "the number of sde_steps must be an integer of at least 1, got 0"),
        ({}, {"sde_steps": (0, 1.5)}, "the number of sde_steps must be an integer"),
        ({}, {"sde_steps": (1,)}, "sde_steps must be two integers"),
        ({}, {"sde_steps": "12"}, "sde_steps must be two integers"),
    ],
)
def test_bad_input(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_flow_table(SD35 | changes, **{"num_inference_steps": 4, **arguments})


def test_the_other_kernels_may_begin_below_1() -> None:
    for kernel in KERNELS:
        if kernel != "flow-sde":
            make_flow_table(SD35, 4, kernel, sigmas=[0.9999, 0.75, 0.5, 0.25])  # type: ignore[arg-type]
