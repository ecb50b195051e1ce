"""An update in micro-batches that fit into memory; tests of the algorithms check the steps themselves."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import DPOK
from dpok_gym.rewards import NonFiniteError
from tests.agents.common.support import collect


def test_backward_passes_of_one_step_add_up(make_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if one of them runs out of memory in its middle, and begins again with smaller micro-batches."""
    agent = make_agent(use_critic=False, micro_batch_size="auto")
    buffer, agent._metrics = collect(agent), defaultdict(list)
    buffer.advantages = agent.advantages(buffer)
    first, second = buffer.batches(6, np.random.default_rng(0))

    def gradient(*batches: Any) -> Tensor:
        agent.policy.optimizer.zero_grad()
        for batch in batches:
            agent.backward(batch)
        return torch.cat([value.grad.flatten() for value in agent.policy.denoiser_parameters()])

    expected = gradient(first) + gradient(second)
    torch.testing.assert_close(gradient(first, second), expected)
    loss, sizes = agent.loss, list[int]()

    def limited(part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        sizes.append(len(part))
        if len(part) > 3 or len(sizes) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(part)

    monkeypatch.setattr(agent, "loss", limited)
    with pytest.warns(UserWarning, match="memory ran out"):
        in_parts = gradient(first, second)
    assert sizes == [6, 3, 3, 3, 3, 2, 2, 2]
    torch.testing.assert_close(in_parts, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_step_is_taken_with_a_gradient_that_is_not_finite(
    make_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """Or else all weights would be NaN, and so would every checkpoint from then on."""
    agent = make_agent(use_critic=False)
    before = [value.clone() for value in agent.policy.denoiser_parameters()]
    loss = agent.loss

    def broken(part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        values, metrics = loss(part)
        return bad * values, metrics

    monkeypatch.setattr(agent, "loss", broken)
    with pytest.raises(NonFiniteError, match="the gradient is infinite or NaN, so this step was not taken"):
        agent.learn(12)
    assert all(torch.equal(*pair) for pair in zip(before, agent.policy.denoiser_parameters(), strict=True))
    assert agent._n_updates == 0


@pytest.mark.slow
def test_an_update_that_runs_out_of_memory_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the whole batch is that of one whose second micro-batch did not fit at first."""

    def train(micro_batch_size: Literal["auto"] | None) -> list[Tensor]:
        agent = DPOK(
            env="DPOK-Shapes-v0",
            n_envs=2,
            micro_batch_size=micro_batch_size,
            learning_rate=1.0,
            use_critic=False,
            # Adam would make whole steps of rounding errors.
            policy_kwargs={"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.0}},
            seed=0,
        )
        loss, calls = agent.loss, list[int]()

        def limited(part: Any) -> tuple[Tensor, dict[str, Tensor]]:
            calls.append(len(part))
            if micro_batch_size == "auto" and (len(part) > 16 or len(calls) == 3):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss(part)

        monkeypatch.setattr(agent, "loss", limited)
        agent.learn(40)
        assert calls == ([40, 20, 10, 5, 5, 5, 5, 5, 5, 5, 5] if micro_batch_size == "auto" else [40])
        return [value.detach().clone() for value in agent.policy.denoiser_parameters()]

    expected = train(None)
    with pytest.warns(UserWarning, match="memory ran out with micro_batch_size = 40; trying 20"):
        learned = train("auto")
    for ours, theirs in zip(learned, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert any(value.abs().max() > 0.1 for value in expected)  # something was learned
