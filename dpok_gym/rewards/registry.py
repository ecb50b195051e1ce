"""The names of rewards, and how they are loaded. Importing this module imports no torch."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpok_gym.utils.registry import RAISED_BY, Registry, import_attribute

if TYPE_CHECKING:
    from torch import Tensor

#: ``(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`` or ``-> {component: (B,)}``, with (B,) a tensor, array or list;
#: or, with a mapping that is not used, ``-> ((B,), info)``.
RewardFunction = Callable[["Tensor", list[str]], Any]
#: A callable without arguments that loads a reward function and returns it.
RewardFactory = Callable[[], RewardFunction]

#: The factory of each registered name.
REWARDS: Registry[RewardFactory] = Registry(
    "reward",
    "Add yours with register_reward(), or pass the callable itself, 'module:name', or a folder that dpok fit-reward "
    "wrote",
)

# Loaded rewards, by name. The environments for training and for evaluation share one copy of the weights.
_loaded: dict[str, RewardFunction] = {}
# Fitted rewards, by the path of their folder, each with the time at which the folder was last changed.
_loaded_folders: dict[str, tuple[int, RewardFunction]] = {}


def register_reward(name: str, factory: RewardFactory | str) -> None:
    """Gives a reward a name that :func:`~dpok_gym.rewards.make_reward` knows.

    A class or function that is defined anew, as a notebook cell does when it runs again, replaces itself.

    Args:
        name: the name of the reward and of its component.
        factory: a callable without arguments that loads and returns the reward function (a class will do), or the
            place where it is defined, written ``"module:function"``. It is imported and called when the reward is
            first made.

    Raises:
        TypeError: if the factory is neither callable nor a string.
        ValueError: if the name is blank or already stands for another factory, or the string has no colon.
    """
    if not (isinstance(factory, str) or callable(factory)):
        raise TypeError(f"the factory of the reward {name!r} must be a callable or 'module:function', not {factory!r}")
    if isinstance(factory, str) and not all(factory.partition(":")):
        raise ValueError(f"the factory of the reward {name!r} must be written 'module:function', not {factory!r}")
    is_new = name not in REWARDS or REWARDS.get(name) is not factory
    REWARDS.register(name, factory)
    if is_new:
        _loaded.pop(name, None)


def list_rewards() -> list[str]:
    """Returns the registered names in alphabetical order."""
    return REWARDS.names()


@contextmanager
def noting_errors(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Adds a note to an error that a user's reward raises in the block. Its author needs the traceback.

    Errors of the rewards of this package say by themselves what to do.

    Args:
        name: the reward's name.
        function: the reward, or what makes it.
    """
    try:
        yield
    except Exception as error:
        module = getattr(function, "__module__", None) or type(function).__module__
        if module.partition(".")[0] != "dpok_gym":
            error.add_note(f"{RAISED_BY}the reward {name!r}")
        raise


def is_place(name: str) -> bool:
    """Returns whether the name of a reward is ``"module:name"``, which is imported: no registered name or folder."""
    from dpok_gym.rewards.remote.access import is_address

    is_written_so = all(name.partition(":")) and not is_address(name)
    return is_written_so and name not in REWARDS and not os.path.isdir(name)


def check_name(name: str) -> None:
    """Checks that a reward is a registered name, a folder or ``"module:name"``, and imports nothing.

    Raises:
        ValueError: if it is none of these; the message has the nearest name.
    """
    if not (os.path.isdir(name) or is_place(name)):
        REWARDS.get(name)


def load_reward(name: str) -> RewardFunction:
    """Loads a registered reward, the reward in a folder, or the reward at ``"module:name"``.

    A callable at ``"module:name"`` that needs no arguments, as most classes do, is a factory and is called. A function
    that needs arguments is the reward itself. Each reward is loaded once per process, and a folder again after it was
    written anew.

    Raises:
        ValueError: if the name is unknown, or a file in the folder is damaged.
        FileNotFoundError: if the folder holds no reward.
        ImportError: if ``"module:name"`` cannot be imported.
        TypeError: if the factory returns something that is not callable, or is a class that needs arguments.
    """
    if name not in REWARDS and os.path.isdir(name):
        return _load_folder(os.path.realpath(name))
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def _load_folder(path: str) -> RewardFunction:
    # dpok fit-reward may write the folder again while this process lives, so the times of its files are compared.
    times = [file.stat().st_mtime_ns for file in Path(path).iterdir()]
    changed = max(times, default=0)
    if path not in _loaded_folders or _loaded_folders[path][0] != changed:
        from dpok_gym.rewards.preference.reward import LearnedReward

        _loaded_folders[path] = changed, LearnedReward.load(path)
    return _loaded_folders[path][1]


def _load(name: str) -> RewardFunction:
    is_registered = name in REWARDS
    factory: Any = name if not is_registered and all(name.partition(":")) else REWARDS.get(name)
    if isinstance(factory, str):
        what = f"reward {name!r}"
        if not is_registered:
            what += ", read as 'module:name' (or is http:// missing?),"
        factory = import_attribute(what, factory)
    needs_arguments = _needs_arguments(factory)
    if needs_arguments and isinstance(factory, type):
        raise TypeError(
            f"the class {factory.__name__!r} of the reward {name!r} needs arguments, and is made without any here: "
            "give them defaults, name a function that makes it, or pass an instance that you made"
        )
    is_reward = needs_arguments and not is_registered
    with noting_errors(name, factory):
        reward: RewardFunction = factory if is_reward else factory()
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


register_reward("jpeg-compressibility", "dpok_gym.rewards.jpeg:JpegCompressibility")
register_reward("jpeg-incompressibility", "dpok_gym.rewards.jpeg:JpegIncompressibility")
register_reward("image-reward", "dpok_gym.rewards.networks.image_reward:ImageReward")
register_reward("pickscore", "dpok_gym.rewards.networks.pickscore:PickScore")
register_reward("hpsv2", "dpok_gym.rewards.networks.hpsv2:HPSv2")
register_reward("hpsv2.1", "dpok_gym.rewards.networks.hpsv2:HPSv21")
register_reward("clip-score", "dpok_gym.rewards.networks.clip_score:ClipScore")
register_reward("aesthetic", "dpok_gym.rewards.networks.aesthetic:Aesthetic")
