"""The measures of the mixture benchmarks, on answers by hand and on the pre-trained model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from agents import DPOK
from benchmarks import kl_bound, mixture, mixture_objective, mixture_policies
from dpok_gym.mixture.exact import GaussianSampler
from dpok_gym.models import load_model
from dpok_gym.samplers import DenoisingProcess


class ReferencePolicy:
    """The pre-trained model of the mixture world, with the attributes of a policy that the benchmarks use."""

    def __init__(self, model: str = "mixture", n_steps: int = 10) -> None:
        self.process = DenoisingProcess(load_model(model, "cpu"), num_inference_steps=n_steps)
        self.model = self.process.model

    def transition(self, state: Any, reference: bool = False) -> Any:
        return self.process.transition(state)

    reference_transition = transition


def test_components_by_hand() -> None:
    policy: Any = SimpleNamespace(model=load_model("mixture", "cpu"))
    means = policy.model.mixtures["two modes"].means
    points = torch.stack([means[0], means[0] + 0.1, means[1]]).double()
    weights, component_means = mixture.components(policy, "two modes", points, torch.tensor([1.0, 2.0, 5.0]).double())
    assert weights.tolist() == pytest.approx([3 / 8, 5 / 8])
    torch.testing.assert_close(component_means, torch.stack([means[0] + 0.2 / 3, means[1]]).double())


def test_tilts_by_hand() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.5]]).double()
    weights = mixture.tilts(points, {"mixture-linear": 0.5}, beta=0.25)
    assert (weights[1:] / weights[0]).tolist() == pytest.approx([np.exp(2)] * 2, rel=1e-3)


@pytest.mark.slow
def test_trajectories_have_the_exact_moments() -> None:
    policy: Any = ReferencePolicy()
    states = mixture_policies.sample_trajectories(policy, "one gaussian", 20_000, seed=0)
    assert states.shape == (11, 20_000, 2)
    torch.testing.assert_close(states[0].var(0), torch.ones(2).double(), rtol=0.05, atol=0)
    model = policy.model
    sampler = GaussianSampler.of(model.mixtures["one gaussian"], policy.process.table, model.denoiser.alphas_cumprod)
    torch.testing.assert_close(states[-1].T.cov(), sampler.covariance, rtol=0.05, atol=0)
    again = mixture_policies.sample_trajectories(policy, "one gaussian", 20_000, seed=0, reference=True)
    assert torch.equal(again, states)


def test_a_policy_on_the_grid() -> None:
    policy: Any = ReferencePolicy("mixture-1d")
    on_grid = mixture_policies.on_grid(policy, "one gaussian")
    assert on_grid.means.shape == (10, len(mixture_policies.GRID))
    model = policy.model
    sampler = GaussianSampler.of(model.mixtures["one gaussian"], policy.process.table, model.denoiser.alphas_cumprod)
    gains = sampler.gains.flatten().numpy()[:, None]
    np.testing.assert_allclose(on_grid.means, gains * mixture_policies.GRID, atol=1e-5)


@pytest.mark.slow
def test_the_bound_is_measured_along_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kl_bound", "--images", "1280", "--out", str(tmp_path)])
    kl_bound.main()
    results = json.loads((tmp_path / "kl_bound.json").read_text())
    for placement in ("reward", "loss"):
        rows = results[placement]["training"]
        assert [row["images"] for row in rows] == [0, 4 * 256, 5 * 256]
        assert rows[0]["bound"] == rows[0]["KL of x_0"] == 0
        for row in (*rows[1:], results[placement]["exact"]):
            assert 0 < row["KL of x_0"] < row["bound"]
    assert (tmp_path / "kl_bound.png").stat().st_size > 5_000


@pytest.mark.slow
def test_the_mixture_benchmark_with_few_points(tmp_path: Path) -> None:
    (row,) = mixture.gaussian(seeds=1, images=256, n=1000)
    assert row["variance / exact"] == pytest.approx([1, 1], abs=0.2)
    rows, policies = mixture.mixtures(seeds=1, images=256, n=500)
    assert [row["case"].partition(",")[0] for row in rows] == ["two modes", "ring of six", "ring of six"]
    assert all(sum(row["exact weights"]) == pytest.approx(1) for row in rows)
    assert list(policies) == ["two modes", "ring of six"]
    mixture.scatter(policies, tmp_path / "mixture.png", n=20, columns=3)
    assert (tmp_path / "mixture.png").stat().st_size > 5_000


@pytest.mark.slow
def test_objectives_of_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    learners = {name: mixture_objective.LEARNERS[name] for name in ("DPOK, KL in the reward", "GRPO")}
    monkeypatch.setattr(mixture_objective, "LEARNERS", learners)
    rows = list(mixture_objective.rows_of(mixture_objective.CASES[0], seeds=1, images=1024))
    start, optimum, loss, *learned = rows
    assert [row["policy"] for row in learned] == list(learners)
    assert start["share"] == start["KL"] == 0
    assert (optimum["share"], optimum["regret"]) == (1, 0)
    assert loss["objective"] == pytest.approx(0.108, abs=1e-3)  # for modes at -1 and 1, by another program
    for row in (loss, *learned):
        assert start["objective"] < row["objective"] < optimum["objective"]
        assert row["objective"] == pytest.approx(row["E[r]"] - row["KL"], abs=1e-6)


@pytest.mark.slow
def test_the_value_of_a_policy_is_that_of_its_densities() -> None:
    """On a grid of values, and by integrating the densities forward."""
    env = mixture_policies.make_env("two modes", {"mixture-linear": 0.5}, 10, "mixture-1d")
    agent: Any = DPOK(env=env, seed=0, device="cpu", use_critic=False, learning_rate=1e-2)
    agent.learn(4 * 64 * 10)
    policy, reference = (mixture_policies.on_grid(agent.policy, "two modes", each) for each in (False, True))
    expected, kl = policy.expectation(mixture_policies.half_reward), float(policy.step_kl(reference).sum())
    case = mixture_objective.Case("mixture-1d", "two modes", {"mixture-linear": 0.5}, 0.5)
    scores = mixture_objective.score(env, case, agent.policy.transition)
    assert kl > 1e-3
    assert scores == pytest.approx({"E[r]": expected, "KL": kl, "objective": expected - 0.5 * kl}, abs=2e-4)
