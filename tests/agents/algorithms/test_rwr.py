"""RWR: its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.agents.algorithms.support import MakeAgent

tensor = torch.tensor
REWARDS, TEXTS = tensor([-2.0, 0.5, 1.0, 3.0]), ["a", "a", "b", "b"]


def test_exponential_weights_by_hand(make_agent: MakeAgent) -> None:
    """exp(r / temperature), with a mean of 1 over each prompt's images."""
    weights = make_agent("RWR", temperature=2.0).image_weights(REWARDS, TEXTS)
    exponentials = torch.exp(REWARDS / 2)
    means = tensor([exponentials[:2].mean(), exponentials[2:].mean()]).repeat_interleave(2)
    torch.testing.assert_close(weights, exponentials / means)
    torch.testing.assert_close(weights.reshape(2, 2).mean(dim=1), torch.ones(2))


def test_prompts_may_come_in_any_order(make_agent: MakeAgent) -> None:
    agent = make_agent("RWR")
    order = tensor([2, 0, 3, 1])
    mixed = agent.image_weights(REWARDS[order], [TEXTS[row] for row in order.tolist()])
    torch.testing.assert_close(mixed, agent.image_weights(REWARDS, TEXTS)[order])


def test_extreme_rewards_have_finite_weights(make_agent: MakeAgent) -> None:
    weights = make_agent("RWR", temperature=1e-3).image_weights(tensor([-50.0, 900.0]), ["a", "a"])
    assert weights.tolist() == [0.0, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fraction", "rewards", "prompts", "expected"),
    [
        (0.5, [1.0, 2.0, 3.0, 3.0], ["a"] * 4, [0, 0, 1, 1]),
        (0.25, [1.0, 2.0, 3.0, 3.0], ["a"] * 4, [0, 0, 1, 1]),  # as good as the last of the best
        (0.5, [-2.0, 0.5, 1.0, 3.0], TEXTS, [0, 1, 0, 1]),
        (0.6, [-2.0, 0.5, 1.0, 3.0], TEXTS, [1, 1, 1, 1]),  # rounded up
    ],
)
def test_sparse_weights_by_hand(
    fraction: float, rewards: list[float], prompts: list[str], expected: list[int], make_agent: MakeAgent
) -> None:
    agent = make_agent("RWR", sparse_fraction=fraction)
    assert agent.image_weights(tensor(rewards), prompts).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"sparse_fraction": 1.5}, "sparse_fraction .unless None. must lie in"),
        ({"sparse_fraction": 0.0}, "sparse_fraction .unless None. must lie in"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent("RWR", **kwargs)
