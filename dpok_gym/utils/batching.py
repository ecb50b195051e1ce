"""Computations in parts that fit into memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from dpok_gym.utils.validation import check_integer

Result = TypeVar("Result")


class BatchSize:
    """The number of entries that are computed at a time.

    Args:
        name: of the setting, for messages.
        size: at least 1; None for everything at once; "auto" begins with everything and halves the size whenever
            memory runs out.

    Raises:
        ValueError: if the size is none of these.
    """

    def __init__(self, name: str, size: int | Literal["auto"] | None) -> None:
        self.name = name
        self.is_automatic = isinstance(size, str) and size == "auto"
        self.size: int | None = None
        if not (size is None or self.is_automatic):
            self.size = check_integer(f"{name} (unless None or 'auto')", size)  # type: ignore[arg-type]

    def run(self, function: Callable[[int], Result], n: int) -> Result:
        """Calls ``function(size)``, and again with a smaller size if memory runs out and the size is automatic.

        Args:
            function: computes ``n`` entries, ``size`` at a time.
            n: number of entries.

        Raises:
            torch.OutOfMemoryError: if memory runs out and the size is fixed, or is 1 already.
        """
        while True:
            size = min(self.size or n, n)
            try:
                return function(size)
            except RuntimeError as error:
                if not self.is_automatic or size == 1 or not _is_out_of_memory(error):
                    raise
            # This comes after the except block, inside which the error would keep the tensors of its frames alive.
            self.size = (size + 1) // 2
            warnings.warn(f"memory ran out with {self.name} = {size}; trying {self.size}", stacklevel=2)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def map(self, function: Callable[[slice], Tensor], n: int) -> Tensor:
        """Calls ``function`` with consecutive slices of ``n`` entries; joins the results along the first axis."""

        def in_parts(size: int) -> Tensor:
            return torch.cat([function(slice(first, first + size)) for first in range(0, n, size)])

        return self.run(in_parts, n)


def _is_out_of_memory(error: RuntimeError) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size  # it knows what each kind of device says

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
