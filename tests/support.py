"""Helpers that several test modules share: toy rewards, exact comparison, a small denoising process."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from dpok_gym.samplers.process import DenoisingProcess


#: What Gymnasium's checker says of an observed latent, which is a sample of a Gaussian.
GYMNASIUM_ADVICE = (
    "A Box observation space minimum value is -infinity",
    "A Box observation space maximum value is infinity",
)
#: What Stable-Baselines3's checker says: every array of three axes is an image to it, and actions lie in [-1, 1].
SB3_ADVICE = (
    "It seems that your observation latent is an image but its `dtype` is",
    "It seems that your observation space latent is an image but the upper and lower bounds",
    "The minimal resolution for an image is 36x36",
    "We recommend you to use a symmetric and normalized Box action space",
)


#: The small pipeline that stands for a published model in tests, by the model's name.
SMALL_MODELS = {
    "sd15": "stable-diffusion",
    "sd21": "stable-diffusion-v",
    "sdxl": "stable-diffusion-xl",
    "sd35": "stable-diffusion-3",
    "flux": "flux-dev",
    "pixart": "pixart-sigma",
    "sana": "sana",
}


#: Seconds after which a process that a test waits for counts as hanging. On a busy machine some take two minutes.
HANGS_AFTER = 600.0


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """Returns how much redder than green and blue each image is."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def colours(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Returns a reward of two components."""
    return {"red": images[:, 0].mean((1, 2)), "blue": images[:, 2].mean((1, 2))}


def every_other_fails(images: Tensor, prompts: list[str]) -> Tensor:
    """Returns the redness of every second image; the others get nan and infinity in turn."""
    rewards = redness(images, prompts)
    failures = torch.tensor([math.nan, math.inf]).repeat(len(rewards))
    rewards[1::2] = failures[: len(rewards[1::2])]
    return rewards


def always_nan(images: Tensor, prompts: list[str]) -> Tensor:
    """Returns nan for every image."""
    return torch.full((len(images),), math.nan)


def assert_same(actual: Any, expected: Any, where: str = "value") -> None:
    """Asserts that two values are equal to the last bit.

    Compares tensors, arrays, mappings, sequences and dataclasses part by part. Types, shapes and dtypes must agree; nan
    equals nan.

    Args:
        actual: the value under test.
        expected: what it must be.
        where: the name of the value in the error message.

    Raises:
        AssertionError: at the first part that differs; the message says where it is.
    """
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping), f"{where}: {type(actual)} is no mapping"
        assert set(actual) == set(expected), (
            f"{where}: keys {sorted(map(str, actual))}, not {sorted(map(str, expected))}"
        )
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]")
        return
    assert type(actual) is type(expected), f"{where}: {type(actual)}, not {type(expected)}"
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, f"{where}: {actual.dtype}, not {expected.dtype}"
        assert actual.device == expected.device, f"{where}: on {actual.device}, not on {expected.device}"
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(expected, np.ndarray) and expected.dtype == object:  # of a vector environment's infos
        assert actual.shape == expected.shape, f"{where}: shape {actual.shape}, not {expected.shape}"
        assert_same(actual.ravel().tolist(), expected.ravel().tolist(), where)
    elif isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype, f"{where}: {actual.dtype}, not {expected.dtype}"
        np.testing.assert_array_equal(actual, expected, err_msg=where, strict=True)
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(actual, field.name), getattr(expected, field.name), f"{where}.{field.name}")
    elif isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        assert len(actual) == len(expected), f"{where}: length {len(actual)}, not {len(expected)}"
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_same(ours, theirs, f"{where}[{index}]")
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(actual), f"{where}: {actual}, not nan"
    else:
        assert actual == expected, f"{where}: {actual!r}, not {expected!r}"


@contextmanager
def ending(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Kills processes at the end of the block, or when they hang: who waits for their next word then goes on."""

    def kill() -> None:
        for process in processes:
            process.kill()

    timer = threading.Timer(HANGS_AFTER, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        kill()


def wait_for_end(*processes: subprocess.Popen[str]) -> list[str]:
    """Waits until processes have ended; returns what each of them wrote into its pipes.

    Raises:
        subprocess.TimeoutExpired: if one hangs. All of them are killed then.
    """
    with ending(*processes):
        # With a limit too, as a killed launcher leaves processes behind that hold its pipe.
        written = [process.communicate(timeout=HANGS_AFTER) for process in processes]
    return ["".join(text or "" for text in texts) for texts in written]


def write_choices(
    folder: Path, prompts: Sequence[str], n_choices: int, size: tuple[int, int] = (16, 16), flat: bool = False
) -> Path:
    """Writes a file of choices between random images, the first and the second one preferred in turn.

    Args:
        folder: for the file and its images.
        prompts: of the choices, in turn.
        n_choices: number of choices, each between two images of its own.
        size: width and height of the images, in pixels.
        flat: whether all pixels of an image are the same.

    Returns:
        The path of the file.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), []
    for number in range(n_choices):
        names = [f"{number}-{k}.png" for k in (0, 1)]
        for name in names:
            shape = (1, 1, 3) if flat else (size[1], size[0], 3)
            pixels = np.broadcast_to(rng.integers(256, size=shape, dtype=np.uint8), (size[1], size[0], 3))
            Image.fromarray(pixels).save(folder / name)
        line = {"prompt": prompts[number % len(prompts)], "images": names, "preferred": number % 2}
        lines.append(json.dumps(line) + "\n")
    path = folder / "choices.jsonl"
    path.write_text("".join(lines))
    return path


def make_process(folder: Path, num_inference_steps: int = 3, **kwargs: Any) -> DenoisingProcess:
    """Makes a denoising process of a saved model, on the CPU.

    Args:
        folder: a diffusers pipeline, such as the fixture ``tiny_sd_folder``.
        num_inference_steps: T.
        kwargs: further arguments of the process (eta, guidance_scale); any others go to ``load_model``.
    """
    from dpok_gym.models import load_model
    from dpok_gym.samplers.process import DenoisingProcess

    of_process = {"sampler", "eta", "guidance_scale"} & kwargs.keys()
    settings = {name: kwargs.pop(name) for name in of_process}
    model = load_model(folder, "cpu", **kwargs)
    return DenoisingProcess(model, num_inference_steps=num_inference_steps, **settings)


@functools.cache
def real_clip_tokenizer() -> CLIPTokenizer:
    """Returns the tokenizer of Stable Diffusion 1.5, with CLIP's real vocabulary: it reads at most 77 tokens.

    ``save_tiny_pipeline(folder, tokenizer=real_clip_tokenizer())`` saves a small pipeline that reads prompts with it.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    # The package's code is not imported: it needs torchvision.
    (path,) = (file for file in files("openai-clip") or () if file.name == "bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path.locate(), "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    # The file has a line about itself, and more merges than CLIP uses: its vocabulary has 49,408 tokens.
    merges = [tuple(line.split()) for line in lines[1 : 49_408 - 2 * 256 - 2 + 1]]
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(f"{each}</w>" for each in characters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
