"""Published policy gradients on one rollout: no two of them are the same algorithm under two names."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import DDPO, DPOK, GRPO, PRESETS, REINFORCE, PolicyGradient
from agents.algorithms.registry import load_algorithm
from agents.common.buffer import TrajectoryBuffer
from dpok_gym import DenoisingVectorEnv
from tests.agents.algorithms.support import DIMS, PROMPTS, change, gradient, listen
from tests.agents.algorithms.support import collect as draw

MakeEnv = Callable[..., DenoisingVectorEnv]

N, T = 8, 5
#: Two groups of four. The rewards of the second one differ more.
REWARDS = torch.tensor([0.1, 0.9, 0.4, 0.6, 2.0, 2.2, 2.4, 5.0])
#: 1e-4 in each dimension of a latent, as all of the codes have; here a latent has 256.
CLIP_RANGE = 1e-4 * DIMS
#: The same for DPOK's limit of 1 nat, which is for a whole iteration: this one moves the policy less.
KL_RANGE = 1e-4
#: How far the policy has moved from the pre-trained model before the rollout, so that there is a KL.
LEARNED = 0.3
#: How far the policy moves after the rollout, so that each clip leaves out some transitions and keeps others.
MOVED = 0.01


def published() -> dict[str, tuple[type[PolicyGradient], dict[str, Any]]]:
    """Returns what each has of its own, in the sizes of this rollout; a name for each."""
    variants: dict[str, tuple[type[PolicyGradient], dict[str, Any]]] = {
        "DPOK": (DPOK, {"clip_range": KL_RANGE}),
        "REINFORCE": (REINFORCE, {}),
    }
    for preset in ("paper", "official-code", "ddpo", "dance-grpo", "flow-grpo"):
        (name,) = PRESETS[preset].only
        kwargs = PRESETS[preset].algorithm_kwargs(name) | {"clip_range": CLIP_RANGE, "timestep_fraction": 1.0}
        if name == "grpo":
            kwargs |= {"group_size": N // 2}
        if name == "ddpo":
            kwargs |= {"min_count": N // 4}  # below a prompt's images, as 16 is below 256
        variants[preset] = (load_algorithm(name), kwargs)  # type: ignore[assignment]
    return variants


def make(cls: type[PolicyGradient], env: Any, **kwargs: Any) -> Any:
    """Makes an agent with the network of all others, which has learned something."""
    own = kwargs | {"images_per_iteration": N, "policy_kwargs": {"lora_rank": 2, "critic_hidden": 16}}
    agent = cls(env=env, seed=0, device="cpu", **own)
    listen(agent)
    change(agent, LEARNED)
    return agent


def rollout(env: Any) -> TrajectoryBuffer:
    """Draws two groups of images, of a prompt each."""
    agent = make(GRPO, env, group_size=N // 2)
    buffer = draw(agent, N)
    buffer.rewards[:, -1] = REWARDS
    return buffer


def update_direction(agent: Any, buffer: TrajectoryBuffer) -> Tensor:
    """Returns the direction of the gradient on a rollout, after the policy has moved away from it."""
    agent.rollout_buffer = buffer = copy.deepcopy(buffer)
    # The rewards of the iteration before, which DDPO remembers: they were lower.
    buffer.rewards[:, -1] = REWARDS - 0.5
    agent.advantages(buffer)
    buffer.rewards[:, -1] = REWARDS
    buffer.advantages = agent.advantages(buffer)
    change(agent, MOVED)
    (batch,) = buffer.batches(None, np.random.default_rng(0), 1.0, agent.step_importance())
    with torch.no_grad():
        _, metrics = agent.loss(batch)
    if "clip_fraction" in metrics:
        assert 0 < metrics["clip_fraction"].mean() < 1
    slope = gradient(agent, batch)
    return slope / slope.norm()


@pytest.mark.slow
def test_no_two_have_the_same_gradient(make_env: MakeEnv) -> None:
    env = make_env(N, num_inference_steps=T)
    buffer = rollout(env)
    assert len(set(buffer.prompts)) == 2
    directions = {
        name: update_direction(make(cls, env, **kwargs), buffer) for name, (cls, kwargs) in published().items()
    }
    for one, other in itertools.combinations(directions, 2):
        assert directions[one] @ directions[other] < 0.999, (one, other)


@pytest.mark.slow
def test_what_their_tables_say_is_all_that_differs(make_env: MakeEnv) -> None:
    """On one prompt, with the mean of the rollout as the baseline of all.

    DPOK has another ratio, another clip, a KL, and no gradient at the last steps. GRPO has a KL, and DDPO none of
    these. Without them, the three are one.
    """
    env = make_env(N, prompts=PROMPTS[:1], num_inference_steps=T)
    buffer = rollout(env)
    # The statistics of all are those of the eight images.
    ddpo = {"clip_range": CLIP_RANGE, "min_count": 1, "statistics_size": N}
    grpo = {"clip_range": CLIP_RANGE, "group_size": N}
    dpok = {"use_critic": False}
    as_ddpo = {"ratio": "per-dimension", "clip_type": "ppo", "clip_range": CLIP_RANGE, "skip_last_steps": 0}
    own = [
        update_direction(make(cls, env, **kwargs), buffer)
        for cls, kwargs in ((DDPO, ddpo), (GRPO, grpo), (DPOK, dpok | {"clip_range": KL_RANGE}))
    ]
    for one, other in itertools.combinations(own, 2):
        assert one @ other < 0.999
    alike = [
        update_direction(make(cls, env, **kwargs), buffer)
        for cls, kwargs in ((GRPO, grpo | {"kl_coef": 0.0}), (DPOK, dpok | as_ddpo | {"kl_coef": 0.0}))
    ]
    for each in alike:
        torch.testing.assert_close(each, own[0], rtol=0, atol=1e-4)
