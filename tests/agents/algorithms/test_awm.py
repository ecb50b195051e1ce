"""AWM: GRPO with the matching error as the log-probability."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpok_gym.samplers import State
from tests.agents.algorithms.support import UPDATE, MakeAgent, change, gradient, listen, take_batches, whole_batch


@pytest.mark.slow
def test_the_ratio_is_one_before_the_first_step(make_agent: MakeAgent) -> None:
    """One state in each call of the network, in the rollout as in the update: then it is 1 to the last bit."""
    agent = make_agent("AWM", batch_size=None, micro_batch_size=1, policy_kwargs={"max_batch_size": 1})
    rows = listen(agent)
    agent.learn(UPDATE)
    assert rows[0]["train/mean_ratio"] == 1
    assert rows[0]["train/clip_fraction"] == 0
    assert rows[0]["train/distance_to_old"] == 0
    assert rows[0]["train/distance_to_reference"] == 0


@pytest.mark.slow
def test_scores_are_of_the_policy_before_the_first_step(make_agent: MakeAgent) -> None:
    agent = make_agent("AWM")
    first, second = take_batches(agent)
    for batch in (first, second):
        with torch.no_grad():
            log_prob = agent.log_prob(batch, agent.policy.predict_output(batch.state, guidance_scale=1.0))
        torch.testing.assert_close(batch.old_log_prob, log_prob, rtol=1e-4, atol=1e-5)
        assert (log_prob < 0).all()


@pytest.mark.slow
def test_scoring_needs_the_prompts_of_the_images_only(make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a prompt for each noisy image would fill the memory: T5's are megabytes."""
    agent = make_agent("AWM", batch_size=None)
    asked: list[int] = []

    def predict_output(state: State, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(len(state.latents))
        return original(state, *args, **kwargs)

    original = agent.policy.predict_output
    monkeypatch.setattr(agent.policy, "predict_output", predict_output)
    (batch,) = take_batches(agent)
    n_images = len(agent.rollout_buffer)
    assert len(batch) > n_images
    assert max(asked) == n_images


@pytest.mark.slow
def test_outside_of_the_range_there_is_no_gradient(make_agent: MakeAgent) -> None:
    agent = make_agent("AWM", clip_range=1e-6, ema_coef=0.0, kl_coef=0.0)
    batch = whole_batch(agent)
    change(agent, 0.2)
    with torch.no_grad():
        log_ratio = agent.log_prob(batch, agent.policy.predict_output(batch.state)) - batch.old_log_prob
    beyond = torch.nonzero(batch.weight * log_ratio > 1e-5).flatten()
    before = torch.nonzero(batch.weight * log_ratio < -1e-5).flatten()
    assert len(beyond)
    assert len(before)
    assert gradient(agent, batch.take(beyond)).abs().max() == 0
    assert gradient(agent, batch.take(before)).abs().max() > 0  # PPO's: what went the wrong way can come back


@pytest.mark.slow
def test_without_the_average_no_pass_is_needed(make_agent: MakeAgent) -> None:
    passes = []
    for ema_coef in (0.0, 1.0):
        agent = make_agent("AWM", ema_coef=ema_coef, kl_coef=0.0)
        agent.learn(UPDATE)
        passes.append(agent.process.num_function_evaluations)
    assert passes == [3 * UPDATE, 4 * UPDATE]  # drawing, scoring and learning; and asking the average


def test_bad_arguments(make_agent: MakeAgent) -> None:
    with pytest.raises(ValueError, match="clip_range must be a number above 0"):
        make_agent("AWM", clip_range=0.0)
    with pytest.raises(ValueError, match="ema_coef must be a number of at least 0"):
        make_agent("AWM", ema_coef=-1.0)
    with pytest.raises(ValueError, match="space must be"):
        make_agent("AWM", space="pixels")
