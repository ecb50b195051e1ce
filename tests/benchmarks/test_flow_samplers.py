"""The benchmark of flow matching's samplers, at a small size and against closed forms."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import flow_samplers
from benchmarks.flow_samplers import ExactVelocity, FlowMixtureModel, draw_data, spread, train
from dpok_gym.mixture.data import MIXTURES, GaussianMixture
from dpok_gym.samplers import DenoisingProcess


def test_data_have_their_moments() -> None:
    prompts = list(MIXTURES[2])
    mixtures = GaussianMixture.stack(list(MIXTURES[2].values()))
    for prompt in ("one gaussian", "two modes"):
        numbers = torch.full((20_000,), prompts.index(prompt))
        points = draw_data(mixtures, numbers, torch.Generator().manual_seed(0)).double()
        data = MIXTURES[2][prompt]
        between = data.means.T @ data.means / len(data.means)
        torch.testing.assert_close(points.T.cov(), data.covariances.mean(0) + between, rtol=0.05, atol=0.01)


def test_exact_velocity_of_gaussian_data() -> None:
    """E[eps - x_0 | x_s] is linear in x_s there."""
    data = MIXTURES[2]["one gaussian"]
    s, x = torch.tensor([1.0, 0.7, 0.1]), torch.randn(3, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    found = ExactVelocity([data])(x, 1000 * s, torch.zeros(3, dtype=torch.int64))
    covariance, eye = data.covariances[0].float(), torch.eye(2)
    for row, level in enumerate(s):
        of_state = (1 - level) ** 2 * covariance + level**2 * eye
        gain = (level * eye - (1 - level) * covariance) @ torch.linalg.inv(of_state)
        torch.testing.assert_close(found[row].flatten(), gain @ x[row].flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_samples_of_a_trained_model_have_the_datas_spread() -> None:
    """For every sampler but one, which draws too narrow points however many steps there are."""
    model = FlowMixtureModel(train(2500, seed=0, batch_size=512))
    for sampler, eta in flow_samplers.SAMPLERS:
        found = spread(DenoisingProcess(model, sampler, 100, eta), "two modes", 600, seed=0)
        assert found == pytest.approx(0.8 if sampler == "cps" else 1, abs=0.1), sampler


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--training-steps", "2", "--steps", "2", "3", "--points", "20", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["flow_samplers", *words])
    flow_samplers.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "flow_samplers.json").read_text())
    assert results.keys() == {"exact", "learned"}
    for rows in results.values():
        assert len(rows) == 2 * len(flow_samplers.SAMPLERS)
        assert all(row["spread"] > 0 for row in rows)
    assert "dance-sde" in printed
    assert "T = 3" in printed
