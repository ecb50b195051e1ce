"""Steering: its weights by hand, its limits, and the distribution that it aims at where that is known exactly."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from agents import SVDD, BestOf, FKSteering, evaluate
from agents.common.evaluation import sample_images
from agents.common.steering import (
    UNSTEERED,
    ParticleFilter,
    Steering,
    effective_sample_size,
    normalized_weights,
    potential_so_far,
    quantiles,
    systematic_resampling,
)
from dpok_gym.mixture.exact import Array, GridPolicy, tilted_density
from dpok_gym.models import load_model
from dpok_gym.samplers import DenoisingProcess, State
from dpok_gym.vector_env import DenoisingVectorEnv
from tests.agents.common.support import PROMPTS, perturb
from tests.support import assert_same, every_other_fails

T = 3


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- The pure functions


def test_potentials_by_hand() -> None:
    """The exponents of the product of all G so far, from values 1, 3, 2."""
    values = tensor([[[1.0, 3.0, 2.0]]])
    expected = {"difference": (1, 3, 2), "max": (1, 1 + 3, 1 + 3 + 3), "sum": (1, 1 + 4, 1 + 4 + 6)}
    for potential, so_far in expected.items():
        for i in (1, 2, 3):
            assert potential_so_far(values[..., :i], potential).tolist() == [[so_far[i - 1]]]  # type: ignore[arg-type]


def test_weights() -> None:
    scores = tensor([[0.0, math.log(3), -math.inf], [5.0, 5.0, -2.0]])
    torch.testing.assert_close(normalized_weights(scores, 1.0)[0], tensor([0.25, 0.75, 0.0]))
    torch.testing.assert_close(normalized_weights(scores, 0.5)[0], tensor([0.1, 0.9, 0.0]))
    assert normalized_weights(scores, 0.0).tolist() == [[0, 1, 0], [1, 0, 0]]  # of two that are as good the first
    torch.testing.assert_close(normalized_weights(scores, math.inf)[0], tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(normalized_weights(tensor([[-math.inf] * 4]), 1.0), tensor([[0.25] * 4]))


def test_effective_sample_size() -> None:
    sizes = effective_sample_size(tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]]))
    torch.testing.assert_close(sizes, tensor([4.0, 1.0, 2.0]))


def test_quantiles_never_take_a_particle_without_weight() -> None:
    weights = tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    points = tensor([[0.0, 0.49, 0.5, 0.99, 1 - 1e-16]])
    assert quantiles(weights, points).tolist() == [[1, 1, 3, 3, 3]]


def test_systematic_resampling_by_hand() -> None:
    weights = tensor([[0.5, 0.125, 0.125, 0.25], [0.25] * 4])
    # Points (u + 0, 1, 2, 3) / 4 of the cumulative weights 0.5, 0.625, 0.75, 1.
    assert systematic_resampling(weights, tensor([0.1, 0.9])).tolist() == [[0, 0, 1, 3], [0, 1, 2, 3]]
    assert systematic_resampling(weights, tensor([0.6, 0.0])).tolist() == [[0, 0, 2, 3], [0, 1, 2, 3]]


def test_systematic_resampling_is_unbiased_and_even() -> None:
    weights = normalized_weights(torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).double(), 1.0)
    uniforms = torch.arange(10_000).double() / 10_000
    parents = systematic_resampling(weights.expand(10_000, 8), uniforms)
    children = torch.nn.functional.one_hot(parents, 8).sum(1).double()
    torch.testing.assert_close(children.mean(0), 8 * weights[0], rtol=0, atol=2e-3)
    assert (children >= (8 * weights).floor()).all()
    assert (children <= (8 * weights).ceil()).all()


# --- The weights of whole paths


class Path:
    """States of particles as a denoising process would show them, with given values; and a filter's choices."""

    def __init__(self, steering: Steering, values: Tensor) -> None:
        self.values = values  # (T, N, k) of the particle at each place
        self.log_products = torch.zeros(values.shape[1:], dtype=torch.float64)
        _, n, k = values.shape
        generator = torch.Generator().manual_seed(3)
        self.filter = ParticleFilter(
            steering, n, self._value, lambda step: torch.rand(n, generator=generator, dtype=torch.float64)
        )
        self.lineage = torch.arange(n * k)

    def _value(self, state: State, mean: Tensor) -> Tensor:
        return self.values[int(state.step[0])].flatten()

    def walk(self, n_steps: int) -> Iterator[Tensor]:
        """Yields the rows that go on from each step."""
        _, n, k = self.values.shape
        for index in range(n_steps):
            state = State(torch.zeros(n * k, 1, 1, 1), torch.full((n * k,), index), {})
            rows = self.filter(state, state.latents)
            yield torch.arange(n * k) if rows is None else rows


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_the_weights_of_a_path_multiply_to_the_exponential_of_the_reward(potential: Any) -> None:
    """All G of a path, of which some were used up by resampling: their product is exp(r / temperature)."""
    n_steps, n, k, temperature = 5, 3, 4, 0.7
    values = torch.randn(n_steps, n, k, generator=torch.Generator().manual_seed(1)).double()
    steering = FKSteering(k, temperature, potential=potential, ess_threshold=0.8)
    path = Path(steering, values)
    spent = torch.zeros(n, k, dtype=torch.float64)  # log weights that resampling has used up, of each particle's path
    resampled_ever = torch.zeros(n, dtype=torch.bool)
    for rows in path.walk(n_steps):
        before = path.filter._scores.clone()  # 0 where it was just resampled
        parents = rows.reshape(n, k) - k * torch.arange(n)[:, None]
        was_resampled = (before == 0).all(1)
        # What has been spent so far is everything, for a particle that starts anew.
        spent = torch.where(was_resampled[:, None], path.filter._potential, spent.gather(1, parents))
        resampled_ever |= was_resampled
    rewards = torch.randn(n * k, generator=torch.Generator().manual_seed(2)).double()
    path.filter.finish(rewards, n_steps)
    assert resampled_ever.all()
    torch.testing.assert_close(spent + path.filter._scores, rewards.reshape(n, k))
    expected = ((rewards.reshape(n, k) - spent) / temperature).softmax(1)
    torch.testing.assert_close(path.filter.weights, expected)


def test_a_step_by_hand() -> None:
    """Differences of values at temperature 1, and no choice at the second step."""
    values = tensor([[[0.0, math.log(3)]], [[9.0, 9.0]], [[math.log(2), 0.0]]])
    path = Path(FKSteering(2, 1.0, resample_every=2), values)
    steps = path.walk(3)
    next(steps)
    torch.testing.assert_close(path.filter.weights, tensor([[0.25, 0.75]]))
    assert path.filter._values[0, :, 0].tolist() == [0, math.log(3)]  # points u / 2 and (u + 1) / 2 with u < 0.5
    next(steps)
    torch.testing.assert_close(path.filter.weights, tensor([[0.25, 0.75]]))
    next(steps)
    torch.testing.assert_close(path.filter.weights, tensor([[6 / 7, 1 / 7]]))  # rises by log 2 and -log 3


def test_one_candidate_is_the_parent_of_all() -> None:
    values = tensor([[[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], [[0.0, 0.0, 5.0], [1.0, 1.0, 1.0]]])
    chosen = [rows.tolist() for rows in Path(SVDD(3), values).walk(2)]
    assert chosen == [[1, 1, 1, 3, 3, 3], [2, 2, 2, 3, 3, 3]]


def test_svdd_draws_by_the_exponential_of_the_value() -> None:
    n = 4000
    values = tensor([0.0, math.log(3)]).expand(1, n, 2)
    (rows,) = Path(SVDD(2, temperature=1.0), values).walk(1)
    assert (rows.reshape(n, 2)[:, 0] % 2).double().mean().item() == pytest.approx(0.75, abs=0.02)


def test_a_particle_without_a_value_counts_as_the_worst() -> None:
    values = tensor([[[math.nan, -2.0, 4.0], [math.nan, math.inf, -math.inf]]])
    path = Path(FKSteering(3, 1.0, ess_threshold=0.0), values)
    next(path.walk(1))
    assert path.filter._values[..., 0].tolist() == [[-2.0, -2.0, 4.0], [0.0, 0.0, 0.0]]


def test_an_image_without_a_reward_loses() -> None:
    rewards = tensor([math.nan, -3.0, -1.0, math.inf, -math.inf, math.nan])
    for steering in (BestOf(3), FKSteering(3, 0.1), FKSteering(3, 1e-3, choice="draw"), SVDD(3)):
        path = Path(steering, torch.zeros(1, 2, 3, dtype=torch.float64))
        first, second = path.filter.finish(rewards, 1).tolist()
        assert first == 2
        assert second in (3, 4, 5)


# --- Arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestOf(0), "n_particles must be an integer of at least 1, got 0"),
        (lambda: FKSteering(temperature=0.0), "temperature must be a number above 0, got 0"),
        (lambda: FKSteering(potential="min"), "potential must be one of 'difference', 'max', 'sum', got 'min'"),
        (lambda: FKSteering(ess_threshold=2.0), r"ess_threshold must lie in \[0, 1\], got 2"),
        (lambda: FKSteering(choice="first"), "choice must be one of 'best', 'draw', got 'first'"),
        (lambda: FKSteering(resample_every=0), "resample_every must be an integer of at least 1, got 0"),
        (lambda: SVDD(temperature=-1.0), "temperature must be a number of at least 0, got -1"),
        (lambda: SVDD(resample_every=0.5), "resample_every must be an integer of at least 1, got 0.5"),
    ],
)
def test_bad_arguments(make: Callable[[], Steering], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- A known answer: the mixture in one dimension, r = 0.5 x, temperature 0.25

STEPS, TEMPERATURE, X = 10, 0.25, np.linspace(-6, 6, 601)


@pytest.fixture(scope="module")
def process() -> DenoisingProcess:
    return DenoisingProcess(load_model("mixture-1d", "cpu"), num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def reference(process: DenoisingProcess) -> GridPolicy:
    conditioning = process.encode(["two modes"] * len(X))

    @torch.no_grad()
    def mean(index: int, latents: Tensor) -> Tensor:
        return process.transition(process.state(latents, index, conditioning))[0]

    return GridPolicy.of(mean, process.table.std, X)


def reward(x: Array) -> Array:
    return 0.5 * x


def exact_values(reference: GridPolicy) -> list[Array]:
    """temperature log E[exp(r(x_0) / temperature) | x_t] on the grid, of x_T, ..., x_1."""
    weight, dx, values = np.exp(reward(X) / TEMPERATURE), X[1] - X[0], []
    for means, std in zip(reference.means[::-1], reference.std[::-1], strict=True):
        density = np.exp(-0.5 * ((X[None] - means[:, None]) / std) ** 2) / (std * np.sqrt(2 * np.pi))
        weight = dx * density @ weight
        values.append(TEMPERATURE * np.log(weight))
    return values[::-1]


@torch.no_grad()
def draw_particles(
    process: DenoisingProcess, steering: FKSteering, seed: int, values: list[Array] | None = None
) -> tuple[Array, Array]:
    """Returns the final points (k,) of one image's particles and their weights."""
    rng, k = np.random.default_rng(seed), steering.n_particles

    def value(state: State, mean: Tensor) -> Tensor:
        if values is None:
            return torch.from_numpy(reward(process.predicted_clean(state, mean).flatten().double().numpy()))
        x = state.latents.flatten().double().numpy()
        return torch.from_numpy(CubicSpline(X, values[int(state.step[0])])(x))

    def noise(step: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((k, 1, 1, 1), np.float32))

    particles = ParticleFilter(steering, 1, value, lambda step: torch.from_numpy(rng.random(1)))
    for step in process.denoise(noise(-1), process.encode(["two modes"] * k), noise, select=particles):
        latents = step.next_latents
    x = latents.flatten().double().numpy()
    particles.finish(torch.from_numpy(reward(x)), STEPS)
    return x, particles.weights[0].numpy()


def right_mode(reference: GridPolicy) -> float:
    """The probability of x_0 > 0 in the distribution p(x_0) exp(r / temperature)."""
    density = tilted_density(reference, reward, TEMPERATURE)
    return float(density[X > 0].sum() * (X[1] - X[0]))


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
@pytest.mark.parametrize("ess_threshold", [0.0, 0.5, 1.0])
def test_many_particles_are_the_tilted_distribution(
    process: DenoisingProcess, reference: GridPolicy, potential: Any, ess_threshold: float
) -> None:
    """Whatever the potentials and however often they are resampled; the predicted x_0 is not the exact value."""
    # "max" and "sum" tilt each time by more than they should, so few looks leave enough particles for the last weights.
    every = 2 if potential == "difference" else 5
    steering = FKSteering(20_000, TEMPERATURE, every, potential=potential, ess_threshold=ess_threshold)
    x, weights = draw_particles(process, steering, seed=0)
    density = tilted_density(reference, reward, TEMPERATURE) * (X[1] - X[0])
    assert right_mode(reference) > 0.95  # it is 0.5 without the tilt
    assert (weights * (x > 0)).sum() == pytest.approx(right_mode(reference), abs=0.01)
    assert (weights * x).sum() == pytest.approx((density * X).sum(), abs=0.02)


@pytest.mark.slow
def test_the_error_falls_with_the_particles(process: DenoisingProcess, reference: GridPolicy) -> None:
    """As 1 / sqrt(k), and with the exact value from the first step all weights are nearly equal."""
    exact, values = right_mode(reference), exact_values(reference)
    errors = []
    for k in (16, 256):
        shares = []
        for seed in range(64):
            x, weights = draw_particles(process, FKSteering(k, TEMPERATURE), seed, values)
            # The exact value leaves nothing to be weighed at the end but the noise of the last step.
            assert effective_sample_size(torch.from_numpy(weights)[None]).item() > 0.9 * k
            shares.append((weights * (x > 0)).sum())
        errors.append(math.sqrt(np.mean((np.array(shares) - exact) ** 2)))
    assert errors[1] < 0.02
    assert 2 < errors[0] / errors[1] < 8  # 4 in expectation


def test_an_infinite_temperature_changes_nothing(process: DenoisingProcess) -> None:
    steered, weights = draw_particles(process, FKSteering(64, math.inf), seed=0)
    plain, _ = draw_particles(process, FKSteering(64, 1.0, ess_threshold=0.0), seed=0)
    np.testing.assert_array_equal(steered, plain)
    np.testing.assert_allclose(weights, 1 / 64)


# --- Images


@pytest.fixture
def policy(make_agent: Callable[..., Any], make_env: Callable[..., Any]) -> Any:
    # One state at a time in the network: else its last bits may depend on the others of the batch.
    return perturb(make_agent(make_env(1), policy_kwargs={"max_batch_size": 1}).policy)


ONE_PARTICLE = [BestOf(1), SVDD(1), FKSteering(1, 0.1), FKSteering(1, 0.1, potential="max", choice="draw")]


@pytest.mark.slow
@pytest.mark.parametrize("steering", ONE_PARTICLE, ids=str)
def test_one_particle_is_the_policy(steering: Steering, policy: Any, make_env: Callable[..., Any]) -> None:
    assert_same(evaluate(policy, make_env(2), PROMPTS, 5, steering=steering), evaluate(policy, make_env(2), PROMPTS, 5))


@pytest.mark.slow
def test_without_preference_the_images_are_the_policys(policy: Any, make_env: Callable[..., Any]) -> None:
    """FK steering with an infinite temperature draws one of the images that the policy draws anyway."""
    env = make_env(6)
    steered = evaluate(policy, env, PROMPTS, 5, steering=FKSteering(3, math.inf, choice="draw"))
    best = evaluate(policy, env, PROMPTS, 5, steering=FKSteering(3, math.inf))
    # Without any choice on the way, the best of the particles is the best of three.
    assert_same(best, evaluate(policy, env, PROMPTS, 5, steering=BestOf(3)))
    assert (steered.reward <= best.reward).all()
    assert (steered.reward < best.reward).any()


@pytest.mark.slow
@pytest.mark.parametrize("reference", [False, True])
def test_best_of_is_the_best_of_all(policy: Any, make_env: Callable[..., Any], reference: bool) -> None:
    # Their sum tells which is the best, neither of them alone does.
    rewards = {"jpeg-compressibility": 1.0, lambda images, prompts: 10 * images.mean((1, 2, 3)): -1.0}
    env = make_env(2, reward=rewards)
    drawn = [evaluate(policy, env, PROMPTS, 5, reference, BestOf(k)) for k in (1, 2, 3, 4)]
    assert_same(drawn[0], evaluate(policy, env, PROMPTS, 5, reference))
    for fewer, more in itertools.pairwise(drawn):
        # More candidates only add to fewer, so the image stays, or is a better one.
        same = (fewer.images == more.images).all((1, 2, 3))
        assert (more.reward[~same] > fewer.reward[~same]).all()
        assert_same(more.step_kl[same], fewer.step_kl[same])
    assert (drawn[-1].reward > drawn[0].reward).any()
    assert drawn[-1].prompts == list(PROMPTS)
    components = drawn[-1].rewards
    first, second = components.values()
    np.testing.assert_allclose(drawn[-1].reward, first - second, rtol=1e-5)


STEERED = [BestOf(3), FKSteering(3, 0.01), SVDD(3, 0.01)]


@pytest.mark.slow
@pytest.mark.parametrize("steering", STEERED, ids=lambda steering: type(steering).__name__)
def test_an_image_depends_on_its_own_seed_and_prompt_only(
    steering: Steering, policy: Any, make_env: Callable[..., Any]
) -> None:
    all_three = evaluate(policy, make_env(9), PROMPTS, 3, steering=steering)
    for n_envs in (1, 7):
        assert_same(evaluate(policy, make_env(n_envs), PROMPTS, 3, steering=steering), all_three)
    last = evaluate(policy, make_env(9), PROMPTS[2:], 5, steering=steering)
    assert_same(last.images, all_three.images[2:])
    assert_same(last.step_kl, all_three.step_kl[2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steering", "rewards"),
    [(UNSTEERED, 1), (BestOf(4), 4), (FKSteering(4, 0.1, resample_every=2), 12), (SVDD(4), 16), (SVDD(1), 1)],
)
def test_costs(steering: Steering, rewards: int, make_env: Callable[..., Any]) -> None:
    scored: list[int] = []

    def count(images: Tensor, prompts: list[str]) -> Tensor:
        scored.append(len(images))
        return images.mean((1, 2, 3))

    env = make_env(2, reward=count)
    sample_images(env.process, env, PROMPTS, 0, steering=steering)
    assert env.process.num_function_evaluations == len(PROMPTS) * steering.denoiser_calls(T)
    assert sum(scored) == len(PROMPTS) * steering.reward_calls(T) == len(PROMPTS) * rewards


@pytest.mark.slow
def test_the_kl_is_that_of_the_images_own_path(policy: Any, make_env: Callable[..., Any]) -> None:
    """A policy whose KL is the square of the state: so the KL of each step can be followed to its ancestors."""
    env, paths = make_env(4), []

    def reference(state: State) -> tuple[Tensor, Tensor]:
        paths.append(state.latents.flatten(1)[:, 0])
        mean, std = env.process.transition(state)
        offset = torch.zeros_like(mean)
        offset[:, 0, 0, 0] = state.latents[:, 0, 0, 0]
        return mean + offset * std.reshape(-1, 1, 1, 1), std

    steering = SVDD(4)
    evaluation = sample_images(env.process, env, PROMPTS[:1], 0, reference=reference, steering=steering)
    # All four are copies of one ancestor before the noise of each step.
    assert all(len(states.unique()) == 1 for states in paths)
    np.testing.assert_allclose(evaluation.step_kl[0], [float(0.5 * states[0] ** 2) for states in paths], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FKSteering, SVDD])
def test_without_noise_only_finished_images_are_chosen_from(
    make_env: Callable[..., Any], method: type[Steering]
) -> None:
    """Copies would be the same image in the end, for k times the work."""
    env = make_env(4, eta=0.0)
    with pytest.raises(ValueError, match=rf"{method.__name__} copies .* so use BestOf\(4\)"):
        sample_images(env.process, env, [PROMPTS[0]], 0, steering=method(4))
    windowed = make_env(4, sde_steps=(1, 1))
    for sampler, steering in ((env, method(1)), (env, BestOf(4)), (windowed, method(4))):
        assert len(sample_images(sampler.process, sampler, [PROMPTS[0]], 0, steering=steering)) == 1


def test_masked_images_lose(make_env: Callable[..., Any]) -> None:
    env = make_env(4, reward=every_other_fails, non_finite="mask", decode_batch_size=4)
    for steering in (BestOf(2), FKSteering(2, 0.01), SVDD(2)):
        evaluation = sample_images(env.process, env, PROMPTS, 0, steering=steering)
        assert np.isfinite(evaluation.reward).all()


@pytest.mark.slow
def test_more_particles_have_more_reward() -> None:
    env = DenoisingVectorEnv(
        32,
        prompts="three green squares",
        reward={"shapes-preference": 1.0},
        num_inference_steps=5,
        decode_batch_size=16,
        device="cpu",
    )

    def mean_reward(steering: Steering) -> float:
        return sample_images(env.process, env, list(env.prompts.train) * 24, 0, steering=steering).mean_reward

    alone = mean_reward(UNSTEERED)
    for make in (BestOf, partial(FKSteering, temperature=0.3, resample_every=2), partial(SVDD, resample_every=2)):
        two, six = (mean_reward(make(n_particles=k)) for k in (2, 6))
        assert alone + 0.3 < two
        assert two + 0.05 < six
