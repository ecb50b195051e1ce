"""Learns a reward from choices, and says how far to trust it.

Letters used for shapes: N choices, M pictures, S x S pixels.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpok_gym.checks import integer, positive
from dpok_gym.files import replacing
from dpok_gym.rewards.preference import PreferenceConfig, PreferenceNetwork, PreferenceReward, split_words
from dpok_gym.rewards.preference_data import Comparisons

_WARMUP = 100  # optimiser steps
_MAX_WORDS = 64  # a prompt's further words would make every prompt's reading slower


@dataclass
class Measured:
    """How a reward does on choices that it was not learned from.

    "Its favourite" is the picture with the higher score; p is the probability that the reward gives to the choice of
    it, at least 1/2.

    Attributes:
        choices: N, how many.
        agreement: share of the choices that fell on its favourite, in [0, 1].
        loss: mean of -log sigmoid(s_preferred - s_other), nats; log 2 = 0.69 is that of a coin.
        calibration_error: the expected calibration error: how far the next three are apart, mean weighted by counts.
        predicted: mean p of each bin of p, the bins equally wide; empty ones are left out.
        observed: share of its choices that fell on the favourite.
        counts: choices in it.
    """

    choices: int
    agreement: float
    loss: float
    calibration_error: float
    predicted: list[float]
    observed: list[float]
    counts: list[int]


@dataclass
class Fit:
    """What :func:`fit` returns.

    Attributes:
        reward: with the weights of the epoch that had the lowest loss on the held-out choices.
        held_out: how it does on them. They chose the epoch, so new ones may agree a little less.
        trained_on: number of choices that it learned from.
        epoch: that the weights are of, from 1.
        interrupted: whether Ctrl-C ended it early.
    """

    reward: PreferenceReward
    held_out: Measured
    trained_on: int
    epoch: int
    interrupted: bool


def bradley_terry_loss(preferred: Tensor, other: Tensor) -> Tensor:
    """-log P(preferred > other) = -log sigmoid(s_preferred - s_other), of scores of any shape, nats.

    Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs"; for rewards: Christiano et al. 2017, "Deep
    Reinforcement Learning from Human Preferences", equation 1.
    """
    return -F.logsigmoid(preferred - other)


def measure(log_odds: Tensor, n_bins: int = 10) -> Measured:
    """Agreement and calibration.

    Args:
        log_odds: (N,) s_preferred - s_other of choices.
        n_bins: of the calibration.
    """
    confidence, right = log_odds.abs().sigmoid(), (log_odds > 0).float()
    index = ((2 * confidence - 1) * n_bins).long().clamp(max=n_bins - 1)
    counts = index.bincount(minlength=n_bins)
    filled = counts > 0
    predicted, observed = (
        torch.zeros(n_bins).index_add_(0, index, values)[filled] / counts[filled] for values in (confidence, right)
    )
    counts = counts[filled]
    return Measured(
        choices=len(log_odds),
        agreement=right.mean().item(),
        loss=-F.logsigmoid(log_odds).mean().item(),
        calibration_error=((predicted - observed).abs() * counts).sum().item() / len(log_odds),
        predicted=predicted.tolist(),
        observed=observed.tolist(),
        counts=counts.tolist(),
    )


@torch.no_grad()
def log_odds(reward: PreferenceReward, comparisons: Comparisons) -> Tensor:
    """s_preferred - s_other of choices, (N,) float32 on the CPU."""
    parts = []
    for rows in torch.arange(len(comparisons)).split(reward.batch_size):
        preferred, other = _scores(reward.network, comparisons[rows])
        parts.append((preferred - other).cpu())
    return torch.cat(parts)


def make_network(prompts: Iterable[str], picture_size: int) -> PreferenceNetwork:
    """An untrained network for pictures of this size, whose words are those of the prompts."""
    split = [split_words(prompt) for prompt in prompts]
    words = tuple(sorted({word for prompt in split for word in prompt}))
    return PreferenceNetwork(PreferenceConfig(words, min(max(map(len, split)), _MAX_WORDS), picture_size))


def fit(
    comparisons: Comparisons,
    *,
    network: PreferenceNetwork | None = None,
    epochs: int = 50,
    held_out: float = 0.1,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    device: str = "auto",
    checkpoint: Path | None = None,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Fit:
    """Minimises the Bradley-Terry loss with AdamW, the learning rate falling linearly to zero.

    Ctrl-C after the first epoch ends it with what is best so far.

    Args:
        comparisons: the choices; their pictures' size S becomes the network's.
        network: to start from, for pictures of that size; it is not changed. None for an untrained one that knows the
            words of the prompts.
        epochs: passes over the choices, 1 or more. Some hundred thousand choices in all are a good start; too many
            passes over few choices learn them by heart, which the held-out loss shows.
        held_out: share of the choices that is not learned from, in (0, 1); see :meth:`Comparisons.split`.
        seed: of split, first weights, order and shifts.
        batch_size: choices in each optimiser step, 1 or more.
        learning_rate: the highest; 5e-4 to 3e-3.
        device: "auto" (a GPU if there is one), or any torch device.
        checkpoint: file to go on from if it is there, and to write after each epoch; None for none.
        log: called after each epoch with its number, the mean training loss, and the held-out loss and agreement.

    Raises:
        ValueError: if an argument is out of range, the choices cannot be split, or the checkpoint is of another fit.
        KeyboardInterrupt: if Ctrl-C comes before the first epoch is over.
    """
    integer("epochs", epochs)
    integer("batch_size", batch_size)
    positive("learning_rate", learning_rate)
    train, test = comparisons.split(held_out, seed)
    torch.manual_seed(seed)
    start = network or make_network(train.prompts, comparisons.pictures.shape[-1])
    reward = PreferenceReward(copy.deepcopy(start), device)
    network = reward.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    steps = epochs * -(-len(train) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, max(1 - step / steps, 0.0))
    )
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    settings = {
        "picture_size": network.config.picture_size,
        "content": _digest(network.state_dict(), train),
        "choices": len(train),
        "epochs": epochs,
        "held_out": held_out,
        "seed": seed,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    state: dict[str, Any] = {"settings": settings, "epoch": 0, "best_epoch": 0, "best_loss": math.inf, "best": {}}
    if checkpoint is not None and checkpoint.exists():
        state = _restore(checkpoint, settings, parts)
    interrupted = False
    try:
        for epoch in range(state["epoch"] + 1, epochs + 1):
            network.train()
            batches = _batches(train, batch_size, torch.Generator().manual_seed(1_000_000 * seed + epoch))
            loss = fmean(_step(network, batch, optimizer, schedule) for batch in batches)
            network.eval()
            found = measure(log_odds(reward, test))
            state["epoch"] = epoch
            if found.loss < state["best_loss"]:
                weights = {name: weight.clone() for name, weight in network.state_dict().items()}
                state |= {"best_epoch": epoch, "best_loss": found.loss, "best": weights}
            if checkpoint is not None:
                _save(checkpoint, state, parts)
            log({"epoch": epoch, "loss": loss, "held_out_loss": found.loss, "agreement": found.agreement})
    except KeyboardInterrupt:
        if not state["best"]:
            raise
        interrupted = True
    if not state["best"]:
        raise ValueError("the held-out loss was not finite after any epoch; try a smaller learning rate")
    # Rounded as in the folder, so that what is measured is what is kept.
    network.load_state_dict({name: weight.half().float() for name, weight in state["best"].items()})
    network.eval().requires_grad_(False)
    return Fit(reward, measure(log_odds(reward, test)), len(train), state["best_epoch"], interrupted)


def _digest(first_weights: dict[str, Tensor], choices: Comparisons) -> str:
    """What tells one fit from another that has the same settings."""
    digest = hashlib.sha256("\n".join(choices.prompts).encode())
    for values in (*first_weights.values(), choices.pictures, choices.pairs):
        digest.update(values.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _batches(comparisons: Comparisons, batch_size: int, generator: torch.Generator) -> Iterator[Comparisons]:
    """All choices once in random order, with the pictures shifted a little, each by another random amount."""
    for rows in torch.randperm(len(comparisons), generator=generator).split(batch_size):
        batch = comparisons[rows]
        yield replace(batch, pictures=_shifted(batch.pictures, generator))


def _shifted(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (M, 3, S, S) uint8, each moved by at most S / 16 pixels, what is missing repeated from the border."""
    size = pictures.shape[-1]
    reach = size // 16
    padded = F.pad(pictures.float(), (reach,) * 4, mode="replicate").byte()
    corners = torch.randint(2 * reach + 1, (len(pictures), 2), generator=generator).tolist()
    return torch.stack([padded[k, :, y : y + size, x : x + size] for k, (y, x) in enumerate(corners)])


def _scores(network: PreferenceNetwork, batch: Comparisons) -> tuple[Tensor, Tensor]:
    """The scores (N,) of the preferred pictures and of the others."""
    device = network.places.device
    seen = network.look(batch.pictures.to(device).float() / 255)
    words = network.read(batch.prompts).to(device)
    preferred, other = batch.pairs.to(device).T
    scores = network.judge(seen[torch.cat([preferred, other])], words.repeat(2, 1))
    return scores[: len(words)], scores[len(words) :]


def _step(network: PreferenceNetwork, batch: Comparisons, optimizer: Any, schedule: Any) -> float:
    """One optimiser step; returns the loss before it."""
    loss = bradley_terry_loss(*_scores(network, batch)).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


def _restore(path: Path, settings: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["settings"] != settings:
        raise ValueError(
            f"{str(path)!r} is the checkpoint of a fit with other settings, {saved['settings']}; go on with those, or "
            "remove it"
        )
    for name, part in parts.items():
        part.load_state_dict(saved.pop(name))
    return saved


def _save(path: Path, state: dict[str, Any], parts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state | {name: part.state_dict() for name, part in parts.items()}, file)
