"""One interface for every reward: checks, weights and sums what reward functions return.

Letters used for shapes: B pictures, H x W pixels.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpok_gym.checks import one_of
from dpok_gym.rewards.normalization import Normalize, RunningStatistics, check_normalize, standardize
from dpok_gym.rewards.registry import RewardFunction, load_reward
from dpok_gym.rewards.remote import RemoteReward, is_address

#: What the functions of a reward return: by function, by component, (B,) float32 on the CPU.
Components = dict[str, dict[str, Tensor]]


class RewardBatch(NamedTuple):
    """What a batch of pictures is worth. All tensors are (B,), on the CPU.

    Attributes:
        total: float32, the weighted sum of the components; finite, and 0 where ``valid`` is False.
        components: float32, by name, raw: before normalisation and weighting; not finite where that is why the picture
            is not valid.
        valid: bool, False for a picture that got no finite reward and must not be learned from.
        weighted: float32, by name, what each component adds to the total.
    """

    total: Tensor
    components: dict[str, Tensor]
    valid: Tensor
    weighted: dict[str, Tensor]


class Part(NamedTuple):
    """One reward function of a sum.

    Attributes:
        function: see :data:`~dpok_gym.rewards.RewardFunction`.
        weight: what its components are multiplied by.
        normalize: how they are standardised before.
    """

    function: RewardFunction
    weight: float = 1.0
    normalize: Normalize = None


class Reward:
    """A weighted sum of reward functions, checked; made by :func:`make_reward`.

    Attributes:
        training: whether parts with ``normalize="running"`` are normalised, and learn from what they see. While it is
            False they count as they are and their statistics stay, so that totals before and after training compare.
    """

    def __init__(self, parts: Mapping[str, Part], non_finite: Literal["error", "mask"] = "error") -> None:
        one_of("non_finite", non_finite, "error", "mask")
        self._parts = dict(parts)
        self._statistics: dict[str, RunningStatistics] = {}
        self.non_finite = non_finite
        self.training = True

    @property
    def names(self) -> list[str]:
        """The rewards in the sum, of which each may have several components."""
        return list(self._parts)

    def __call__(self, images: Tensor, prompts: list[str]) -> RewardBatch:
        """Judges a batch of pictures.

        Args:
            images: (B, 3, H, W) floating point in [0, 1], on any device.
            prompts: the B prompts that the pictures were made for.

        Raises:
            TypeError: if the images are not a floating-point tensor, or a function returns something that is no tensor.
            ValueError: if a shape is wrong, two components have the same name, or (unless such pictures are masked)
                a picture or a reward is not finite.
        """
        return self.combine(self.components(images, prompts), prompts)

    @torch.no_grad()
    def components(self, images: Tensor, prompts: list[str]) -> Components:
        """The first half of a call, without state: asks the functions; NaN for pictures that are not finite.

        Several threads may do this at once if the functions may be called so.
        """
        prompts = list(prompts)
        _check_images(images, len(prompts))
        # A diverged model paints NaN. Rewards never see it: many would crash, or give it an innocent number.
        sound = images.isfinite().flatten(1).all(1)
        sound = self._require_finite(torch.where(sound, 0.0, math.nan).cpu(), "the picture", prompts)
        if not sound.all():
            images = images.nan_to_num(0.0, 0.0, 0.0)

        judged: Components = {}
        names: set[str] = set()
        for name, part in self._parts.items():
            judged[name] = _evaluate(part.function, name, images, prompts)
            for component, values in judged[name].items():
                if component in names:
                    raise ValueError(f"two rewards have a component named {component!r}; rename one of them")
                names.add(component)
                values[~sound] = math.nan
        return judged

    def combine(self, judged: Components, prompts: list[str]) -> RewardBatch:
        """The second half: checks the components of a whole batch, normalises, weights and sums them."""
        components = {component: values for found in judged.values() for component, values in found.items()}
        valid = torch.ones(len(prompts), dtype=torch.bool)
        for component, values in components.items():
            valid &= self._require_finite(values, f"the reward {component!r}", prompts, valid)
        weighted: dict[str, Tensor] = {}
        for name, found in judged.items():
            part = self._parts[name]
            if isinstance(part.normalize, tuple) and len(found) > 1:
                raise ValueError(
                    f"the reward {name!r} has the components {', '.join(found)}, which one [mean, std] cannot "
                    f"normalise; use 'running', which has a pair for each"
                )
            for component, values in found.items():
                weighted[component] = part.weight * self._normalize(part.normalize, component, values, valid)
        total = torch.zeros(len(prompts), dtype=torch.float64)
        for values in weighted.values():
            total += values
        total = total.float()
        valid &= self._require_finite(total, "the weighted sum of the rewards", prompts, valid)  # it may overflow
        return RewardBatch(total.where(valid, 0.0), components, valid, weighted)

    def check_differentiable(self) -> None:
        """Makes sure that :meth:`differentiable` can be called; parts of weight 0, which only inform, need no gradient.

        Raises:
            ValueError: if a function has no gradients, its normalisation learns from what it sees, or no part has a
                weight.
        """
        if not self._counting():
            raise ValueError("every reward has the weight 0, so there is no gradient to follow; give one a weight")
        for name, part in self._counting():
            if not getattr(part.function, "differentiable", False):
                raise ValueError(
                    f"the reward {name!r} has no gradient; a differentiable one has an attribute differentiable = True "
                    f"and a method score(images, prompts) -> (B,), such as a reward fitted by dpok fit-reward"
                )
            if part.normalize == "running":
                raise ValueError(f"the reward {name!r} is normalised by running statistics, which have no gradient")

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The total of a batch (B,) with its gradient in the images; not checked to be finite."""
        totals = []
        for _, part in self._counting():
            values = part.function.score(images, prompts)  # type: ignore[attr-defined]
            totals.append(part.weight * (values if part.normalize is None else standardize(values, *part.normalize)))
        return torch.stack(totals).sum(dim=0)

    def _counting(self) -> list[tuple[str, Part]]:
        """The parts with a weight."""
        return [(name, part) for name, part in self._parts.items() if part.weight]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """``with reward.evaluating()``: :attr:`training` is False."""
        training, self.training = self.training, False
        try:
            yield
        finally:
            self.training = training

    def state_dict(self) -> dict[str, tuple[float, float, float]]:
        """The running statistics, all the state there is: count, mean and sum of squares of each component."""
        return {component: statistics.state() for component, statistics in self._statistics.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, float, float]]) -> None:
        """Goes on with the statistics that :meth:`state_dict` returned."""
        self._statistics = {component: RunningStatistics(*saved) for component, saved in state.items()}

    def _normalize(self, how: Normalize, component: str, values: Tensor, valid: Tensor) -> Tensor:
        """The values (B,) of a component, standardised; those of valid pictures are learned from."""
        if how is None or (how == "running" and not self.training):
            return values
        if how == "running":
            statistics = self._statistics.setdefault(component, RunningStatistics())
            statistics.update(values[valid])
            return standardize(values, statistics.mean, statistics.std)
        return standardize(values, *how)

    def _require_finite(self, values: Tensor, what: str, prompts: list[str], expected: Tensor | None = None) -> Tensor:
        """Returns where ``values`` (B,) are finite; raises if they are not where expected, unless these are masked."""
        finite = values.isfinite()
        wrong = (~finite if expected is None else ~finite & expected).nonzero().flatten().tolist()
        if wrong and self.non_finite == "error":
            raise ValueError(
                f"{what} for the prompt {prompts[wrong[0]]!r} is not finite ({values[wrong[0]].item()}; "
                f"{len(wrong)} of {len(prompts)} in the batch); mend its cause, or leave such pictures out with "
                f"non_finite='mask'"
            )
        return finite


def make_reward(
    spec: str | RewardFunction | Mapping[Any, Any] | Reward, non_finite: Literal["error", "mask"] = "error"
) -> Reward:
    """Makes a reward, and loads at once whatever it needs.

    With ``"normalize": "running"`` a reward is standardised by the mean and standard deviation of all its values so
    far, the batch itself included: weights then compare rewards of different scales. Components stay raw in
    :class:`RewardBatch`, in ``info`` and in the logs, and only they show progress: the total's mean stays about 0. What
    to know:

    - Alone in the sum, it changes nothing for an agent that normalises its advantages, and makes a critic chase a
      moving target. It is for sums.
    - A picture's total depends on those before it: scalar environments, which each count for themselves, do not equal
      the vector environment then. ``[mean, std]``, fixed numbers, have no such memory.
    - In an evaluation it is off: ``agents.evaluation`` and :mod:`.server` see to it. In one of your own, by SB3's
      ``EvalCallback`` for example, set :attr:`Reward.training` of that environment's reward to False.
    - An agent of ``agents`` saves the statistics and goes on with them; others have :meth:`Reward.state_dict`.

    Args:
        spec: one of

            - a registered name, see :func:`~dpok_gym.rewards.list_rewards`;
            - the path of a folder that ``dpok fit-reward`` wrote, as text or ``Path``, see :mod:`.preference`;
            - ``"module:name"``, where a callable as below is, or a class or factory without arguments that makes it;
            - ``http://`` or ``https://`` and the rest of an address, or several with spaces between them: servers that
              share the work, see :class:`~dpok_gym.rewards.RemoteReward`;
            - a callable ``(images, prompts) -> (B,)``: a single component, called as the function or its class is;
            - a callable ``(images, prompts) -> {component: (B,)}``: the total is the sum of the entries;
            - ``{name: weight}``, any of these and the finite number that each is multiplied by. In place of the number
              may be ``{"weight": 1.0, "normalize": how}``, with ``how`` None, "running" or ``[mean, std]``, and for
              an address RemoteReward's arguments, such as ``"timeout": 300``;
            - a :class:`Reward`, returned as it is.
        non_finite: what happens to a picture whose reward, or which itself, is NaN or infinite: ``"error"`` raises a
            ValueError that names the reward and the prompt; ``"mask"`` gives it a total of 0 and ``valid = False``.

    Raises:
        TypeError: if the spec is of another kind or a weight is not a number.
        ValueError: if a name is unknown, the mapping is empty, two rewards have the same name, a weight is not finite,
            a setting or ``normalize`` is unknown, or ``non_finite`` is neither of the two.
        ImportError: if a reward needs something that is not installed.
    """
    if isinstance(spec, Reward):
        return spec
    entries = spec.items() if isinstance(spec, Mapping) else [(spec, 1.0)]
    if not entries:
        raise ValueError("the mapping of rewards is empty; name at least one, such as {'jpeg-compressibility': 1.0}")
    parts: dict[str, Part] = {}
    for key, settings in entries:
        settings = dict(settings) if isinstance(settings, Mapping) else {"weight": settings}
        weight, normalize = settings.pop("weight", 1.0), settings.pop("normalize", None)
        name, load = _identify(key, settings)
        if name in parts:
            raise ValueError(f"two rewards are named {name!r}; rename one of them")
        parts[name] = Part(load(), _check_weight(weight, name), check_normalize(normalize, name))
    return Reward(parts, non_finite)


def _identify(key: Any, settings: Mapping[str, Any]) -> tuple[str, Callable[[], RewardFunction]]:
    """The name of a reward, and what loads it."""
    key = os.fspath(key) if isinstance(key, os.PathLike) else key
    if isinstance(key, str) and is_address(key):
        try:
            inspect.signature(RemoteReward).bind(key, **settings)
        except TypeError as error:
            raise ValueError(f"unknown settings of the reward {key!r}: {error}; see RemoteReward") from None
        key = RemoteReward(key.split(), **settings)
    elif settings:
        unknown = ", ".join(map(str, settings))
        raise ValueError(f"unknown settings {unknown} of the reward {key!r}; it has 'weight', 'normalize'")
    if isinstance(key, str):
        return key, lambda: load_reward(key)
    if callable(key):
        return getattr(key, "__name__", type(key).__name__), lambda: key
    raise TypeError(f"a reward must be a registered name, a callable, or a mapping of names to weights, not {key!r}")


def _check_weight(weight: Any, name: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(f"the weight of the reward {name!r} must be a number, not {weight!r}")
    if not math.isfinite(weight):
        raise ValueError(f"the weight of the reward {name!r} must be finite, not {weight!r}")
    return float(weight)


def _check_images(images: Any, n_prompts: int) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor with values in [0, 1], not {kind}")
    if images.ndim != 4 or images.shape[:2] != (n_prompts, 3):
        raise ValueError(
            f"images must have the shape ({n_prompts}, 3, H, W) for {n_prompts} prompts, not {tuple(images.shape)}"
        )


def _evaluate(function: RewardFunction, name: str, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Calls a reward function; returns its components, each (B,) float32 on the CPU and not shared with anyone."""
    returned = function(images, prompts)
    if isinstance(returned, Mapping) and not returned:
        raise ValueError(f"the reward {name!r} returned an empty mapping; it must have at least one component")
    entries = returned if isinstance(returned, Mapping) else {name: returned}
    return {component: _to_tensor(values, component, len(prompts)) for component, values in entries.items()}


def _to_tensor(values: Any, name: str, n_prompts: int) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values.to("cpu", torch.float32, copy=True)
    else:
        try:
            tensor = torch.tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"the reward {name!r} returned {type(values).__name__}, which is no tensor ({error}); "
                f"return a tensor, an array or a list of floats of shape ({n_prompts},)"
            ) from error
    if tensor.shape != (n_prompts,):
        raise ValueError(
            f"the reward {name!r} must return one number for each of the {n_prompts} pictures, shape ({n_prompts},), "
            f"but the shape is {tuple(tensor.shape)}"
        )
    return tensor
