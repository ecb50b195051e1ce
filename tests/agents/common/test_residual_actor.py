"""The residual actor: at first the pre-trained model, then what stock PPO makes of it."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO

from agents import GymnasiumVecEnv, ResidualActorPolicy
from dpok_gym import NoiseAction, TextFeatures, VectorNoiseAction, VectorTextFeatures

N, T = 4, 3


def make_env(env_id: str = "DPOK-Shapes-v0", **kwargs: Any) -> Any:
    settings: dict[str, Any] = {"num_inference_steps": T, "reward": "jpeg-compressibility", "device": "cpu"}
    return VectorTextFeatures(VectorNoiseAction(gymnasium.make_vec(env_id, num_envs=N, **settings | kwargs)))


def make_agent(env: Any, algorithm: Any = PPO, **policy_kwargs: Any) -> Any:
    settings: dict[str, Any] = {"n_steps": T, "gamma": 1.0, "device": "cpu", "seed": 0}
    settings |= {"batch_size": N, "n_epochs": 2} if algorithm is PPO else {}
    return algorithm(ResidualActorPolicy, GymnasiumVecEnv(env), policy_kwargs=policy_kwargs, **settings)


@pytest.mark.parametrize("env_id", ["DPOK-Shapes-v0", "DPOK-Mixture-v0"])
def test_starts_as_the_pre_trained_model(env_id: str) -> None:
    """The mean of the noise is exactly 0 and its std exactly 1."""
    env = make_env(env_id)
    policy = make_agent(env).policy
    observation, _ = env.reset(seed=0)
    tensors, _ = policy.obs_to_tensor(observation)
    gaussian = policy.get_distribution(tensors).distribution
    assert not gaussian.mean.any()
    assert torch.equal(gaussian.stddev, torch.ones_like(gaussian.stddev))
    actions, values, log_prob = policy(tensors)
    assert actions.shape == observation["latent"].shape
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(actions).flatten(1).sum(1)
    torch.testing.assert_close(log_prob, expected)
    assert values.shape == (N, 1)
    assert len(values.unique()) == N  # the critic sees the latents


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_stock_agents_train_it(algorithm: Any) -> None:
    agent = make_agent(make_env(), algorithm)
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    agent.learn(2 * N * T)
    changed = {name for name, value in agent.policy.state_dict().items() if not torch.equal(value, before[name])}
    assert "mlp_extractor.actor.last.weight" in changed
    assert "mlp_extractor.critic.last.weight" in changed
    assert "log_std" not in changed
    assert np.abs(agent.rollout_buffer.actions).max() < agent.action_space.high.min()  # nothing was clipped


def test_sees_the_step_and_the_prompt() -> None:
    env = make_env()
    policy = make_agent(env).policy
    torch.nn.init.normal_(policy.mlp_extractor.actor.last.weight)
    observation, _ = env.reset(seed=0, options={"prompt": "a red circle"})
    other, _ = env.reset(seed=0, options={"prompt": "a blue star"})
    latents = observation["latent"]

    def mean_of(**changes: Any) -> np.ndarray:
        return policy.predict(observation | {"latent": latents} | changes, deterministic=True)[0]

    base = mean_of()
    assert np.abs(base - mean_of(step=np.ones(N, np.int64))).max() > 1e-3
    assert np.abs(base - mean_of(prompt=other["prompt"])).max() > 1e-3
    assert np.abs(base - mean_of(latent=latents[::-1].copy())).max() > 1e-3


def test_the_noise_is_the_callers_choice() -> None:
    agent = make_agent(make_env(), noise_std=0.8, hidden_channels=16)
    assert torch.allclose(agent.policy.log_std.exp(), torch.tensor(0.8))


def test_save_and_load(tmp_path: Path) -> None:
    env = make_env()
    agent = make_agent(env, hidden_channels=16).learn(N * T)
    agent.save(tmp_path / "agent.zip")
    observation, _ = env.reset(seed=0)
    again = PPO.load(tmp_path / "agent.zip", device="cpu")
    agent.policy.save(tmp_path / "policy.pt")
    policy = ResidualActorPolicy.load(tmp_path / "policy.pt", device="cpu")
    expected, _ = agent.predict(observation, deterministic=True)
    assert expected.any()
    for each in (again, policy):
        assert np.array_equal(each.predict(observation, deterministic=True)[0], expected)


def test_the_scalar_environment() -> None:
    env = TextFeatures(NoiseAction(gymnasium.make("DPOK-Mixture-v0", num_inference_steps=T)))
    PPO(ResidualActorPolicy, env, n_steps=2 * T, batch_size=T, device="cpu").learn(2 * T)


class TestRefusals:
    def test_bytes(self) -> None:
        with pytest.raises(ValueError, match="wrap the denoising environment in TextFeatures"):
            make_agent(make_env().env)

    @pytest.mark.parametrize("squashed", [None, True])
    def test_other_actions(self, squashed: bool | None) -> None:
        env: Any = gymnasium.make_vec("DPOK-Shapes-v0", num_envs=N)
        if squashed:
            env = VectorNoiseAction(env, squashed=True)
        with pytest.raises(ValueError, match="action is the noise: wrap the denoising environment in NoiseAction"):
            make_agent(VectorTextFeatures(env))

    def test_other_environments(self) -> None:
        with pytest.raises(ValueError, match="observes a latent, a step and text features"):
            PPO(ResidualActorPolicy, "CartPole-v1", device="cpu")

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"hidden_channels": 12}, "hidden_channels must be a multiple of 8, got 12"),
            ({"hidden_channels": 0}, "hidden_channels must be an integer of at least 8, got 0"),
            ({"noise_std": 0.0}, "noise_std must be a number above 0"),
        ],
    )
    def test_bad_arguments(self, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_agent(make_env(), **kwargs)
