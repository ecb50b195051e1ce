"""Sizes that are halved when memory runs out."""

import pytest
import torch

from agents.algorithms.dpok import DPOK
from dpok_gym.utils.batching import BatchSize


def small(limit: int, calls: list[int]):
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


def test_auto_gives_up_at_one() -> None:
    with pytest.warns(UserWarning, match="memory ran out"), pytest.raises(torch.OutOfMemoryError):
        BatchSize("size", "auto").map(small(0, []), 2)


def test_other_errors_pass() -> None:
    def broken(part: slice) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        BatchSize("size", "auto").map(broken, 4)


@pytest.mark.parametrize("size", [0, -1, 1.5, "all"])
def test_bad_sizes(size) -> None:
    with pytest.raises(ValueError, match=f"limit must be an integer of at least 1, None or 'auto', got {size!r}"):
        BatchSize("limit", size)


def test_an_update_that_runs_out_of_memory_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the whole batch is that of one whose second micro-batch did not fit at first."""

    def trained(micro_batch_size) -> list[torch.Tensor]:
        agent = DPOK(
            env="DPOK-Shapes-v0",
            n_envs=2,
            micro_batch_size=micro_batch_size,
            learning_rate=1.0,
            use_critic=False,
            policy_kwargs={"optimizer_class": torch.optim.SGD},  # Adam would make steps of what is but rounding
            seed=0,
        )
        loss, calls = agent._loss, []

        def limited(part, *args):
            calls.append(len(part))
            if micro_batch_size == "auto" and (len(part) > 16 or len(calls) == 3):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss(part, *args)

        monkeypatch.setattr(agent, "_loss", limited)
        agent.learn(40)
        assert calls == ([40, 20, 10, 5, 5, 5, 5, 5, 5, 5, 5] if micro_batch_size == "auto" else [40])
        return [value.detach().clone() for value in agent.policy.denoiser_parameters()]

    expected = trained(None)
    with pytest.warns(UserWarning, match="memory ran out with micro_batch_size = 40; trying 20"):
        found = trained("auto")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
