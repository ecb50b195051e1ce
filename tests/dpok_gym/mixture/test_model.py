"""The mixture model: an exact denoiser behind the interface of all models, and the environment around it."""

import math

import gymnasium
import numpy as np
import pytest
import torch

from dpok_gym import load_model, reference_policy
from dpok_gym.mixture.model import MixtureDenoiser, MixtureModel
from dpok_gym.models.lora import reference_copy
from tests.support import GYMNASIUM_ADVICE, assert_same


def load_mixture(name: str) -> MixtureModel:
    model = load_model(name, "cpu")
    assert isinstance(model, MixtureModel)
    return model


@pytest.mark.parametrize("name", ["mixture", "mixture-1d"])
def test_the_denoiser_is_exact_for_every_prompt_and_timestep(name: str) -> None:
    model = load_mixture(name)
    for prompt, data in model.mixtures.items():
        for timestep in (1, 500, 999):
            alpha_bar = model.denoiser.alphas_cumprod[timestep].item()
            x = torch.randn(20, *model.latent_shape)
            points = x.flatten(1).double().requires_grad_(True)
            noised = data.noised(torch.tensor(alpha_bar, dtype=torch.float64))
            (score,) = torch.autograd.grad(noised.log_prob(points).sum(), points)
            noise = model.predict(x, torch.full((20,), timestep), model.encode([prompt] * 20))
            assert noise.shape == x.shape
            torch.testing.assert_close(
                noise.flatten(1).double(), -math.sqrt(1 - alpha_bar) * score, atol=2e-4, rtol=2e-4
            )


def test_a_constant_tilt_of_gaussian_data_is_the_tilted_data() -> None:
    model, slope = load_mixture("mixture"), torch.tensor([0.5, -1.0])
    tilted = model.mixtures["one gaussian"].tilted(slope.double())
    tuned = reference_copy(model.denoiser)
    tuned.get_submodule("network.4").bias.data = slope
    expected = MixtureDenoiser([tilted], model.denoiser.alphas_cumprod)
    x, timesteps, first = torch.randn(3, 1, 1, 2), torch.tensor([10, 500, 990]), torch.zeros(3, dtype=torch.int64)
    noise = model.predict(x, timesteps, {"mixture": first}, denoiser=tuned)
    torch.testing.assert_close(noise, expected(x, timesteps, first), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(noise, model.predict(x, timesteps, {"mixture": first}), atol=0.01)
    assert not any(parameter.requires_grad for parameter in model.denoiser.parameters())


def test_prompts() -> None:
    model = load_model("mixture", "cpu")
    prompts = ["two  modes", "ring of six", "two modes"]
    model.check_prompts(prompts)
    conditioning = model.encode(prompts)
    assert {name: values.tolist() for name, values in conditioning.items()} == {"mixture": [1, 3, 1]}
    assert model.text_features(conditioning).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert model.text_width == 4
    for read in (model.check_prompts, model.encode):
        with pytest.raises(ValueError, match=r"cannot read the prompt 'six modes'; it knows one gaussian, two modes"):
            read(["two modes", "six modes"])
    with pytest.raises(ValueError, match="'mixture-1d' cannot read the prompt 'ring of six'"):
        load_model("mixture-1d", "cpu").check_prompts(["ring of six"])


@pytest.mark.parametrize(("name", "value"), [("dtype", "bfloat16"), ("compile", True), ("revision", "main")])
def test_it_is_computed_in_float32_from_no_files(name: str, value: str | bool) -> None:
    with pytest.raises(ValueError, match=f"'mixture' .* in float32 and from no files: leave out {name}"):
        load_model("mixture", "cpu", **{name: value})


@pytest.mark.parametrize(("name", "value"), [("image_size", 128), ("negative_prompt", "a ring")])
def test_it_draws_images_of_one_size_without_a_negative_prompt(name: str, value: str | int) -> None:
    with pytest.raises(ValueError, match="leave out image_size and negative_prompt"):
        load_model("mixture", "cpu", **{name: value})


def test_it_has_no_guidance() -> None:
    model = load_model("mixture", "cpu")
    assert model.num_forward_passes(1.0) == 1
    with pytest.raises(ValueError, match=r"'mixture' has no unconditional data.*use guidance_scale=1, not 2\.0"):
        model.num_forward_passes(2.0)
    with pytest.raises(ValueError, match=r"use guidance_scale=1, not 2\.0"):
        model.predict(torch.zeros(1, 1, 1, 2), torch.tensor([10]), model.encode(["two modes"]), 2.0)
    with pytest.raises(ValueError, match=r"use guidance_scale=1, not 2\.0"):
        run_one_step(gymnasium.make("DPOK-Mixture-v0", guidance_scale=2.0))


def run_one_step(env: gymnasium.Env) -> None:
    observation, _ = env.reset(seed=0)
    env.step(reference_policy(env)(observation))


def test_it_is_no_diffusers_pipeline_and_has_no_layers_for_a_lora() -> None:
    model = load_mixture("mixture-1d")
    for denoiser in (None, model.denoiser):
        with pytest.raises(ValueError, match="diffusers has no pipeline for the model 'mixture-1d'"):
            model.to_pipeline(denoiser)
    assert model.lora_layers == {}
    assert model.default_lora_rank == 0
    with pytest.raises(ValueError, match="too small for gradient checkpointing"):
        model.denoiser.enable_gradient_checkpointing()


def test_another_name() -> None:
    with pytest.raises(ValueError, match="must be one of 'mixture', 'mixture-1d', got 'mixture-3d'"):
        MixtureModel("mixture-3d")


def test_the_model_does_not_depend_on_the_random_state_nor_change_it() -> None:
    torch.manual_seed(1)
    first = MixtureModel("mixture")
    drawn = torch.rand(3)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(3), drawn, rtol=0, atol=0)
    second = MixtureModel("mixture")
    assert_same(dict(second.denoiser.named_parameters()), dict(first.denoiser.named_parameters()))


@pytest.mark.parametrize("name", ["mixture", "mixture-1d"])
def test_images_are_encoded_into_the_latents_that_they_show(name: str) -> None:
    model = load_model(name, "cpu")
    latents = 6 * torch.rand(50, *model.latent_shape) - 3
    encoded = model.encode_images(model.decode(latents))
    assert encoded.dtype == torch.float32
    torch.testing.assert_close(encoded, latents, atol=5e-6, rtol=0)
    with pytest.raises(ValueError, match=r"a dot is read from images of shape \(B, 3, 64, 64\)"):
        model.encode_images(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("model", ["mixture", "mixture-1d"])
def test_an_episode(model: str, only_warnings) -> None:
    with only_warnings(*GYMNASIUM_ADVICE):
        env = gymnasium.make("DPOK-Mixture-v0", model=model, prompts="two modes")
        policy = reference_policy(env, seed=0)
        observation, _ = env.reset(seed=0)
        for _ in range(20):
            observation, reward, terminated, _, info = env.step(policy(observation))
    assert terminated
    distance = np.square(observation["latent"].ravel() - [1.0, 0.0][: observation["latent"].size]).sum()
    assert reward == pytest.approx(np.exp(-distance / 2), abs=1e-5)
    assert info["image"].shape == (64, 64, 3)


def test_decoding_many_at_a_time_is_decoding_one() -> None:
    latents = torch.randn(70, 1, 1, 2)
    model = load_model("mixture", "cpu")
    assert torch.equal(model.decode(latents), torch.cat([model.decode(one[None]) for one in latents]))
