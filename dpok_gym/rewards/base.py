"""One interface for every reward: checks, weights and sums what reward functions return.

Letters used for shapes: B pictures, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpok_gym.rewards.registry import RewardFunction, load_reward


class RewardBatch(NamedTuple):
    """What a batch of pictures is worth. All tensors are (B,), on the CPU.

    Attributes:
        total: float32, the weighted sum of the components; finite, and 0 where ``valid`` is False.
        components: float32, by name, before weighting; not finite where that is why the picture is not valid.
        valid: bool, False for a picture that got no finite reward and must not be learned from.
    """

    total: Tensor
    components: dict[str, Tensor]
    valid: Tensor


class Reward:
    """A weighted sum of reward functions, checked; made by :func:`make_reward`."""

    def __init__(
        self, functions: Mapping[str, tuple[RewardFunction, float]], non_finite: Literal["error", "mask"] = "error"
    ) -> None:
        if non_finite not in ("error", "mask"):
            raise ValueError(f"non_finite must be 'error' or 'mask', not {non_finite!r}")
        self._functions = dict(functions)
        self.non_finite = non_finite

    @torch.no_grad()
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
        prompts = list(prompts)
        _check_images(images, len(prompts))
        # A diverged model paints NaN. Rewards never see it: many would crash, or give it an innocent number.
        sound = images.isfinite().flatten(1).all(1)
        valid = self._require_finite(torch.where(sound, 0.0, math.nan).cpu(), "the picture", prompts)
        if not valid.all():
            images = images.nan_to_num(0.0, 0.0, 0.0)

        components: dict[str, Tensor] = {}
        total = torch.zeros(len(prompts), dtype=torch.float64)
        for name, (function, weight) in self._functions.items():
            for component, values in _evaluate(function, name, images, prompts).items():
                if component in components:
                    raise ValueError(f"two rewards have a component named {component!r}; rename one of them")
                values[~valid] = math.nan
                components[component] = values
                total += weight * values
        total = total.float()
        for component, values in components.items():
            valid &= self._require_finite(values, f"the reward {component!r}", prompts, valid)
        valid &= self._require_finite(total, "the weighted sum of the rewards", prompts, valid)  # it may overflow
        return RewardBatch(total.where(valid, 0.0), components, valid)

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
    spec: str | RewardFunction | Mapping[Any, float] | Reward, non_finite: Literal["error", "mask"] = "error"
) -> Reward:
    """Makes a reward, and loads at once whatever it needs.

    Args:
        spec: one of

            - a registered name, see :func:`~dpok_gym.rewards.list_rewards`;
            - a callable ``(images, prompts) -> (B,)``: a single component, called as the function or its class is;
            - a callable ``(images, prompts) -> {component: (B,)}``: the total is the sum of the entries;
            - ``{name: weight}``, registered names (or such callables) and the finite number that each is multiplied by;
            - a :class:`Reward`, returned as it is.
        non_finite: what happens to a picture whose reward, or which itself, is NaN or infinite: ``"error"`` raises a
            ValueError that names the reward and the prompt; ``"mask"`` gives it a total of 0 and ``valid = False``.

    Raises:
        TypeError: if the spec is of another kind or a weight is not a number.
        ValueError: if a name is unknown, the mapping is empty, two rewards have the same name, a weight is not finite,
            or ``non_finite`` is neither of the two.
        ImportError: if a reward needs something that is not installed.
    """
    if isinstance(spec, Reward):
        return spec
    weights = spec.items() if isinstance(spec, Mapping) else [(spec, 1.0)]
    if not weights:
        raise ValueError("the mapping of rewards is empty; name at least one, such as {'jpeg-compressibility': 1.0}")
    functions: dict[str, tuple[RewardFunction, float]] = {}
    for key, weight in weights:
        name, load = _identify(key)
        if name in functions:
            raise ValueError(f"two rewards are named {name!r}; rename one of them")
        functions[name] = load(), _check_weight(weight, name)
    return Reward(functions, non_finite)


def _identify(key: Any) -> tuple[str, Callable[[], RewardFunction]]:
    """The name of a reward, and what loads it."""
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
