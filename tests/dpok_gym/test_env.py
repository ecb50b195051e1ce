"""The scalar environment: the checkers of Gymnasium and Stable-Baselines3, an episode, and what is refused."""

import copy
import inspect
import math
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_checker import data_equivalence as equal
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import dpok_gym
from dpok_gym import DenoisingEnv, DenoisingVectorEnv, NoiseAction, PromptSet, TextFeatures, TextToImageModel
from dpok_gym.prompts import prompt_to_bytes, prompts_from_bytes
from dpok_gym.registration import ENVIRONMENTS, TASKS
from dpok_gym.utils.images import tile, to_uint8
from tests.support import GYMNASIUM_ADVICE, SB3_ADVICE, SMALL_MODELS, always_nan, assert_same

RED_CIRCLE = "a red circle"
T = 3


def make(**kwargs: Any) -> DenoisingEnv:
    return DenoisingEnv(**{"num_inference_steps": T, "device": "cpu"} | kwargs)


def make_long(tiny_sd_folder: Path, **kwargs: Any) -> DenoisingEnv:
    """With three prompts of six, and one unseen one of two, that have more than 40 tokens or 100 bytes."""
    fits, tokens, size = ("a dog", "a cat", "a moon"), "a " * 60, "green " * 30
    prompts = PromptSet(
        "mine", (fits[0], tokens, fits[1], size, tokens, fits[2]), (tokens, "a rabbit"), (1, 2, 3, 4, 5, 6)
    )
    return make(model=tiny_sd_folder, prompts=prompts, reward="jpeg-compressibility", max_prompt_bytes=150, **kwargs)


@pytest.fixture
def fast_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window waits for nobody who looks at it."""
    monkeypatch.setitem(DenoisingVectorEnv.metadata, "render_fps", 10_000)


def act(env: gymnasium.Env, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(env.action_space.shape, np.float32)


def finish(env: DenoisingEnv, **reset: Any) -> tuple[dict, float, bool, bool, dict]:
    """Plays an episode; returns what its last step did."""
    env.reset(**reset)
    for i in range(T):
        last = env.step(act(env, i))
    return last


def text_of(observation: dict[str, Any]) -> str:
    (text,) = prompts_from_bytes(observation["prompt"][None])
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "wrapped", "env_id"),
    [
        (steps, wrapped, env_id)
        for steps, wrapped in (
            *((1, "plain"), (3, "plain"), (3, "noise"), (3, "squashed noise"), (3, "features")),
            (3, "noise and features"),
        )
        for env_id in ENVIRONMENTS
        if env_id not in TASKS or (steps, wrapped) == (3, "plain")  # a task has other prompts and another reward only
    ],
)
@pytest.mark.usefixtures("fast_window")
def test_checkers(env_id: str, steps: int, wrapped: str, tiny_folder: Callable[[str], Path], only_warnings) -> None:
    name = ENVIRONMENTS[env_id]["model"]
    ours: dict[str, Any] = {}
    if name in SMALL_MODELS:
        ours = {"model": str(tiny_folder(SMALL_MODELS[name])), "image_size": 32, "reward": "jpeg-compressibility"}
    with only_warnings():
        env = gymnasium.make(env_id, num_inference_steps=steps, render_mode="rgb_array", **ours).unwrapped
        if "noise" in wrapped:
            env = NoiseAction(env, squashed="squashed" in wrapped)
        if "features" in wrapped:
            env = TextFeatures(env)
    # The advice is about the latent, the features, and that the environment was wrapped.
    with only_warnings(*GYMNASIUM_ADVICE, "The environment ("):
        check_env(env)
    with only_warnings(*SB3_ADVICE):
        sb3_check_env(env)


def test_spaces() -> None:
    env = make()
    observation_space: Any = env.observation_space
    assert list(observation_space) == ["latent", "prompt", "step"]
    latent, prompt, step = observation_space.values()
    assert (latent.shape, latent.dtype) == ((4, 8, 8), np.float32)
    assert not latent.is_bounded("below")
    assert step == gymnasium.spaces.Discrete(T)
    assert prompt == gymnasium.spaces.Box(0, 255, (512,), np.uint8)
    assert env.action_space == gymnasium.spaces.Box(-100, 100, (4, 8, 8), np.float32)


def test_an_episode() -> None:
    env = make(reward={"jpeg-compressibility": 0.5, "jpeg-incompressibility": 2.0})
    observation, info = env.reset(seed=0)
    assert info["prompt"] in env.prompts.train
    for i in range(T):
        assert observation["step"] == i
        assert env.observation_space.contains(observation)
        assert text_of(observation) == info["prompt"]
        observation, reward, terminated, truncated, last_info = env.step(act(env, i))
        assert np.array_equal(observation["latent"], act(env, i))
        assert (terminated, truncated) == (i == T - 1, False)
        assert (reward == 0.0) == (last_info == {}) == (i < T - 1)
    assert env.observation_space.contains(observation)
    assert last_info.keys() == {"prompt", "image", "rewards", "reward_valid"}
    assert last_info["prompt"] == info["prompt"]
    assert last_info["reward_valid"] is True
    size = last_info["rewards"]["jpeg-incompressibility"]
    assert last_info["rewards"] == {"jpeg-compressibility": -size, "jpeg-incompressibility": size}
    assert isinstance(reward, float)
    assert reward == pytest.approx(1.5 * size)
    image = env.batch.model.decode(torch.from_numpy(observation["latent"])[None])[0]
    assert last_info["image"].dtype == np.uint8
    assert np.array_equal(last_info["image"], (255 * image).round().byte().permute(1, 2, 0).numpy())


def test_the_judge_agrees_with_the_last_step() -> None:
    env = make(reward={"shapes-alignment": 1.0, "jpeg-compressibility": 0.1})
    observation, reward, _, _, info = finish(env, seed=0)
    outcome = env.batch.judge(torch.from_numpy(observation["latent"])[None], [info["prompt"]])
    assert outcome.rewards.total.item() == reward
    assert {name: values.item() for name, values in outcome.rewards.components.items()} == info["rewards"]
    assert np.array_equal(outcome.images[0], info["image"])


def test_reward_sees_the_image_and_its_prompt() -> None:
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


class TestPrompts:
    def test_of_the_callers_choice(self) -> None:
        env = make(prompts=["a blue square"])
        observation, info = env.reset(seed=0, options={"prompt": RED_CIRCLE})
        assert info == {"prompt": RED_CIRCLE}
        assert text_of(observation) == RED_CIRCLE
        assert env.reset()[1] == {"prompt": "a blue square"}
        assert make(prompts=PromptSet("mine", ("a star",), ("a circle",))).reset()[1] == {"prompt": "a star"}

    def test_held_out_prompts_are_never_drawn(self) -> None:
        env = make(prompts=PromptSet("mine", ("a star", "a square"), ("a circle",)))
        assert {env.reset(seed=seed)[1]["prompt"] for seed in range(20)} == {"a star", "a square"}

    def test_are_drawn_by_their_weights(self) -> None:
        env = make(prompts=PromptSet("mine", ("a star", "a square"), (), (3.0, 1.0)))
        drawn = [env.reset(seed=seed)[1]["prompt"] for seed in range(200)]
        assert 0.6 < drawn.count("a star") / 200 < 0.9

    def test_are_observed_as_bytes(self) -> None:
        env = make(max_prompt_bytes=20, prompts=["a star"])
        observation, _ = env.reset(options={"prompt": RED_CIRCLE})
        assert env.observation_space.contains(observation)
        assert observation["prompt"].dtype == np.uint8
        assert observation["prompt"].tolist() == [*RED_CIRCLE.encode(), *[0] * 8]
        for i in range(T):
            observation, *_ = env.step(act(env, i))
            assert text_of(observation) == RED_CIRCLE

    def test_do_not_depend_on_a_vocabulary(self, tiny_sd_folder: Path, tiny_xl_folder: Path) -> None:
        text = "Ein grüner Hase — 兔子"
        expected = prompt_to_bytes([text], 512)[0]
        for folder in (tiny_sd_folder, tiny_xl_folder):
            env = make(model=str(folder), prompts=[text], reward="jpeg-compressibility")
            observation, info = env.reset()
            assert info == {"prompt": text}
            assert np.array_equal(observation["prompt"], expected)
            assert text_of(observation) == text

    def test_that_are_longer_than_the_observation(self) -> None:
        message = r"the prompt 'a red circle' has 12 bytes in UTF-8, but max_prompt_bytes is 11; raise max_prompt_bytes"
        with pytest.raises(ValueError, match=message):
            make(prompts=["a star", RED_CIRCLE], max_prompt_bytes=11)
        assert text_of(make(prompts=[RED_CIRCLE], max_prompt_bytes=12).reset()[0]) == RED_CIRCLE
        env = make(prompts=["a star"], max_prompt_bytes=11)
        env.reset(seed=0)
        with pytest.raises(ValueError, match=message):
            env.reset(options={"prompt": RED_CIRCLE})
        assert text_of(env.step(act(env))[0]) == "a star"


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
    """The state, and beside it the image that the pre-trained model expects."""
    env = make(render_mode="rgb_array")
    with pytest.raises(gymnasium.error.ResetNeeded, match="before render"):
        env.render()
    observation, _ = env.reset(seed=0)
    first = env.render()
    assert (first.shape, first.dtype) == ((64, 128, 3), np.uint8)
    state, expected = np.split(first, 2, axis=1)
    with torch.no_grad():
        latent = torch.from_numpy(observation["latent"])[None]
        assert np.array_equal(state, to_uint8(env.model.decode(latent))[0])
        mean, _ = env.batch.reference_transition()
        clean = env.batch.process.predicted_clean(env.batch.state_of(env.batch._observe()), mean)
        assert np.array_equal(expected, to_uint8(env.model.decode(clean))[0])
    for i in range(T):
        *_, info = env.step(act(env, i))
    assert np.array_equal(env.render(), np.concatenate([info["image"]] * 2, axis=1))
    silent = make()
    silent.reset()
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert silent.render() is None


def test_frames_of_an_episode() -> None:
    """Gymnasium collects them."""
    env = gymnasium.make("DPOK-Shapes-v0", render_mode="rgb_array_list", num_inference_steps=2, device="cpu")
    env.reset(seed=0)
    for i in range(2):
        env.step(act(env, i))
    frames = env.render()
    assert [frame.shape for frame in frames] == [(64, 128, 3)] * 3
    assert env.render() == []


@pytest.mark.usefixtures("fast_window")
class TestWindow:
    @pytest.mark.parametrize("n", [1, 3])
    def test_it_shows_the_frame_of_each_step(self, n: int) -> None:
        pygame = pytest.importorskip("pygame")
        arguments: dict[str, Any] = {"num_inference_steps": 2, "device": "cpu", "prompts": RED_CIRCLE}
        env = DenoisingVectorEnv(n, render_mode="human", **arguments)
        silent = DenoisingVectorEnv(n, render_mode="rgb_array", **arguments)
        for each in (env, silent):
            each.reset(seed=0)
        shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
        frames = tile(np.stack(silent.render()))
        factor = 1024 // frames.shape[1]
        np.testing.assert_array_equal(shown, frames.repeat(factor, axis=0).repeat(factor, axis=1))
        assert pygame.display.get_caption()[0] == f"x_t and the x_0 expected, after 0 steps: {RED_CIRCLE}"
        env.step(np.zeros(env.action_space.shape, np.float32))
        assert "after 1 steps" in pygame.display.get_caption()[0]
        assert env.render() is None
        twin = copy.deepcopy(env)  # with a window of its own
        twin.close()
        assert pygame.display.get_surface() is not None
        env.close()
        assert pygame.display.get_surface() is None

    def test_gymnasium_knows_the_mode(self) -> None:
        pytest.importorskip("pygame")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Gymnasium would warn if it wrapped the environment instead
            env = gymnasium.make("DPOK-Shapes-v0", render_mode="human", num_inference_steps=2, device="cpu")
        assert env.render_mode == "human"
        env.reset(seed=0)
        env.close()

    def test_without_pygame(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pygame", None)
        with pytest.raises(ImportError, match=r"needs the extra 'human' .*pip install 'dpok-gym\[human\]'"):
            make(render_mode="human")


class TestPredictedImage:
    def test_it_is_that_of_the_observed_latent(self) -> None:
        env, untouched = make(predicted_info=True, render_mode="rgb_array"), make()
        observation, info = env.reset(seed=0)
        assert "predicted" not in untouched.reset(seed=0)[1]
        for i in range(T + 1):
            assert (info["predicted"].shape, info["predicted"].dtype) == ((64, 64, 3), np.uint8)
            frame = env.render()
            assert frame is not None
            assert np.array_equal(info["predicted"], frame[:, 64:])
            if i < T:
                observation, *_, info = env.step(act(env, i))
                assert equal(observation, untouched.step(act(env, i))[0], exact=True)
        assert np.array_equal(info["predicted"], info["image"])

    def test_it_shares_its_call_of_the_denoiser(self) -> None:
        calls = []
        for asked in (
            {},
            {"reference_info": True},
            {"predicted_info": True},
            {"reference_info": True, "predicted_info": True},
        ):
            env = make(**asked)
            finish(env, seed=0)
            calls.append(env.batch.process.num_function_evaluations)
        assert calls == [0, T, T, T]


class TestModels:
    def test_as_a_path_and_as_an_object(self, tiny_sd_folder: Path) -> None:
        by_path = make(model=tiny_sd_folder, reward="jpeg-compressibility")
        assert by_path.batch.process.config.model == str(tiny_sd_folder)
        by_object = make(model=by_path.batch.model, reward="jpeg-compressibility")
        assert by_object.batch.model is by_object.batch.process.model is by_path.batch.model

    def test_of_a_live_pipeline(self, tiny_sd_folder: Path) -> None:
        """The environment uses the networks that are there, changed weights included."""
        pipe = DiffusionPipeline.from_pretrained(tiny_sd_folder)
        with torch.no_grad():
            pipe.vae.decoder.conv_out.bias.add_(0.5)
        model = TextToImageModel.from_pipeline(pipe)
        settings: dict[str, Any] = {"prompts": "dog", "reward": "jpeg-compressibility"}
        env = make(model=model, **settings)
        assert env.batch.process.model is model
        assert env.batch.world is None
        *_, info = finish(env, seed=0)
        *_, of_the_files = finish(make(model=str(tiny_sd_folder), **settings), seed=0)
        assert info["image"].mean() > of_the_files["image"].mean() + 20

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "arguments",
        [
            {"dtype": "bfloat16"},
            {"image_size": 32},
            {"negative_prompt": "dog"},
            {"model_kwargs": {"revision": "main"}},
        ],
    )
    def test_that_are_loaded_take_no_arguments(self, tiny_sd_folder: Path, arguments: dict[str, Any]) -> None:
        model = make(model=str(tiny_sd_folder), reward="jpeg-compressibility").batch.model
        name = next(iter(arguments.get("model_kwargs", arguments)))
        with pytest.raises(ValueError, match=f"a loaded model has its own {name}: give these to load_model"):
            make(model=model, reward="jpeg-compressibility", **arguments)

    def test_in_bfloat16(self) -> None:
        _, reward, terminated, _, info = finish(make(dtype="bfloat16"), seed=0)
        assert terminated
        assert np.isfinite(reward)
        assert info["image"].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"render_mode": "ansi"}, "render_mode must be None, 'human' or 'rgb_array' .*got 'ansi'"),
        ({"guidance_scale": -1.0}, "guidance_scale .* must be a number of at least 0, got -1.0"),
        ({"guidance_scale": float("inf")}, "guidance_scale .* must be a number of at least 0, got inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale .* must be a number of at least 0, got nan"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"dtype": "float8"}, "dtype must be one of 'float32', 'bfloat16', 'float16', got 'float8'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be an integer of at most 1,000, got 1001"),
        ({"eta": -0.1}, r"eta must lie in \[0, 1\], got -0.1"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"decode_batch_size": 0}, r"decode_batch_size \(unless .*\) must be an integer of at least 1, got 0"),
        ({"max_prompt_bytes": 0}, "max_prompt_bytes must be an integer of at least 1, got 0"),
        ({"max_prompt_bytes": 12.5}, "max_prompt_bytes must be an integer of at least 1, got 12.5"),
        ({"reward_workers": -1}, "reward_workers must be an integer of at least 0, got -1"),
        ({"non_finite": "ignore"}, "non_finite must be one of 'error', 'mask'"),
        ({"prompts": []}, "prompt set 'list' is empty"),
        ({"prompts": ["a red circle", " "]}, "prompt 1 of 'list'"),
        ({"prompts": ["a red dragon"]}, "cannot read 'dragon' in the prompt 'a red dragon'; its words are: a above"),
        ({"prompts": ["a red circle " * 9]}, "29 tokens and the model 'shapes' reads at most 16"),
        ({"reward": "beauty"}, "unknown reward 'beauty'; .*jpeg-compressibility, .*shapes-alignment"),
        ({"model_kwargs": {"varient": "fp16"}}, "unknown argument of load_model 'varient'; did you mean 'variant'"),
        ({"model_kwargs": {"dtype": "bfloat16"}}, "dtype is an argument of the environment: leave it out of model_kw"),
        ({"model_kwargs": {"image_size": 32}}, "image_size is an argument of the environment: leave it out"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [("guidance", "guidance_scale"), ("num_inference_step", "num_inference_steps"), ("rewards", "reward")],
)
def test_misspelt_arguments(misspelt: str, nearest: str) -> None:
    message = f"environment got an unexpected keyword argument '{misspelt}'; did you mean '{nearest}'? There are: auto"
    with pytest.raises(TypeError, match=re.escape(message)):
        make(**{misspelt: 3})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": RED_CIRCLE}, r"unknown reset options \['prompts'\]; there are 'prompt' and 'latent'"),
        ({"prompt": "a red dragon"}, "cannot read 'dragon'"),
        ({"prompt": ""}, "not blank"),
        ({"prompt": ["a red circle", "a star"]}, "one text or 1, got 2"),
        ({"prompt": [3]}, "must be a text"),
        ({"prompt": "a " * 30}, "reads at most 16"),
        ({"latent": np.zeros((4, 8))}, r"'latent' takes finite numbers of shape \(4, 8, 8\).*got \(4, 8\)"),
        ({"latent": np.zeros((2, 4, 8, 8))}, r"'latent' takes .*got \(2, 4, 8, 8\)"),
        ({"latent": np.full((4, 8, 8), np.nan), "prompt": "a star"}, "'latent' takes finite numbers"),
        ({"latent": "noise"}, "'latent' takes an array of numbers"),
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
    assert info["prompt"] == text_of(observation) == RED_CIRCLE


def test_reward_that_is_not_finite() -> None:
    env = make(reward=always_nan)
    with pytest.raises(ValueError, match=f"'always_nan' for the prompt '{RED_CIRCLE}' is not finite"):
        finish(env, options={"prompt": RED_CIRCLE})
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(act(env))
    _, reward, terminated, _, info = finish(make(reward=always_nan, non_finite="mask"))
    assert (reward, terminated, info["reward_valid"]) == (0.0, True, False)
    assert np.isnan(info["rewards"]["always_nan"])


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


def test_the_docstring_names_every_argument() -> None:
    """The class docstring is the environment's documentation: a table with a row for each argument."""
    documented = set()
    for names in re.findall(r"^    \| (`[^|]+`) +\| ", DenoisingEnv.__doc__, re.MULTILINE):
        documented |= set(re.findall(r"`(\w+)`", names))
    arguments = set(inspect.signature(DenoisingVectorEnv).parameters) - {"num_envs", "unknown", "autoreset_mode"}
    assert arguments <= documented
    assert documented - arguments == {"latent", "step", "prompt"}  # the keys of the observation


class TestReference:
    """The pre-trained model's Gaussian in the info, and its log-probability in the reward."""

    def test_info_and_reward(self) -> None:
        env = make(reference_info=True, reference_log_prob_coef=0.01)
        plain = make()
        observation, _ = env.reset(seed=0)
        plain.reset(seed=0)
        for i in range(T):
            state = env.batch.state_of({name: np.asarray(value)[None] for name, value in observation.items()})
            with torch.no_grad():
                mean, std = env.batch.process.transition(state)
            action = (mean[0] + std * torch.from_numpy(act(env, i))).numpy()
            observation, reward, terminated, _, info = env.step(action)
            _, plain_reward, _, _, plain_info = plain.step(action)
            expected = torch.distributions.Normal(mean[0].double(), std.double()).log_prob(
                torch.from_numpy(action).double()
            )
            assert info["log_prob_reference"] == pytest.approx(expected.sum().item(), rel=1e-9)
            assert np.array_equal(info["reference_mean"], mean[0].numpy())
            assert info["reference_std"] == std.item()
            assert reward == pytest.approx(plain_reward + 0.01 * expected.sum().item(), rel=1e-9)
            assert plain_info.keys() == info.keys() - {"log_prob_reference", "reference_mean", "reference_std"}
        assert terminated

    def test_a_deterministic_step_has_no_log_prob(self) -> None:
        env = make(reference_info=True, reference_log_prob_coef=0.01, sde_steps=(1, 1))
        env.reset(seed=0)
        for i in range(T):
            mean = env.batch.reference_transition()[0][0].cpu().numpy()
            _, reward, terminated, _, info = env.step(mean if i != 1 else act(env, i))
            assert np.array_equal(info["reference_mean"], mean)
            assert (info["reference_std"] > 0) == (info["log_prob_reference"] != 0) == (i == 1)
            if not terminated:
                assert reward == pytest.approx(0.01 * info["log_prob_reference"])
        assert terminated

    def test_costs_a_call_only_on_request(self) -> None:
        for settings, calls in (({}, 0), ({"reference_info": True}, T), ({"reference_log_prob_coef": 0.1}, T)):
            env = make(**settings)
            finish(env, seed=0)
            assert env.batch.process.num_function_evaluations == calls

    def test_gymnasium_checks_it(self, only_warnings) -> None:
        env = gymnasium.make("DPOK-Mixture-v0", reference_info=True, reference_log_prob_coef=0.1)
        with only_warnings(*GYMNASIUM_ADVICE):
            check_env(env.unwrapped)

    @pytest.mark.parametrize("coef", [-1.0, float("inf"), "much"])
    def test_bad_coefficient(self, coef: Any) -> None:
        with pytest.raises(ValueError, match="reference_log_prob_coef must be a number of at least 0"):
            make(reference_log_prob_coef=coef)

    @pytest.mark.slow
    def test_entropy_regularised_return_is_the_objective(self) -> None:
        """E[beta log p_pre] + beta H is -beta KL, here of a policy whose noise has the mean 0.3: T D 0.3^2 / 2 nats."""
        n, beta, shift = 2000, 0.5, 0.3
        kwargs: dict[str, Any] = {"prompts": "two modes", "reward": lambda images, prompts: [0.0] * len(prompts)}
        env = gymnasium.make_vec("DPOK-Mixture-v0", num_envs=n, reference_log_prob_coef=beta, **kwargs)
        assert isinstance(env, DenoisingVectorEnv)
        noisy, rng = dpok_gym.VectorNoiseAction(env), np.random.default_rng(0)
        noisy.reset(seed=0)
        total = np.zeros(n)
        for _ in range(20):
            _, rewards, *_ = noisy.step(shift + rng.standard_normal((n, 1, 1, 2), np.float32))
            total += rewards
        entropy = 2 * (env.process.table.std.double().log() + 0.5 * math.log(2 * math.pi * math.e)).sum().item()
        expected = -beta * 20 * 2 * shift**2 / 2
        assert total.mean() + beta * entropy == pytest.approx(expected, abs=4 * total.std() / math.sqrt(n))
        assert 4 * total.std() / math.sqrt(n) < 0.3


class TestOptimalValue:
    def test_is_that_of_the_vector_environment(self) -> None:
        kwargs: dict[str, Any] = {"model": "mixture-1d", "prompts": "two modes", "reward": {"mixture-linear": 0.5}}
        value = DenoisingEnv(**kwargs).optimal_value(1.0)
        assert value == DenoisingVectorEnv(3, **kwargs).optimal_value(1.0)
        assert value == pytest.approx(0.10928, abs=1e-5)

    def test_worlds_without_an_answer(self) -> None:
        with pytest.raises(ValueError, match="the optimum is not known for the model 'shapes'"):
            make().optimal_value(1.0)

    @pytest.mark.parametrize("beta", [0, -1.0, float("nan")])
    def test_bad_beta(self, beta: float) -> None:
        with pytest.raises(ValueError, match="beta must be a number above 0"):
            DenoisingEnv(model="mixture-1d", prompts="two modes", reward="mixture-linear").optimal_value(beta)


def test_one_environment_does_not_reset_itself() -> None:
    with pytest.raises(TypeError, match="autoreset_mode is an argument of make_vec"):
        make(autoreset_mode="NextStep")


# --- Prompts that are too long


def test_long_prompts_are_counted(tiny_sd_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has 62 tokens .*--long-prompts\).*\(2 of 6 are wrong, with index 1, 4\)"):
        make_long(tiny_sd_folder)
    with pytest.raises(ValueError, match="long_prompts must be one of 'error', 'truncate', 'skip', got 'cut'"):
        make(long_prompts="cut")


def test_long_prompts_are_left_out(tiny_sd_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = make_long(tiny_sd_folder, long_prompts="skip").prompts
    assert (prompts.train, prompts.weights) == (("a dog", "a cat", "a moon"), (1, 3, 6))
    assert prompts.held_out == ("a rabbit",)
    (message,) = caplog.messages
    assert message.startswith("3 of 6 prompts of 'mine' (with index 1, 3, 4) are too long for the model ")
    assert message.endswith(" and are left out, and 1 of 2 unseen ones")
    with pytest.raises(ValueError, match="all 1 prompts of 'list' are too long"):
        make(model=tiny_sd_folder, prompts=["a " * 60], long_prompts="skip")


def test_long_prompts_are_truncated(tiny_sd_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The networks do not see their end; the observation, the reward and the infos have all of them."""
    seen: list[str] = []

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.extend(prompts)
        return images.mean((1, 2, 3))

    long = "a " * 60 + "dog"
    env = make(model=tiny_sd_folder, prompts=["a dog", long], reward=reward, long_prompts="truncate")
    assert "1 of 2 prompts of 'list' (with index 1) are too long" in caplog.text
    observation, _ = env.reset(seed=0, options={"prompt": long})
    assert text_of(observation) == long
    for i in range(T):
        info = env.step(act(env, i))[-1]
    assert (info["prompt"], seen) == (long, [long])
    told = env.batch.model.encode([long, long[:-3] + "cat"])["encoder_hidden_states"]
    assert torch.equal(told[0], told[1])
    assert env.batch.process.config.model_kwargs == {"long_prompts": "truncate"}


def test_every_prompt_is_checked_before_anything_is_drawn(tmp_path: Path) -> None:
    """Also the one beyond the first thousands, and the unseen ones."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["a red circle"] * 2500 + ["a red dragon"]))
    with pytest.raises(ValueError, match=r"cannot read 'dragon' .*\(1 of 2501 are wrong, in line 2501\)"):
        make(prompts=str(path))
    with pytest.raises(ValueError, match="cannot read 'dragon'"):
        make(prompts=PromptSet("mine", ("a red circle",), ("a red dragon",)))


def test_timestep_spacing() -> None:
    env = make(timestep_spacing="trailing")
    assert env.batch.process.table.timesteps.tolist() == [999, 666, 332]
    assert env.batch.process.config.model_kwargs == {"timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="timestep_spacing must be one of"):
        make(timestep_spacing="linspace")
    model = dpok_gym.load_model("shapes", "cpu", timestep_spacing="trailing")
    with pytest.raises(ValueError, match="a loaded model has its own timestep_spacing"):
        make(model=model, timestep_spacing="trailing")
    assert make(model=model).batch.process.table.timesteps[0] == 999


# --- Copies


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_environment_would(copied: str, wrapped: bool, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    env: Any = gymnasium.make(
        "DPOK-Shapes-v0",
        num_inference_steps=T,
        device="cpu",
        prompts=tmp_path / "prompts.txt",
        reward={"jpeg-compressibility": 2.0},
        reward_workers=2,
        reference_info=True,
    )
    env = NoiseAction(env) if wrapped else env
    env.reset(seed=5)
    env.step(act(env))
    (tmp_path / "prompts.txt").unlink()  # what was read is kept
    again: Any = copy.deepcopy(env) if copied == "deepcopy" else pickle.loads(pickle.dumps(env))
    assert again.unwrapped.batch.model is env.unwrapped.batch.model
    for episode in range(2):
        for i in range(T - 1 + episode):
            assert_same(again.step(act(env, i)), env.step(act(env, i)))
        assert_same(again.reset(), env.reset())
    again.reset(seed=1)  # the original's episode is its own
    env.step(act(env))
    assert again.unwrapped.batch.running.all()


def test_copies_share_weights_and_pickles_have_none(only_warnings: Any) -> None:
    model, scorer = dpok_gym.load_model("shapes", "cpu"), torch.nn.Linear(1, 1)
    env = gymnasium.make("DPOK-Shapes-v0", model=model, reward=scorer, num_inference_steps=T)
    again: Any = copy.deepcopy(env)
    assert again.unwrapped.batch.model is model
    assert again.unwrapped.reward is env.unwrapped.reward  # type: ignore[attr-defined]
    assert again.unwrapped.spec.kwargs["model"] is again.spec.kwargs["model"] is model
    plain = make(reward="shapes-preference")
    assert len(pickle.dumps(plain)) < 1e5


@pytest.mark.parametrize("what", ["model", "network", "lambda"])
def test_what_cannot_be_pickled(what: str) -> None:
    choices: dict[str, dict[str, Any]] = {
        "model": {"model": dpok_gym.load_model("shapes", "cpu")},
        "network": {"reward": torch.nn.Linear(1, 1)},
        "lambda": {"reward": lambda images, prompts: images.mean((1, 2, 3))},
    }
    (name,) = choices[what]
    with pytest.raises(TypeError, match=rf"pickled as its arguments, and {name}=.*give the model by its name.*module:"):
        pickle.dumps(make(**choices[what]))
