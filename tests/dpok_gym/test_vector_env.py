"""The vector environment: bit for bit the scalar one, seed by seed."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from dpok_gym import DenoisingVectorEnv

N, T = 3, 2
SHAPE = (N, 4, 8, 8)


def make(**kwargs: Any) -> DenoisingVectorEnv:
    return DenoisingVectorEnv(**{"num_envs": N, "num_inference_steps": T, "device": "cpu"} | kwargs)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal to the last bit, in the same types, whatever it is made of."""
    if isinstance(theirs, (dict, tuple)):
        keys = theirs.keys() if isinstance(theirs, dict) else range(len(theirs))
        assert type(ours) is type(theirs), where
        assert len(ours) == len(theirs), where
        for key in keys:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, np.ndarray) and theirs.dtype == object:
        assert_same(tuple(ours), tuple(theirs), where)
    else:
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype, where
        assert np.array_equal(ours, theirs), where


@pytest.mark.parametrize("env_id", ["DPOK-Shapes-v0", "DPOK-SD15-v0"])
def test_equals_the_scalar_environments(env_id: str, tiny_sd_folder: Path, only_warnings) -> None:
    kwargs: dict[str, Any] = {"num_inference_steps": T, "render_mode": "rgb_array"}
    if env_id == "DPOK-SD15-v0":
        kwargs |= {"model": str(tiny_sd_folder), "reward": "jpeg-compressibility"}
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
    for space in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
        assert getattr(ours, space) == getattr(scalar, space)
    assert_same(ours.reset(seed=5), scalar.reset(seed=5), "reset")
    for i in range(2 * T + 1):
        assert_same(ours.step(noise(i)), scalar.step(noise(i)), f"step {i}")
        assert_same(ours.render(), scalar.render(), f"render {i}")
    assert_same(ours.reset(), scalar.reset(), "reset that goes on")
    assert_same(ours.reset(seed=[3, None, 8]), scalar.reset(seed=[3, None, 8]), "reset with a list")
    assert_same(ours.step(noise()), scalar.step(noise()), "step after it")


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
    tokens = env.model.tokenize(list(infos["prompt"]))
    assert np.array_equal(observation["prompt"], tokens)


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
    assert np.array_equal(observation["prompt"], env.model.tokenize(texts))
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


def test_pictures_decoded_together_are_about_the_same() -> None:
    alone, together = (make(decode_batch_size=size, render_mode="rgb_array") for size in (1, 2))
    for env in (alone, together):
        env.reset(seed=0)
    difference = np.stack(alone.render()).astype(int) - np.stack(together.render())
    assert abs(difference).max() <= 1


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


@pytest.mark.parametrize("num_envs", [0, -1])
def test_bad_number_of_environments(num_envs: int) -> None:
    with pytest.raises(ValueError, match=f"num_envs must be an integer of at least 1, got {num_envs}"):
        make(num_envs=num_envs)


def test_bad_calls() -> None:
    env = make()
    with pytest.raises(ValueError, match="3 environments need as many seeds, got 2"):
        env.reset(seed=[1, 2])
    with pytest.raises(gymnasium.error.Error, match="-1"):
        env.reset(seed=-1)
    with pytest.raises(ValueError, match="one text or 3, got 2"):
        env.reset(options={"prompt": ["a star", "a circle"]})
    with pytest.raises(ValueError, match="unknown reset options"):
        env.reset(options={"reset_mask": np.ones(N, bool)})
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
    second, _ = env.reset(seed=[np.int64(5), None, 9])
    assert env.np_random_seed == (5, 6, 9)
    same = [np.array_equal(one, other) for one, other in zip(first["latent"], second["latent"], strict=True)]
    assert same == [True, False, False]
