"""Fixtures of all tests: small models of random weights, seeds, and the list of warnings that may be."""

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpok_gym.models import clear_model_cache
from dpok_gym.testing import save_tiny_pipeline
from tests.browser import browsing


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (it is the generator that libraries use)


@pytest.fixture(scope="session", autouse=True)
def _no_screen() -> None:
    # Gymnasium's checker tries every render mode, and one of them opens a window.
    os.environ["SDL_VIDEODRIVER"] = "dummy"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The networks are so small that more threads wait for each other.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture
def fresh_models() -> Callable[[], None]:
    """Models that no other test has: agents leave their LoRA in the network. Called, it makes them fresh again."""
    clear_model_cache()
    return clear_model_cache


@pytest.fixture(scope="module")  # its event loop must not be there for the tests of other modules
def browser() -> Iterator[Any]:
    """A Chromium; without one, the test is skipped."""
    with browsing() as launched:
        yield launched


@contextmanager
def _only(*allowed: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in allowed:
            warnings.filterwarnings("ignore", message=f".*{re.escape(text)}")  # Gymnasium puts a colour code before it
        yield


@pytest.fixture
def only_warnings() -> Callable[..., AbstractContextManager[None]]:
    """``with only_warnings(text, ...)``: a warning that does not begin with one of the texts is an error."""
    return _only


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From the name of a small pipeline to its folder, which is written once."""
    home = tmp_path_factory.mktemp("tiny")
    return functools.cache(lambda family: save_tiny_pipeline(home / family, family))


@pytest.fixture(scope="session")
def tiny_sd_folder(tiny_folder: Callable[[str], Path]) -> Path:
    """A Stable Diffusion of random weights with 4x8x8 latents and 16x16 images, made like version 1.5."""
    return tiny_folder("stable-diffusion")


@pytest.fixture(scope="session")
def tiny_v_folder(tiny_folder: Callable[[str], Path]) -> Path:
    """The same, predicting the velocity."""
    return tiny_folder("stable-diffusion-v")


@pytest.fixture(scope="session")
def tiny_xl_folder(tiny_folder: Callable[[str], Path]) -> Path:
    """A Stable Diffusion XL of random weights with 4x8x8 latents and 16x16 images."""
    return tiny_folder("stable-diffusion-xl")
