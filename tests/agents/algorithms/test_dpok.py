"""DPOK as an agent of Stable-Baselines3: its first update, its options, saving, logging, and that it learns."""

import copy
import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from torch import Tensor

from agents import DPOK, PRESETS, GymVectorVecEnv
from agents.common.buffer import TrajectoryBuffer, Transitions
from dpok_gym import (
    DenoisingEnv,
    DenoisingVectorEnv,
    NoiseAction,
    VectorNoiseAction,
    diffusion,
    models,
    pretrained_policy,
)

N, T = 4, 3
UPDATE = N * T  # denoising steps of one rollout
PROMPTS = ["a rabbit", "a green dog", "the moon"]


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def colours(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    return {"red": images[:, 0].mean((1, 2)), "blue": images[:, 2].mean((1, 2))}


def every_other(images: Tensor, prompts: list[str]) -> Tensor:
    """Fails for each second picture."""
    rewards = redness(images, prompts)
    rewards[1::2] = torch.tensor([math.nan, math.inf]).repeat(len(rewards))[: len(rewards[1::2])]
    return rewards


def never(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.full((len(images),), math.nan)


pytestmark = pytest.mark.usefixtures("fresh_models")


@pytest.fixture
def settings(tiny_sd_folder: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_sd_folder),
        "prompts": PROMPTS,
        "reward": redness,
        "num_inference_steps": T,
        "device": "cpu",
    }


@pytest.fixture
def make_env(settings: dict[str, Any]) -> Callable[..., DenoisingVectorEnv]:
    return lambda num_envs=N, **kwargs: DenoisingVectorEnv(num_envs, **settings | kwargs)


@pytest.fixture
def make_agent(make_env: Callable[..., DenoisingVectorEnv]) -> Callable[..., DPOK]:
    def make(env: Any = None, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> DPOK:
        network = {"lora_rank": 2, "critic_hidden": 16} | (policy_kwargs or {})
        env = make_env() if env is None else env
        return DPOK("DenoisingPolicy", env, **{"seed": 0, "device": "cpu", "policy_kwargs": network} | kwargs)

    return make


def weights(agent: DPOK) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in agent.policy.state_dict().items()}


def is_same(found: Any, expected: Any) -> bool:
    """Equal to the last bit, whatever it is made of."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(is_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    return torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


def change(agent: DPOK, scale: float = 0.1) -> None:
    """As training does, only more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in agent.policy.denoiser_parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))


def collect(agent: DPOK) -> TrajectoryBuffer:
    """A rollout without the update."""
    _, callback = agent._setup_learn(UPDATE)
    assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
    return agent.rollout_buffer


def states(buffer: TrajectoryBuffer, t: int) -> dict[str, Tensor]:
    """What the policy was asked at step t of the rollout."""
    step = torch.full((len(buffer.means),), t)
    return {"latent": buffer.latents[:, t], "step": step, "prompt": buffer.prompt}


def logged(agent: DPOK, name: str) -> float:
    """What the last update left in the logger."""
    return agent.logger.name_to_value[name]


class Memory(KVWriter):
    def __init__(self) -> None:
        self.dumps: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.dumps.append(dict(key_values))

    def close(self) -> None: ...


# --- The first update


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_ratio_is_one_and_kl_zero_before_the_first_update(make_env, make_agent, guidance_scale: float) -> None:
    agent = make_agent(make_env(guidance_scale=guidance_scale), micro_batch_size=None, learning_rate=0.0)
    buffer = collect(agent)
    for t in range(T):
        mean, std = agent.policy.transition(states(buffer, t))
        reference, _ = agent.policy.transition(states(buffer, t), reference=True)
        for reduction in ("mean", "sum"):
            ratios = diffusion.log_ratio(buffer.latents[:, t + 1], mean, buffer.means[:, t], std, reduction).exp()
            assert ratios.tolist() == [1.0] * N
        assert diffusion.kl_divergence(mean, reference, std).tolist() == [0.0] * N
    # In the update, transitions are batched in another way, which may change the last bits of the network's output.
    agent.train()
    assert logged(agent, "train/mean_ratio") == pytest.approx(1, abs=1e-5)
    assert logged(agent, "train/clip_fraction") == 0
    assert logged(agent, "train/kl_to_pretrained") == 0


def test_rollouts_are_whole_trajectories(make_agent) -> None:
    agent = make_agent(n_steps=2 * T)
    for _ in range(2):
        buffer = collect(agent)
        assert len(buffer.means) == 2 * N
        assert len(torch.unique(buffer.latents[:, 0].flatten(1), dim=0)) == 2 * N
        assert buffer.latents[:, 0].std().item() == pytest.approx(1, abs=0.1)  # x_T
        for t in range(T):  # an action is a sample around the mean of the state before it
            mean, std = agent.policy.transition(states(buffer, t))
            torch.testing.assert_close(mean, buffer.means[:, t], rtol=1e-4, atol=1e-5)
            noise = (buffer.latents[:, t + 1] - mean) / std.reshape(-1, 1, 1, 1)
            assert noise.std().item() == pytest.approx(1, abs=0.1)
        pictures = agent.policy.model.decode(buffer.latents[:, -1])
        torch.testing.assert_close(buffer.rewards[:, -1], redness(pictures, PROMPTS), rtol=1e-4, atol=1e-5)
        assert not buffer.rewards[:, :-1].any()


@pytest.mark.parametrize("kind", ["id", "environment", "vector environment", "wrapped", "VecEnv", "DummyVecEnv"])
def test_environments(make_env, make_agent, settings: dict[str, Any], kind: str) -> None:
    env: Any = {
        "id": lambda: "DPOK-Shapes-v0",
        "environment": lambda: DenoisingEnv(**settings),
        "vector environment": make_env,
        "wrapped": lambda: gymnasium.wrappers.vector.RecordEpisodeStatistics(make_env()),
        "VecEnv": lambda: GymVectorVecEnv(make_env()),
        "DummyVecEnv": lambda: DummyVecEnv([lambda: DenoisingEnv(**settings)] * 2),
    }[kind]()
    agent = make_agent(env, **({"n_envs": 2} if kind == "id" else {}))
    before = weights(agent)
    n_envs = {"id": 2, "environment": 1, "DummyVecEnv": 2}.get(kind, N)
    assert agent.n_envs == n_envs
    agent.learn(1)
    assert agent.num_timesteps == n_envs * (20 if kind == "id" else T)
    assert agent._n_updates == 1
    assert not is_same(weights(agent), before)
    assert all(bool(value.isfinite().all()) for value in weights(agent).values())


def test_the_environment_keeps_its_model(make_env, make_agent) -> None:
    env = make_env()
    observation, _ = env.reset(seed=0)
    expected = pretrained_policy(env, seed=0)(observation)
    agent = make_agent(env, learning_rate=1e-2)
    agent.learn(2 * UPDATE)
    assert np.array_equal(pretrained_policy(env, seed=0)(observation), expected)
    tuned, _ = agent.predict(observation, deterministic=True)
    reference = agent.policy.transition({k: torch.as_tensor(v) for k, v in observation.items()}, reference=True)[0]
    assert not np.allclose(tuned, reference.numpy(), atol=1e-3)


# --- Options


def one_update(make_agent: Callable[..., DPOK], **kwargs: Any) -> dict[str, Tensor]:
    """By how much an update with plain gradient descent changes the weights."""
    policy_kwargs = {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.0}}
    settings = {"learning_rate": 1.0, "max_grad_norm": 1e9, "vf_learning_rate": 1e-3}
    agent = make_agent(policy_kwargs=policy_kwargs, **settings | kwargs)
    before = weights(agent)
    agent.learn(UPDATE)
    return {name: value - before[name] for name, value in weights(agent).items()}


def test_micro_batches_add_up(make_agent) -> None:
    def assert_close(found: dict[str, Tensor]) -> None:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 * value.abs().max().item() + 1e-9)

    expected = one_update(make_agent, micro_batch_size=None)
    for micro_batch_size in (5, 1, 100, "auto"):
        assert_close(one_update(make_agent, micro_batch_size=micro_batch_size))
    with pytest.raises(AssertionError):
        assert_close(one_update(make_agent, batch_size=5))


@pytest.mark.parametrize(
    ("kwargs", "n_updates"),
    [({}, 1), ({"batch_size": 3}, 4), ({"batch_size": 5, "n_epochs": 2}, 6), ({"timestep_fraction": 0.5}, 1)],
)
def test_number_of_updates(make_agent, kwargs: dict[str, Any], n_updates: int) -> None:
    agent = make_agent(**kwargs)
    trained_on: list[int] = []
    loss = agent._loss

    def counted(part: Transitions, *args: Any) -> Tensor:
        trained_on.append(len(part))
        return loss(part, *args)

    agent._loss = counted
    agent.learn(UPDATE)
    assert agent._n_updates == n_updates
    assert sum(trained_on) == UPDATE * agent.n_epochs * agent.timestep_fraction


def changed_batch(agent: DPOK, scale: float) -> tuple[Transitions, Tensor]:
    """Transitions of the pre-trained model, after which the agent changes; and the reference's means of them."""
    collect(agent)
    change(agent, scale)
    (batch,) = agent.rollout_buffer.get(None)
    return batch, agent._reference(batch)


def terms(agent: DPOK, batch: Transitions, reference: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with some options changed, and what is logged of it."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name, value in options.items():
            patch.setattr(agent, name, value)
        loss = agent._loss(batch, reference, found)
    return loss, {name: torch.cat(values) for name, values in found.items()}


def test_kl_estimators_and_reductions(make_agent) -> None:
    agent = make_agent(reward_weight=0.0, kl_coef=1.0)
    batch, reference = changed_batch(agent, 0.1)
    schedule, dims = agent.policy.schedule, 4 * 8 * 8
    mean, std = agent.policy.transition(batch.observation)
    kl = diffusion.kl_divergence(mean, reference, std).detach()
    mse = schedule.output_mse(batch.step, mean, reference).detach()
    assert kl.min() > 1e-3
    torch.testing.assert_close(kl, schedule.output_coef[batch.step].square() * mse * dims / (2 * std.square()))
    for reduction, exact, output_mse in (("mean", kl / dims, mse), ("sum", kl, mse * dims)):
        for estimator, expected in (("exact", exact), ("output-mse", output_mse)):
            loss, found = terms(agent, batch, reference, log_prob_reduction=reduction, kl_estimator=estimator)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found["kl_to_pretrained"], kl * T, rtol=1e-4, atol=1e-6)


def test_reductions_of_the_ratio(make_agent) -> None:
    """The clip range is in nats of the whole transition, whatever the ratio is of."""
    agent = make_agent(kl_coef=0.0, reward_weight=2.0, step_weighting="likelihood")
    batch, reference = changed_batch(agent, 0.03)
    found = {r: terms(agent, batch, reference, log_prob_reduction=r, clip_range=0.05) for r in ("mean", "sum")}
    ratio, whole = (found[r][1]["mean_ratio"] for r in ("mean", "sum"))
    torch.testing.assert_close(ratio.double().log() * 256, whole.double().log(), rtol=1e-2, atol=1e-4)
    clipped = found["mean"][1]["clip_fraction"]
    assert torch.equal(clipped, (whole.log().abs() > 0.05).float())
    assert torch.equal(clipped, found["sum"][1]["clip_fraction"])
    assert 0 < clipped.mean() < 1
    bound = math.exp(0.05)
    expected = -torch.minimum(batch.advantages * whole, batch.advantages * whole.clamp(1 / bound, bound))
    torch.testing.assert_close(found["sum"][0], 2 * expected, rtol=1e-4, atol=1e-5)
    weighted, natural = terms(
        agent, batch, reference, log_prob_reduction="sum", clip_range=0.05, step_weighting="output"
    )
    weights = agent.policy.schedule.output_weights()[batch.step]
    torch.testing.assert_close(weighted, 2 * weights * expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(natural["clip_fraction"], clipped)


def test_clippings(make_agent) -> None:
    agent = make_agent(kl_coef=0.0, clip_range=0.05, log_prob_reduction="sum")
    batch, reference = changed_batch(agent, 0.03)
    pessimistic, found = terms(agent, batch, reference, clipping="pessimistic")
    clamped, _ = terms(agent, batch, reference, clipping="clamp")
    inside = found["clip_fraction"] == 0
    assert torch.equal(pessimistic[inside], clamped[inside])
    assert (pessimistic >= clamped).all()
    assert (pessimistic > clamped).any()


def test_falling_learning_rate(make_agent, tmp_path: Path) -> None:
    """Linear in the progress, from the whole of it to the fraction that was asked for, and after loading too."""
    agent = make_agent(learning_rate=0.5, final_lr_fraction=0.2)
    agent.save(tmp_path / "agent")
    for each in (agent, type(agent).load(tmp_path / "agent")):
        assert [each.lr_schedule(progress) for progress in (1, 0.5, 0)] == pytest.approx([0.5, 0.3, 0.1])
    agent.learn(4 * UPDATE)
    assert logged(agent, "train/learning_rate") == pytest.approx(0.1)  # the last update is made at the end
    assert make_agent(learning_rate=0.5).lr_schedule(0) == 0.5
    # A last rollout that goes beyond the total does not turn the gradient around.
    agent.learn(UPDATE + 1)
    assert agent.num_timesteps == 2 * UPDATE
    assert logged(agent, "train/learning_rate") == pytest.approx(0.1)


def test_larger_kl_coef_keeps_the_model_nearer(make_agent) -> None:
    kls = []
    for kl_coef in (0.0, 30.0):
        agent = make_agent(kl_coef=kl_coef, learning_rate=3e-3)
        agent.learn(8 * UPDATE)
        kls.append(logged(agent, "train/kl_to_pretrained"))
    assert kls[1] < 0.5 * kls[0]


def test_kl_in_the_reward(make_agent) -> None:
    """Each action is charged for the KL of the state it leads to; the first KL is nobody's fault."""
    agent = make_agent(kl_in="reward", kl_coef=0.5, reward_weight=4.0, normalize_advantage=False)
    change(agent)
    buffer = collect(agent)
    kl = []
    for t in range(T):
        reference, std = agent.policy.transition(states(buffer, t), reference=True)
        kl.append(diffusion.kl_divergence(buffer.means[:, t], reference, std))
    assert torch.stack(kl).min() > 1e-3
    pictures = agent.policy.model.decode(buffer.latents[:, -1])
    expected = torch.stack([-0.5 / 4 * kl[t + 1] for t in range(T - 1)] + [redness(pictures, PROMPTS)], dim=1)
    torch.testing.assert_close(buffer.rewards, expected, rtol=1e-4, atol=1e-5)
    # What is still to come, the KL included, against the critic's guess.
    to_come = expected.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(buffer.advantages, to_come - buffer.values, rtol=1e-4, atol=1e-4)


def test_without_critic(make_agent) -> None:
    agent = make_agent(use_critic=False, normalize_advantage=False)
    before = weights(agent)
    buffer = collect(agent)
    assert torch.equal(buffer.advantages, buffer.rewards[:, -1:].expand(-1, T))
    agent.train()
    after = weights(agent)
    changed = {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"adapter"}


def test_the_critic_learns_the_returns(make_agent) -> None:
    agent = make_agent(learning_rate=0.0, vf_epochs=100, vf_batch_size=4)
    before = weights(agent)
    buffer = collect(agent)
    agent.train()
    values = torch.stack([agent.policy.predict_values(states(buffer, t)) for t in range(T)], dim=1)
    assert (values - buffer.returns).square().mean() < 0.5 * (buffer.values - buffer.returns).square().mean()
    assert all(torch.equal(value, before[name]) for name, value in weights(agent).items() if "adapter" in name)


@pytest.mark.parametrize(
    ("kwargs", "base"),
    [
        ({"n_steps": 2 * T}, {}),
        ({"gamma": 0.9}, {}),
        ({"gae_lambda": 0.9}, {}),
        ({"kl_coef": 1.0}, {}),
        ({"kl_in": "reward"}, {"kl_coef": 1.0, "normalize_advantage": False}),
        ({"kl_estimator": "output-mse"}, {"kl_coef": 1.0}),
        ({"log_prob_reduction": "sum"}, {}),
        ({"clip_range": 1e-3}, {}),
        ({"clipping": "clamp"}, {"clip_range": 1e-3}),
        ({"normalize_advantage": False}, {}),
        ({"normalize_advantage": "center"}, {}),
        ({"use_critic": False}, {}),
        ({"reward_weight": 0.1}, {}),
        ({"step_weighting": "likelihood"}, {}),
        ({"timestep_fraction": 0.5}, {}),
        ({"policy_kwargs": {"autocast": True}}, {}),
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs)) or "default",
)
def test_every_option_matters(make_agent, kwargs: dict[str, Any], base: dict[str, Any]) -> None:
    found = []
    for options in (base, base | kwargs):
        agent = make_agent(**{"learning_rate": 1e-2, "batch_size": 4} | options)
        agent.learn(2 * agent.n_steps * N)
        found.append(torch.cat([value.detach().flatten() for value in agent.policy.denoiser_parameters()]))
    assert all(bool(values.isfinite().all()) for values in found)
    assert not torch.equal(*found)


def test_learning_rate_schedule(make_agent) -> None:
    agent = make_agent(learning_rate=lambda remaining: 1e-2 * remaining, vf_learning_rate=0.5)
    agent.learn(4 * UPDATE)
    groups = agent.policy.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.0, 0.5]
    agent = make_agent(learning_rate=lambda remaining: 1e-2 + remaining)
    assert agent.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1.01)


def test_rewards_with_long_names_are_told_apart_in_the_log(make_env, make_agent) -> None:
    def shades(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        long = "how-much-of-it-is-of-a-shade-of-grey"
        return {
            f"{version}/{long}": torch.full((len(images),), value) for version, value in {"a": 1.0, "b": 2.0}.items()
        }

    agent = make_agent(make_env(reward=shades))
    memory = Memory()
    agent.set_logger(Logger(None, [memory]))
    agent.learn(UPDATE)
    found = {name: value for name, value in memory.dumps[0].items() if "grey" in name}
    assert sorted(found.values()) == [1.0, 2.0]
    assert all(len(name) <= 36 for name in found)


@pytest.mark.parametrize("name", ["paper", "official-code"])
def test_presets(make_env, name: str) -> None:
    preset = PRESETS[name]
    agent = DPOK("DenoisingPolicy", make_env(preset["n_envs"]), **preset, seed=0, device="cpu")
    for key, value in preset.items():
        assert key == "n_envs" or getattr(agent, key) == value
    before = weights(agent)
    agent.learn(10 * T)
    assert agent._n_updates == 1
    assert not is_same(weights(agent), before)
    # Fifty denoising steps, as in the paper: five optimiser steps.
    assert math.ceil(preset["timestep_fraction"] * 10 * 50 / preset["batch_size"]) == 5


# --- Learning


def drawn_rewards(agent: DPOK, env: DenoisingVectorEnv) -> np.ndarray:
    observation, _ = env.reset(seed=1000)
    for _ in range(len(env.schedule)):
        observation, rewards, *_ = env.step(agent.predict(observation)[0])
    return rewards


#: Two steps that add as much noise as they can, so that few pictures tell a lot about the policy.
NOISY = {
    "num_train_timesteps": 4,
    "beta_start": 0.3,
    "beta_end": 0.3,
    "beta_schedule": "linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@pytest.mark.parametrize("sign", [1, -1])
def test_learns_what_is_rewarded(make_env, make_agent, settings, monkeypatch: pytest.MonkeyPatch, sign: int) -> None:
    """More redness, or less. An untrained decoder would show little of the latents, so here they are the colours."""

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return 10 * sign * redness(images, prompts)

    model = models.load_model(settings["model"], "cpu")
    monkeypatch.setattr(model, "scheduler_config", NOISY)
    monkeypatch.setattr(model, "decode", lambda latents: latents[:, :3].sigmoid())
    env, fresh = (make_env(n, reward=reward, num_inference_steps=2) for n in (32, 64))
    last_layer = {"lora_rank": 4, "target_modules": ["conv_out"]}
    agent = make_agent(env, learning_rate=1e-2, kl_coef=0.0, policy_kwargs=last_layer)
    before = drawn_rewards(agent, fresh)
    agent.learn(24 * 32 * 2)
    after = drawn_rewards(agent, fresh)
    error = math.sqrt((before.var() + after.var()) / 64)
    assert after.mean() - before.mean() > 20 * error


def test_seeds(make_agent) -> None:
    found = []
    for seed in (1, 1, 2):
        agent = make_agent(seed=seed)
        agent.learn(2 * UPDATE)
        found.append(weights(agent))
    assert is_same(found[1], found[0])
    assert not is_same(found[2], found[0])


# --- Saving


@pytest.mark.parametrize(
    "kind", ["vector", "scalar", "processes", "full", "before learning", "saved twice", "normalized"]
)
def test_goes_on_exactly_after_loading(make_env, make_agent, settings, kind: str, tmp_path: Path) -> None:
    def env() -> Any:
        if kind == "normalized":  # by statistics that a loaded agent must know
            return make_env(reward={colours: {"normalize": "running"}})
        if kind == "processes":
            return SubprocVecEnv([lambda: DenoisingEnv(**settings)] * 2)
        return DenoisingEnv(**settings) if kind == "scalar" else make_env()

    policy_kwargs = {"lora_rank": 0} if kind == "full" else {}
    original = make_agent(env(), policy_kwargs=policy_kwargs, batch_size=5)
    if kind != "before learning":
        original.learn(2 * original.n_envs * T)
    original.save(tmp_path / "agent")
    saved, saved_optimizer = weights(original), copy.deepcopy(original.policy.optimizer.state_dict())
    original.learn(2 * original.n_envs * T, reset_num_timesteps=False)
    random_state = torch.get_rng_state()

    loaded = DPOK.load(tmp_path / "agent", env(), device="cpu")
    if kind == "saved twice":
        loaded.save(tmp_path / "again")
        loaded.save(tmp_path / "again")
        loaded = DPOK.load(tmp_path / "again.zip", env(), device="cpu")
        loaded.save(tmp_path / "once more")  # which must not make it forget where to go on
    assert is_same(weights(loaded), saved)
    assert is_same(loaded.policy.optimizer.state_dict(), saved_optimizer)
    loaded.learn(2 * loaded.n_envs * T, reset_num_timesteps=False)
    assert is_same(weights(loaded), weights(original))
    assert is_same(loaded.policy.optimizer.state_dict(), original.policy.optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert loaded.num_timesteps == original.num_timesteps
    assert not is_same(weights(loaded), saved)


def test_loaded_without_environment(make_env, make_agent, tmp_path: Path) -> None:
    agent = make_agent(learning_rate=1e-2)
    agent.learn(UPDATE)
    agent.save(tmp_path / "agent.zip")
    observation, _ = make_env().reset(seed=0)
    expected, _ = agent.predict(observation, deterministic=True)
    loaded = DPOK.load(tmp_path / "agent.zip", device="cpu")
    assert np.array_equal(loaded.predict(observation, deterministic=True)[0], expected)
    assert loaded.predict(observation)[0].shape == expected.shape
    loaded.set_env(make_env())
    loaded.learn(UPDATE)


def test_loaded_on_another_number_of_environments(make_env, make_agent, tmp_path: Path) -> None:
    agent = make_agent()
    agent.learn(UPDATE)
    agent.save(tmp_path / "agent")
    loaded = DPOK.load(tmp_path / "agent", make_env(2), device="cpu")
    loaded.learn(2 * T)
    assert len(loaded.rollout_buffer.means) == 2


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_exported_lora_draws_the_same_in_plain_diffusers(
    make_env, make_agent, tiny_sd_folder: Path, tmp_path: Path, guidance_scale: float
) -> None:
    agent = make_agent(make_env(guidance_scale=guidance_scale), learning_rate=1e-2)
    agent.learn(2 * UPDATE)
    change(agent)
    agent.save_lora(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(len(PROMPTS), 4, 8, 8)

    def draw() -> Tensor:
        return pipeline(
            PROMPTS,
            num_inference_steps=T,
            eta=1.0,
            guidance_scale=guidance_scale,
            latents=start,
            generator=torch.Generator().manual_seed(7),
            output_type="pt",
        ).images

    untrained = draw()
    pipeline.load_lora_weights(tmp_path)
    expected = draw()

    generator = torch.Generator().manual_seed(7)
    latents, prompt = start, agent.policy.model.tokenize(PROMPTS)
    for t in range(T):
        step = torch.full((len(PROMPTS),), t)
        with torch.no_grad():
            mean, std = agent.policy.transition({"latent": latents, "step": step, "prompt": prompt})
        latents = mean + std.reshape(-1, 1, 1, 1) * torch.randn(mean.shape, generator=generator)
    torch.testing.assert_close(agent.policy.model.decode(latents), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(untrained, expected, atol=1e-2)


# --- What Stable-Baselines3's users expect


class Stop(BaseCallback):
    def _on_step(self) -> bool:
        return self.n_calls < T + 2  # amid the second rollout


def test_a_callback_can_stop(make_agent) -> None:
    agent = make_agent()
    agent.learn(10 * UPDATE, callback=Stop())
    assert agent.num_timesteps == (T + 2) * N
    assert agent._n_updates == 1
    agent.learn(UPDATE)  # begins new pictures
    assert agent._n_updates == 2


def test_callbacks_and_evaluation(make_agent, settings: dict[str, Any], tmp_path: Path) -> None:
    agent = make_agent()
    callbacks = [
        CheckpointCallback(save_freq=T, save_path=str(tmp_path / "checkpoints")),
        EvalCallback(
            DummyVecEnv([lambda: Monitor(DenoisingEnv(**settings))]),
            n_eval_episodes=2,
            eval_freq=T,
            log_path=str(tmp_path),
            best_model_save_path=str(tmp_path / "best"),
            deterministic=False,
            verbose=0,
        ),
    ]
    with pytest.warns(UserWarning, match="Training and eval env are not of the same type"):
        agent.learn(2 * UPDATE, callback=callbacks)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == [f"rl_model_{n}_steps.zip" for n in (UPDATE, 2 * UPDATE)]
    DPOK.load(tmp_path / "checkpoints" / found[0], device="cpu")
    DPOK.load(tmp_path / "best" / "best_model.zip", device="cpu")
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [UPDATE, 2 * UPDATE]
    assert evaluations["ep_lengths"].tolist() == [[T, T]] * 2
    rewards, lengths = evaluate_policy(
        agent, Monitor(DenoisingEnv(**settings)), n_eval_episodes=3, return_episode_rewards=True
    )
    assert lengths == [T] * 3
    assert np.isfinite(rewards).all()


def test_log(make_env, make_agent) -> None:
    agent = make_agent(make_env(reward={colours: 2.0}))
    memory = Memory()
    agent.set_logger(Logger(None, [memory]))
    agent.learn(2 * UPDATE)
    agent.logger.dump()
    rollout = {f"rollout/{name}" for name in ("ep_rew_mean", "ep_len_mean", "red", "blue", "pictures", "valid_share")}
    rollout |= {"time/rollout_pictures_per_second", "time/fps", "time/total_timesteps"}
    names = (
        "policy_gradient_loss", "kl_to_pretrained", "mean_ratio", "clip_fraction", "grad_norm", "value_loss",
        "explained_variance", "learning_rate", "vf_learning_rate", "n_updates",
    )  # fmt: skip
    update = {f"train/{name}" for name in names} | {"time/update_pictures_per_second"}
    first, second, last = memory.dumps
    assert rollout <= first.keys()
    assert rollout | update <= second.keys()
    assert update <= last.keys()
    for dump in memory.dumps:
        assert all(len(name) <= 36 and np.isfinite(value) for name, value in dump.items())
    assert first["rollout/ep_rew_mean"] == pytest.approx(2 * (first["rollout/red"] + first["rollout/blue"]), rel=1e-4)
    assert first["rollout/ep_len_mean"] == T
    assert [dump["rollout/pictures"] for dump in (first, second)] == [N, 2 * N]
    assert second["train/n_updates"] == 1
    assert second["train/kl_to_pretrained"] == pytest.approx(0, abs=1e-6)
    assert last["train/kl_to_pretrained"] > 0
    for name in ("time/rollout_pictures_per_second", "time/update_pictures_per_second"):
        assert second[name] > 0


# --- Rewards that are not finite


def test_masked_rewards_never_reach_the_optimiser(make_env, make_agent) -> None:
    agent = make_agent(make_env(reward=every_other, non_finite="mask"))
    buffer = collect(agent)
    assert buffer.valid.tolist() == [True, False] * (N // 2)
    expected = buffer.latents[buffer.valid, :T].flatten(0, 1)
    (batch,) = buffer.get(None)
    assert len(batch) == len(expected)
    for latents in batch.latents:
        assert (latents == expected).flatten(1).all(1).any()
    assert batch.advantages.mean().item() == pytest.approx(0, abs=1e-5)
    agent.learn(2 * UPDATE)
    assert all(bool(value.isfinite().all()) for value in weights(agent).values())
    assert logged(agent, "train/n_updates") == 2
    assert all(np.isfinite(value) for value in agent.logger.name_to_value.values())


@pytest.mark.parametrize("kwargs", [{}, {"micro_batch_size": None, "vf_batch_size": None}, {"batch_size": 4}], ids=str)
def test_nothing_is_learned_from_nothing(make_env, make_agent, kwargs: dict[str, Any]) -> None:
    agent = make_agent(make_env(reward=never, non_finite="mask"), **kwargs)
    before = weights(agent)
    memory = Memory()
    agent.set_logger(Logger(None, [memory]))
    agent.learn(2 * UPDATE)
    agent.logger.dump()
    assert is_same(weights(agent), before)
    assert agent._n_updates == 0
    assert memory.dumps[0]["rollout/valid_share"] == 0
    assert all(np.isfinite(value) for dump in memory.dumps for value in dump.values())


def test_unmasked_rewards_are_errors(make_env, make_agent) -> None:
    with pytest.raises(ValueError, match=r"the reward 'never' for the prompt .* is not finite"):
        make_agent(make_env(reward=never)).learn(UPDATE)


# --- Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_steps": T + 1}, f"n_steps=4 must be a multiple of the {T} denoising steps .* for example 3"),
        ({"n_steps": -T}, "must be a multiple"),
        ({"n_epochs": 0}, "n_epochs must be an integer of at least 1, got 0"),
        ({"vf_epochs": 0}, "vf_epochs must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": -5}, "batch_size must be an integer of at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size must be an integer of at least 1"),
        ({"vf_batch_size": -1}, "vf_batch_size must be an integer of at least 1"),
        ({"timestep_fraction": 0.0}, r"timestep_fraction must lie in \(0, 1\], got 0"),
        ({"final_lr_fraction": -0.1}, r"final_lr_fraction must lie in \[0, 1\], got -0.1"),
        ({"timestep_fraction": 1.5}, r"timestep_fraction must lie in \(0, 1\], got 1.5"),
        ({"clipping": "soft"}, "clipping must be one of 'pessimistic', 'clamp', got 'soft'"),
        ({"log_prob_reduction": "median"}, "log_prob_reduction must be one of 'mean', 'sum', got 'median'"),
        ({"kl_estimator": "k3"}, "kl_estimator must be one of 'exact', 'output-mse', got 'k3'"),
        ({"kl_in": "both"}, "kl_in must be one of 'loss', 'reward', got 'both'"),
        ({"normalize_advantage": "mean"}, "normalize_advantage must be one of True, False, 'center', got 'mean'"),
        ({"kl_coef": -0.1}, "kl_coef must be a number of at least 0, got -0.1"),
        ({"kl_coef": math.nan}, "kl_coef must be a number of at least 0, got nan"),
        ({"clip_range": 0.0}, "clip_range must be a number above 0, got 0"),
        ({"reward_weight": math.inf}, "reward_weight must be a number of at least 0"),
        ({"policy_kwargs": {"lora_rank": -1}}, "rank must be an integer of at least 1"),
        ({"policy_kwargs": {"target_modules": ["to_x"]}}, "no layer of the denoiser ends in"),
        ({"policy_kwargs": {"max_batch_size": 0}}, "max_batch_size must be an integer of at least 1"),
    ],
    ids=str,
)
def test_bad_arguments(make_agent, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent(**kwargs)


def test_without_environment() -> None:
    with pytest.raises(ValueError, match="an environment is needed to set the agent up"):
        DPOK()


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_noise_actions_are_refused(make_env, make_agent, settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    env = NoiseAction(DenoisingEnv(**settings)) if kind == "scalar" else VectorNoiseAction(make_env())
    with pytest.raises(ValueError, match="use the environment without NoiseAction"):
        make_agent(env)
    agent = make_agent(DenoisingEnv(**settings) if kind == "scalar" else make_env())
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match="without NoiseAction"):
        agent.set_env(env)
    with pytest.raises(ValueError, match="Action spaces do not match"):
        DPOK.load(tmp_path / "agent", env, device="cpu")


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_other_environments_are_refused(make_agent, name: str, tmp_path: Path) -> None:
    def vec_env() -> DummyVecEnv:
        return DummyVecEnv([lambda: gymnasium.make(name)])

    agent = make_agent()
    agent.save(tmp_path / "agent")
    for env in (gymnasium.make(name), vec_env()):
        with pytest.raises(ValueError, match="needs a denoising environment such as DPOK-Shapes-v0, got"):
            make_agent(env)
        with pytest.raises(ValueError, match="needs a denoising environment"):
            agent.set_env(env)
        with pytest.raises(ValueError, match="needs a denoising environment"):
            DPOK.load(tmp_path / "agent", env, device="cpu")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_inference_steps": T + 1}, f"num_inference_steps {T} there, {T + 1} here"),
        ({"guidance_scale": 7.5}, "guidance_scale 1.0 there, 7.5 here"),
        ({"eta": 0.5}, "eta 1.0 there, 0.5 here"),
        ({"model": "velocity"}, "model '.*epsilon' there, '.*velocity' here"),
    ],
    ids=str,
)
def test_another_sampler_is_refused(
    make_env, make_agent, settings, tiny_v_folder: Path, other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "model" in other:
        other = {"model": str(tiny_v_folder)}
    agent = make_agent()
    agent.save(tmp_path / "agent")
    for env in (make_env(**other), DenoisingEnv(**settings | other)):
        with pytest.raises(ValueError, match=message):
            agent.set_env(env)
        with pytest.raises(ValueError, match=message):
            DPOK.load(tmp_path / "agent", env, device="cpu")
    agent.learn(UPDATE)  # the refused ones left the agent as it was


@pytest.mark.parametrize(
    "how",
    [{"model": "linked"}, {"model": "moved"}, {"dtype": "bfloat16"}, {"model_kwargs": {"vae_tiling": True}}],
    ids=str,
)
def test_the_same_sampler_computed_elsewhere_is_taken(
    make_env, make_agent, tiny_sd_folder: Path, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = shutil.copytree(tiny_sd_folder, tmp_path / "first" / "model")
    agent = make_agent(make_env(model=str(first)))
    agent.save("agent")
    if how.get("model") == "linked":
        (tmp_path / "link").symlink_to(first)
        how = {"model": "./link"}
    elif how.get("model") == "moved":
        how = {"model": str((tmp_path / "first").rename(tmp_path / "second") / "model")}
    loaded = DPOK.load("agent", make_env(**{"model": str(first)} | how), device="cpu")
    assert loaded.sampler["model"] == how.get("model", str(first))
    loaded.learn(UPDATE)


def test_lora_of_another_model(make_agent, tmp_path: Path) -> None:
    make_agent(policy_kwargs={"lora_rank": 3}).save_lora(tmp_path)
    agent = make_agent(policy_kwargs={"lora_rank": 2})
    before = weights(agent)
    with pytest.raises(ValueError, match="is of another model"):
        agent.policy.load_lora(tmp_path)
    assert is_same(weights(agent), before)
