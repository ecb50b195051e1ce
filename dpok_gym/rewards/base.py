"""The contract of rewards: a reward function scores images, and a :class:`Reward` checks, weights and sums the scores.

Letters used for shapes: B images, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpok_gym.rewards.normalization import Normalize, standardize
from dpok_gym.rewards.registry import RewardFunction, noting_errors
from dpok_gym.utils.validation import check_choice

#: The raw scores of a reward: for each function, its components, each (B,) float32 on the CPU.
Components = dict[str, dict[str, Tensor]]


class NonFiniteError(ValueError):
    """An image, a reward or a gradient is infinite or NaN: the model has diverged, or a reward has a defect."""


class RewardBatch(NamedTuple):
    """The rewards of a batch of images. All tensors are (B,), on the CPU.

    Attributes:
        total: float32, the weighted sum of the components; finite, and 0 where ``valid`` is False.
        components: float32, by name, raw: before normalisation and weighting. A component that is not finite makes its
            image invalid.
        valid: bool, False for an image that got no finite reward. Nothing must be learned from it.
        weights: the weight of each component in the total.
    """

    total: Tensor
    components: dict[str, Tensor]
    valid: Tensor
    weights: dict[str, float]


class Part(NamedTuple):
    """One reward function of a sum.

    Attributes:
        function: see :data:`~dpok_gym.rewards.RewardFunction`.
        weight: the factor of its components in the sum.
        normalize: the ``(mean, std)`` by which its component is standardised before weighting; None for no
            normalisation.
    """

    function: RewardFunction
    weight: float = 1.0
    normalize: Normalize = None


class Reward:
    """A weighted sum of reward functions, made by :func:`~dpok_gym.rewards.make_reward`.

    It keeps nothing between calls: the same images and prompts always get the same reward, as long as this holds for
    its functions.

    Args:
        parts: the functions of the sum, by name.
        non_finite: "error" or "mask", as for :func:`~dpok_gym.rewards.make_reward`.

    Raises:
        ValueError: if ``non_finite`` is neither of the two.
    """

    def __init__(self, parts: Mapping[str, Part], non_finite: Literal["error", "mask"] = "error") -> None:
        check_choice("non_finite", non_finite, "error", "mask")
        self._parts = dict(parts)
        self.non_finite = non_finite

    @property
    def names(self) -> list[str]:
        """The names of the functions in the sum, of which each may have several components."""
        return list(self._parts)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each function in the sum."""
        return {name: part.weight for name, part in self._parts.items()}

    @property
    def functions(self) -> dict[str, RewardFunction]:
        """The functions of the sum, by name."""
        return {name: part.function for name, part in self._parts.items()}

    def __call__(self, images: Tensor, prompts: list[str]) -> RewardBatch:
        """Scores a batch of images.

        Args:
            images: (B, 3, H, W) floating point in [0, 1], on any device.
            prompts: the B prompts that the images were made for.

        Raises:
            TypeError: if the images are not a floating-point tensor, or a function returns something that is no tensor.
            ValueError: if a shape is wrong, or two components have the same name.
            NonFiniteError: if an image or a reward is not finite, and such images are not masked.
        """
        return self.combine(self.components(images, prompts), prompts)

    @torch.no_grad()
    def components(self, images: Tensor, prompts: list[str]) -> Components:
        """Calls the functions. This is the first half of a call; arguments and errors are the same.

        Several threads may do this at once if the functions may be called by several threads.

        Returns:
            The components of each function, NaN for images that are not finite.
        """
        prompts = list(prompts)
        _check_images(images, len(prompts))
        # A diverged model draws NaN. Reward functions never see it: many would crash, or return a finite score for it.
        finite = images.isfinite().flatten(1).all(1)
        marked = torch.where(finite, 0.0, math.nan).cpu()  # (B,)
        finite = self._require_finite(marked, "the image", prompts)
        if not finite.all():
            images = images.nan_to_num(0.0, 0.0, 0.0)

        scores: Components = {}
        names: set[str] = set()
        for name, part in self._parts.items():
            scores[name] = _evaluate(part.function, name, images, prompts)
            for component, values in scores[name].items():
                if component in names:
                    raise ValueError(f"two rewards have a component named {component!r}; rename one of them")
                names.add(component)
                values[~finite] = math.nan
        return scores

    def combine(self, scores: Components, prompts: list[str]) -> RewardBatch:
        """Checks the components of a whole batch, weights and sums them. This is the second half of a call.

        Args:
            scores: see :meth:`components`.
            prompts: the B prompts, for error messages.

        Raises:
            NonFiniteError: if a reward is not finite, and such images are not masked.
            ValueError: as :meth:`weigh` does.
        """
        components: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for name, by_component in scores.items():
            components |= by_component
            weights |= dict.fromkeys(by_component, self._parts[name].weight)
        valid = torch.ones(len(prompts), dtype=torch.bool)
        for component, values in components.items():
            valid &= self._require_finite(values, f"the reward {component!r}", prompts, valid)
        # In float64, so that the sum depends as little as possible on the order of the components.
        total = torch.zeros(len(prompts), dtype=torch.float64)
        for values in self.weigh(scores).values():
            total += values
        total = total.float()
        # The sum of finite numbers may overflow.
        valid &= self._require_finite(total, "the weighted sum of the rewards", prompts, valid)
        return RewardBatch(total.where(valid, 0.0), components, valid, weights)

    def weigh(self, scores: Components) -> dict[str, Tensor]:
        """Normalises and weights components. Their sum is the total.

        Args:
            scores: see :meth:`components`.

        Returns:
            For each component, its contribution to the total, (B,) float32.

        Raises:
            ValueError: if a function with a fixed normalisation has several components.
        """
        weighted: dict[str, Tensor] = {}
        for name, by_component in scores.items():
            part = self._parts[name]
            if part.normalize is not None and len(by_component) > 1:
                raise ValueError(
                    f"the reward {name!r} has the components {', '.join(by_component)}, which one [mean, std] cannot "
                    "normalise; leave 'normalize' out, and pass normalize_rewards=True to the learner, which "
                    "normalises each component by its own statistics"
                )
            for component, values in by_component.items():
                weighted[component] = part.weight * _normalize(values, part.normalize)
        return weighted

    def check_differentiable(self) -> None:
        """Makes sure that :meth:`differentiable` can be called. Parts of weight 0 need no gradient.

        Raises:
            ValueError: if a function has no gradient, or no part has a weight.
        """
        parts = self._weighted_parts()
        if not parts:
            raise ValueError("every reward has the weight 0, so there is no gradient to follow; give one a weight")
        for name, part in parts.items():
            if not getattr(part.function, "differentiable", False):
                raise ValueError(
                    f"the reward {name!r} has no gradient; a differentiable one has an attribute differentiable = True "
                    f"and a method score(images, prompts) -> (B,), such as a reward fitted by dpok fit-reward"
                )

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the total of a batch, (B,), with its gradient in the images. It may be infinite or NaN.

        Args:
            images: (B, 3, H, W) floating point in [0, 1], on any device.
            prompts: the B prompts that the images were made for.
        """
        totals: list[Tensor] = []
        for name, part in self._weighted_parts().items():
            with noting_errors(name, part.function):
                values = part.function.score(images.clone(), list(prompts))  # type: ignore[attr-defined]
            totals.append(part.weight * _normalize(values, part.normalize))
        return torch.stack(totals).sum(dim=0)

    def _weighted_parts(self) -> dict[str, Part]:
        """Returns the parts whose weight is not 0."""
        return {name: part for name, part in self._parts.items() if part.weight}

    def _require_finite(self, values: Tensor, what: str, prompts: list[str], expected: Tensor | None = None) -> Tensor:
        """Returns which of the values (B,) are finite.

        Args:
            values: (B,).
            what: what the values are, for error messages.
            prompts: the B prompts, for error messages.
            expected: (B,) bool, only these values must be finite; None for all of them.

        Raises:
            NonFiniteError: if a value that must be finite is not, and such images are not masked.
        """
        finite = values.isfinite()
        wrong = ~finite if expected is None else ~finite & expected
        rows = wrong.nonzero().flatten().tolist()
        if rows and self.non_finite == "error":
            raise NonFiniteError(
                f"{what} for the prompt {prompts[rows[0]]!r} is not finite ({values[rows[0]].item()}; "
                f"{len(rows)} of {len(prompts)} in the batch); fix its cause, or leave such images out with "
                f"non_finite='mask'"
            )
        return finite


def _normalize(values: Tensor, normalize: Normalize) -> Tensor:
    return values if normalize is None else standardize(values, *normalize)


def _check_images(images: Any, n_prompts: int) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor with values in [0, 1], not {kind}")
    if images.ndim != 4 or images.shape[:2] != (n_prompts, 3):
        raise ValueError(
            f"images must have the shape ({n_prompts}, 3, H, W) for {n_prompts} prompts, not {tuple(images.shape)}"
        )


def _evaluate(function: RewardFunction, name: str, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Calls a reward function.

    Returns:
        Its components, each (B,) float32 on the CPU, in memory of their own.
    """
    # Copies, because a function may write into its arguments. Neither the next function nor the caller must see that.
    with noting_errors(name, function):
        returned = function(images.clone(), list(prompts))
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        returned, _ = returned  # scores and info, as rewards of ddpo-pytorch and TRL return them
    if isinstance(returned, Mapping) and not returned:
        raise ValueError(f"the reward {name!r} returned an empty mapping; it must have at least one component")
    by_component = returned if isinstance(returned, Mapping) else {name: returned}
    return {component: _to_tensor(values, component, len(prompts)) for component, values in by_component.items()}


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
            f"the reward {name!r} must return one number for each of the {n_prompts} images, shape ({n_prompts},), "
            f"but the shape is {tuple(tensor.shape)}"
        )
    return tensor
