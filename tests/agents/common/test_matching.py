"""Noise added to finished images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from agents.common.matching import add_noise, choose_steps, draw_noise, encode_distinct
from tests.support import assert_same, make_process

T = 3


def test_noise_and_target_by_hand(tiny_sd_folder: Path) -> None:
    process = make_process(tiny_sd_folder, T)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([0, 1, 2, 0, 1])
    prompts = ["a rabbit", "the moon", "a rabbit", "a rabbit", "the moon"]
    eps = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = add_noise(process, latents, step, eps, torch.arange(5.0), *encode_distinct(process, prompts))
    signal, noise = process.table.signal[step], process.table.noise[step]
    expected = signal[:, None, None, None] * latents + noise[:, None, None, None] * eps
    torch.testing.assert_close(batch.noisy, expected)
    torch.testing.assert_close(batch.target, eps, rtol=1e-3, atol=1e-3)  # the tiny model predicts the noise
    assert batch.weight.tolist() == [0, 1, 2, 3, 4]
    assert batch.index.tolist() == [0, 1, 0, 0, 1]  # each prompt is encoded once
    assert len(next(iter(batch.conditioning.values()))) == 2
    assert_same(batch.state.conditioning, process.encode(prompts))
    assert torch.equal(batch.state.step, step)


def test_random_steps_and_noise(tiny_sd_folder: Path) -> None:
    step, noise = draw_noise(make_process(tiny_sd_folder, T), 600, np.random.default_rng(0))
    assert (step.bincount(minlength=T) / 600).tolist() == pytest.approx([1 / T] * T, abs=0.06)
    assert noise.shape == (600, 4, 8, 8)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_chosen_steps_differ() -> None:
    steps = choose_steps(400, 2, 5, np.random.default_rng(0))
    assert steps.shape == (400, 2)
    assert (steps[:, 0] != steps[:, 1]).all()
    assert np.bincount(steps.flatten(), minlength=5) / 800 == pytest.approx(0.2, abs=0.04)
    assert np.sort(choose_steps(3, 5, 5, np.random.default_rng(0))).tolist() == [[0, 1, 2, 3, 4]] * 3
