"""A bounded memory of encoded prompts."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class ConditioningCache:
    """Keeps the conditioning of each prompt; when it is full, the prompts that were used least recently leave.

    Args:
        max_bytes: most bytes of tensors that are kept.
        min_entries: prompts that are kept even if they take more.

    Attributes:
        num_bytes: bytes of the tensors in it.
    """

    def __init__(self, max_bytes: int, min_entries: int = 0) -> None:
        self.max_bytes, self.min_entries = max_bytes, min_entries
        self.num_bytes = 0
        self._entries: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._entries

    def get(self, prompt: str) -> dict[str, Tensor] | None:
        """Returns the conditioning of one prompt, without the leading axis; None if it is not kept."""
        if prompt not in self._entries:
            return None
        self._entries.move_to_end(prompt)
        return self._entries[prompt]

    def add(self, prompt: str, conditioning: dict[str, Tensor]) -> None:
        """Keeps the conditioning of a new prompt, unless it takes more than ``max_bytes`` and ``min_entries`` is 0."""
        self._entries[prompt] = conditioning
        self.num_bytes += _count_bytes(conditioning)
        while self.num_bytes > self.max_bytes and len(self) > self.min_entries:
            _, removed = self._entries.popitem(last=False)
            self.num_bytes -= _count_bytes(removed)

    def clear(self) -> None:
        """Forgets all prompts."""
        self._entries.clear()
        self.num_bytes = 0


def _count_bytes(conditioning: dict[str, Tensor]) -> int:
    return sum(values.numel() * values.element_size() for values in conditioning.values())
