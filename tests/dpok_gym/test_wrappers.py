"""The pre-trained model as a policy, actions in units of its noise, and prompts as features of its text encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import data_equivalence as equal
from stable_baselines3 import A2C, PPO, SAC

from agents import GymnasiumVecEnv
from dpok_gym import (
    CoarseLatent,
    DenoisingEnv,
    DenoisingVectorEnv,
    NoiseAction,
    TextFeatures,
    VectorCoarseLatent,
    VectorNoiseAction,
    VectorTextFeatures,
    reference_policy,
)
from dpok_gym.shapes import WEIGHTS
from dpok_gym.wrappers import _replace_block_means, get_batch
from tests.support import assert_same

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


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_reference_policy_is_the_sampler_of_diffusers(model_folder: Path, guidance_scale: float) -> None:
    env = make(model=str(model_folder), guidance_scale=guidance_scale)
    observation, _ = env.reset(seed=0, options={"prompt": RED_CIRCLE})
    latents = torch.from_numpy(observation["latent"])[None]
    policy = reference_policy(env, seed=3)
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
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(image, output_type="np")[0] * 255
    assert np.abs(info["image"] - expected).max() < 2


@pytest.mark.slow
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
        first, again, other = (reference_policy(env, seed)(observation) for seed in (1, 1, 2))
        assert (first.shape, first.dtype) == (expected, np.float32)
        assert np.array_equal(first, again)
        assert not np.allclose(first, other)
        assert env.action_space.contains(first)


def test_zero_noise_is_the_mean() -> None:
    env: Any = make_noisy()
    before, _ = env.reset(seed=0)
    batch = env.unwrapped.batch
    with torch.no_grad():
        mean, std = batch.process.transition(
            batch.state_of({name: np.asarray(value)[None] for name, value in before.items()})
        )
    assert torch.equal(std, batch.process.table.std[:1])
    after, *_ = env.step(np.zeros(SHAPE, np.float32))
    assert np.array_equal(after["latent"], mean[0].numpy())
    env.reset(seed=0)
    noisy, *_ = env.step(normal(0))
    np.testing.assert_allclose((noisy["latent"] - after["latent"]) / std.numpy(), normal(0), atol=1e-4)


@pytest.mark.slow
def test_standard_normal_actions_are_the_reference_policy() -> None:
    plain, noisy, by_policy = make(), NoiseAction(make()), NoiseAction(make())
    rng, policy, noisy_policy = np.random.default_rng(7), reference_policy(plain, 7), reference_policy(by_policy, 7)
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
    squashed = NoiseAction(gymnasium.make("DPOK-Shapes-v0", num_inference_steps=2), squashed=True)
    assert gymnasium.make(EnvSpec.from_json(squashed.spec.to_json())).action_space == squashed.action_space


def test_as_an_additional_wrapper() -> None:
    spec = gymnasium.spec("DPOK-Shapes-v0")
    spec = EnvSpec.from_json(spec.to_json())
    spec.additional_wrappers = (gymnasium.envs.registration.WrapperSpec("NoiseAction", NOISY, {}),)
    assert isinstance(gymnasium.make(spec, num_inference_steps=2), NoiseAction)


@pytest.mark.slow
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
        with pytest.raises(ValueError, match="expected noise of shape"):
            env.step(np.zeros(wrong, np.float32))
    with pytest.raises(ValueError, match="NaN or infinity"):
        env.step(np.full(shape, np.nan, np.float32))


def test_foreign_environments() -> None:
    cartpole = gymnasium.make("CartPole-v1")
    for wrap in (NoiseAction, TextFeatures, reference_policy):
        with pytest.raises(TypeError, match=r"expected a denoising environment such as DPOK-SD15-v0, got .*CartPole"):
            wrap(cartpole)
    cartpoles = gymnasium.make_vec("CartPole-v1", num_envs=2)
    for wrap_vector in (VectorNoiseAction, VectorTextFeatures, reference_policy):
        with pytest.raises(TypeError, match="expected a denoising environment"):
            wrap_vector(cartpoles)


def test_get_batch() -> None:
    env, vector = make(), DenoisingVectorEnv(2, num_inference_steps=T, device="cpu")
    assert get_batch(TextFeatures(NoiseAction(env))) is env.batch
    assert get_batch(VectorTextFeatures(VectorNoiseAction(vector))) is vector


def make_vector(**kwargs: Any) -> DenoisingVectorEnv:
    settings: dict[str, Any] = {"num_inference_steps": 2, "device": "cpu", "reward": "jpeg-compressibility"}
    return DenoisingVectorEnv(2, **settings | kwargs)


class TestSquashed:
    """Noise actions within +-1."""

    def test_is_the_noise_through_tanh(self) -> None:
        for plain, squashed in (
            (NoiseAction(make()), NoiseAction(make(), squashed=True)),
            (VectorNoiseAction(make_vector()), VectorNoiseAction(make_vector(), squashed=True)),
        ):
            box: Any = squashed.action_space
            assert (box.low.min(), box.high.max()) == (-1, 1)
            for env in (plain, squashed):
                env.reset(seed=0)
            action = normal(0, box.shape)
            expected, *_ = plain.step(action)
            observation, *_ = squashed.step(np.tanh(action))
            np.testing.assert_allclose(observation["latent"], expected["latent"], atol=1e-4)

    def test_the_ends_are_finite(self) -> None:
        env = NoiseAction(make(), squashed=True)
        before, _ = env.reset(seed=0)
        mean, std = env.unwrapped.batch.reference_transition()  # type: ignore[attr-defined]
        observation, *_ = env.step(np.ones(SHAPE, np.float32))
        np.testing.assert_allclose((observation["latent"] - mean[0].numpy()) / std.item(), 8.66, atol=0.01)
        assert not np.array_equal(before["latent"], observation["latent"])

    def test_sac_starts_near_the_pre_trained_noise(self) -> None:
        """Its first actions are noise of a standard deviation of about 1; unless squashed, of more than 5."""
        stds = []
        for squashed in (True, False):
            env = VectorTextFeatures(VectorNoiseAction(make_vector(), squashed=squashed))
            agent = SAC("MultiInputPolicy", GymnasiumVecEnv(env), seed=0, device="cpu", buffer_size=2)
            actions, _ = agent.predict(env.reset(seed=0)[0])  # type: ignore[arg-type]
            stds.append((np.arctanh(actions) if squashed else actions).std())
        assert 0.8 < stds[0] < 1.2
        assert stds[1] > 5

    def test_reference_policy(self) -> None:
        plain, squashed = NoiseAction(make()), NoiseAction(make(), squashed=True)
        observation, _ = plain.reset(seed=0)
        first, second = (reference_policy(env, 3)(observation) for env in (plain, squashed))
        assert np.array_equal(np.tanh(first), second)

    def test_reward_has_the_density_of_the_action(self) -> None:
        """log p(action) = log p(latent) + D log std - sum log(1 - action^2); the step's constant is left out."""
        kwargs: dict[str, Any] = {"reference_log_prob_coef": 0.5, "reference_info": True}
        action = np.tanh(normal(0))
        slope = -np.log(1 - action.astype(np.float64) ** 2).sum()
        env = NoiseAction(make(**kwargs), squashed=True)
        env.reset(seed=0)
        _, reward, *_, info = env.step(action)
        assert reward == pytest.approx(0.5 * (info["log_prob_reference"] + slope), rel=1e-5)
        vector = VectorNoiseAction(make_vector(**kwargs, autoreset_mode="NextStep"), squashed=True)
        vector.reset(seed=0)
        actions = np.stack([action, np.zeros(SHAPE, np.float32)])
        _, rewards, _, _, infos = vector.step(actions)
        expected = 0.5 * (infos["log_prob_reference"] + [slope, 0])
        np.testing.assert_allclose(rewards, expected, rtol=1e-5)
        vector.step(actions)
        _, rewards, *_ = vector.step(actions)  # the step that resets
        assert rewards.tolist() == [0, 0]

    def test_around_it_the_log_prob_is_that_of_the_latent(self) -> None:
        env = NoiseAction(make(reference_info=True))
        env.reset(seed=0)
        _, _, _, _, info = env.step(np.zeros(SHAPE, np.float32))
        assert info["log_prob_reference"] == pytest.approx(-256 * np.log(info["reference_std"] * np.sqrt(2 * np.pi)))

    def test_one_call_of_the_denoiser_serves_both(self) -> None:
        env = NoiseAction(make(reference_info=True, num_inference_steps=2))
        env.reset(seed=0)
        for step in range(2):
            env.step(normal(step))
        assert get_batch(env).process.num_function_evaluations == 2


class TestTextFeatures:
    """Prompts as features, in the scalar and in the vector environment."""

    @pytest.mark.parametrize("name", ["tiny_sd_folder", "tiny_xl_folder", "mixture"])
    def test_are_those_of_the_model(self, name: str, request: pytest.FixtureRequest) -> None:
        settings: dict[str, Any] = {"model": name, "prompts": "mixture"}
        if name != "mixture":
            settings = {"model": str(request.getfixturevalue(name)), "prompts": ["dog", "a green moon"]}
        env: Any = TextFeatures(make(**settings))
        model = get_batch(env).model
        space = env.observation_space
        assert isinstance(space, gymnasium.spaces.Dict)
        assert space["prompt"] == gymnasium.spaces.Box(-np.inf, np.inf, (model.text_width,), np.float32)
        assert all(space[key] == env.env.observation_space[key] for key in ("latent", "step"))
        observation, info = env.reset(seed=0)
        expected = model.text_features(model.encode([info["prompt"]])).numpy()[0]
        for i in range(T):
            assert space.contains(observation)
            assert_same(observation["prompt"], expected)
            observation, _, terminated, _, _ = env.step(normal(i, env.action_space.shape))
        assert terminated
        assert_same(observation["prompt"], expected)

    def test_tell_prompts_apart(self) -> None:
        env = TextFeatures(make())
        first, second = (env.reset(options={"prompt": text})[0]["prompt"] for text in (RED_CIRCLE, "a blue star"))
        assert np.abs(first - second).max() > 0.1

    def test_of_the_vector_environment(self) -> None:
        """The same as those of the scalar one, also in ``final_obs``."""
        vector = VectorTextFeatures(make_vector())
        scalars = [TextFeatures(make(num_inference_steps=2)) for _ in range(2)]
        assert vector.single_observation_space == scalars[0].observation_space
        space = vector.observation_space
        assert isinstance(space, gymnasium.spaces.Dict)
        assert space["prompt"].shape == (2, get_batch(vector).model.text_width)

        observation, infos = vector.reset(seed=4)
        expected = [env.reset(seed=4 + i)[0] for i, env in enumerate(scalars)]
        assert len(set(infos["prompt"])) == 2
        for step in range(4):
            assert space.contains(observation)
            for i in range(2):
                assert_same({name: values[i] for name, values in observation.items()}, expected[i])
            actions = normal(step, (2, *SHAPE))
            observation, rewards, terminated, _, infos = vector.step(actions)
            results = [env.step(action) for env, action in zip(scalars, actions, strict=True)]
            assert rewards.tolist() == [result[1] for result in results]
            expected = [result[0] for result in results]
            assert terminated.all() == (step % 2 == 1)
            if terminated.all():
                for last, of_scalar in zip(infos["final_obs"], expected, strict=True):
                    assert_same(last, of_scalar)
                expected = [env.reset()[0] for env in scalars]

    def test_leave_the_environment_as_it_is(self) -> None:
        plain, wrapped = make_vector(), make_vector()
        wrapper = VectorTextFeatures(wrapped)
        for env in (plain, wrapper):
            env.reset(seed=0)
        for step in range(2):
            plain_step, own_step = plain.step(normal(step, (2, *SHAPE))), wrapper.step(normal(step, (2, *SHAPE)))
        assert_same(own_step[0]["latent"], plain_step[0]["latent"])
        assert_same(own_step[4]["final_info"], plain_step[4]["final_info"])
        assert wrapped.single_observation_space == plain.single_observation_space

    def test_around_actions_by_noise(self) -> None:
        """NoiseAction inside reads the prompt, TextFeatures outside replaces it."""
        plain: Any = NoiseAction(make())
        wrapped: Any = TextFeatures(NoiseAction(make()))
        assert wrapped.action_space == plain.action_space
        policies = reference_policy(plain, 7), reference_policy(wrapped, 7)
        observation, features = plain.reset(seed=1)[0], wrapped.reset(seed=1)[0]
        for _ in range(T):
            result, of_wrapped = plain.step(policies[0](observation)), wrapped.step(policies[1](features))
            observation, features = result[0], of_wrapped[0]
            assert_same(features["latent"], observation["latent"])
            assert_same(of_wrapped[1:], result[1:])
        assert features["prompt"].shape == wrapped.observation_space["prompt"].shape

    def test_around_actions_by_noise_of_the_vector_environment(self) -> None:
        plain, wrapped = VectorNoiseAction(make_vector()), VectorTextFeatures(VectorNoiseAction(make_vector()))
        assert wrapped.action_space == plain.action_space
        policies = reference_policy(plain, 7), reference_policy(wrapped, 7)
        observation, features = plain.reset(seed=1)[0], wrapped.reset(seed=1)[0]
        for _ in range(2):
            result, of_wrapped = plain.step(policies[0](observation)), wrapped.step(policies[1](features))
            observation, features = result[0], of_wrapped[0]
            assert_same(features["latent"], observation["latent"])
            assert_same(of_wrapped[1:4], result[1:4])
        assert_same(of_wrapped[4]["final_info"], result[4]["final_info"])
        for last in of_wrapped[4]["final_obs"]:
            assert wrapped.single_observation_space.contains(last)

    @torch.no_grad()
    def test_bytes_saturate_a_stock_network_and_features_do_not(self) -> None:
        """The share of the first layer's tanh units above 0.99."""
        noisy = VectorNoiseAction(make_vector(prompts="three green squares"))
        shares = []
        for env in (noisy, VectorTextFeatures(noisy)):
            policy: Any = PPO("MultiInputPolicy", GymnasiumVecEnv(env), n_steps=2, batch_size=4, seed=0).policy
            tensors, _ = policy.obs_to_tensor(env.reset(seed=0)[0])
            hidden = policy.mlp_extractor.policy_net[:2](policy.extract_features(tensors))
            shares.append((hidden.abs() > 0.99).float().mean())
        assert shares[0] > 0.8
        assert shares[1] < 0.1

    def test_spec_survives_json(self) -> None:
        env = TextFeatures(make_noisy(2))
        again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
        assert isinstance(again, TextFeatures)
        assert again.observation_space == env.observation_space
        assert again.action_space == env.action_space
        assert equal(again.reset(seed=0), env.reset(seed=0), exact=True)

    def test_stable_baselines3_trains_on_it(self, only_warnings) -> None:
        settings: dict[str, Any] = {"n_steps": 4, "batch_size": 4, "n_epochs": 1, "device": "cpu", "seed": 0}
        with only_warnings():
            model = PPO("MultiInputPolicy", TextFeatures(make_noisy(2)), **settings).learn(8)
        assert model.num_timesteps == 8


def block_sums(latents: np.ndarray, b: int) -> np.ndarray:
    """Returns the sums of the b x b blocks of (..., 8, 8), divided by b."""
    rows = [latents[..., i : i + b, :] for i in range(0, 8, b)]
    return np.stack([[row[..., j : j + b].sum((-2, -1)) / b for j in range(0, 8, b)] for row in rows]).transpose(
        2, 0, 1
    )


class TestBlocks:
    """Noise and latents by blocks."""

    @pytest.mark.parametrize("b", [2, 8])
    def test_the_action_is_the_sum_of_each_block_of_the_noise(self, b: int) -> None:
        """The rest of the noise comes from the environment's seed, in the scalar and in the vector environment."""
        shape = (4, 8 // b, 8 // b)
        vector = VectorNoiseAction(make_vector(), block_size=b)
        scalars: list[Any] = [NoiseAction(make(num_inference_steps=2), block_size=b) for _ in range(2)]
        assert vector.single_action_space == scalars[0].action_space
        assert vector.single_action_space.shape == shape
        vector.reset(seed=4)
        for i, env in enumerate(scalars):
            env.reset(seed=4 + i)
        actions = np.stack([normal(0, shape), normal(0, shape)])
        mean, std = get_batch(vector).reference_transition()
        observation, *_ = vector.step(actions)
        noise = (observation["latent"] - mean.numpy()) / std[0].item()
        for i, env in enumerate(scalars):
            np.testing.assert_allclose(block_sums(noise[i], b), actions[i], atol=1e-4)
            of_scalar, *_ = env.step(actions[i])
            np.testing.assert_allclose(of_scalar["latent"], observation["latent"][i], atol=1e-4)
        assert np.abs(noise[0] - noise[1]).max() > 1  # the seeds differ, and the actions do not

    def test_a_second_episode_is_that_of_an_environment_alone(self) -> None:
        """The step that only begins it, of which the action is not used, draws no noise."""
        vector = VectorNoiseAction(make_vector(autoreset_mode="NextStep"), block_size=8)
        scalars: list[Any] = [NoiseAction(make(num_inference_steps=2), block_size=8) for _ in range(2)]
        vector.reset(seed=4)
        for i, env in enumerate(scalars):
            env.reset(seed=4 + i)
        for step in range(6):
            actions = np.stack([normal(2 * step, (4, 1, 1)), normal(2 * step + 1, (4, 1, 1))])
            observation, *_ = vector.step(actions)
            alone = [env.reset() if step % 3 == 2 else env.step(actions[i]) for i, env in enumerate(scalars)]
            for i, (of_scalar, *_) in enumerate(alone):
                np.testing.assert_allclose(of_scalar["latent"], observation["latent"][i], atol=1e-4)

    def test_a_standard_normal_action_is_the_pre_trained_sampler(self) -> None:
        """The 16 numbers of a channel are independent, of variance 1: the ratio of their covariance to I is near 1."""
        rng = np.random.default_rng(0)
        n = 20_000
        coarse, fine = rng.standard_normal((n, 1, 2, 2), np.float32), rng.standard_normal((n, 1, 4, 4), np.float32)
        covariance = np.cov(_replace_block_means(fine, coarse).reshape(n, 16).T)
        np.testing.assert_allclose(covariance, np.eye(16), atol=0.04)

    def test_the_reference_policy_acts_by_blocks(self) -> None:
        env, squashed = (NoiseAction(make(), squashed=squashed, block_size=4) for squashed in (False, True))
        observation, _ = env.reset(seed=0)
        first, second = (reference_policy(each, 3)(observation) for each in (env, squashed))
        assert env.action_space.contains(first)
        assert np.array_equal(np.tanh(first), second)

    def test_the_observed_latent(self) -> None:
        """Scalar and vector, also in ``final_obs``; the prompt and the step stay."""
        plain, vector = make_vector(), VectorTextFeatures(VectorCoarseLatent(make_vector(), 4))
        scalar: Any = CoarseLatent(make(num_inference_steps=2), 4)
        for env in (plain, vector, scalar):
            observation, _ = env.reset(seed=0)
        assert scalar.observation_space["latent"].shape == (4, 2, 2)
        for step in range(2):
            actions = normal(step, (2, *SHAPE))
            expected, _, _, _, infos = plain.step(actions)
            observation, _, _, _, own_infos = vector.step(actions)
            of_scalar, *_ = scalar.step(actions[0])
            if step == 1:
                expected, observation = infos["final_obs"][0], own_infos["final_obs"][0]
            else:
                expected, observation = ({name: v[0] for name, v in obs.items()} for obs in (expected, observation))
            for own in (observation, of_scalar):
                np.testing.assert_allclose(own["latent"], block_sums(expected["latent"], 4), atol=1e-5)
            assert vector.single_observation_space.contains(observation)
            assert_same(
                {name: of_scalar[name] for name in ("prompt", "step")}, {k: expected[k] for k in ("prompt", "step")}
            )

    def test_spec_survives_json(self) -> None:
        env = CoarseLatent(NoiseAction(gymnasium.make("DPOK-Shapes-v0", num_inference_steps=2), block_size=8), 8)
        again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))  # type: ignore[union-attr]
        assert equal(again.reset(seed=0), env.reset(seed=0), exact=True)
        assert again.action_space == env.action_space

    @pytest.mark.parametrize(("size", "message"), [(3, "must divide the latent's height and width, 8 and 8"), (0, "0")])
    def test_wrong_sizes(self, size: int, message: str) -> None:
        for wrap in (lambda: NoiseAction(make(), block_size=size), lambda: CoarseLatent(make(), size)):
            with pytest.raises(ValueError, match=rf"block_size .*{message}"):
                wrap()

    def test_wrapped_once(self) -> None:
        with pytest.raises(ValueError, match=r"blocks of the latent already: wrap .* CoarseLatent only once"):
            VectorCoarseLatent(VectorCoarseLatent(make_vector(), 2), 2)
        with pytest.raises(TypeError, match="take TextFeatures and CoarseLatent off"):
            reference_policy(CoarseLatent(make(), 2))


class TestOrder:
    """What cannot be wrapped in what."""

    def test_noise_twice(self) -> None:
        with pytest.raises(ValueError, match=r"the action is the noise already: wrap .* only once"):
            NoiseAction(gymnasium.wrappers.OrderEnforcing(NoiseAction(make())))
        with pytest.raises(ValueError, match=r"the action is the noise already: wrap .* only once"):
            VectorNoiseAction(VectorNoiseAction(make_vector()))

    def test_features_twice(self) -> None:
        with pytest.raises(ValueError, match=r"text features already: wrap .* only once"):
            TextFeatures(gymnasium.wrappers.OrderEnforcing(TextFeatures(make())))
        with pytest.raises(ValueError, match=r"text features already: wrap .* only once"):
            VectorTextFeatures(VectorTextFeatures(make_vector()))

    def test_noise_and_features_in_either_order(self) -> None:
        first, second = TextFeatures(NoiseAction(make())), NoiseAction(TextFeatures(make()))
        for env in (first, second):
            env.reset(seed=0)
        assert_same(first.step(normal(0)), second.step(normal(0)))

    def test_the_reference_policy_reads_the_prompt(self) -> None:
        for env in (TextFeatures(make()), VectorTextFeatures(make_vector())):
            with pytest.raises(TypeError, match="reads the prompt and the latent itself"):
                reference_policy(env)
