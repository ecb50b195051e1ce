"""Sizes that are halved when memory runs out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dpok_gym.utils.batching import BatchSize


def small(limit: int, calls: list[int]) -> Callable[[slice], torch.Tensor]:
    """Squares on a device whose memory holds ``limit`` entries."""

    def square(part: slice) -> torch.Tensor:
        values = torch.arange(10.0)[part]
        calls.append(len(values))
        if len(values) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much")
        return values.square()

    return square


@pytest.mark.parametrize(("size", "expected"), [(None, [10]), (4, [4, 4, 2]), (100, [10])])
def test_fixed_sizes(size: int | None, expected: list[int]) -> None:
    calls: list[int] = []
    result = BatchSize("size", size).map(small(10, calls), 10)
    assert torch.equal(result, torch.arange(10.0).square())
    assert calls == expected
    if expected[0] > 3:
        with pytest.raises(torch.OutOfMemoryError):
            BatchSize("size", size).map(small(3, []), 10)


@pytest.mark.slow
def test_auto_halves_and_remembers() -> None:
    calls: list[int] = []
    size = BatchSize("size", "auto")
    with pytest.warns(UserWarning, match="memory ran out with size = ") as said:
        result = size.map(small(3, calls), 10)
    assert torch.equal(result, torch.arange(10.0).square())
    assert calls == [10, 5, 3, 3, 3, 1]
    assert [str(warning.message) for warning in said if warning.category is UserWarning] == [
        "memory ran out with size = 10; trying 5",
        "memory ran out with size = 5; trying 3",
    ]
    calls.clear()
    size.map(small(3, calls), 10)
    assert calls == [3, 3, 3, 1]


@pytest.mark.slow
def test_auto_gives_up_at_one() -> None:
    with pytest.warns(UserWarning, match="memory ran out"), pytest.raises(torch.OutOfMemoryError):
        BatchSize("size", "auto").map(small(0, []), 2)


def test_other_errors_pass() -> None:
    def broken(part: slice) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        BatchSize("size", "auto").map(broken, 4)


@pytest.mark.parametrize("size", [0, -1, 1.5, "all"])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"limit \(unless None or 'auto'\) must be an integer of at least 1, got {size!r}"
    ):
        BatchSize("limit", size)


@pytest.mark.slow
def test_run_calls_again_with_half() -> None:
    calls: list[int] = []

    def compute(size: int) -> str:
        calls.append(size)
        if size > 2:
            raise RuntimeError("MPS backend out of memory")  # an error of no class of its own
        return "done"

    batch = BatchSize("size", "auto")
    with pytest.warns(UserWarning, match="memory ran out"):
        assert batch.run(compute, 7) == "done"
    assert calls == [7, 4, 2]
    assert batch.size == 2
    assert batch.run(compute, 1) == "done"
    assert calls[3:] == [1]
    assert batch.size == 2  # fewer entries do not change it


def test_map_joins_along_the_first_axis() -> None:
    joined = BatchSize("size", 2).map(lambda rows: torch.arange(10.0).reshape(5, 2)[rows], 5)
    assert torch.equal(joined, torch.arange(10.0).reshape(5, 2))


def test_numpy_integers() -> None:
    assert BatchSize("size", np.int64(3)).size == 3
