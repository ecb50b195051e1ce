"""The table of reward names, and the loading of what they stand for."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

#: ``(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`` or ``-> {component: (B,)}``, with (B,) a tensor, array or list.
RewardFunction = Callable[[Tensor, list[str]], Any]
RewardFactory = Callable[[], RewardFunction]

_FACTORIES: dict[str, RewardFactory | str] = {}


def register_reward(name: str, factory: RewardFactory | str) -> None:
    """Gives a reward a name that :func:`~dpok_gym.rewards.make_reward` knows.

    Args:
        name: the name; also that of the reward's component.
        factory: a callable without arguments that loads and returns the reward (a class will do), or where it is,
            as ``"module:function"``; it is imported and called when the reward is first made.

    Raises:
        TypeError: if the factory is neither callable nor a string.
        ValueError: if the name is blank or already stands for another factory, or the string has no colon. A class or
            function that was defined anew, as a notebook's cell does, replaces itself.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"a reward's name must be a text that is not blank, not {name!r}")
    if not (isinstance(factory, str) or callable(factory)):
        raise TypeError(f"the factory of the reward {name!r} must be a callable or 'module:function', not {factory!r}")
    if isinstance(factory, str) and not all(factory.partition(":")):
        raise ValueError(f"the factory of the reward {name!r} must be written 'module:function', not {factory!r}")
    known = _FACTORIES.get(name, factory)
    if _definition(known) != _definition(factory):
        raise ValueError(f"the reward {name!r} is already registered, as {known!r}; choose another name")
    if known is not factory:
        _load.cache_clear()
    _FACTORIES[name] = factory


def _definition(factory: RewardFactory | str) -> Any:
    """What stays the same when the same code runs again."""
    name = getattr(factory, "__qualname__", "<")
    return factory if "<" in name else (factory.__module__, name)


def list_rewards() -> list[str]:
    """The registered names, in alphabetical order."""
    return sorted(_FACTORIES)


def load_reward(name: str) -> RewardFunction:
    """Loads a registered reward, the one in a folder, or the one that a name such as ``"module:name"`` points to.

    There, what needs no arguments, as most classes do, is a factory and called; a function that needs them is the
    reward itself. It is loaded once per process, a folder again when it was written anew: the environments for training
    and for evaluation share one copy of the weights.

    Raises:
        ValueError: if the name is unknown, or what a folder holds is damaged.
        FileNotFoundError: if a folder holds no reward.
        ImportError: if its ``"module:function"`` cannot be imported.
        TypeError: if its factory returns something that cannot be called, or is a class that needs arguments.
    """
    if name not in _FACTORIES and os.path.isdir(name):
        return _load_folder(
            os.path.realpath(name), max((entry.stat().st_mtime_ns for entry in os.scandir(name)), default=0)
        )
    return _load(name)


@functools.cache
def _load_folder(path: str, written: int) -> RewardFunction:
    from dpok_gym.rewards.preference import PreferenceReward

    return PreferenceReward.load(path)


@functools.cache
def _load(name: str) -> RewardFunction:
    factory: Any = _FACTORIES.get(name, name)
    if name not in _FACTORIES and not all(name.partition(":")):
        close = difflib.get_close_matches(name, _FACTORIES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"unknown reward {name!r}; {hint}The registered ones are {', '.join(list_rewards())}; "
            f"add yours with register_reward(), or pass the callable itself, 'module:name', or a folder that "
            f"dpok fit-reward wrote"
        )
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            known = f"registered as {factory!r}" if name in _FACTORIES else "module:name (or is http:// missing?)"
            raise ImportError(f"the reward {name!r}, {known}, cannot be imported: {error}") from error
    if isinstance(factory, type) and _needs_arguments(factory):
        raise TypeError(
            f"the class {factory.__name__!r} of the reward {name!r} needs arguments, and is made without any here: "
            "give them defaults, name a function that makes it, or pass one that you made"
        )
    reward = factory if name not in _FACTORIES and _needs_arguments(factory) else factory()
    if not callable(reward):
        raise TypeError(f"the factory of the reward {name!r} must return a callable, not {reward!r}")
    return reward


def _needs_arguments(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:  # a builtin that does not say what it takes
        return False
    return False
