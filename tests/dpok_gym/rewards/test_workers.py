"""Rewards computed in threads: the same numbers, in time, and errors that surface."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from dpok_gym import DenoisingVectorEnv
from dpok_gym.rewards import judge_chunks, make_reward
from tests.support import assert_same, redness

N, T = 5, 2
PROMPTS = [f"prompt {i}" for i in range(N)]


def make(**kwargs: Any) -> DenoisingVectorEnv:
    options: dict[str, Any] = {"num_envs": N, "num_inference_steps": T, "device": "cpu"}
    return DenoisingVectorEnv(**options | kwargs)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, 4, 8, 8), np.float32)


def finish(env: DenoisingVectorEnv) -> tuple:
    env.reset(seed=0)
    env.step(noise(0))
    return env.step(noise(1))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def chunks(images: torch.Tensor, size: int = 2) -> list[tuple[torch.Tensor, list[str]]]:
    return [(images[first : first + size], PROMPTS[first : first + size]) for first in range(0, N, size)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("decode_batch_size", [1, 2])
def test_equals_the_environment_without(workers: int, decode_batch_size: int) -> None:
    reward = {
        "shapes-alignment": 1.0,
        "shapes-quality": 0.2,
        "jpeg-compressibility": {"weight": 0.5, "normalize": [-2.0, 0.5]},
    }
    options = {"reward": reward, "decode_batch_size": decode_batch_size}
    ours, plain = make(reward_workers=workers, **options), make(**options)
    assert_same(ours.reset(seed=5), plain.reset(seed=5))
    for i in range(2 * T):
        assert_same(ours.step(noise(i)), plain.step(noise(i)), f"step {i}")
    ours.close()


@pytest.mark.slow
def test_equals_the_scalar_environments() -> None:
    options: dict[str, Any] = {"num_envs": N, "num_inference_steps": T, "reward_workers": 2}
    ours = gymnasium.make_vec("DPOK-Shapes-v0", **options)
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    scalar = gymnasium.make_vec("DPOK-Shapes-v0", vectorization_mode="sync", vector_kwargs=mode, **options)
    assert_same(ours.reset(seed=5), scalar.reset(seed=5))
    for i in range(T):
        assert_same(ours.step(noise(i)), scalar.step(noise(i)), f"step {i}")
    ours.close()
    scalar.close()


def test_chunks_are_judged_side_by_side(images: torch.Tensor) -> None:
    together = threading.Barrier(3, timeout=20)

    def waiting(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        together.wait()  # an error, if one had to end before the next begins
        return redness(images, prompts)

    with ThreadPoolExecutor(3) as executor:
        judged = judge_chunks(make_reward(waiting), chunks(images), executor)
    assert torch.equal(judged.total, redness(images, PROMPTS))


def test_images_are_decoded_while_others_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    judging = threading.Event()
    decoded: list[int] = []

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        judging.set()
        return redness(images, prompts)

    env = make(num_envs=5, reward=reward, reward_workers=1)
    decode = env.model.decode

    def waiting(latents: torch.Tensor) -> torch.Tensor:
        if len(decoded) == 3:  # the first chunk, of three, is complete
            assert judging.wait(20)
        decoded.append(0)
        return decode(latents)

    monkeypatch.setattr(env.model, "decode", waiting)
    finish(env)
    assert len(decoded) == 5
    env.close()


@pytest.mark.slow
def test_results_keep_the_order_of_the_images(images: torch.Tensor) -> None:
    def late_first(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        time.sleep(0.2 * (prompts[0] == PROMPTS[0]))
        return redness(images, prompts)

    reward = make_reward({late_first: 2.0, "jpeg-compressibility": {"weight": 0.5, "normalize": [-2.0, 0.5]}})
    with ThreadPoolExecutor(3) as executor:
        judged = judge_chunks(reward, chunks(images), executor)
    assert_same(judged, reward(images, PROMPTS))
    assert_same(judge_chunks(reward, chunks(images)), judged)


def test_a_reward_that_writes_into_its_images_does_not_change_them(images: torch.Tensor) -> None:
    def vandal(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        images.zero_()
        return torch.zeros(len(prompts))

    before = images.clone()
    judge_chunks(make_reward(vandal), chunks(images))
    assert torch.equal(images, before)


def test_errors_surface_and_the_environment_goes_on() -> None:
    broken = True

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if broken and not prompts[0].startswith("a star"):
            raise RuntimeError(f"cannot judge {prompts[0]}")
        return redness(images, prompts)

    env = make(reward=reward, reward_workers=5)
    prompts = ["a star", "a red circle", "a star", "a blue square", "a star"]
    env.reset(seed=0, options={"prompt": prompts})
    env.step(noise(0))
    with pytest.raises(RuntimeError, match="cannot judge a red circle"):  # the first, in the order of the images
        env.step(noise(1))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(noise(1))
    broken = False
    finish(env)
    env.close()


@pytest.mark.slow
def test_what_has_not_begun_is_called_off(images: torch.Tensor) -> None:
    judged = []

    def failing(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        judged.append(prompts)
        time.sleep(0.2)
        raise RuntimeError("no more")

    with ThreadPoolExecutor(1) as executor, pytest.raises(RuntimeError, match="no more"):
        judge_chunks(make_reward(failing), chunks(images, 1), executor)
    assert len(judged) <= 2


def test_masked_rewards(images: torch.Tensor) -> None:
    images[3] = float("nan")
    with ThreadPoolExecutor(2) as executor:
        judged = judge_chunks(make_reward(redness, "mask"), chunks(images), executor)
        assert judged.valid.tolist() == [True, True, True, False, True]
        with pytest.raises(ValueError, match="the image for the prompt 'prompt 3' is not finite"):
            judge_chunks(make_reward(redness), chunks(images), executor)


def test_components_must_be_the_same_everywhere(images: torch.Tensor) -> None:
    def moody(images: torch.Tensor, prompts: list[str]) -> dict[str, list[float]]:
        return {prompts[0]: [1.0] * len(prompts)}

    message = r"'moody' must have the same components .* has \['prompt 0'\] for some and \['prompt 2'\] for others"
    with pytest.raises(ValueError, match=message):
        judge_chunks(make_reward(moody), chunks(images))


@pytest.mark.parametrize("workers", [-1, 1.5, "2", None])
def test_bad_number_of_workers(workers: Any) -> None:
    with pytest.raises(ValueError, match=f"reward_workers must be an integer of at least 0, got {workers!r}"):
        make(reward_workers=workers)
