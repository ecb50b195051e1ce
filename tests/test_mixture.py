"""The mixture model: its data and score, the picture of a point, the exact answers, and the environment around it."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from conftest import GYMNASIUM_ADVICE
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dpok_gym import diffusion, load_model, make_reward, pretrained_policy
from dpok_gym.mixture.data import MIXTURES, GaussianMixture
from dpok_gym.mixture.exact import GaussianSampler, GridPolicy, best_policy, tilted_density
from dpok_gym.mixture.model import MixtureDenoiser, MixtureModel
from dpok_gym.mixture.picture import PIXELS_PER_UNIT, REACH, draw_dots, read_dots
from dpok_gym.models.lora import pretrained_copy

GRID = np.linspace(-6, 6, 601)
ALL = [(d, prompt) for d, mixtures in MIXTURES.items() for prompt in mixtures]


def torch_mixture(data: GaussianMixture, alpha_bar: float) -> MixtureSameFamily:
    """The same noised mixture, by torch's own classes."""
    identity = torch.eye(data.means.shape[-1]).double()
    parts = MultivariateNormal(alpha_bar**0.5 * data.means, alpha_bar * data.covariances + (1 - alpha_bar) * identity)
    return MixtureSameFamily(Categorical(logits=data.log_weights), parts)


def sampler_of(prompt: str, n_steps: int) -> tuple[MixtureModel, diffusion.Schedule, GaussianSampler]:
    model = load_model("mixture", "cpu")
    schedule = diffusion.make_schedule(model.scheduler_config, n_steps)
    return model, schedule, GaussianSampler.of(model.mixtures[prompt], schedule, model.denoiser.alphas_cumprod)


def pretrained_on_grid(prompt: str, n_steps: int) -> GridPolicy:
    model = load_model("mixture-1d", "cpu")
    schedule = diffusion.make_schedule(model.scheduler_config, n_steps)
    conditioning = model.encode(model.tokenize([prompt] * len(GRID)))

    def mean(t: int, latents: torch.Tensor) -> torch.Tensor:
        steps = torch.full((len(latents),), t)
        return schedule.mean(steps, latents, model.predict(latents, schedule.timesteps[steps], conditioning))

    return GridPolicy.of(mean, schedule.std, GRID)


def variance(policy: GridPolicy) -> float:
    return policy.expectation(lambda x: x**2) - policy.expectation(lambda x: x) ** 2


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


@pytest.mark.parametrize("name", ["mixture", "mixture-1d"])
def test_the_denoiser_is_exact_for_every_prompt_and_timestep(name: str) -> None:
    model = load_model(name, "cpu")
    for prompt, data in model.mixtures.items():
        for timestep in (1, 500, 999):
            alpha_bar = model.denoiser.alphas_cumprod[timestep].item()
            x = torch.randn(20, *model.latent_shape)
            points = x.flatten(1).double().requires_grad_(True)
            (score,) = torch.autograd.grad(torch_mixture(data, alpha_bar).log_prob(points).sum(), points)
            conditioning = model.encode(model.tokenize([prompt] * 20))
            noise = model.predict(x, torch.full((20,), timestep), conditioning)
            assert noise.shape == x.shape
            torch.testing.assert_close(
                noise.flatten(1).double(), -math.sqrt(1 - alpha_bar) * score, atol=2e-4, rtol=2e-4
            )


def test_a_constant_tilt_of_gaussian_data_is_the_tilted_data() -> None:
    model, slope = load_model("mixture", "cpu"), torch.tensor([0.5, -1.0])
    tilted = model.mixtures["one gaussian"].tilted(slope.double())
    tuned = pretrained_copy(model.denoiser)
    tuned.network[-1].bias.data = slope
    expected = MixtureDenoiser([tilted], model.denoiser.alphas_cumprod)
    x, timesteps, first = torch.randn(3, 1, 1, 2), torch.tensor([10, 500, 990]), torch.zeros(3, dtype=torch.int64)
    noise = model.predict(x, timesteps, {"mixture": first}, denoiser=tuned)
    torch.testing.assert_close(noise, expected(x, timesteps, first), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(noise, model.predict(x, timesteps, {"mixture": first}), atol=0.01)
    assert not any(parameter.requires_grad for parameter in model.denoiser.parameters())


def test_a_position_can_be_read_from_its_picture() -> None:
    points = 2 * REACH * torch.rand(500, 2) - REACH
    pictures = draw_dots(points)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert (read_dots(pictures) - points).abs().max() < 5e-6  # float32: seventh digit of a coordinate up to 3


def test_where_the_dot_is() -> None:
    (picture,) = draw_dots(torch.tensor([[1.0, 2.0]]))
    row, column = divmod(picture[0].argmin().item(), 64)
    assert column + 0.5 == pytest.approx(32 + PIXELS_PER_UNIT, abs=1)
    assert row + 0.5 == pytest.approx(32 - 2 * PIXELS_PER_UNIT, abs=1)
    on_the_line = read_dots(draw_dots(torch.tensor([[-1.5], [9.0]])))
    torch.testing.assert_close(on_the_line, torch.tensor([[-1.5, 0], [REACH, 0]]).double(), atol=5e-6, rtol=0)


def test_rewards() -> None:
    pictures = draw_dots(torch.tensor([[1.0, 2.0], [-0.5, 0.0]]))
    for name, expected in {"mixture-linear": [1.0, -0.5], "mixture-quadratic": [-4.0, -2.25]}.items():
        assert make_reward(name)(pictures, ["", ""]).total.tolist() == pytest.approx(expected, abs=2e-5)
    with pytest.raises(
        ValueError, match=r"a dot is read from pictures of shape \(B, 3, 64, 64\).*got \(2, 3, 32, 32\)"
    ):
        read_dots(pictures[:, :, ::2, ::2])


@pytest.mark.parametrize("n_steps", [5, 20])
def test_gaussian_data_leave_the_sampler_as_computed(n_steps: int) -> None:
    _, _, sampler = sampler_of("one gaussian", n_steps)
    n = 2000
    env = gymnasium.make_vec("DPOK-Mixture-v0", num_envs=n, prompts="one gaussian", num_inference_steps=n_steps)
    policy = pretrained_policy(env, seed=0)
    observation, _ = env.reset(seed=0)
    for _ in range(n_steps):
        observation, _, _, _, infos = env.step(policy(observation))
    points = np.stack([last["latent"].ravel() for last in infos["final_obs"]])
    covariance = sampler.covariance.numpy()
    std = np.sqrt(covariance.diagonal())
    assert np.abs((points.mean(0) - sampler.mean.numpy()) / std).max() < 4 / math.sqrt(n)
    assert np.abs((np.cov(points.T) - covariance) / np.outer(std, std)).max() < 4 * math.sqrt(2 / n)


def test_many_steps_sample_the_data() -> None:
    model, _, sampler = sampler_of("one gaussian", 500)
    torch.testing.assert_close(sampler.covariance, model.mixtures["one gaussian"].covariances[0], atol=0, rtol=0.04)


def test_dynamic_programming_finds_the_closed_form() -> None:
    model = load_model("mixture-1d", "cpu")
    schedule = diffusion.make_schedule(model.scheduler_config, 8)
    sampler = GaussianSampler.of(model.mixtures["one gaussian"], schedule, model.denoiser.alphas_cumprod)
    pretrained = pretrained_on_grid("one gaussian", 8)
    shift = sampler.optimal_shift(torch.tensor([0.5]).double(), beta=0.5).item()
    for charged in (True, False):  # no state is dearer than another here, so charging for later states changes nothing
        best = best_policy(pretrained, lambda x: 0.5 * x, 0.5, charged)
        assert best.expectation(lambda x: x) == pytest.approx(shift, abs=1e-6)
        assert variance(best) == pytest.approx(sampler.covariance.item(), abs=1e-6)
        # Moving a Gaussian along with its noise wastes nothing but the knowledge of x_T.
        assert best.step_kl(pretrained).sum() == pytest.approx(0.5 * shift, abs=1e-6)
        assert best.final_kl(pretrained) == pytest.approx(shift**2 / (2 * sampler.covariance.item()), abs=1e-6)


def test_no_policy_beats_dynamic_programming() -> None:
    pretrained = pretrained_on_grid("two modes", 10)

    def objective(policy: GridPolicy) -> float:
        return policy.expectation(lambda x: 0.5 * x) - policy.step_kl(pretrained).sum()

    best = best_policy(pretrained, lambda x: 0.5 * x, 1.0)
    reached = objective(best)
    others = [pretrained, best_policy(pretrained, lambda x: 0.5 * x, 1.0, charge_later_kl=False)]
    for t in range(10):
        for change in (0.1, -0.1):
            means = best.means.copy()
            means[t] += change * best.std[t]
            others.append(GridPolicy(GRID, means, best.std))
    assert reached > max(map(objective, others))
    # The log of the mean of exp(r), which only the tilt reaches, bounds it.
    tilt = tilted_density(pretrained, lambda x: 0.5 * x, 1.0)
    assert reached < math.log(pretrained.expectation(lambda x: np.exp(0.5 * x)))
    right = [0.02 * tilt[GRID > 0].sum(), best.expectation(lambda x: 1.0 * (x > 0))]
    assert right == pytest.approx([0.7165, 0.6866], abs=1e-3)  # written down: the benchmark's numbers


def test_kl_in_the_loss_goes_half_of_the_way_at_half_of_beta() -> None:
    pretrained = pretrained_on_grid("two modes", 50)
    uncharged = best_policy(pretrained, lambda x: 0.5 * x, 1.0, charge_later_kl=False)
    further = best_policy(pretrained, lambda x: 0.5 * x, 0.5)
    half = GridPolicy(GRID, (pretrained.means + further.means) / 2, pretrained.std)
    assert uncharged.step_kl(pretrained).sum() == pytest.approx(half.step_kl(pretrained).sum(), rel=0.05)
    assert uncharged.expectation(np.tanh) == pytest.approx(half.expectation(np.tanh), rel=0.02)
    best = best_policy(pretrained, lambda x: 0.5 * x, 1.0)
    assert uncharged.expectation(np.tanh) < 0.97 * best.expectation(np.tanh)


def test_the_sum_of_step_kls_bounds_the_final_one() -> None:
    pretrained = pretrained_on_grid("two modes", 10)
    best = best_policy(pretrained, lambda x: 0.5 * x, 1.0)
    assert 0.5 * best.step_kl(pretrained).sum() < best.final_kl(pretrained) < best.step_kl(pretrained).sum()
    assert pretrained.final_kl(pretrained) == pytest.approx(0, abs=1e-9)


def test_prompts() -> None:
    model = load_model("mixture", "cpu")
    tokens = model.tokenize(["two  modes", "ring of six"])
    assert tokens.tolist()[0][2:] == [0]
    assert model.encode(tokens)["mixture"].tolist() == [1, 3]
    assert model.text_features(model.encode(tokens)).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    with pytest.raises(ValueError, match=r"cannot read the prompt 'six modes'; it knows one gaussian, two modes"):
        model.tokenize(["two modes", "six modes"])
    with pytest.raises(ValueError, match="tokens are none of a prompt"):
        model.encode(torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="'mixture-1d' cannot read the prompt 'ring of six'"):
        load_model("mixture-1d", "cpu").tokenize(["ring of six"])


def test_what_the_model_cannot_do() -> None:
    for options in ({"dtype": "bfloat16"}, {"compile": True}, {"revision": "main"}):
        with pytest.raises(ValueError, match="'mixture' is computed in float32, from no files"):
            load_model("mixture", "cpu", **options)
    for options in ({"image_size": 128}, {"negative_prompt": "a ring"}):
        with pytest.raises(ValueError, match="leave out image_size and negative_prompt"):
            load_model("mixture", "cpu", **options)
    env = gymnasium.make("DPOK-Mixture-v0", guidance_scale=2.0).unwrapped
    with pytest.raises(ValueError, match=r"use guidance_scale=1, not 2\.0"):
        pretrained_policy(env)(env.reset(seed=0)[0])


@pytest.mark.parametrize("model", ["mixture", "mixture-1d"])
def test_an_episode(model: str, only_warnings) -> None:
    with only_warnings(*GYMNASIUM_ADVICE):
        env = gymnasium.make("DPOK-Mixture-v0", model=model, prompts="two modes")
        policy = pretrained_policy(env, seed=0)
        observation, _ = env.reset(seed=0)
        for _ in range(20):
            observation, reward, terminated, _, info = env.step(policy(observation))
    assert terminated
    assert reward == pytest.approx(observation["latent"].ravel()[0], abs=1e-5)
    assert info["image"].shape == (64, 64, 3)


def test_decoding_many_at_a_time_is_decoding_one() -> None:
    latents = torch.randn(70, 1, 1, 2)
    model = load_model("mixture", "cpu")
    assert torch.equal(model.decode(latents), torch.cat([model.decode(one[None]) for one in latents]))
