"""The scalar environment: the checkers of Gymnasium and Stable-Baselines3, an episode, and what is refused."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import GYMNASIUM_ADVICE, SB3_ADVICE
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_checker import data_equivalence as equal
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from dpok_gym import DenoisingEnv, PromptSet
from dpok_gym.registration import ENVIRONMENTS

RED_CIRCLE = "a red circle"
T = 3


def make(**kwargs: Any) -> DenoisingEnv:
    return DenoisingEnv(**{"num_inference_steps": T, "device": "cpu"} | kwargs)


def act(env: gymnasium.Env, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(env.action_space.shape, np.float32)


def finish(env: gymnasium.Env, **reset: Any) -> tuple[dict, float, bool, bool, dict]:
    """Plays an episode; returns what its last step did."""
    env.reset(**reset)
    for i in range(T):
        last = env.step(act(env, i))
    return last


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_checkers(env_id: str, steps: int, request: pytest.FixtureRequest, only_warnings) -> None:
    small = {"sd15": "tiny_sd_folder", "sd21": "tiny_v_folder", "sdxl": "tiny_xl_folder"}  # in place of the real ones
    name = ENVIRONMENTS[env_id]["model"]
    ours: dict = {}
    if name in small:
        ours = {"model": str(request.getfixturevalue(small[name])), "reward": "jpeg-compressibility"}
    with only_warnings(*GYMNASIUM_ADVICE):
        env = gymnasium.make(env_id, num_inference_steps=steps, render_mode="rgb_array", **ours)
        check_env(env.unwrapped)
    with only_warnings(*SB3_ADVICE):
        sb3_check_env(env.unwrapped)


def test_spaces() -> None:
    env = make()
    assert env.observation_space["latent"].shape == env.action_space.shape == (4, 8, 8)
    assert env.observation_space["step"].n == T
    prompt = env.observation_space["prompt"]
    assert (prompt.shape, prompt.dtype) == ((env.batch.model.max_tokens,), np.int64)
    assert prompt.high.max() == env.batch.model.vocab_size - 1
    assert env.action_space.is_bounded()


def test_an_episode() -> None:
    env = make(reward={"jpeg-compressibility": 0.5, "jpeg-incompressibility": 2.0})
    observation, info = env.reset(seed=0)
    assert info["prompt"] in env.batch.prompts.train
    for i in range(T):
        assert observation["step"] == i
        assert env.observation_space.contains(observation)
        assert np.array_equal(observation["prompt"], env.batch.model.tokenize([info["prompt"]])[0])
        observation, reward, terminated, truncated, last_info = env.step(act(env, i))
        assert np.array_equal(observation["latent"], act(env, i))
        assert (terminated, truncated) == (i == T - 1, False)
        assert (reward == 0.0) == (last_info == {}) == (i < T - 1)
    assert env.observation_space.contains(observation)
    assert last_info["prompt"] == info["prompt"]
    assert last_info["reward_valid"] is True
    size = last_info["rewards"]["jpeg-incompressibility"]
    assert last_info["rewards"] == {"jpeg-compressibility": -size, "jpeg-incompressibility": size}
    assert isinstance(reward, float)
    assert reward == pytest.approx(1.5 * size)
    picture = env.batch.model.decode(torch.from_numpy(observation["latent"])[None])[0]
    assert last_info["image"].dtype == np.uint8
    assert np.array_equal(last_info["image"], (255 * picture).round().byte().permute(1, 2, 0).numpy())


def test_reward_sees_the_picture_and_its_prompt() -> None:
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.append((images, prompts))
        return images.mean((1, 2, 3))

    *_, info = finish(make(reward=brightness), seed=0, options={"prompt": RED_CIRCLE})
    ((images, prompts),) = seen
    assert prompts == [RED_CIRCLE]
    assert images.shape == (1, 3, 64, 64)
    assert info["rewards"] == {"brightness": pytest.approx(info["image"].mean() / 255, abs=2e-3)}


def test_seeds() -> None:
    env = make()
    first = env.reset(seed=1)
    following = env.reset()
    assert equal(first, make().reset(seed=1), exact=True)
    assert equal(env.reset(seed=1), first, exact=True)
    assert equal(env.reset(), following, exact=True)
    for other in (following, env.reset(seed=2)):
        assert not np.allclose(other[0]["latent"], first[0]["latent"])
    prompts = {env.reset(seed=seed)[1]["prompt"] for seed in range(30)}
    assert len(prompts) > 5


def test_first_latent_is_standard_normal() -> None:
    env = make()
    latents = np.stack([env.reset(seed=seed)[0]["latent"] for seed in range(100)])
    assert abs(latents.mean()) < 0.03  # 25600 numbers: the mean has a standard deviation of 0.006
    assert abs(latents.std() - 1) < 0.03


def test_prompt_of_the_callers_choice() -> None:
    env = make(prompts=["a blue square"])
    observation, info = env.reset(seed=0, options={"prompt": RED_CIRCLE})
    assert info == {"prompt": RED_CIRCLE}
    assert np.array_equal(observation["prompt"], env.batch.model.tokenize([RED_CIRCLE])[0])
    assert env.reset()[1] == {"prompt": "a blue square"}
    assert make(prompts=PromptSet("mine", ("a star",), ("a circle",))).reset()[1] == {"prompt": "a star"}


def test_latent_of_the_callers_choice() -> None:
    env = make()
    chosen = act(env)
    for latent in (chosen, chosen[None]):
        observation, info = env.reset(seed=3, options={"latent": latent})
        assert np.array_equal(observation["latent"], chosen)
        assert info == make().reset(seed=3)[1]
    chosen[:] = observation["latent"][:] = 7
    following, *_ = env.step(act(env, 1))
    assert np.array_equal(following["latent"], act(env, 1))
    assert not np.allclose(env.reset()[0]["latent"], act(env))
    # What is given is not drawn.
    env.reset(seed=3, options={"latent": act(env), "prompt": RED_CIRCLE})
    drawn, _ = env.reset(options={"prompt": RED_CIRCLE})
    assert np.array_equal(drawn["latent"], make().reset(seed=3, options={"prompt": RED_CIRCLE})[0]["latent"])


def test_held_out_prompts_are_never_drawn() -> None:
    env = make(prompts=PromptSet("mine", ("a star", "a square"), ("a circle",)))
    assert {env.reset(seed=seed)[1]["prompt"] for seed in range(20)} == {"a star", "a square"}


def test_observations_and_actions_are_the_callers_own() -> None:
    env, untouched = make(render_mode="rgb_array"), make(render_mode="rgb_array")
    first, _ = env.reset(seed=0)
    untouched.reset(seed=0)
    first["latent"][:] = first["prompt"][:] = 7
    assert np.array_equal(env.render(), untouched.render())
    action = act(env)
    following, *_ = env.step(action)
    expected, *_ = untouched.step(act(env))
    assert equal(following, expected, exact=True)
    action[:] = following["latent"][:] = 7
    assert np.array_equal(env.render(), untouched.render())


def test_render() -> None:
    env = make(render_mode="rgb_array")
    with pytest.raises(gymnasium.error.ResetNeeded, match="before render"):
        env.render()
    env.reset(seed=0)
    first = env.render()
    assert (first.shape, first.dtype) == ((64, 64, 3), np.uint8)
    for i in range(T):
        *_, info = env.step(act(env, i))
    assert not np.array_equal(env.render(), first)
    assert np.array_equal(env.render(), info["image"])
    silent = make()
    silent.reset()
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert silent.render() is None


def test_model_as_a_path_and_as_an_object(tiny_sd_folder: Path) -> None:
    by_path = make(model=tiny_sd_folder, reward="jpeg-compressibility")
    assert by_path.sampler["model"] == str(tiny_sd_folder)
    assert make(model=by_path.batch.model, reward="jpeg-compressibility").batch.model is by_path.batch.model


def test_bfloat16_episode() -> None:
    _, reward, terminated, _, info = finish(make(dtype="bfloat16"), seed=0)
    assert terminated
    assert np.isfinite(reward)
    assert info["image"].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"render_mode": "human"}, "render_mode must be None or 'rgb_array', got 'human'"),
        ({"guidance_scale": -1.0}, "guidance_scale must be finite and at least 0"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite and at least 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite and at least 0"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"dtype": "float8"}, "dtype must be float32, bfloat16 or float16, got 'float8'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000, got 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be an integer from 1 to 1000, got 1001"),
        ({"eta": 0.0}, r"eta must lie in \(0, 1\], got 0"),
        ({"eta": 1.5}, r"eta must lie in \(0, 1\], got 1.5"),
        ({"decode_batch_size": 0}, "decode_batch_size must be an integer of at least 1, None or 'auto', got 0"),
        ({"non_finite": "ignore"}, "non_finite must be one of 'error', 'mask'"),
        ({"prompts": []}, "prompt set 'list' is empty"),
        ({"prompts": ["a red circle", " "]}, "prompt 1 of 'list'"),
        ({"prompts": ["a red dragon"]}, "cannot read 'dragon' in the prompt 'a red dragon'; its words are: a above"),
        ({"prompts": ["a red circle " * 9]}, "29 tokens and the model 'shapes' reads at most 16"),
        ({"reward": "beauty"}, "unknown reward 'beauty'; .*jpeg-compressibility, .*shapes-alignment"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": RED_CIRCLE}, r"unknown reset options \['prompts'\]; there are 'prompt' and 'latent'"),
        ({"prompt": "a red dragon"}, "cannot read 'dragon'"),
        ({"prompt": ""}, "not blank"),
        ({"prompt": ["a red circle", "a star"]}, "one text or 1, got 2"),
        ({"prompt": "a " * 30}, "reads at most 16"),
        ({"latent": np.zeros((4, 8))}, r"'latent' takes finite numbers of shape \(4, 8, 8\).*got \(4, 8\)"),
        ({"latent": np.zeros((2, 4, 8, 8))}, r"'latent' takes .*got \(2, 4, 8, 8\)"),
        ({"latent": np.full((4, 8, 8), np.nan), "prompt": "a star"}, "'latent' takes finite numbers"),
    ],
)
def test_bad_reset_leaves_the_episode_alone(options: dict[str, Any], message: str) -> None:
    env = make()
    env.reset(seed=0, options={"prompt": RED_CIRCLE})
    env.step(act(env))
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)
    env.step(act(env))
    observation, _, terminated, _, info = env.step(act(env))
    assert terminated
    assert info["prompt"] == RED_CIRCLE
    assert np.array_equal(observation["prompt"], env.batch.model.tokenize([RED_CIRCLE])[0])


def nowhere_finite(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.full((len(prompts),), torch.nan)


def test_reward_that_is_not_finite() -> None:
    env = make(reward=nowhere_finite)
    with pytest.raises(ValueError, match=f"'nowhere_finite' for the prompt '{RED_CIRCLE}' is not finite"):
        finish(env, options={"prompt": RED_CIRCLE})
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(act(env))
    _, reward, terminated, _, info = finish(make(reward=nowhere_finite, non_finite="mask"))
    assert (reward, terminated, info["reward_valid"]) == (0.0, True, False)
    assert np.isnan(info["rewards"]["nowhere_finite"])


def test_reward_of_a_wrong_shape() -> None:
    def pairs(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.zeros(len(prompts), 2)

    with pytest.raises(ValueError, match=r"'pairs' must return one number for each.*shape is \(1, 2\)"):
        finish(make(reward=pairs))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((4, 8)), r"of shape \(4, 8, 8\).*got \(1, 4, 8\)"),
        (np.zeros((1, 4, 8, 8)), r"got \(1, 1, 4, 8, 8\)"),
        (0.0, r"got \(1,\)"),
        (np.full((4, 8, 8), np.nan), "NaN or infinity"),
        (np.full((4, 8, 8), -np.inf), "NaN or infinity"),
        pytest.param(
            np.full((4, 8, 8), 1e300), "NaN or infinity", marks=pytest.mark.filterwarnings("ignore:overflow")
        ),  # finite until it becomes float32
    ],
)
def test_bad_actions(action: Any, message: str) -> None:
    env = make()
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert env.step(act(env))[0]["step"] == before["step"] + 1


def test_stepping_outside_an_episode() -> None:
    env = make()
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"reset\(\) before step"):
        env.step(act(env))
    finish(env)
    with pytest.raises(gymnasium.error.ResetNeeded, match="is over"):
        env.step(act(env))
    env.reset()
    assert not env.step(act(env))[2]
