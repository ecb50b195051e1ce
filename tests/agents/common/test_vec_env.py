"""Gymnasium's vector environments as Stable-Baselines3 sees them: step for step what its own ``DummyVecEnv`` gives."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from agents import GymVectorVecEnv
from dpok_gym import DenoisingEnv, DenoisingVectorEnv, VectorNoiseAction

N, T = 3, 2
SETTINGS: dict[str, Any] = {
    "num_inference_steps": T,
    "device": "cpu",
    "render_mode": "rgb_array",
    "reward": {"jpeg-compressibility": 1.0, "jpeg-incompressibility": 0.5},
}


def denoising_pair() -> tuple[VecEnv, VecEnv]:
    ours = GymVectorVecEnv(DenoisingVectorEnv(N, **SETTINGS))
    return ours, DummyVecEnv([lambda: DenoisingEnv(**SETTINGS)] * N)


def cart_pole_pair() -> tuple[VecEnv, VecEnv]:
    """Its episodes end at different times, some at the time limit."""
    settings = {"max_episode_steps": 15}
    vector_kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
    batch = gymnasium.make_vec("CartPole-v1", N, vectorization_mode="sync", vector_kwargs=vector_kwargs, **settings)
    return GymVectorVecEnv(batch), DummyVecEnv([lambda: gymnasium.make("CartPole-v1", **settings)] * N)


def random_actions(env: VecEnv, rng: np.random.Generator) -> np.ndarray:
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        return rng.integers(0, env.action_space.n, N)
    return rng.standard_normal((N, *env.action_space.shape), np.float32)


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, (dict, list, tuple)):
        keys = theirs.keys() if isinstance(theirs, dict) else range(len(theirs))
        assert len(ours) == len(theirs)
        for key in keys:
            assert_same(ours[key], theirs[key])
    else:
        assert np.array_equal(ours, theirs)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("pair", [denoising_pair, cart_pole_pair])
def test_equals_dummy_vec_env(pair: Callable[[], tuple[VecEnv, VecEnv]]) -> None:
    ours, theirs = pair()
    assert ours.num_envs == theirs.num_envs == N
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.seed(5) == theirs.seed(5)
    assert_same(ours.reset(), theirs.reset())
    assert_same(ours.reset_infos, theirs.reset_infos)
    rng = np.random.default_rng(0)
    n_ended = n_cut_short = 0
    for _ in range(40 if pair is cart_pole_pair else 2 * T + 1):
        actions = random_actions(ours, rng)
        result = ours.step(actions)
        assert_same(result, theirs.step(actions))
        assert_same(ours.reset_infos, theirs.reset_infos)
        _, rewards, dones, infos = result
        assert rewards.dtype == np.float32
        n_ended += dones.sum()
        n_cut_short += sum(info["TimeLimit.truncated"] for info in infos)
        assert [("terminal_observation" in info) for info in infos] == dones.tolist()
    assert n_ended >= 2 * N
    if pair is cart_pole_pair:
        assert 0 < n_cut_short < n_ended
    # Seeds hold for one reset; then the generators go on.
    assert_same(ours.reset(), theirs.reset())
    ours.seed(9)
    theirs.seed(9)
    assert_same(ours.reset(), theirs.reset())


def test_last_info() -> None:
    env, _ = denoising_pair()
    env.seed(0)
    env.reset()
    started = [info["prompt"] for info in env.reset_infos]
    rng = np.random.default_rng(0)
    for _ in range(T):
        last = random_actions(env, rng)
        observation, rewards, dones, infos = env.step(last)
    assert dones.all()
    assert observation["step"].tolist() == [0] * N
    for i, info in enumerate(infos):
        assert info["prompt"] == started[i]
        assert np.array_equal(info["terminal_observation"]["latent"], last[i])
        assert info["image"].dtype == np.uint8
        components = info["rewards"]
        total = components["jpeg-compressibility"] + 0.5 * components["jpeg-incompressibility"]
        assert rewards[i] == pytest.approx(total)


def test_options() -> None:
    env, _ = denoising_pair()
    prompt = env.venv.prompts.train[3]  # type: ignore[attr-defined]
    env.set_options({"prompt": prompt})
    env.reset()
    assert [info["prompt"] for info in env.reset_infos] == [prompt] * N
    prompts = set()
    for _ in range(5):
        env.reset()
        prompts |= {info["prompt"] for info in env.reset_infos}
    assert len(prompts) > 1  # an option holds for one reset


def test_options_of_each_environment() -> None:
    ours, theirs = denoising_pair()
    latents = random_actions(ours, np.random.default_rng(0))
    prompts = ["a red star", "a blue circle", "a red star"]
    options = [{"prompt": prompt, "latent": latent} for prompt, latent in zip(prompts, latents, strict=True)]
    for env in (ours, theirs):
        env.seed(5)
        env.set_options(options)
    observation = ours.reset()
    assert_same(observation, theirs.reset())
    assert_same(ours.reset_infos, theirs.reset_infos)
    assert [info["prompt"] for info in ours.reset_infos] == prompts
    assert np.array_equal(observation["latent"], latents)
    assert_same(ours.reset(), theirs.reset())  # the options held for one reset
    for env in (ours, theirs):
        env.set_options({"latent": latents[1]})
    assert_same(ours.reset(), theirs.reset())
    assert_same(ours.reset_infos, theirs.reset_infos)


def test_attributes_and_methods() -> None:
    ours, theirs = denoising_pair()
    for env in (ours, theirs):
        env.seed(3)
        env.reset()
    assert ours.get_attr("sampler") == theirs.get_attr("sampler")
    assert ours.get_attr("sampler", indices=1) == theirs.get_attr("sampler", indices=1)
    assert ours.get_attr("render_mode", indices=[0, 2]) == ["rgb_array"] * 2
    for indices in (None, 2, [2, 0]):
        mine, others = (env.get_attr("np_random", indices) for env in (ours, theirs))
        assert [g.bit_generator.state for g in mine] == [g.bit_generator.state for g in others]
    ours.set_attr("reward_workers", 2)
    assert ours.get_attr("reward_workers") == [2] * N
    assert [len(frames) for frames in ours.env_method("render", indices=[1, 2])] == [N, N]
    assert ours.env_is_wrapped(Monitor) == [False] * N
    assert ours.env_is_wrapped(Monitor, indices=[0]) == [False]
    with pytest.raises(AttributeError):
        ours.get_attr("no_such_thing")


def test_attributes_of_what_is_wrapped() -> None:
    batch = DenoisingVectorEnv(N, **SETTINGS)
    env = GymVectorVecEnv(VectorNoiseAction(batch))
    assert env.get_attr("sampler") == [batch.sampler] * N
    assert env.get_attr("num_envs")[0] == N
    env.reset()
    assert [generator is mine for generator, mine in zip(env.get_attr("np_random"), batch.np_random, strict=True)]
    assert len(env.env_method("pretrained_transition", env.reset())) == N


def test_render() -> None:
    ours, theirs = denoising_pair()
    for env in (ours, theirs):
        env.seed(0)
        env.reset()
    assert_same(ours.get_images(), theirs.get_images())
    assert_same(ours.render("rgb_array"), theirs.render("rgb_array"))
    ours.close()


def test_render_without_a_mode() -> None:
    env = GymVectorVecEnv(DenoisingVectorEnv(N, **SETTINGS | {"render_mode": None}))
    env.reset()
    with pytest.warns(UserWarning, match="needs render_mode='rgb_array'"):
        assert env.get_images() == [None] * N


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(mode: AutoresetMode) -> None:
    env = gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})
    with pytest.raises(ValueError, match="must have autoreset mode SAME_STEP, it has AutoresetMode"):
        GymVectorVecEnv(env)


def test_options_of_some_environments_only() -> None:
    env, _ = denoising_pair()
    prompt = env.venv.prompts.train[3]  # type: ignore[attr-defined]
    for options in ([{}] * (N - 1) + [{"prompt": prompt}], [{"prompt": prompt}] * (N - 1) + [{}]):
        env.set_options([dict(each) for each in options])
        with pytest.raises(ValueError, match="the same names for all environments"):
            env.reset()


def test_one_option_for_all_is_passed_on_as_it_is() -> None:
    env = GymVectorVecEnv(
        gymnasium.make_vec("CartPole-v1", 2, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})
    )
    env.set_options({"low": -0.01, "high": 0.01})
    assert np.abs(env.reset()).max() <= 0.01
