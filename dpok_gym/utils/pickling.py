"""Pickles without weights."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dpok_gym.utils.validation import shorten


def check_picklable(why: str, arguments: Mapping[str, Any], advice: str) -> None:
    """Checks that arguments can be sent to another process, without weights.

    Args:
        why: why they are pickled, for the error message.
        arguments: the values by their names.
        advice: what to do, for the error message.

    Raises:
        TypeError: if one cannot; the message names it.
    """
    for name, value in arguments.items():
        try:
            _PicklerWithoutWeights(io.BytesIO()).dump(value)
        except Exception as error:  # pickle raises many kinds
            raise TypeError(f"{why}, and {name}={shorten(value)} cannot be ({error}); {advice}") from error


class _PicklerWithoutWeights(pickle.Pickler):
    """Refuses networks and tensors."""

    def persistent_id(self, obj: Any) -> None:
        if isinstance(obj, (nn.Module, Tensor)):
            raise TypeError("it holds weights")
