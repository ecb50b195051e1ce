"""Makes a reward from its description: a name, a callable, an address, or a sum of these."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from dpok_gym.rewards.base import Part, Reward
from dpok_gym.rewards.normalization import Normalize, check_normalize
from dpok_gym.rewards.registry import RewardFunction, check_name, load_reward
from dpok_gym.rewards.remote.access import TOKEN_VARIABLE, check_no_secret, is_address
from dpok_gym.rewards.remote.client import RemoteReward
from dpok_gym.utils.validation import check_choice, check_finite

if TYPE_CHECKING:
    from torch import Tensor


def make_reward(
    spec: str | os.PathLike[str] | RewardFunction | Mapping[Any, Any] | Reward,
    non_finite: Literal["error", "mask"] = "error",
) -> Reward:
    """Makes a reward, and loads its networks at once.

    With ``"normalize": [mean, std]`` a reward is standardised by these fixed numbers before it is weighted, so that
    weights compare rewards of different scales. Components stay raw in :class:`RewardBatch`, in ``info`` and in the
    logs. To standardise by the mean and standard deviation of all values so far is an option of the learner,
    ``normalize_rewards=True``, because a reward keeps no statistics.

    Args:
        spec: one of

            - a registered name, see :func:`~dpok_gym.rewards.list_rewards`;
            - the path of a folder that ``dpok fit-reward`` wrote, as text or ``Path``, see :mod:`.preference`;
            - ``"module:name"``, the place of a callable as below, or of a class or factory without arguments that
              makes one;
            - ``http://`` or ``https://`` and the rest of an address, or several with spaces between them: servers that
              share the work, see :class:`~dpok_gym.rewards.RemoteReward`;
            - a callable ``(images, prompts) -> (B,)``: a single component, named like the function or its class;
            - a callable ``(images, prompts) -> {component: (B,)}``: the total is the sum of the entries;
            - a callable ``(images, prompts, metadata) -> (scores, info)``, as in ddpo-pytorch and TRL: its metadata is
              an empty dict for each prompt, and its info is not used;
            - ``{name: weight}``, with any of these in place of the name, and the finite number that it is multiplied
              by. In place of the number may be ``{"weight": 1.0, "normalize": [mean, std]}`` (or None in place of the
              pair), and for an address RemoteReward's arguments too, such as ``"timeout": 300``, but no token;
            - a :class:`Reward`, returned as it is; with ``"mask"``, a copy of it that masks.
        non_finite: what happens to an image that contains NaN or infinity, or whose reward does: ``"error"`` raises a
            ValueError that names the reward and the prompt; ``"mask"`` gives it a total of 0 and ``valid = False``.

    Raises:
        TypeError: if the spec is of another kind, a function takes other arguments, or a weight is not a number.
        ValueError: if a name is unknown, the mapping is empty, two rewards have the same name, a weight is not finite,
            a setting or ``normalize`` is unknown, or ``non_finite`` is neither of the two.
        ImportError: if a reward needs something that is not installed.
    """
    check_choice("non_finite", non_finite, "error", "mask")
    if isinstance(spec, Reward):
        return Reward(spec._parts, "mask") if non_finite == "mask" else spec
    parts = {}
    for name, (load, weight, normalize) in _describe(spec).items():
        parts[name] = Part(_taking_two(load(), name), weight, normalize)
    return Reward(parts, non_finite)


def check_reward(spec: Any) -> None:
    """Checks the description of a reward as :func:`make_reward` does, and loads nothing; errors are the same."""
    if not isinstance(spec, Reward):
        _describe(spec)


def _describe(spec: Any) -> dict[str, tuple[Callable[[], RewardFunction], float, Normalize]]:
    """Returns what loads each reward of a sum, by name, with its weight and its normalisation."""
    # A list of pairs and no dict, because a callable need not be hashable.
    entries = list(spec.items()) if isinstance(spec, Mapping) else [(spec, 1.0)]
    if not entries:
        raise ValueError("the mapping of rewards is empty; name at least one, such as {'jpeg-compressibility': 1.0}")
    parts: dict[str, tuple[Callable[[], RewardFunction], float, Normalize]] = {}
    for key, settings in entries:
        settings = dict(settings) if isinstance(settings, Mapping) else {"weight": settings}
        weight, normalize = settings.pop("weight", 1.0), settings.pop("normalize", None)
        name, load = _identify(key, settings)
        if name in parts:
            raise ValueError(f"two rewards are named {name!r}; rename one of them")
        weight = float(check_finite(f"the weight of the reward {name!r}", weight))
        parts[name] = load, weight, check_normalize(normalize, name)
    return parts


def _taking_two(function: Callable[..., Any], name: str) -> RewardFunction:
    """Returns a reward as a function of images and prompts; one that also takes metadata gets an empty dict for each.

    Raises:
        TypeError: if it takes other arguments.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin that does not say what it takes
        return function
    if _takes(signature, 2):
        return function
    if not _takes(signature, 3):
        raise TypeError(
            f"the reward {name!r} takes {signature}; it must take (images, prompts), or (images, prompts, metadata) as "
            "rewards of ddpo-pytorch and TRL do"
        )

    @functools.wraps(function)
    def without_metadata(images: Tensor, prompts: list[str]) -> Any:
        return function(images, prompts, [{} for _ in prompts])

    return without_metadata


def _takes(signature: inspect.Signature, n: int) -> bool:
    """Returns whether a function can be called with n arguments by position, and no others."""
    try:
        signature.bind(*[None] * n)
    except TypeError:
        return False
    return True


def _identify(key: Any, settings: Mapping[str, Any]) -> tuple[str, Callable[[], RewardFunction]]:
    """Returns the name of a reward, and a function that loads it."""
    key = os.fspath(key) if isinstance(key, os.PathLike) else key
    if isinstance(key, str) and is_address(key):
        check_no_secret(key)
        if "token" in settings:
            raise ValueError(
                f"the settings of a reward are written into files: put the token into the environment variable "
                f"{TOKEN_VARIABLE}, or make a RemoteReward(address, token=...)"
            )
        try:
            inspect.signature(RemoteReward).bind(key, **settings)
        except TypeError as error:
            raise ValueError(f"unknown settings of the reward {key!r}: {error}; see RemoteReward") from None
        key = RemoteReward(key.split(), **settings)
    elif settings:
        unknown = ", ".join(map(str, settings))
        raise ValueError(f"unknown settings {unknown} of the reward {key!r}; it has 'weight', 'normalize'")
    if isinstance(key, str):
        check_name(key)
        return key, lambda: load_reward(key)
    if callable(key):
        return getattr(key, "__name__", type(key).__name__), lambda: key
    raise TypeError(f"a reward must be a registered name, a callable, or a mapping of names to weights, not {key!r}")
