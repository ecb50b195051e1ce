"""Fixed normalisation of a reward before it is weighted, so that weights compare rewards of different scales."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

#: The mean and standard deviation of a reward's values, or None for no normalisation.
Normalize = tuple[float, float] | None


def check_normalize(value: Any, name: str) -> Normalize:
    """Checks the setting ``normalize`` of the reward ``name``, and returns it.

    Raises:
        ValueError: if it is neither None nor a pair of finite numbers, or the standard deviation is not positive.
    """
    if value is None:
        return None
    if isinstance(value, str) and value == "running":
        raise ValueError(
            f"'normalize' of the reward {name!r} cannot be 'running': a reward keeps no statistics between batches. "
            "Leave it out, and pass normalize_rewards=True to the learner"
        )
    try:
        mean, std = map(float, value)
    except (TypeError, ValueError):
        mean = std = math.nan
    if isinstance(value, str) or not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(
            f"'normalize' of the reward {name!r} must be a pair [mean, std] of finite numbers with a positive std, "
            f"or None, not {value!r}"
        )
    return mean, std


def standardize(values: Tensor, mean: float, std: float) -> Tensor:
    """Returns ``(values - mean) / std``, computed in float64 and returned in float32."""
    return ((values.double() - mean) / std).float()
