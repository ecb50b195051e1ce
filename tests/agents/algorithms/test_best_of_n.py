"""Best of n: its winners."""

from __future__ import annotations

import pytest
import torch

from tests.agents.algorithms.support import MakeAgent, N, T

tensor = torch.tensor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewards", "prompts", "expected"),
    [
        ([1.0, 5.0, 2.0, 4.0, 3.0], ["a", "b", "a", "a", "a"], [0, 1, 1, 1, 0]),
        ([1.0, 2.0, 3.0], ["a", "a", "a"], [0, 1, 1]),  # what is left over is one more group
        ([-3.0, -2.0], ["a", "a"], [0, 1]),
        ([7.0, 7.0], ["a", "a"], [1, 0]),  # one winner, also of equals
    ],
)
def test_winners_by_hand(rewards: list[float], prompts: list[str], expected: list[int], make_agent: MakeAgent) -> None:
    assert make_agent("BestOfN", n=2).image_weights(tensor(rewards), prompts).tolist() == expected


@pytest.mark.slow
def test_learns_from_the_winners_only(make_agent: MakeAgent) -> None:
    agent = make_agent("BestOfN", n=4, n_gradient_steps=1, batch_size=20)
    batches = []
    backward = agent.backward
    agent.backward = lambda batch: (batches.append(batch), backward(batch))
    agent.learn(2 * N * T)
    winners = agent.image_weights(agent.image_rewards, agent.image_prompts)
    assert 0 < winners.sum() < 2 * N
    for prompt in set(agent.image_prompts):
        rows = [row for row, text in enumerate(agent.image_prompts) if text == prompt]
        best = max(rows[:4], key=lambda row: agent.image_rewards[row])
        assert winners[best] == 1
    best_latents = agent.image_latents[winners == 1]
    for latents in batches[0].latents:
        assert (best_latents == latents).flatten(1).all(1).any()


@pytest.mark.slow
def test_bad_arguments(make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match=r"n .* must be an integer of at least 2, got 1"):
        make_agent("BestOfN", n=1)
