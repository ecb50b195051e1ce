"""Checks of an update: where it begins, its gradient, its direction, its length, and what it does to the reward.

Letters used for shapes: n images of the trial, B transitions, T denoising steps, C x h x w a latent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.special import stdtr
from torch import Tensor

from agents.common import losses
from agents.common.buffer import Transitions
from agents.common.doctor.finding import Finding, judge
from agents.common.doctor.trial import Trial
from agents.common.precision import Precision
from dpok_gym import diffusion
from dpok_gym.samplers import State

#: Deviation from 1 or 0 that rounding explains, where it depends on the number of states in a call.
_ROUNDING = 1e-3
#: Nats per image that the first update moves the policy: unusual ones, and ruinous ones.
_LONG, _RUINOUS = 10.0, 100.0
#: Probability, by Student's t, that noise alone brings such a rise of the reward, or such a fall: below it, they count.
_RISE, _FALL = 0.05, 0.0005
#: Standard errors of the mean that the rounding of half precision may explain.
_ROUNDED = 3.0
#: Images whose whole trajectories are computed again, to compare policies.
_COMPARED = 4


def check_start(trial: Trial, batch: Any) -> list[Finding]:
    """Checks that the first ratios are exactly 1, and the KL exactly 0 if nothing is learned yet.

    Both are checked as the training is set, and in bfloat16.
    """
    policy = trial.agent.policy
    findings = []
    before = policy.precision
    precisions: tuple[Precision, ...] = (before, "bfloat16")
    for precision in dict.fromkeys(precisions):
        policy.precision = precision
        try:
            state, actions, old_means = trial.transitions(2)
            if precision == before and isinstance(batch, Transitions):  # as many in a call as in the training
                state, actions, old_means = batch.state, batch.actions, batch.old_means
            means, std = policy.transition(state)
            ratio, _ = losses.importance_ratio(actions, means.detach(), old_means, std)
            reference, _ = policy.reference_transition(state)
        finally:
            policy.precision = before
        where = " in bfloat16" if precision == "bfloat16" else ""
        if isinstance(batch, Transitions):
            deviation = (ratio.exp() - 1).abs().max().item()
            findings.append(_check_rounding(f"first ratio{where}", f"at most {deviation:.2g} from 1", "1", deviation))
        if trial.is_fresh:
            kl = diffusion.kl_divergence(means.detach(), reference, std).max().item()
            findings.append(_check_rounding(f"first KL{where}", f"at most {kl:.2g} nats", "0", kl))
    return findings


def _check_rounding(name: str, measured: str, normal: str, deviation: float) -> Finding:
    return judge(
        name,
        f"{measured}, before the first step",
        f"exactly {normal}; rounding may add {_ROUNDING}",
        "the update does not see the policy that drew the images: the network must be in evaluation mode, without "
        "dropout, and the same for the same input",
        not deviation <= _ROUNDING,
        deviation > 0,
    )


def check_step(trial: Trial, batch: Any) -> list[Finding]:
    """Takes one optimiser step on a batch; checks that each weight has a gradient, and the direction of the step."""
    agent, weights = trial.agent, trial.agent.policy._named_denoiser_parameters()
    before = {name: values.detach().clone() for name, values in weights.items()}
    trial.step(batch)
    gradients = _gradients(weights)
    moved = {name: values.detach() - before[name] for name, values in weights.items()}
    gains = _surrogate_gains(trial, batch) if isinstance(batch, Transitions) else None
    # A LoRA's output is B A x with B = 0 at first, so A has no gradient before B has moved.
    agent.policy.optimizer.zero_grad()
    with trial.logged_update():
        agent.backward(batch)
    later = _gradients(weights)
    without = [name for name in weights if not (gradients[name].any() or later[name].any())]
    some = f", such as {', '.join(without[:2])}" if without else ""
    return [
        judge(
            "gradient",
            f"{len(weights) - len(without)} of {len(weights)} trained tensors get a gradient in the first two "
            f"steps{some and ', not' + some.removeprefix(', such as')}",
            "all of them",
            "tensors without a gradient stay as they are: see that nothing froze them (requires_grad), and that the "
            "target modules are in use; if there is none at all, see that the rewards differ",
            bool(without),
        ),
        _check_direction(gradients, moved, gains, trial.is_half),
    ]


def _gradients(weights: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(w) if w.grad is None else w.grad.detach().clone() for name, w in weights.items()}


def _check_direction(
    gradients: dict[str, Tensor], moved: dict[str, Tensor], gains: Tensor | None, is_half: bool
) -> Finding:
    gradient = torch.cat([values.flatten() for values in gradients.values()]).double()
    step = torch.cat([values.flatten() for values in moved.values()]).double()
    length = gradient.norm() * step.norm()
    cosine = -(gradient @ step / length).item() if length else math.nan
    measured = f"the cosine of the first step and the descent of the loss is {cosine:.2g}"
    normal, gain, rounding = "above 0", math.nan, 0.0
    if gains is not None:
        gain = gains.mean().item()
        measured += f"; the step changes the policy gradient's objective, on its own batch, by {gain:+.2g}"
        normal = "above 0, both (there is no noise in them)"
    if gains is not None and is_half:
        # A small step moves the mean of a transition by less than its last digit, so each gain is rounded up or down.
        rounding = _ROUNDED * gains.std().item() / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        measured += f"; half precision may hide {rounding:.2g} of it"
        normal = "above 0, both, but for the rounding"
    return judge(
        "direction of a step",
        measured,
        normal,
        "the step does not go where the gradient leads: check the optimiser, the sign of the loss, and that the "
        "learning rate is neither 0 nor so large that the policy overshoots",
        not cosine > 0 or (gains is not None and not gain + rounding > 0),
    )


@torch.no_grad()
def _surrogate_gains(trial: Trial, batch: Transitions) -> Tensor:
    """Returns A log rho (B,) of a batch, in units of the reward; log rho without its drift, 0 before a step.

    So it does not matter how the algorithm clips.
    """
    mean, std = trial.agent.policy.transition(batch.state)
    log_ratio, dims = losses.importance_ratio(batch.actions, mean, batch.old_means, std, "centred")
    step_weights = getattr(trial.agent, "step_weights", torch.ones_like(trial.process.table.std))
    return (batch.weight * step_weights[batch.step] * batch.advantages * log_ratio * dims).double()


@torch.no_grad()
def check_length(trial: Trial) -> Finding:
    """Measures how far the first update has moved the policy."""
    buffer, table = trial.buffer, trial.process.table
    kl = torch.zeros(())
    for index in table.exploring.nonzero().flatten().tolist():
        state: State = buffer.state_at(index)[:_COMPARED]
        mean, std = trial.agent.policy.transition(state)
        kl = kl + diffusion.kl_divergence(mean, buffer.means[:_COMPARED, index], std).mean().cpu()
    return judge(
        "length of an update",
        f"the first update moves the policy by {kl.item():.2g} nats per image",
        f"above 0 and below {_LONG:.0f}; {_RUINOUS:.0f} ruins the images",
        "take a smaller learning_rate (or a larger one, if it is near 0)",
        not 0 < kl <= _RUINOUS,
        bool(kl > _LONG),
    )


def check_reward_change(before: Tensor, after: Tensor | None) -> Finding:
    """Compares the rewards of the same images, from the same noise, before and after the first update.

    Args:
        before: (n,) float64.
        after: (n,) float64; None if an image is not finite.
    """
    name, normal = "reward after an update", "a rise, or a change that noise hides"
    if after is None:
        return judge(name, "images are nan or infinite", normal, "take a smaller learning_rate", True)
    difference = after - before
    mean, error = difference.mean().item(), difference.std().item() / math.sqrt(len(difference))
    measured = f"{mean:+.3g} with a standard error of {error:.2g}, on {len(difference)} images from the same noise"
    if not error:
        return Finding(name, "not checked", f"{measured}: cannot tell, as no reward has changed", normal)
    if stdtr(len(difference) - 1, -abs(mean / error)) > (_RISE if mean > 0 else _FALL):
        return Finding(name, "not checked", f"{measured}: cannot tell, as noise hides the change", normal)
    # Adam's first steps are mostly noise, so a small fall need not last.
    advice = "the first update makes the images worse: take a smaller learning_rate, or a warmup_fraction above 0"
    return judge(name, measured, normal, advice, mean < -before.std().item(), mean < 0)
