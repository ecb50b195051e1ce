"""REINFORCE: its baseline, and one step in each iteration. Its gradient is tested beside DDPO's score function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.agents.algorithms.support import UPDATE, MakeAgent, flat_weights

tensor = torch.tensor


@pytest.mark.slow
def test_leaves_the_image_itself_out(make_agent: MakeAgent) -> None:
    agent = make_agent("REINFORCE")
    prompts = ["a", "a", "a", "b"]
    advantages = agent.image_advantages(tensor([1.0, 2.0, 6.0, 4.0]), prompts, torch.arange(4))
    # The lonely one is compared with all others.
    torch.testing.assert_close(advantages, tensor([1 - 4, 2 - 3.5, 6 - 1.5, 4 - 3.0]))
    assert agent.image_advantages(tensor([5.0]), ["a"], torch.arange(1)).tolist() == [5.0]


@pytest.mark.slow
def test_one_step_in_each_iteration_and_no_clipping(make_agent: MakeAgent) -> None:
    learned = []
    for kwargs in ({}, {"clip_range": 1e-9, "clip_type": "clamp"}):
        agent = make_agent("REINFORCE", **kwargs)
        agent.learn(3 * UPDATE)
        assert agent._n_updates == 3
        learned.append(flat_weights(agent))
    assert torch.equal(*learned)


@pytest.mark.parametrize("kwargs", [{"batch_size": 2}, {"n_epochs": 2}], ids=str)
def test_bad_arguments(kwargs: dict[str, Any], make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match="REINFORCE takes one optimiser step in each iteration"):
        make_agent("REINFORCE", **kwargs)
