"""A second set of weights for a network: a copy that follows the trained ones slowly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SlowCopy(nn.Module):
    """A copy of parameters, which can take their place in the network for a while.

    It works for any parameters, those of a LoRA or of a whole network, and takes as much memory as they do.

    Args:
        parameters: the trained parameters by name. The copy begins equal to them.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        # In a list, so that they do not count as parameters of this module too.
        self._trained = list(parameters.values())
        for name, value in parameters.items():
            self.register_buffer(name.replace(".", "/"), value.detach().clone())  # names must have no dots

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """copy <- decay copy + (1 - decay) trained; a decay of 0 makes the two equal.

        Args:
            decay: in [0, 1].
        """
        for copied, trained in self._pairs():
            copied.lerp_(trained, 1 - decay)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copied values back into the trained parameters."""
        for copied, trained in self._pairs():
            trained.copy_(copied)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the network computes with the copy; no gradient must go through it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for copied, trained in self._pairs():
            copied.data, trained.data = trained.data, copied.data

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.buffers(), self._trained, strict=True)
