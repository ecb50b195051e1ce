"""Gymnasium's vector environments as Stable-Baselines3 sees them, and the denoising environment inside wrappers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from agents import DPOK, GymnasiumVecEnv
from agents.common.vec_env import find_denoising_env
from dpok_gym import (
    DenoisingEnv,
    DenoisingVectorEnv,
    NoiseAction,
    TextFeatures,
    VectorNoiseAction,
    VectorTextFeatures,
)
from tests.support import assert_same

N, T = 3, 3
#: Ours and Stable-Baselines3's vector of the same environments.
Pair = tuple[Any, Any]
REWARD = {"jpeg-compressibility": 1.0, "jpeg-incompressibility": 0.5}


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """With two rewards, and images to look at."""
    return settings | {"reward": REWARD, "render_mode": "rgb_array"}


@pytest.fixture
def denoising_pair(settings: dict[str, Any]) -> Pair:
    ours = GymnasiumVecEnv(DenoisingVectorEnv(N, **settings))
    return ours, DummyVecEnv([lambda: DenoisingEnv(**settings)] * N)


@pytest.fixture
def cart_pole_pair() -> Pair:
    """Its episodes end at different times, some at the time limit."""
    settings = {"max_episode_steps": 15}
    vector_kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
    batch = gymnasium.make_vec("CartPole-v1", N, vectorization_mode="sync", vector_kwargs=vector_kwargs, **settings)
    return GymnasiumVecEnv(batch), DummyVecEnv([lambda: gymnasium.make("CartPole-v1", **settings)] * N)


def random_actions(env: Any, rng: np.random.Generator) -> np.ndarray:
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        return rng.integers(0, env.action_space.n, N)
    return rng.standard_normal((N, *env.action_space.shape), np.float32)


# --- Step for step what Stable-Baselines3's own DummyVecEnv gives


def without_types(value: Any) -> Any:
    """Turns NumPy's numbers into Python's: which of them an info has is a matter of who has put it there."""
    if isinstance(value, dict):
        return {key: without_types(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_types(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def assert_equal(ours: Any, theirs: Any) -> None:
    assert_same(without_types(ours), without_types(theirs))


@pytest.mark.parametrize("name", ["denoising_pair", "cart_pole_pair"])
def test_equals_dummy_vec_env(name: str, request: pytest.FixtureRequest) -> None:
    ours, theirs = request.getfixturevalue(name)
    is_cart_pole = name == "cart_pole_pair"
    assert ours.num_envs == theirs.num_envs == N
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.seed(5) == theirs.seed(5)
    assert_equal(ours.reset(), theirs.reset())
    assert_equal(ours.reset_infos, theirs.reset_infos)
    rng = np.random.default_rng(0)
    n_ended = n_cut_short = 0
    for _ in range(40 if is_cart_pole else 2 * T + 1):
        actions = random_actions(ours, rng)
        result = ours.step(actions)
        assert_equal(result, theirs.step(actions))
        assert_equal(ours.reset_infos, theirs.reset_infos)
        _, rewards, dones, infos = result
        assert rewards.dtype == np.float32
        n_ended += dones.sum()
        n_cut_short += sum(info["TimeLimit.truncated"] for info in infos)
        assert [("terminal_observation" in info) for info in infos] == dones.tolist()
    assert n_ended >= 2 * N
    if is_cart_pole:
        assert 0 < n_cut_short < n_ended
    # Seeds hold for one reset; then the generators go on.
    assert_equal(ours.reset(), theirs.reset())
    ours.seed(9)
    theirs.seed(9)
    assert_equal(ours.reset(), theirs.reset())


def test_last_info(denoising_pair: Pair) -> None:
    env, _ = denoising_pair
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


def test_options(denoising_pair: Pair) -> None:
    env, _ = denoising_pair
    prompt = env.venv.prompts.train[1]
    env.set_options({"prompt": prompt})
    env.reset()
    assert [info["prompt"] for info in env.reset_infos] == [prompt] * N
    prompts = set()
    for _ in range(5):
        env.reset()
        prompts |= {info["prompt"] for info in env.reset_infos}
    assert len(prompts) > 1  # an option holds for one reset


def test_options_of_each_environment(denoising_pair: Pair) -> None:
    ours, theirs = denoising_pair
    latents = random_actions(ours, np.random.default_rng(0))
    prompts = ["a red star", "a blue circle", "a red star"]
    options = [{"prompt": prompt, "latent": latent} for prompt, latent in zip(prompts, latents, strict=True)]
    for env in (ours, theirs):
        env.seed(5)
        env.set_options(options)
    observation = ours.reset()
    assert_equal(observation, theirs.reset())
    assert_equal(ours.reset_infos, theirs.reset_infos)
    assert [info["prompt"] for info in ours.reset_infos] == prompts
    assert np.array_equal(observation["latent"], latents)
    assert_equal(ours.reset(), theirs.reset())  # the options held for one reset
    for env in (ours, theirs):
        env.set_options({"latent": latents[1]})
    assert_equal(ours.reset(), theirs.reset())
    assert_equal(ours.reset_infos, theirs.reset_infos)


def test_options_of_some_environments_only(denoising_pair: Pair) -> None:
    env, _ = denoising_pair
    prompt = env.venv.prompts.train[1]
    some: list[dict[str, Any]] = [{}, {"prompt": prompt}]
    for options in (some[:1] * (N - 1) + some[1:], some[1:] * (N - 1) + some[:1]):
        env.set_options([dict(each) for each in options])
        with pytest.raises(ValueError, match="the same names for all environments"):
            env.reset()


def test_one_option_for_all_is_passed_on_as_it_is(cart_pole_pair: Pair) -> None:
    env, _ = cart_pole_pair
    env.set_options({"low": -0.01, "high": 0.01})
    assert np.abs(env.reset()).max() <= 0.01


def test_attributes_and_methods(denoising_pair: Pair) -> None:
    ours, theirs = denoising_pair
    for env in (ours, theirs):
        env.seed(3)
        env.reset()
    assert ours.get_attr("prompts") == theirs.get_attr("prompts")
    assert ours.get_attr("prompts", indices=1) == theirs.get_attr("prompts", indices=1)
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


def test_attributes_of_what_is_wrapped(settings: dict[str, Any]) -> None:
    batch = DenoisingVectorEnv(N, **settings)
    env = GymnasiumVecEnv(VectorNoiseAction(batch))
    assert env.get_attr("process") == [batch.process] * N
    assert env.get_attr("num_envs")[0] == N
    env.reset()
    assert [generator is mine for generator, mine in zip(env.get_attr("np_random"), batch.np_random, strict=True)]
    (state,) = env.env_method("state_of", env.reset(), indices=0)
    assert state.step.tolist() == [0] * N


def test_render(denoising_pair: Pair) -> None:
    ours, theirs = denoising_pair
    for env in (ours, theirs):
        env.seed(0)
        env.reset()
    # Networks round differently in batches, so the expected images, on the right, may differ by a level.
    for mine, others in zip(ours.get_images(), theirs.get_images(), strict=True):
        assert_equal(mine[:, :64], others[:, :64])
    difference = ours.render("rgb_array").astype(int) - theirs.render("rgb_array")
    assert abs(difference).max() <= 1
    ours.close()


def test_render_without_a_mode(settings: dict[str, Any]) -> None:
    env = GymnasiumVecEnv(DenoisingVectorEnv(N, **settings | {"render_mode": None}))
    env.reset()
    with pytest.warns(UserWarning, match="needs render_mode='rgb_array'"):
        assert env.get_images() == [None] * N


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(mode: AutoresetMode) -> None:
    env = gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})
    with pytest.raises(ValueError, match="must have autoreset mode SAME_STEP, it has AutoresetMode"):
        GymnasiumVecEnv(env)


# --- Other people's agents


def test_a_stock_agent_learns_by_noise(settings: dict[str, Any]) -> None:
    """Stable-Baselines3's own PPO reads the features of the prompt and acts by noise."""
    n_envs = 2
    env = GymnasiumVecEnv(VectorTextFeatures(VectorNoiseAction(DenoisingVectorEnv(n_envs, **settings))))
    agent = PPO("MultiInputPolicy", VecMonitor(env), n_steps=T, batch_size=2, n_epochs=1, seed=0, device="cpu")
    before = [value.clone() for value in agent.policy.parameters()]
    agent.learn(2 * n_envs * T)
    assert len(agent.ep_info_buffer) == 2 * n_envs
    assert all(episode["l"] == T for episode in agent.ep_info_buffer)
    assert any((value != old).any() for value, old in zip(agent.policy.parameters(), before, strict=True))


def test_a_stock_agent_can_read_bytes_too(settings: dict[str, Any]) -> None:
    env = GymnasiumVecEnv(VectorNoiseAction(DenoisingVectorEnv(2, max_prompt_bytes=16, **settings)))
    agent = PPO("MultiInputPolicy", env, n_steps=T, batch_size=2, n_epochs=1, seed=0, device="cpu")
    agent.learn(2 * T)
    actions, _ = agent.predict(env.reset())
    assert actions.shape == (2, 4, 8, 8)


# --- The denoising environment inside

PLAIN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "scalar": lambda settings: DenoisingEnv(**settings),
    "vector": lambda settings: DenoisingVectorEnv(2, **settings),
    "GymnasiumVecEnv": lambda settings: GymnasiumVecEnv(DenoisingVectorEnv(2, **settings)),
    "DummyVecEnv": lambda settings: DummyVecEnv([lambda: DenoisingEnv(**settings)]),
    "Monitor": lambda settings: Monitor(DenoisingEnv(**settings)),
    "VecMonitor": lambda settings: VecMonitor(GymnasiumVecEnv(DenoisingVectorEnv(2, **settings))),
    "make_vec_env": lambda settings: make_vec_env(lambda: DenoisingEnv(**settings), n_envs=1),
    "gymnasium.make": lambda settings: gymnasium.make("DPOK-Shapes-v0", **settings),
    "gymnasium.make_vec": lambda settings: gymnasium.make_vec("DPOK-Shapes-v0", 2, **settings),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLAIN)
def test_the_denoising_environment_is_found(kind: str, settings: dict[str, Any]) -> None:
    env = PLAIN[kind](settings)
    batch = find_denoising_env(env)
    assert isinstance(batch, DenoisingVectorEnv)
    is_single = kind in ("scalar", "DummyVecEnv", "Monitor", "make_vec_env", "gymnasium.make")
    assert batch.num_envs == (1 if is_single else 2)
    assert find_denoising_env(batch) is batch
    assert find_denoising_env(env) is batch
    inner = getattr(env, "unwrapped", env)
    if isinstance(inner, DenoisingEnv):
        assert batch is inner.batch
    agent = DPOK(env=env, seed=0, device="cpu", policy_kwargs={"lora_rank": 2})
    assert agent.denoising_env is batch
    assert agent.process is batch.process
    assert agent.n_envs == batch.num_envs


WRAPPERS: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "NoiseAction": lambda settings, path: NoiseAction(DenoisingEnv(**settings)),
    "TextFeatures": lambda settings, path: TextFeatures(DenoisingEnv(**settings)),
    "VectorNoiseAction": lambda settings, path: VectorNoiseAction(DenoisingVectorEnv(2, **settings)),
    "VectorTextFeatures": lambda settings, path: GymnasiumVecEnv(VectorTextFeatures(DenoisingVectorEnv(2, **settings))),
    "RecordEpisodeStatistics": lambda settings, path: gymnasium.wrappers.vector.RecordEpisodeStatistics(
        DenoisingVectorEnv(2, **settings)
    ),
    "TimeLimit": lambda settings, path: gymnasium.make("DPOK-Shapes-v0", max_episode_steps=2, **settings),
    "TransformReward": lambda settings, path: gymnasium.wrappers.TransformReward(
        DenoisingEnv(**settings), lambda reward: 2.0
    ),
    "VecNormalize": lambda settings, path: VecNormalize(
        GymnasiumVecEnv(DenoisingVectorEnv(2, **settings)), norm_obs_keys=["latent"]
    ),
    "VecCheckNan": lambda settings, path: VecCheckNan(DummyVecEnv([lambda: DenoisingEnv(**settings)])),
    "VecMonitor": lambda settings, path: VecMonitor(
        GymnasiumVecEnv(DenoisingVectorEnv(2, **settings)), str(path / "monitor")
    ),
    "Monitor": lambda settings, path: Monitor(DenoisingEnv(**settings), str(path / "monitor")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_that_would_have_no_effect_are_refused(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    env = WRAPPERS[name](settings, tmp_path)
    for use in (find_denoising_env, lambda env: DPOK(env=env, device="cpu")):
        with pytest.raises(ValueError, match=rf"would not notice the wrapper {name}; take it off"):
            use(env)


class HalfActions(DenoisingVectorEnv):
    def step(self, actions: Any) -> Any:
        return super().step(actions / 2)


class FixedStart(DenoisingEnv):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(seed=0)


class OwnReward(DenoisingVectorEnv):
    """It is no other decision process: agents ask for its rewards."""

    def judge(self, latents: Any, prompts: Any) -> Any:
        return super().judge(-latents, prompts)


def test_environments_that_step_in_their_own_way_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"would not notice HalfActions.step\(\): leave it out"):
        find_denoising_env(HalfActions(2, **settings))
    with pytest.raises(ValueError, match=r"would not notice FixedStart.reset\(\): leave it out"):
        find_denoising_env(FixedStart(**settings))
    assert find_denoising_env(OwnReward(2, **settings))


OTHERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "several in one process": lambda settings: DummyVecEnv([lambda: DenoisingEnv(**settings)] * 2),
    "a process each": lambda settings: SubprocVecEnv([lambda: gymnasium.make("CartPole-v1")] * 2, "fork"),
    "sync": lambda settings: gymnasium.vector.SyncVectorEnv([lambda: DenoisingEnv(**settings)] * 2),
    "another game": lambda settings: gymnasium.make("CartPole-v1"),
    "another game in a wrapper": lambda settings: VecFrameStack(
        DummyVecEnv([lambda: gymnasium.make("CartPole-v1")]), n_stack=2
    ),
    "none": lambda settings: None,
    "a text": lambda settings: "DPOK-Shapes-v0",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_other_environments_are_refused(kind: str, settings: dict[str, Any]) -> None:
    env = OTHERS[kind](settings)
    with pytest.raises(ValueError, match=r"needs a denoising environment such as .*, got .*; make many at a time with"):
        find_denoising_env(env)
    if isinstance(env, SubprocVecEnv):
        env.close()


@pytest.mark.parametrize("wrap", [lambda env: env, GymnasiumVecEnv])
def test_agents_refuse_the_reward_of_the_pre_trained_model(wrap: Any) -> None:
    env = DenoisingVectorEnv(2, device="cpu", reference_log_prob_coef=0.1)
    with pytest.raises(ValueError, match=r"would not notice the environment's reference_log_prob_coef; .* kl_coef"):
        find_denoising_env(wrap(env))
