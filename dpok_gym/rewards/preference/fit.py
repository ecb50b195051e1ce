"""Fits a reward to choices, and measures its agreement with choices that it has not learned from.

Letters used for shapes: N choices, M images, S x S pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dpok_gym.choices.agreement import wilson_interval
from dpok_gym.rewards.preference.data import Comparisons
from dpok_gym.rewards.preference.network import PreferenceConfig, PreferenceNetwork, split_words
from dpok_gym.rewards.preference.reward import LearnedReward, PreferenceReward
from dpok_gym.utils.tensors import flatten_optimizer, load_optimizer, load_tensors, save_tensors
from dpok_gym.utils.validation import check_integer, check_positive

_WARMUP = 100  # optimiser steps, but at most a tenth of all
_UNTRAINED_RATE = 1.5e-3  # learning rate of a small network that begins at random
_MAX_WORDS = 64  # each prompt is padded to the longest one, so a very long one would slow all of them down


@dataclass
class Measured:
    """The agreement of a reward with choices that it was not learned from.

    The reward's favourite is the image with the higher score. p is the probability that the reward gives to the choice
    of its favourite, at least 1/2. For the calibration, choices are sorted by p into bins of equal width; empty bins
    are left out. A tie is half a choice of the favourite there, as it was learned. The agreement leaves ties out, since
    neither image is right: Zheng et al. 2023, "Judging LLM-as-a-Judge", count in this way too.

    Attributes:
        choices: N, ties included.
        ties: number of ties.
        agreement: share of the choices without ties in which the favourite was preferred, in [0, 1]; NaN if there are
            ties only.
        interval: ends of the 95 % interval of the agreement, which says how uncertain so few choices leave it; see
            :func:`~dpok_gym.choices.agreement.wilson_interval`.
        loss: mean of :func:`bradley_terry_loss`, nats; guessing gives log 2 = 0.69.
        calibration_error: the expected calibration error, in [0, 1]: the mean distance between ``predicted`` and
            ``observed``, weighted by ``counts``.
        predicted: for each bin, the mean of p.
        observed: for each bin, the share of its choices in which the favourite was preferred.
        counts: for each bin, the number of its choices.
    """

    choices: int
    ties: int
    agreement: float
    interval: list[float]
    loss: float
    calibration_error: float
    predicted: list[float]
    observed: list[float]
    counts: list[int]


@dataclass
class Fit:
    """The result of :func:`fit`.

    Attributes:
        reward: the reward, with the weights of the epoch that had the lowest loss on the held-out choices. Of a reward
            that was given, those that it had at the start count too, as epoch 0.
        held_out: its agreement with the held-out choices. The epoch was selected by these choices too, so its agreement
            with new choices may be a little lower.
        trained_on: number of choices that it learned from.
        epoch: epoch of the weights.
        interrupted: what ended the fit early, such as Ctrl-C; None if all epochs are done.
    """

    reward: LearnedReward
    held_out: Measured
    trained_on: int
    epoch: int
    interrupted: KeyboardInterrupt | None


def bradley_terry_loss(first: Tensor, second: Tensor, outcomes: Tensor) -> Tensor:
    """Returns -w log P(first > second) - (1 - w) log P(second > first), nats, with P(a > b) = sigmoid(s_a - s_b).

    A tie counts as half a win for each image.

    Source: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs"; for rewards, with ties, Christiano et
    al. 2017, "Deep Reinforcement Learning from Human Preferences", equation 1.

    Args:
        first: scores of any shape.
        second: scores of the same shape.
        outcomes: w, the shares of a win that the first ones get, in [0, 1].
    """
    return F.binary_cross_entropy_with_logits(first - second, outcomes, reduction="none")


def measure(log_odds: Tensor, outcomes: Tensor, n_bins: int = 10) -> Measured:
    """Computes agreement, loss and calibration.

    Args:
        log_odds: (N,) s_first - s_second of the choices.
        outcomes: (N,) the shares of a win that the first images get, 1, 0 or 1/2.
        n_bins: number of bins for the calibration.
    """
    confidence = log_odds.abs().sigmoid().nan_to_num(0.5)  # if the fit has diverged; its loss is nan then
    right = torch.where(log_odds > 0, outcomes, 1 - outcomes)  # (N,), the share that the favourite gets
    bins = ((2 * confidence - 1) * n_bins).long().clamp(max=n_bins - 1)  # (N,), bins of equal width in [1/2, 1]
    counts = bins.bincount(minlength=n_bins)
    filled = counts > 0
    counts = counts[filled]
    predicted = torch.zeros(n_bins).index_add_(0, bins, confidence)[filled] / counts
    observed = torch.zeros(n_bins).index_add_(0, bins, right)[filled] / counts
    decided = right[outcomes != 0.5]
    return Measured(
        choices=len(log_odds),
        ties=len(log_odds) - len(decided),
        agreement=decided.mean().item(),
        interval=[*wilson_interval(int(decided.sum()), len(decided))],
        loss=bradley_terry_loss(log_odds, torch.zeros(()), outcomes).mean().item(),
        calibration_error=((predicted - observed).abs() * counts).sum().item() / len(log_odds),
        predicted=predicted.tolist(),
        observed=observed.tolist(),
        counts=counts.tolist(),
    )


@torch.no_grad()
def log_odds(reward: LearnedReward, comparisons: Comparisons) -> Tensor:
    """Returns s_first - s_second of each choice, (N,) float32 on the CPU."""
    parts = []
    for rows in torch.arange(len(comparisons)).split(reward.batch_size):
        first, second = reward.compare(comparisons[rows])
        parts.append((first - second).cpu())
    return torch.cat(parts)


def default_held_out(n: int) -> float:
    """Returns the share of n choices to hold out: 50 of them, but 10 % at least and 30 % at most.

    With 50, the 95 % interval of an agreement of 80 % is 67 % to 89 %; with 10, it would be 49 % to 94 %.
    """
    return min(max(50 / n, 0.1), 0.3)


def make_network(prompts: Iterable[str], image_size: int) -> PreferenceNetwork:
    """Makes an untrained network for images of ``image_size`` pixels, with the words of the prompts as vocabulary."""
    split = [split_words(prompt) for prompt in prompts]
    words = set().union(*split)
    longest = max(map(len, split))
    return PreferenceNetwork(PreferenceConfig(tuple(sorted(words)), min(longest, _MAX_WORDS), image_size))


def fit(
    comparisons: Comparisons,
    *,
    reward: LearnedReward | None = None,
    epochs: int = 30,
    held_out: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float | None = None,
    device: str = "auto",
    checkpoint: Path | None = None,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Fit:
    """Minimises the Bradley-Terry loss with AdamW. The learning rate falls linearly to zero.

    Ctrl-C after the first epoch ends the fit with the best weights so far.

    Args:
        comparisons: the choices, with images of the reward's size.
        reward: the reward to start from, which is changed; None for a small network that is untrained, with the words
            of the prompts.
        epochs: passes over the choices, 1 or more. Too many of them overfit: the held-out loss rises.
        held_out: share of the choices that is not learned from, in (0, 1); see :meth:`Comparisons.split`. None takes
            :func:`default_held_out`.
        seed: seed of the split, the first weights, the order of the choices and the shifts.
        batch_size: choices in each optimiser step, 1 or more.
        learning_rate: the highest learning rate, above 0. None takes the reward's own, or 1.5e-3 for the untrained
            network; a third to three times of these is usual.
        device: "auto" (a GPU if there is one), or any torch device, for the small network that None stands for.
        checkpoint: safetensors file to write after each epoch, and to resume from if it exists; None for none.
        log: called after each epoch with its number, the mean training loss, and the held-out loss and agreement.

    Raises:
        ValueError: if an argument is out of range, the choices cannot be split, or the checkpoint is damaged or
            another fit's.
        WriteError: if the checkpoint cannot be written.
        KeyboardInterrupt: if Ctrl-C comes before the end of the first epoch.
    """
    check_integer("epochs", epochs)
    check_integer("batch_size", batch_size)
    held_out = default_held_out(len(comparisons)) if held_out is None else held_out
    if learning_rate is None:
        learning_rate = _UNTRAINED_RATE if reward is None else reward.learning_rate
    check_positive("learning_rate", learning_rate)
    train, test = comparisons.split(held_out, seed)
    if (test.outcomes == 0.5).all():
        raise ValueError(f"the {len(test)} held-out choices are all ties; hold out more, or take another seed")
    torch.manual_seed(seed)
    is_new = reward is None
    if reward is None:
        reward = PreferenceReward(make_network(train.prompts, comparisons.images.shape[-1]), device)
    learned = reward.learned()
    for parameter in learned.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned.values(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    steps_per_epoch = math.ceil(len(train) / batch_size)
    settings: dict[str, Any] = {"epochs": epochs, "held_out": held_out, "seed": seed, "batch_size": batch_size}
    settings |= {"learning_rate": learning_rate, "image_size": comparisons.images.shape[-1], "choices": len(train)}
    settings["content"] = _digest(learned, train)
    state: dict[str, Any] = {"settings": settings, "epoch": 0, "best_epoch": 0, "best_loss": math.inf}
    best: dict[str, Tensor] = {}
    if checkpoint is not None and checkpoint.exists():
        state, best = _restore(checkpoint, settings, learned, optimizer)
    train, test = reward.encode(train), reward.encode(test)
    if not is_new and not best:
        best = {name: weight.detach().clone() for name, weight in learned.items()}
        state["best_loss"] = measure(log_odds(reward, test), test.outcomes).loss
    interrupted = None
    try:
        for epoch in range(state["epoch"] + 1, epochs + 1):
            # Each epoch has a generator of its own, so that a resumed fit draws the same batches.
            batches = _batches(train, batch_size, torch.Generator().manual_seed(1_000_000 * seed + epoch))
            first = (epoch - 1) * steps_per_epoch
            factors = [_rate_factor(first + step, epochs * steps_per_epoch) for step in range(steps_per_epoch)]
            loss = _fit_epoch(reward, batches, optimizer, [learning_rate * factor for factor in factors])
            measured = measure(log_odds(reward, test), test.outcomes)
            state["epoch"] = epoch
            if measured.loss < state["best_loss"]:
                best = {name: weight.detach().clone() for name, weight in learned.items()}
                state |= {"best_epoch": epoch, "best_loss": measured.loss}
            if checkpoint is not None:
                _save(checkpoint, state, best, learned, optimizer)
            log({"epoch": epoch, "loss": loss, "held_out_loss": measured.loss, "agreement": measured.agreement})
    except KeyboardInterrupt as error:
        if not state["epoch"]:
            raise
        interrupted = error
    if not best:
        raise ValueError("the held-out loss was not finite after any epoch; try a smaller learning rate")
    # Rounded to half precision as in the folder, so that the measured weights are the saved ones.
    for name, weight in best.items():
        learned[name].requires_grad_(False).copy_(weight.half())
    return Fit(reward, measure(log_odds(reward, test), test.outcomes), len(train), state["best_epoch"], interrupted)


def _rate_factor(step: int, n_steps: int) -> float:
    """Returns the share of the highest learning rate at a step: it warms up and then falls linearly to 0."""
    return min((step + 1) / min(_WARMUP, max(n_steps / 10, 1)), max(1 - step / n_steps, 0.0))


def _digest(first_weights: Mapping[str, Tensor], choices: Comparisons) -> str:
    """Returns a hash of the data and the first weights: fits with the same settings may differ in these."""
    digest = hashlib.sha256("\n".join(choices.prompts).encode())
    for values in (*first_weights.values(), choices.images, choices.pairs, choices.outcomes):
        digest.update(values.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _batches(comparisons: Comparisons, batch_size: int, generator: torch.Generator) -> Iterator[Comparisons]:
    """Yields all choices once, in random order, with each image shifted by a small random amount if it is one still."""
    for rows in torch.randperm(len(comparisons), generator=generator).split(batch_size):
        batch = comparisons[rows]
        yield batch if batch.images.ndim == 2 else replace(batch, images=_shifted(batch.images, generator))


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each image (M, 3, S, S) uint8 by at most S / 16 pixels, and repeats its border at the free edge."""
    size = images.shape[-1]
    reach = size // 16
    padded = F.pad(images.float(), (reach,) * 4, mode="replicate").byte()
    corners = torch.randint(2 * reach + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([padded[k, :, y : y + size, x : x + size] for k, (y, x) in enumerate(corners)])


def _fit_epoch(
    reward: LearnedReward, batches: Iterable[Comparisons], optimizer: Optimizer, rates: Sequence[float]
) -> float:
    """Makes an optimiser step for each batch; returns the mean loss, and leaves the network in evaluation mode."""
    reward.network.train()
    losses = [_step(reward, batch, optimizer, rate) for batch, rate in zip(batches, rates, strict=True)]
    reward.network.eval()
    return fmean(losses)


def _step(reward: LearnedReward, batch: Comparisons, optimizer: Optimizer, rate: float) -> float:
    """Makes one optimiser step, and returns the loss before it."""
    loss = bradley_terry_loss(*reward.compare(batch), batch.outcomes.to(reward.device)).mean()
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = rate
    optimizer.step()
    return loss.item()


def _save(
    path: Path, state: dict[str, Any], best: Mapping[str, Tensor], learned: Mapping[str, Tensor], optimizer: Optimizer
) -> None:
    """Writes a checkpoint: one file, whose tensors are named ``<group>/<name>``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = {"best": best, "network": learned, "optimizer": flatten_optimizer(optimizer)}
    tensors = {f"{group}/{name}": value for group, named in groups.items() for name, value in named.items()}
    save_tensors(path, tensors, state)


def _restore(
    path: Path, settings: dict[str, Any], learned: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Puts back what :func:`_save` wrote; returns the state and the best weights."""
    try:
        tensors, state = load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it, and the fit begins anew") from error
    if state.get("settings") != settings:
        raise ValueError(
            f"{str(path)!r} is the checkpoint of a fit with other settings, {state.get('settings')}; continue with "
            "those, or remove it"
        )
    groups: dict[str, dict[str, Tensor]] = {"best": {}, "network": {}, "optimizer": {}}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups[group][name] = value
    for name, parameter in learned.items():
        parameter.data.copy_(groups["network"][name])
    load_optimizer(optimizer, groups["optimizer"])
    return state, groups["best"]
