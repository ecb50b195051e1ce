"""Stock agents: their wrappers, where they start, and a run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import stock_agents


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo-bytes", "ppo", "ppo-residual", "ppo-lora", "sac"])
def test_a_run(name: str) -> None:
    row = stock_agents.run(name, images=64, eval_images=64, seed=0, learning_rate=3e-4)
    assert row["agent"] == name
    assert (row["saturated"] is not None) == (name in ("ppo", "ppo-bytes"))
    for when in ("before", "after"):
        assert 0 <= row[when]["aligned"] <= row[when]["alignment"] <= 1
    if name in ("ppo-residual", "ppo-lora"):  # they start as the pre-trained model
        assert row["before"]["alignment"] > 0.8
    if name == "ppo":
        assert row["saturated"] < 0.1
    if name == "ppo-bytes":
        assert row["saturated"] > 0.7


def test_sac_starts_near_the_pre_trained_noise() -> None:
    """Squashed actions are noise of about standard deviation 1; without, of more than 5."""
    stds = {}
    for name in ("sac", "sac-unsquashed"):
        agent = stock_agents.AGENTS[name]
        env = stock_agents.make_env(agent, 4)
        model = agent.algorithm(agent.policy, stock_agents.GymnasiumVecEnv(env), seed=0, device="cpu")
        observation, _ = env.reset(seed=0)
        actions, _ = model.predict(observation)
        stds[name] = (np.arctanh(actions) if agent.actions == "squashed" else actions).std()
    assert 0.8 < stds["sac"] < 1.2
    assert stds["sac-unsquashed"] > 5


def test_evaluation_is_of_fixed_images() -> None:
    agent = stock_agents.AGENTS["ppo"]
    env = stock_agents.make_env(agent, 4)
    model = agent.algorithm(agent.policy, stock_agents.GymnasiumVecEnv(env), seed=0, device="cpu", n_steps=10)
    first, second = (stock_agents.evaluate(model, env, 4) for _ in range(2))
    assert np.array_equal(first.images, second.images)
    assert first.reward == pytest.approx(first.rewards["shapes-alignment"] + 0.2 * first.rewards["shapes-quality"])


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs.jsonl"
    words = ["stock_agents", "--agents", "ppo", "--images", "64", "--eval-images", "64", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    stock_agents.main()
    assert json.loads(out.read_text())["agent"] == "ppo"
    assert "alignment" in capsys.readouterr().out
