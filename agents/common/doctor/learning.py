"""Checks of an update: its beginning, its gradient, its direction and its length.

Letters used for shapes: n images of the trial, B transitions, T denoising steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from agents.common import losses
from agents.common.buffer import Transitions
from agents.common.doctor.finding import Finding, judge
from agents.common.doctor.trial import Trial, copies
from dpok_gym import diffusion
from dpok_gym.samplers import State

#: Largest deviation of a ratio from 1 that rounding explains, where it depends on the number of states in a call.
_ROUNDING = 1e-3
#: Nats per image that a first iteration moves the policy: usual, and surely too many.
_LONG_STEP, _RUINOUS_STEP = 10.0, 100.0
#: Standard errors at which a change of the reward counts: an expected rise, and a fall that noise alone hardly brings.
_RISE, _FALL = 2.0, -4.0


def check_start(trial: Trial, batch: Any) -> list[Finding]:
    """Checks that the first ratios are exactly 1 and, if nothing is learned yet, the first KL exactly 0."""
    findings = []
    policy = trial.agent.policy
    for autocast in dict.fromkeys((policy.autocast, True)):
        where = " under autocast" if autocast else ""
        with _autocast(policy, autocast):
            if isinstance(batch, Transitions):
                if autocast == policy_of(trial).autocast_before:
                    states, actions, old_means = batch.state, batch.actions, batch.old_means
                findings.append(_check_ratio(trial, batch, where))
    return findings
