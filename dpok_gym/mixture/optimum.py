"""The best value of DPOK's objective in the mixture world, for any reward of the image.

The objective (Fan et al. 2023, Eq. 8), over policies that choose the means m_t and keep the standard deviations, is

    E[ r(x_0) - beta sum_t KL_t ],    KL_t = ||m_t(x_t) - m_t^ref(x_t)||^2 / (2 std_t^2).

Dynamic programming solves it from the last step to the first, on a grid of x in one or two dimensions:

    V_0 = r,    V_t(x) = max_m  E[ V_{t-1}(m + std_t n) ] - beta ||m - m_t^ref(x)||^2 / (2 std_t^2).

A deterministic step, std_t = 0, stays as it is. The optimum is E[ V_T(x_T) ] with x_T ~ N(0, I), which no policy can
change. All in float64, but for the model's own
float32. The tests compare it with the closed form and with a finer grid: they agree to 2e-5.

Letters used for shapes: n points of a side of the grid, d dimensions, T denoising steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.ndimage import map_coordinates
from torch import Tensor

from dpok_gym.mixture.image import REACH
from dpok_gym.prompts import PromptSet
from dpok_gym.samplers import DenoisingProcess, State, Transition

if TYPE_CHECKING:
    from dpok_gym.worlds import RewardOfLatents

Array = NDArray[np.float64]

#: The grid goes from -SIDE to SIDE: x_T leaves it with a probability below 1e-6 in each dimension.
SIDE = 5.0
#: Distance of its points, by the number of dimensions.
SPACING = {1: 0.02, 2: 0.1}
#: The same for what a run reports of itself, in a sixth of the time; values differ by about 2e-4.
_COARSE = {1: 0.04, 2: 0.25}

#: Images judged at a time.
_CHUNK = 1024


def optimal_value(process: DenoisingProcess, prompts: PromptSet, reward: RewardOfLatents, beta: float) -> float:
    """Computes the largest E[r] - beta KL of any policy; see :class:`dpok_gym.worlds.KnownOptimum`.

    Args:
        process: of a mixture model.
        prompts: its training prompts are drawn by their weights.
        reward: takes latents (B, 1, 1, d) x_0 and a prompt; returns (B,).
        beta: weight of the KL, reward per nat, above 0.
    """
    process = copy.copy(process)  # its count of the denoiser's calls is not touched
    return _mean_over_prompts(prompts, lambda prompt: prompt_value(process, prompt, reward, beta))


def optimal_transition(
    process: DenoisingProcess, prompts: PromptSet, reward: RewardOfLatents, beta: float
) -> Transition:
    """Returns the transition of the policy whose value is :func:`optimal_value`, for the training prompts.

    Its means are interpolated between the points of the grid. Arguments as for :func:`optimal_value`.
    """
    process = copy.copy(process)
    spacing = _COARSE[process.model.latent_shape[-1]]
    x, _ = _grid(process, spacing)
    best_means_of = {_number(process, each): _solve(process, each, reward, beta, spacing)[2] for each in prompts.train}

    def transition(state: State) -> tuple[Tensor, Tensor]:
        mean, std = process.transition(state)
        points = mean.double().cpu().numpy().reshape(len(mean), -1)  # (B, d)
        places = np.stack([state.step.cpu().numpy(), state.conditioning["mixture"].cpu().numpy()], axis=1)
        for step, number in np.unique(places, axis=0).tolist():
            best = best_means_of[number][step]
            if best is not None:
                rows = (places == (step, number)).all(axis=1)
                moved = [interpolate(x, best[..., axis], points[rows]) for axis in range(best.shape[-1])]
                points[rows] = np.stack(moved, axis=-1)
        return torch.from_numpy(points).to(mean).reshape(mean.shape), std

    return transition


def value_of(
    process: DenoisingProcess, prompts: PromptSet, reward: RewardOfLatents, beta: float, transition: Transition
) -> float:
    """Computes E[r] - beta KL of a policy over the training prompts; arguments as for :func:`policy_value`."""
    process = copy.copy(process)
    spacing = _COARSE[process.model.latent_shape[-1]]
    return _mean_over_prompts(prompts, lambda prompt: policy_value(process, prompt, reward, beta, transition, spacing))


def _mean_over_prompts(prompts: PromptSet, value: Callable[[str], float]) -> float:
    return float(np.average([value(prompt) for prompt in prompts.train], weights=prompts.weights or None))


def _number(process: DenoisingProcess, prompt: str) -> int:
    """Returns the number by which the denoiser knows a prompt."""
    return int(process.encode([prompt])["mixture"])


def prompt_value(
    process: DenoisingProcess, prompt: str, reward: RewardOfLatents, beta: float, spacing: float | None = None
) -> float:
    """Computes the optimum for one prompt; arguments as for :func:`optimal_value`.

    Args:
        process: of a mixture model.
        prompt: the prompt.
        reward: of latents.
        beta: weight of the KL.
        spacing: distance of the grid's points; None for :data:`SPACING`.
    """
    points, value, _ = _solve(process, prompt, reward, beta, spacing)
    return _mean_over_noise(points, value)


def _solve(
    process: DenoisingProcess, prompt: str, reward: RewardOfLatents, beta: float, spacing: float | None
) -> tuple[Array, Array, list[Array | None]]:
    """Solves the problem for one prompt; arguments as for :func:`prompt_value`.

    Returns:
        The grid's points (n, ..., n, d); V_T there, (n, ..., n); and for each of the T steps, the noisiest one first,
        the best mean for each mean of the pre-trained model on the grid, (n, ..., n, d), or None if the step is
        deterministic: it has no KL, and stays as it is.
    """
    x, points, value = _begin(process, prompt, reward, spacing)
    means = _means_on_grid(process, prompt, points)
    found: list[Array | None] = []
    for mean, std in zip(means[::-1], process.table.std.double().cpu().numpy()[::-1], strict=True):
        best = None
        if std:
            value, best = best_means(x, smoothed(x, value, std), std, beta)
        found.append(best)
        value = interpolate(x, value, mean)
    return points, value, found[::-1]


def policy_value(
    process: DenoisingProcess,
    prompt: str,
    reward: RewardOfLatents,
    beta: float,
    transition: Transition | None = None,
    spacing: float | None = None,
) -> float:
    """Computes E[r] - beta KL of a policy for one prompt, without drawing anything:

        V_t(x) = E[ V_{t-1}(m_t(x) + std_t n) ] - beta ||m_t(x) - m_t^ref(x)||^2 / (2 std_t^2).

    Args:
        process: of a mixture model.
        prompt: the prompt.
        reward: of latents, see :func:`optimal_value`.
        beta: weight of the KL, reward per nat, at least 0; 0 for the expected reward alone.
        transition: of the policy; None for the pre-trained model.
        spacing: distance of the grid's points; None for :data:`SPACING`.
    """
    x, points, value = _begin(process, prompt, reward, spacing)
    references = _means_on_grid(process, prompt, points)
    means = references if transition is None else _means_on_grid(process, prompt, points, transition)
    stds = process.table.std.double().cpu().numpy()
    for mean, start, std in zip(means[::-1], references[::-1], stds[::-1], strict=True):
        if std:
            cost = beta * ((mean - start) ** 2).sum(-1) / (2 * std**2)
            value = interpolate(x, smoothed(x, value, std), mean) - cost
        else:
            value = interpolate(x, value, mean)
    return _mean_over_noise(points, value)


def _begin(
    process: DenoisingProcess, prompt: str, reward: RewardOfLatents, spacing: float | None
) -> tuple[Array, Array, Array]:
    """Returns the grid along a side (n,), its points (n, ..., n, d), and V_0 there (n, ..., n)."""
    x, points = _grid(process, spacing)
    return x, points, _reward_on_grid(x, points, prompt, reward)


def _grid(process: DenoisingProcess, spacing: float | None) -> tuple[Array, Array]:
    """Returns the grid along a side (n,), and its points (n, ..., n, d)."""
    d = process.model.latent_shape[-1]
    spacing = spacing or SPACING[d]
    half = round(SIDE / spacing)
    x: Array = spacing * np.arange(-half, half + 1, dtype=np.float64)
    return x, np.stack(np.meshgrid(*[x] * d, indexing="ij"), axis=-1)


def _mean_over_noise(points: Array, value: Array) -> float:
    """Returns E[ V_T(x_T) ], x_T ~ N(0, I)."""
    density = np.exp(-0.5 * (points**2).sum(-1))
    return float((density * value).sum() / density.sum())


def _reward_on_grid(x: Array, points: Array, prompt: str, reward: RewardOfLatents) -> Array:
    """Returns the rewards (n, ..., n) of the images of points (n, ..., n, d)."""
    # A point beyond REACH is drawn at REACH, so it is not judged again.
    inside = np.flatnonzero(np.abs(x) <= REACH + 1e-9)
    inner = points[np.ix_(*[inside] * (points.ndim - 1))]
    latents = torch.from_numpy(inner.reshape(-1, 1, 1, points.shape[-1])).float()
    rewards = np.concatenate([reward(part, prompt) for part in latents.split(_CHUNK)])
    return np.pad(rewards.reshape(inner.shape[:-1]), inside[0], mode="edge")


@torch.no_grad()
def _means_on_grid(
    process: DenoisingProcess, prompt: str, points: Array, transition: Transition | None = None
) -> list[Array]:
    """Returns a policy's m_t at the points, T arrays (n, ..., n, d), the noisiest step first."""
    transition = transition or process.transition
    latents = torch.from_numpy(points.reshape(-1, 1, 1, points.shape[-1])).float().to(process.model.device)
    conditioning = process.encode([prompt] * len(latents))
    means = []
    for step in range(process.num_inference_steps):
        mean, _ = transition(process.state(latents, step, conditioning))
        means.append(mean.double().cpu().numpy().reshape(points.shape))
    return means


def smoothed(x: Array, value: Array, std: float) -> Array:
    """Returns E[ value(x + std n) ] with n ~ N(0, I), for values (n, ..., n) on the grid x (n,).

    The sum over the noise is finer than the noise itself, and a cubic spline gives the values between the grid's
    points. Beyond the grid the value is that of its edge.
    """
    noise = np.linspace(-6, 6, 49)
    weights = np.exp(-0.5 * noise**2)
    moved = (x[:, None] + std * noise).clip(x[0], x[-1])
    for axis in range(value.ndim):
        value = np.average(CubicSpline(x, value, axis=axis)(moved), axis=axis + 1, weights=weights)
    return value


def best_means(x: Array, expected: Array, std: float, beta: float) -> tuple[Array, Array]:
    """Finds max_m F(m) - beta ||m - m_0||^2 / (2 std^2), for each m_0 on the grid.

    Args:
        x: (n,) the grid's points along a side.
        expected: (n, ..., n) F on the grid.
        std: of the step.
        beta: weight of the KL.

    Returns:
        The maximum, (n, ..., n), and the m that has it, (n, ..., n, d).
    """
    cost = beta / (2 * std**2)
    d = expected.ndim
    # The maximum over the grid, one dimension after the other, as the cost is a sum over the dimensions.
    best, chosen = expected, []
    for axis in range(d):
        gain = np.moveaxis(best, axis, -1)[..., None, :] - cost * (x[:, None] - x) ** 2  # (..., m_0, m)
        chosen.append(np.moveaxis(gain.argmax(-1), -1, axis))
        best = np.moveaxis(gain.max(-1), -1, axis)
    start = np.stack(np.meshgrid(*[x] * d, indexing="ij"), axis=-1)
    origin = start.copy()
    index = chosen[-1]  # of the last dimension; the earlier ones were chosen given it
    start[..., -1] = x[index]
    if d == 2:
        start[..., 0] = x[np.take_along_axis(chosen[0], index, axis=1)]
    # Newton's method finds the maximum between the grid's points.
    slopes = [CubicSpline(x, expected, axis=axis)(x, 1) for axis in range(d)]
    curvatures = [[CubicSpline(x, slope, axis=axis)(x, 1) for axis in range(d)] for slope in slopes]
    move = start.copy()
    for _ in range(3):
        slope = np.stack([interpolate(x, each, move) for each in slopes], -1) - 2 * cost * (move - origin)
        rows = [np.stack([interpolate(x, each, move, order=1) for each in row], -1) for row in curvatures]
        curvature = np.stack(rows, -2) - 2 * cost * np.eye(d)
        newton = move - np.linalg.solve(curvature, slope[..., None])[..., 0]
        move = newton.clip(start - (x[1] - x[0]), start + (x[1] - x[0]))

    def gain_of(point: Array) -> Array:
        return interpolate(x, expected, point) - cost * ((point - origin) ** 2).sum(-1)

    gain = gain_of(move)
    return np.maximum(gain, best), np.where((gain >= best)[..., None], move, start)


def interpolate(x: Array, values: Array, points: Array, order: Literal[1, 3] = 3) -> Array:
    """Returns values on the grid (n, ..., n) at points (..., d), by splines; beyond the grid, those of its edge."""
    coordinates = np.moveaxis((points - x[0]) / (x[1] - x[0]), -1, 0)
    return map_coordinates(values, coordinates, order=order, mode="nearest")
