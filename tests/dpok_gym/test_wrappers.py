"""The pre-trained model as a policy, against a plain diffusers pipeline, and actions in units of its noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import GYMNASIUM_ADVICE, SB3_ADVICE
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_checker import data_equivalence as equal
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from dpok_gym import DenoisingEnv, DenoisingVectorEnv, NoiseAction, VectorNoiseAction, pretrained_policy
from dpok_gym.shapes import WEIGHTS

RED_CIRCLE = "a red circle"
SHAPE = (4, 8, 8)
T = 4
NOISY = "dpok_gym.wrappers:NoiseAction"


def make(**kwargs: Any) -> DenoisingEnv:
    return DenoisingEnv(**{"num_inference_steps": T, "device": "cpu", "reward": "jpeg-compressibility"} | kwargs)


def make_noisy(steps: int = T, **kwargs: Any) -> NoiseAction:
    return NoiseAction(gymnasium.make("DPOK-Shapes-v0", num_inference_steps=steps, device="cpu", **kwargs))


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(params=["epsilon", "velocity", "shapes"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "shapes":
        return WEIGHTS
    return request.getfixturevalue({"epsilon": "tiny_sd_folder", "velocity": "tiny_v_folder"}[request.param])


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_pretrained_policy_is_the_sampler_of_diffusers(model_folder: Path, guidance_scale: float) -> None:
    env = make(model=str(model_folder), guidance_scale=guidance_scale)
    observation, _ = env.reset(seed=0, options={"prompt": RED_CIRCLE})
    latents = torch.from_numpy(observation["latent"])[None]
    policy = pretrained_policy(env, seed=3)
    noise = np.random.default_rng(3)  # what the policy draws from

    pipeline = StableDiffusionPipeline.from_pretrained(model_folder)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(T)
    conditional, empty = pipeline.encode_prompt(RED_CIRCLE, "cpu", 1, True)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            output = pipeline.unet(latents, timestep, conditional).sample
            if guidance_scale != 1:
                without = pipeline.unet(latents, timestep, empty).sample
                output = without + guidance_scale * (output - without)
        drawn = torch.from_numpy(noise.standard_normal(SHAPE, np.float32))[None]
        latents = scheduler.step(output, timestep, latents, eta=1.0, variance_noise=drawn).prev_sample
        observation, _, terminated, _, info = env.step(policy(observation))
        torch.testing.assert_close(torch.from_numpy(observation["latent"])[None], latents, rtol=1e-3, atol=1e-3)
    assert terminated
    with torch.no_grad():
        picture = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(picture, output_type="np")[0] * 255
    assert np.abs(info["image"] - expected).max() < 2


def test_noise_action_is_a_call_of_the_pipeline(tiny_sd_folder: Path) -> None:
    env = NoiseAction(make(model=str(tiny_sd_folder), guidance_scale=5.0))
    observation, _ = env.reset(seed=0, options={"prompt": RED_CIRCLE})
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    expected = pipeline(
        RED_CIRCLE,
        num_inference_steps=T,
        guidance_scale=5.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(8),
        latents=torch.from_numpy(observation["latent"])[None],
        output_type="latent",
    ).images
    generator = torch.Generator().manual_seed(8)
    for _ in range(T):
        observation, *_ = env.step(torch.randn(1, *SHAPE, generator=generator)[0].numpy())
    torch.testing.assert_close(torch.from_numpy(observation["latent"])[None], expected, rtol=1e-3, atol=1e-3)


def test_policy_takes_what_its_environment_gives() -> None:
    scalar, vector = make(), DenoisingVectorEnv(2, num_inference_steps=T, device="cpu")
    for env, expected in ((scalar, SHAPE), (vector, (2, *SHAPE))):
        observation, _ = env.reset(seed=0)
        first, again, other = (pretrained_policy(env, seed)(observation) for seed in (1, 1, 2))
        assert (first.shape, first.dtype) == (expected, np.float32)
        assert np.array_equal(first, again)
        assert not np.allclose(first, other)
        assert env.action_space.contains(first)


def test_zero_noise_is_the_mean() -> None:
    env = make_noisy()
    before, _ = env.reset(seed=0)
    batch = env.unwrapped.batch
    mean, std = batch.pretrained_transition({name: np.asarray(value)[None] for name, value in before.items()})
    assert torch.equal(std, batch.schedule.std[:1])
    after, *_ = env.step(np.zeros(SHAPE, np.float32))
    assert np.array_equal(after["latent"], mean[0].numpy())
    env.reset(seed=0)
    noisy, *_ = env.step(normal(0))
    np.testing.assert_allclose((noisy["latent"] - after["latent"]) / std.numpy(), normal(0), atol=1e-4)


def test_standard_normal_actions_are_the_pretrained_policy() -> None:
    plain, noisy, by_policy = make(), NoiseAction(make()), NoiseAction(make())
    rng, policy, noisy_policy = np.random.default_rng(7), pretrained_policy(plain, 7), pretrained_policy(by_policy, 7)
    observation, noisy_observation = (env.reset(seed=1)[0] for env in (plain, by_policy))
    noisy.reset(seed=1)
    for _ in range(T):
        expected = plain.step(policy(observation))
        assert equal(noisy.step(rng.standard_normal(SHAPE, np.float32)), expected, exact=True)
        result = by_policy.step(noisy_policy(noisy_observation))  # the policy knows what an action is there
        assert equal(result, expected, exact=True)
        observation, noisy_observation = expected[0], result[0]


def test_scalar_and_vector_agree() -> None:
    vector = VectorNoiseAction(
        gymnasium.make_vec("DPOK-Shapes-v0", num_envs=2, num_inference_steps=2, guidance_scale=3.0)
    )
    scalars = [make_noisy(2, guidance_scale=3.0) for _ in range(2)]
    assert vector.single_action_space == scalars[0].action_space
    assert vector.action_space.shape == (2, *SHAPE)
    observation, _ = vector.reset(seed=4)
    latents = [env.reset(seed=4 + i)[0]["latent"] for i, env in enumerate(scalars)]
    assert np.array_equal(observation["latent"], np.stack(latents))
    for step in range(3):  # the third begins the second episode
        actions = normal(step, (2, *SHAPE))
        observation, _, terminated, _, infos = vector.step(actions)
        results = [env.step(action) for env, action in zip(scalars, actions, strict=True)]
        ours = np.stack([last["latent"] for last in infos["final_obs"]]) if step == 1 else observation["latent"]
        np.testing.assert_allclose(ours, np.stack([result[0]["latent"] for result in results]), rtol=1e-3, atol=1e-3)
        assert terminated.tolist() == [result[2] for result in results] == [step == 1] * 2
        if step == 1:
            for env in scalars:
                env.reset()


def test_spec_survives_json() -> None:
    env = make_noisy(2)
    again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    assert isinstance(again, NoiseAction)
    assert again.action_space == env.action_space
    for each in (env, again):
        each.reset(seed=0)
    assert equal(env.step(normal(0)), again.step(normal(0)), exact=True)


def test_as_an_additional_wrapper() -> None:
    spec = gymnasium.spec("DPOK-Shapes-v0")
    spec = EnvSpec.from_json(spec.to_json())
    spec.additional_wrappers = (gymnasium.envs.registration.WrapperSpec("NoiseAction", NOISY, {}),)
    assert isinstance(gymnasium.make(spec, num_inference_steps=2), NoiseAction)


def test_checkers(only_warnings) -> None:
    with only_warnings(*GYMNASIUM_ADVICE, "The environment ("):
        check_env(make_noisy(2, render_mode="rgb_array"))
    with only_warnings(*SB3_ADVICE):
        sb3_check_env(make_noisy(2))


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_stable_baselines3_trains_on_it(algorithm: type, only_warnings) -> None:
    settings = {"n_steps": 4} | ({"batch_size": 4, "n_epochs": 1} if algorithm is PPO else {})
    with only_warnings():
        model = algorithm("MultiInputPolicy", make_noisy(2), device="cpu", seed=0, **settings)
        before = [value.detach().clone() for value in model.policy.parameters()]
        model.learn(8)
    assert model.num_timesteps == 8
    assert any(not torch.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))
    actions = model.rollout_buffer.actions
    assert actions.size == 4 * np.prod(SHAPE)
    assert np.abs(actions).max() < model.action_space.high.min()  # so nothing was clipped on the way


def test_memory_is_not_shared() -> None:
    env, untouched = make_noisy(2), make_noisy(2)
    observation, _ = env.reset(seed=0)
    untouched.reset(seed=0)
    observation["latent"][:] = observation["prompt"][:] = 0
    assert equal(env.step(normal(0))[0], untouched.step(normal(0))[0], exact=True)


@pytest.mark.parametrize(
    ("make_env", "shape"),
    [
        (lambda: NoiseAction(make()), SHAPE),
        (lambda: VectorNoiseAction(DenoisingVectorEnv(2, num_inference_steps=T, device="cpu")), (2, *SHAPE)),
    ],
    ids=["scalar", "vector"],
)
def test_bad_calls(make_env: Callable[[], Any], shape: tuple[int, ...]) -> None:
    env = make_env()
    with pytest.raises(gymnasium.error.ResetNeeded, match="before step"):
        env.step(np.zeros(shape, np.float32))
    env.reset(seed=0)
    for wrong in (shape[1:], shape[:-1], (1, *shape)):  # the first would broadcast
        with pytest.raises(ValueError, match="expected noise of the latents' shape"):
            env.step(np.zeros(wrong, np.float32))
    with pytest.raises(ValueError, match="NaN or infinity"):
        env.step(np.full(shape, np.nan, np.float32))


def test_foreign_environments() -> None:
    cartpole = gymnasium.make("CartPole-v1")
    for wrap in (NoiseAction, pretrained_policy):
        with pytest.raises(TypeError, match=r"expected a denoising environment such as DPOK-Shapes-v0, got .*CartPole"):
            wrap(cartpole)
    with pytest.raises(TypeError, match="expected a denoising environment"):
        VectorNoiseAction(gymnasium.make_vec("CartPole-v1", num_envs=2))
