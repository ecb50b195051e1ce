"""The vector environment: bit for bit the scalar one, seed by seed."""

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from gymnasium.vector import AutoresetMode

import dpok_gym
from dpok_gym import DenoisingEnv, DenoisingVectorEnv, judging
from dpok_gym.models import TextToImageModel
from dpok_gym.prompts import prompt_to_bytes, prompts_from_bytes
from dpok_gym.registration import ENVIRONMENTS
from dpok_gym.worlds import find_world
from tests.support import SMALL_MODELS, assert_same, colours, every_other_fails, redness

N, T = 3, 2
SHAPE = (N, 4, 8, 8)


def make(**kwargs: Any) -> DenoisingVectorEnv:
    return DenoisingVectorEnv(**{"num_envs": N, "num_inference_steps": T, "device": "cpu"} | kwargs)


def noise(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_equals_the_scalar_environments(env_id: str, tiny_folder: Callable[[str], Path], only_warnings) -> None:
    kwargs: dict[str, Any] = {"num_inference_steps": T, "render_mode": "rgb_array", "decode_batch_size": 1}
    name = ENVIRONMENTS[env_id]["model"]
    if name in SMALL_MODELS:
        kwargs |= {"model": str(tiny_folder(SMALL_MODELS[name])), "image_size": 32}
    if ENVIRONMENTS[env_id]["reward"] in ("image-reward", "shapes-preference"):  # networks round differently in batches
        kwargs["reward"] = "jpeg-compressibility"
    with only_warnings():
        ours = gymnasium.make_vec(env_id, num_envs=N, **kwargs)
        scalar = gymnasium.make_vec(
            env_id,
            num_envs=N,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
            **kwargs,
        )
    assert isinstance(ours, DenoisingVectorEnv)
    assert ours.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    for space in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
        assert getattr(ours, space) == getattr(scalar, space)
    shape = ours.action_space.shape
    assert_same(ours.reset(seed=5), scalar.reset(seed=5), "reset")
    for i in range(2 * T + 1):
        step = ours.step(noise(i, shape))
        assert_same(step, scalar.step(noise(i, shape)), f"step {i}")
        assert step[2].all() == (i % T == T - 1)
        # Networks round differently in batches, so the expected images may differ by a level.
        mine, others = (np.stack(env.render()).astype(int) for env in (ours, scalar))
        half = mine.shape[2] // 2
        assert_same(mine[:, :, :half], others[:, :, :half], f"render {i}")
        assert abs(mine - others).max() <= 1
    assert_same(ours.reset(), scalar.reset(), "reset that goes on")
    assert_same(ours.reset(seed=[3, None, 8]), scalar.reset(seed=[3, None, 8]), "reset with a list")
    assert_same(ours.step(noise(0, shape)), scalar.step(noise(0, shape)), "step after it")


def test_same_step_autoreset() -> None:
    env = make(reward="jpeg-compressibility")
    _, infos = env.reset(seed=0)
    started = list(infos["prompt"])
    _, rewards, terminated, truncated, infos = env.step(noise(0))
    assert infos == {}
    assert not np.concatenate([rewards, terminated, truncated]).any()
    observation, rewards, terminated, truncated, infos = env.step(noise(1))
    assert terminated.all()
    assert not truncated.any()
    assert observation["step"].tolist() == [0] * N
    assert not np.allclose(observation["latent"], noise(1))
    final = infos["final_info"]
    assert np.array_equal(np.stack([last["latent"] for last in infos["final_obs"]]), noise(1))
    assert list(final["prompt"]) == started
    assert np.array_equal(rewards, final["rewards"]["jpeg-compressibility"])
    assert final["reward_valid"].tolist() == [True] * N
    assert np.stack(final["image"]).shape == (N, 64, 64, 3)
    assert prompts_from_bytes(observation["prompt"]) == list(infos["prompt"])
    assert [last["step"] for last in infos["final_obs"]] == [T - 1] * N
    assert prompts_from_bytes(np.stack([last["prompt"] for last in infos["final_obs"]])) == started


class TestAutoreset:
    """The three modes of Gymnasium, and its wrappers around them."""

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", list(AutoresetMode))
    def test_equals_the_scalar_environments(self, mode: AutoresetMode) -> None:
        kwargs: dict[str, Any] = {"num_inference_steps": T, "reward": "jpeg-compressibility"}
        ours = gymnasium.make_vec("DPOK-Shapes-v0", num_envs=N, autoreset_mode=mode, **kwargs)
        scalar = gymnasium.make_vec(
            "DPOK-Shapes-v0", num_envs=N, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **kwargs
        )
        assert ours.metadata["autoreset_mode"] is scalar.metadata["autoreset_mode"] is mode
        assert_same(ours.reset(seed=5), scalar.reset(seed=5), "reset")
        for i in range(3 * T):
            if mode is AutoresetMode.DISABLED and i and i % T == 0:
                # The last environment is reset one step after the others, so that they are at different steps.
                for mask in ([True, True, False], [False, False, True]):
                    options = {"reset_mask": np.array(mask)}
                    ours_reset, theirs = ours.reset(options=dict(options)), scalar.reset(options=dict(options))
                    assert_same(ours_reset, theirs, f"reset with mask {mask}")
            assert_same(ours.step(noise(i)), scalar.step(noise(i)), f"step {i}")

    def test_environments_at_different_steps(self) -> None:
        """A mask in the middle of an episode: the others go on, and end alone."""
        env = make(reward="jpeg-compressibility", autoreset_mode="Disabled")
        env.reset(seed=0)
        env.step(noise(0))
        observation, infos = env.reset(options={"reset_mask": np.array([False, True, False])})
        assert observation["step"].tolist() == [1, 0, 1]
        assert infos["_prompt"].tolist() == [False, True, False]
        assert np.array_equal(observation["latent"][[0, 2]], noise(0)[[0, 2]])
        _, rewards, ended, _, infos = env.step(noise(1))
        assert ended.tolist() == (rewards != 0).tolist() == infos["_image"].tolist() == [True, False, True]
        with pytest.raises(gymnasium.error.ResetNeeded, match="is over"):
            env.step(noise(2))
        same = make(reward="jpeg-compressibility")
        same.reset(seed=0)
        same.step(noise(0))
        _, expected, *_ = same.step(noise(1))
        assert rewards[[0, 2]].tolist() == expected[[0, 2]].tolist()

    def test_next_step(self) -> None:
        env = make(reward="jpeg-compressibility", autoreset_mode="NextStep")
        env.reset(seed=0)
        env.step(noise(0))
        observation, _, ended, _, infos = env.step(noise(1))
        assert ended.all()
        assert np.array_equal(observation["latent"], noise(1))
        assert np.stack(infos["image"]).shape == (N, 64, 64, 3)
        observation, rewards, ended, _, infos = env.step(np.full(SHAPE, np.nan))  # the action is not used
        assert not rewards.any()
        assert not ended.any()
        assert observation["step"].tolist() == [0] * N
        assert prompts_from_bytes(observation["prompt"]) == list(infos["prompt"])

    def test_gymnasium_wrappers(self) -> None:
        env: Any = make(reward="jpeg-compressibility", autoreset_mode="NextStep")
        env = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
        env = gymnasium.wrappers.vector.TransformReward(env, lambda rewards: 2 * rewards)

        def halved(values: dict[str, Any]) -> dict[str, Any]:
            return {**values, "latent": values["latent"] / 2}

        env = gymnasium.wrappers.vector.TransformObservation(env, halved)
        observation, _ = env.reset(seed=0)
        plain, _ = make().reset(seed=0)
        assert np.array_equal(observation["latent"], plain["latent"] / 2)
        env.step(noise(0))
        observation, rewards, _, _, infos = env.step(noise(1))
        assert np.array_equal(observation["latent"], noise(1) / 2)
        assert np.allclose(rewards, 2 * infos["episode"]["r"])
        assert infos["episode"]["l"].tolist() == [T] * N

    def test_flattening_wrapper(self) -> None:
        env = make(reward="jpeg-compressibility", autoreset_mode="NextStep")
        flat = gymnasium.wrappers.vector.FlattenObservation(
            dpok_gym.VectorTextFeatures(dpok_gym.VectorNoiseAction(env))
        )
        for i in range(2 * (T + 1)):
            observation, *_ = flat.step(noise(i)) if i else flat.reset(seed=0)
            assert observation.shape == (N, 4 * 8 * 8 + T + env.model.text_width)

    def test_unknown_mode(self) -> None:
        with pytest.raises(
            ValueError, match="autoreset_mode must be one of 'NextStep', 'SameStep', 'Disabled', got 'of"
        ):
            make(autoreset_mode="off")

    @pytest.mark.parametrize("mask", [[True] * N, np.ones(N), np.ones(N + 1, bool), np.zeros(N, bool)])
    def test_bad_masks(self, mask: Any) -> None:
        env = make()
        env.reset(seed=0)
        with pytest.raises(ValueError, match=r"'reset_mask' takes a boolean array of shape \(3,\)"):
            env.reset(options={"reset_mask": mask})


def test_reference_info() -> None:
    """About that of the scalar environments, also where an episode ends; networks round differently in batches."""
    kwargs: dict[str, Any] = {"reference_info": True, "reference_log_prob_coef": 0.01, "reward": "jpeg-compressibility"}
    env, scalar = make(**kwargs), DenoisingEnv(num_inference_steps=T, device="cpu", **kwargs)
    env.reset(seed=3)
    scalar.reset(seed=5)
    for step in range(T):
        _, rewards, _, _, infos = env.step(noise(step))
        _, reward, _, _, info = scalar.step(noise(step)[2])
        infos = infos.get("final_info", infos)
        assert rewards[2] == pytest.approx(reward, rel=1e-4)
        for name in ("reference_mean", "reference_std", "log_prob_reference"):
            np.testing.assert_allclose(infos[name][2], info[name], rtol=1e-4, atol=1e-4)


def test_seeds() -> None:
    env = make()
    first, _ = env.reset(seed=5)
    assert len({latent.tobytes() for latent in first["latent"]}) == N
    listed, _ = env.reset(seed=[7, 5, 6])
    assert np.array_equal(listed["latent"], first["latent"][[2, 0, 1]])
    # Two generators of the first seeds make the first two environments: how many there are makes no difference.
    pair, _ = make(num_envs=2).reset(seed=5)
    assert np.array_equal(pair["latent"], first["latent"][:2])
    assert len({rng.random() for rng in env.np_random}) == N


def test_prompts_of_the_callers_choice() -> None:
    env = make()
    texts = ["a star", "a red circle", "a blue square"]
    observation, infos = env.reset(seed=0, options={"prompt": texts})
    assert list(infos["prompt"]) == texts
    assert np.array_equal(observation["prompt"], prompt_to_bytes(texts, 512))
    assert list(env.reset(options={"prompt": "a star"})[1]["prompt"]) == ["a star"] * N


def test_latents_of_the_callers_choice() -> None:
    env = make(reward="jpeg-compressibility")
    latents = noise(3)
    observation, infos = env.reset(seed=5, options={"latent": latents})
    assert observation["latent"].dtype == np.float32
    assert np.array_equal(observation["latent"], latents)
    assert list(infos["prompt"]) == list(make().reset(seed=5)[1]["prompt"])  # still drawn, and the same ones
    texts = ["a star", "a red circle", "a blue square"]
    observation, infos = env.reset(options={"latent": latents[1].astype(float).tolist(), "prompt": texts})
    assert np.array_equal(observation["latent"], np.stack([latents[1]] * N))
    assert list(infos["prompt"]) == texts
    # It holds for one episode.
    env.step(noise(0))
    following, *_ = env.step(noise(1))
    assert len({latent.tobytes() for latent in following["latent"]}) == N


def test_chosen_latents_are_not_drawn() -> None:
    env, untouched = make(prompts=["a star"]), make(prompts=["a star"])
    first, _ = untouched.reset(seed=5)
    env.reset(seed=5, options={"prompt": "a star", "latent": noise()})
    assert np.array_equal(env.reset(options={"prompt": "a star"})[0]["latent"], first["latent"])


@pytest.mark.slow
def test_memory_is_not_shared() -> None:
    env, untouched = make(render_mode="rgb_array"), make(render_mode="rgb_array")
    first, _ = env.reset(seed=0)
    untouched.reset(seed=0)
    for values in first.values():
        values[:] = 1
    assert_same(env.render(), untouched.render())
    action = noise()
    following, *_ = env.step(action)
    assert_same(following, untouched.step(noise())[0])
    action[:] = following["latent"][:] = 7
    assert_same(env.render(), untouched.render())
    for chosen in (noise(), noise()[0]):  # for each of them, for all of them
        kept = chosen.copy()
        observation, _ = env.reset(options={"latent": chosen})
        untouched.reset(options={"latent": kept})
        observation["latent"][0] = 7
        assert np.array_equal(chosen, kept)
        chosen[:] = 7
        assert_same(env.render(), untouched.render())


def test_masked_rewards() -> None:
    def second_is_nan(images: torch.Tensor, prompts: list[str]) -> list[float]:
        return [1.0, float("nan"), 3.0]

    env = make(reward=second_is_nan, non_finite="mask")
    env.reset(seed=0)
    env.step(noise())
    _, rewards, _, _, infos = env.step(noise())
    assert rewards.tolist() == [1.0, 0.0, 3.0]
    assert infos["final_info"]["reward_valid"].tolist() == [True, False, True]
    strict = make(reward=second_is_nan)
    _, infos = strict.reset(seed=0)
    strict.step(noise())
    with pytest.raises(ValueError, match=f"for the prompt '{infos['prompt'][1]}' is not finite"):
        strict.step(noise())


def test_images_decoded_together_are_about_the_same() -> None:
    alone, together = (make(decode_batch_size=size, render_mode="rgb_array") for size in (1, 2))
    for env in (alone, together):
        env.reset(seed=0)
    difference = np.stack(alone.render()).astype(int) - np.stack(together.render())
    assert abs(difference).max() <= 1


def test_predicted_images() -> None:
    """Also where the episodes are at different steps, and of the first observation after an end."""
    env = make(predicted_info=True, render_mode="rgb_array", reward="jpeg-compressibility")
    _, infos = env.reset(seed=0)
    alone = DenoisingEnv(predicted_info=True, num_inference_steps=T, device="cpu")
    for i in range(N):
        _, info = alone.reset(seed=i)
        assert abs(infos["predicted"][i].astype(int) - info["predicted"]).max() <= 1
    env.step(noise())
    _, infos = env.reset(options={"reset_mask": np.array([True, False, False])})
    assert infos["_predicted"].tolist() == [True, False, False]
    frames = env.render()
    assert frames is not None
    assert abs(infos["predicted"][0].astype(int) - frames[0][:, 64:]).max() <= 1
    _, _, terminated, _, infos = env.step(noise(1))
    assert terminated.tolist() == [False, True, True]
    last = infos["final_info"]
    assert_same(np.stack(last["predicted"][1:]), np.stack(last["image"][1:]))
    assert infos["_predicted"].all()
    assert not np.array_equal(infos["predicted"][1], last["predicted"][1])


def test_render_before_reset() -> None:
    with pytest.raises(gymnasium.error.ResetNeeded, match="before render"):
        make(render_mode="rgb_array").render()
    silent = make()
    silent.reset()
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert silent.render() is None


def test_stepping_before_reset() -> None:
    with pytest.raises(gymnasium.error.ResetNeeded, match="before step"):
        make().step(noise())


@pytest.mark.parametrize("num_envs", [0, -1, 1.5, True])
def test_bad_number_of_environments(num_envs: Any) -> None:
    with pytest.raises(ValueError, match=f"num_envs must be an integer of at least 1, got {num_envs}"):
        make(num_envs=num_envs)


def test_bad_calls() -> None:
    env = make()
    with pytest.raises(ValueError, match="expected a seed for each of the 3 environments, got 2"):
        env.reset(seed=[1, 2])
    with pytest.raises(ValueError, match="the seed must be an integer of at least 0, got -1"):
        env.reset(seed=-1)
    with pytest.raises(ValueError, match="one text or 3, got 2"):
        env.reset(options={"prompt": ["a star", "a circle"]})
    with pytest.raises(ValueError, match="unknown reset options"):
        env.reset(options={"reset_masks": np.ones(N, bool)})
    for wrong in (noise()[:2], noise()[:, 0], noise()[None], 0.0, np.full(SHAPE, np.nan), np.full(SHAPE[1:], np.inf)):
        with pytest.raises(ValueError, match=r"'latent' takes finite numbers of shape \(4, 8, 8\), or \(3, 4, 8, 8\)"):
            env.reset(options={"latent": wrong})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected an array of shape \(3, 4, 8, 8\) for 3 .*got \(4, 8, 8\)"):
        env.step(noise()[0])
    spoilt = noise()
    spoilt[2, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        env.step(spoilt)


def test_seeds_are_told() -> None:
    env = make(num_inference_steps=np.int64(T))
    first, _ = env.reset(seed=np.int64(5))
    assert env.np_random_seed == (5, 6, 7)
    second, _ = env.reset(seed=[np.int64(5), None, 9])  # type: ignore[list-item]  # NumPy's integers will do
    assert env.np_random_seed == (5, 6, 9)
    same = [np.array_equal(one, other) for one, other in zip(first["latent"], second["latent"], strict=True)]
    assert same == [True, False, False]


class TestJudge:
    @pytest.mark.slow
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("reward", [redness, {"shapes-alignment": 1.0, "jpeg-compressibility": 0.1}, colours])
    def test_equals_the_rewards_and_infos_of_step(self, reward: Any, workers: int) -> None:
        """Whatever the size of the batch; so a learner may judge as many images at a time as it likes."""
        env = make(num_envs=5, reward=reward)
        env.reset(seed=0)
        for i in range(T):
            _, rewards, _, _, infos = env.step(noise(i, (5, 4, 8, 8)))
        final = infos["final_info"]
        latents = torch.from_numpy(np.stack([last["latent"] for last in infos["final_obs"]]))
        prompts = list(final["prompt"])
        for num_envs in (1, 3):  # the environment's own size makes no difference
            judge = make(num_envs=num_envs, reward=reward, reward_workers=workers)
            for size in (1, 2, 5):
                for first in range(0, 5, size):
                    rows = slice(first, first + size)
                    outcome = judge.judge(latents[rows], prompts[rows])
                    assert_same(outcome.rewards.total.double().numpy(), rewards[rows])
                    assert_same(outcome.rewards.valid.numpy(), final["reward_valid"][rows])
                    assert outcome.rewards.components.keys() == {
                        name for name in final["rewards"] if not name.startswith("_")
                    }
                    for name, values in outcome.rewards.components.items():
                        assert_same(values.double().numpy(), final["rewards"][name][rows])
                    assert_same(outcome.images, np.stack(final["image"])[rows])
                    assert outcome.images.shape[1:] == (64, 64, 3)
            judge.close()

    @pytest.mark.slow
    def test_needs_no_episode_and_leaves_one_alone(self) -> None:
        env, untouched = make(reward=redness), make(reward=redness)
        latents = torch.from_numpy(noise(9, (7, 4, 8, 8)))
        before = env.judge(latents, ["a star"] * 7)
        for each in (env, untouched):
            each.reset(seed=0)
            each.step(noise())
        assert_same(env.judge(latents, ["a star"] * 7), before)
        assert_same(env.step(noise(1)), untouched.step(noise(1)))

    def test_masks_or_refuses_what_is_not_finite(self) -> None:
        latents, prompts = torch.from_numpy(noise()), ["a star", "a red circle", "a blue square"]
        rewards = make(reward=every_other_fails, non_finite="mask").judge(latents, prompts).rewards
        assert rewards.valid.tolist() == [True, False, True]
        assert rewards.total[1] == 0
        with pytest.raises(ValueError, match="for the prompt 'a red circle' is not finite"):
            make(reward=every_other_fails).judge(latents, prompts)

    @pytest.mark.parametrize("n", [1, 2, 4])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_needs_a_prompt_for_each_image(self, n: int, workers: int) -> None:
        env = make(reward=redness, reward_workers=workers)
        with pytest.raises(ValueError, match=f"expected a prompt for each of the 3 latents, got {n}"):
            env.judge(torch.from_numpy(noise()), ["a star"] * n)
        env.close()


class TestWorld:
    def test_is_that_of_the_model(self) -> None:
        for env_id in ("DPOK-Shapes-v0", "DPOK-Mixture-v0"):
            env = gymnasium.make_vec(env_id, num_envs=1)
            assert isinstance(env, DenoisingVectorEnv)
            assert env.world is not None
            assert env.world is find_world(env.model.name)

    def test_whatever_the_reward_is(self) -> None:
        world = make(reward="jpeg-compressibility").world
        assert world is not None
        assert world is make().world

    def test_there_is_none_of_other_models(self, tiny_sd_folder: Path) -> None:
        assert make(model=str(tiny_sd_folder), prompts="a red circle", reward=redness).world is None
        model = TextToImageModel.from_pipeline(DiffusionPipeline.from_pretrained(tiny_sd_folder))
        assert make(model=model, prompts="a red circle", reward=redness).world is None

    def test_there_is_none_for_prompts_that_its_judge_cannot_read(self) -> None:
        """The model reads single words in any order; the judge reads sentences."""
        assert make(prompts="circle red a", reward=redness).world is None
        assert make(prompts=["a red circle", "circle red a"], reward=redness).world is None

    def test_there_is_none_for_images_of_another_size(self) -> None:
        assert make(image_size=32, reward=redness).world is None
        assert make(image_size=64, reward=redness).world is not None


@pytest.mark.slow
def test_a_live_model(tiny_sd_folder: Path) -> None:
    """It draws what the folder's model draws, and is not loaded again."""
    model = TextToImageModel.from_pipeline(DiffusionPipeline.from_pretrained(tiny_sd_folder))
    settings: dict[str, Any] = {"prompts": ["dog", "moon"], "reward": redness, "guidance_scale": 3.0}
    live = gymnasium.make_vec("DPOK-SD15-v0", num_envs=N, model=model, num_inference_steps=T, **settings)
    loaded = make(model=str(tiny_sd_folder), **settings)
    assert isinstance(live, DenoisingVectorEnv)
    assert live.model is live.process.model is model
    policies = [dpok_gym.reference_policy(env, seed=1) for env in (live, loaded)]
    observations = [env.reset(seed=0)[0] for env in (live, loaded)]
    for _ in range(T):
        steps = [
            env.step(policy(observation))
            for env, policy, observation in zip((live, loaded), policies, observations, strict=True)
        ]
        assert_same(*steps)
        observations = [step[0] for step in steps]
    assert steps[0][2].all()


def test_state_of_an_observation() -> None:
    env = make(num_inference_steps=4)
    texts = ["a star", "a red circle", "a blue square"]
    env.reset(seed=0, options={"prompt": texts})
    observation, *_ = env.step(noise())
    state = env.state_of(observation)
    assert_same(state, env.process.state(torch.from_numpy(noise()), 1, env.process.encode(texts)))


def test_the_defaults_are_those_of_the_default_environment() -> None:
    registered = ENVIRONMENTS["DPOK-Shapes-v0"]
    of_vector = inspect.signature(DenoisingVectorEnv).parameters
    # An eta of None is the sampler's usual one: with DDIM that of the environment.
    assert {name: of_vector[name].default for name in registered} == registered | {"eta": None}
    assert DenoisingEnv().batch.process.config == make(num_inference_steps=20).process.config


def test_misspelt_arguments() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_env'; did you mean 'num_envs'"):
        DenoisingVectorEnv(num_env=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'; did you mean 'guidance_scale'"):
        gymnasium.make_vec("DPOK-Shapes-v0", num_envs=2, guidance=3.0)


def test_prompts_that_are_longer_than_the_observation() -> None:
    with pytest.raises(ValueError, match="'a red circle' has 12 bytes in UTF-8, but max_prompt_bytes is 11; raise"):
        make(prompts=["a star", "a red circle"], max_prompt_bytes=11)
    env = make(prompts=["a star"], max_prompt_bytes=np.int64(11))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="raise max_prompt_bytes"):
        env.reset(options={"prompt": ["a star", "a star", "a red circle"]})
    observation, *_ = env.step(noise())  # the episode goes on
    assert prompts_from_bytes(observation["prompt"]) == ["a star"] * N
    assert observation["prompt"].shape == (N, 11)
    assert env.observation_space.contains(observation)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_reward_workers_change_nothing(workers: int) -> None:
    plain, threaded = make(num_envs=5), make(num_envs=5, reward_workers=workers)
    for env in (plain, threaded):
        env.reset(seed=0)
    for i in range(T):
        assert_same(threaded.step(noise(i, (5, 4, 8, 8))), plain.step(noise(i, (5, 4, 8, 8))))
    threaded.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_large_batches_are_scored_in_parts(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images in full precision at a time would take gigabytes."""
    sizes: list[int] = []

    def counting(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        sizes.append(len(prompts))
        return redness(images, prompts)

    latents, prompts = torch.from_numpy(noise(0, (5, 4, 8, 8))), ["a star", "a star", "a red star", "a star", "a star"]
    env = make(reward=counting, decode_batch_size=1, reward_workers=workers)
    whole = env.judge(latents, prompts)
    monkeypatch.setattr(judging, "MAX_PIXELS", 2 * 64 * 64 + 1)
    sizes.clear()
    assert_same(env.judge(latents, prompts), whole)
    assert sorted(sizes) == [1, 2, 2]
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_reward_workers_decode_the_same_images_together(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the last bits of an image would depend on the number of workers."""
    env = make(num_envs=5, reward=redness, decode_batch_size=2, reward_workers=workers)
    decode, sizes = env.model.decode, list[int]()

    def record(latents: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(env.model, "decode", record)
    env.judge(torch.from_numpy(noise(0, (5, 4, 8, 8))), ["a star"] * 5)
    assert sizes == [2, 2, 1]
    env.close()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("a red dragon", "cannot read 'dragon' in the prompt 'a red dragon'"),
        ("a star " * 100, "reads at most 16"),
        ("a star \x00", "cannot read"),
    ],
)
def test_all_prompts_of_a_file_are_checked(tmp_path: Path, bad: str, message: str) -> None:
    """A bad one would end the run when it is first drawn, perhaps after days."""
    lines = ["# many", *["a star"] * 5000]
    for number in (4000, 4500, 4501):
        lines[number] = bad
    path = tmp_path / "many.txt"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as raised:
        make(prompts=str(path))
    assert str(raised.value).endswith("(3 of 5000 are wrong, in line 4001, 4501, 4502)")
    path.write_text("\n".join(["# many", *["a star"] * 4997, *["star"] * 3]))
    message = r"max_prompt_bytes is 5; .* \(4997 of 5000 are wrong, in line 2, 3, 4, 5, 6, \.\.\.\)"
    with pytest.raises(ValueError, match=message):
        make(prompts=str(path), max_prompt_bytes=5)


def test_a_bad_prompt_leaves_the_episode_alone() -> None:
    env = make(prompts=["a star"], reward=redness)
    env.reset(seed=0)
    env.step(noise())
    with pytest.raises(ValueError, match="cannot read 'dragon'"):
        env.reset(options={"prompt": ["a star", "a star", "a red dragon"]})
    _, _, terminated, _, infos = env.step(noise(1))
    assert terminated.all()
    assert list(infos["final_info"]["prompt"]) == ["a star"] * N


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_a_copy_goes_on_as_the_environment_would(copied: str, mode: str) -> None:
    """In the middle of episodes, with workers, over the ends of episodes."""
    env: Any = gymnasium.make_vec(
        "DPOK-Shapes-v0",
        num_envs=N,
        num_inference_steps=T,
        device="cpu",
        reward_workers=2,
        autoreset_mode=mode,
        decode_batch_size="auto",
    )
    env.reset(seed=[3, 1, 2])
    env.step(noise())
    again = copy.deepcopy(env) if copied == "deepcopy" else pickle.loads(pickle.dumps(env))
    assert again.model is env.model
    assert (again.np_random_seed, again.autoreset_mode) == ((3, 1, 2), env.autoreset_mode)
    for k in range(4):
        assert_same(again.step(noise(k)), env.step(noise(k)))
    again.close()
    env.step(noise())  # its workers are its own
