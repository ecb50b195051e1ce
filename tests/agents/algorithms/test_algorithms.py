"""What every algorithm promises, and what makes each of them what it is."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from agents import DDPO, DPOK, GRPO, REINFORCE, RWR, BestOfN, DRaFT, RewardWeightedSFT, evaluate
from agents.common.algorithm import DenoisingAlgorithm
from agents.algorithms.policy_gradient import PolicyGradient
from agents.common.buffer import Transitions
from agents.algorithms.forward_process import Supervised
from dpok_gym import DenoisingEnv, DenoisingVectorEnv, diffusion

N, T = 4, 3
PROMPTS = ["a rabbit", "a green dog"]
tensor = torch.tensor


class Brightness:
    """A reward that everything can learn, with a gradient."""

    differentiable = True

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))

    __call__ = score


SUPERVISED: dict[str, Any] = {"n_gradient_steps": 4, "log_every": 3, "batch_size": 3}
ALGORITHMS: dict[str, tuple[type[DenoisingAlgorithm], dict[str, Any]]] = {
    "DPOK": (DPOK, {"target_kl_to_pretrained": 1.0}),
    "DDPO-IS": (DDPO, {"batch_size": 5}),
    "DDPO-SF": (DDPO, {"score_function": True}),
    "GRPO": (GRPO, {"group_size": 2, "same_noise": True}),
    "REINFORCE": (REINFORCE, {}),
    "SFT-KL-D": (RewardWeightedSFT, SUPERVISED),
    "SFT-KL-O": (RewardWeightedSFT, {"regularization": "KL-O", **SUPERVISED}),
    "RWR": (RWR, SUPERVISED),
    "BestOfN": (BestOfN, {"n": 2, **SUPERVISED}),
    "DRaFT": (DRaFT, {"n_last_steps": 2, "batch_size": 3}),
}


#: What makes one optimiser step of a rollout.
ONE_STEP = {name: {"n_gradient_steps": 1} for name, (kind, _) in ALGORITHMS.items() if issubclass(kind, Supervised)}

pytestmark = pytest.mark.usefixtures("fresh_models")


@pytest.fixture
def settings(tiny_sd_folder: Path) -> dict[str, Any]:
    return {"model": str(tiny_sd_folder), "prompts": PROMPTS, "reward": Brightness(), "num_inference_steps": T}


@pytest.fixture
def make(settings: dict[str, Any]) -> Callable[..., Any]:
    def make_agent(name: str, env: Any = None, **changes: Any) -> Any:
        algorithm, kwargs = ALGORITHMS[name]
        kwargs = {"seed": 0, "device": "cpu", "learning_rate": 1e-2, "policy_kwargs": {"lora_rank": 2}} | kwargs
        env = env or DenoisingVectorEnv(N, device="cpu", **settings)
        return algorithm("DenoisingPolicy", env, **(kwargs | changes))

    return make_agent


def weights(agent: DenoisingAlgorithm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in agent.policy.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


def rollout(agent: Any) -> Any:
    _, callback = agent._setup_learn(N * T)
    assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
    return agent.rollout_buffer


# --- All of them


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learns_predicts_and_saves(name: str, make, settings, tmp_path: Path) -> None:
    agent = make(name)
    before = weights(agent)
    agent.learn(2 * N * T)
    assert agent.is_done(2 * N * T)
    assert not agent.is_done(2 * N * T + 1)
    assert not same(before, weights(agent))
    env = DenoisingVectorEnv(2, device="cpu", **settings)
    action, _ = agent.predict(env.reset(seed=0)[0])
    assert action.shape == env.action_space.shape
    assert evaluate(agent.policy, env, PROMPTS, 0).kl.min() > 0
    assert agent.save_lora(tmp_path).is_file()


def test_runs_of_different_seeds_share_no_noise(make, settings) -> None:
    latents = []
    for seed in range(2):
        for env in (None, DummyVecEnv([lambda: DenoisingEnv(device="cpu", **settings)] * N)):
            latents.append(make("DPOK", env, seed=seed).env.reset()["latent"])
    one, single, other, _ = latents
    assert (one == single).all()  # of one seed, in any kind of environment, it is the same
    assert not (one[:, None] == other[None]).all(axis=(2, 3, 4)).any()


@pytest.mark.parametrize("reset", [False, True], ids=["on", "anew"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_goes_on_after_loading_as_if_nothing_had_happened(
    name: str, reset: bool, make, settings, tmp_path: Path
) -> None:
    agent = make(name)
    agent.learn(2 * N * T)
    agent.save(tmp_path / "agent")
    saved = weights(agent)

    def go_on(agent: Any) -> dict[str, Tensor]:
        agent.learn(N * T, reset_num_timesteps=reset)
        return weights(agent)

    expected = go_on(agent)
    loaded = type(agent).load(tmp_path / "agent", DenoisingVectorEnv(N, device="cpu", **settings), device="cpu")
    assert same(weights(loaded), saved)
    assert same(go_on(loaded), expected)
    assert not same(expected, saved)
    assert loaded.num_timesteps == (1 if reset else 3) * N * T


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_change_nothing(name: str, make) -> None:
    found = []
    for size in (2, None):
        agent = make(name, micro_batch_size=size, learning_rate=1.0, max_grad_norm=1e9)
        agent.policy.optimizer = torch.optim.SGD(agent.policy.optimizer.param_groups, lr=1.0)
        agent.learn(N * T)
        found.append(torch.cat([value.flatten() for value in agent.policy.denoiser_parameters()]))
    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_scalar_environments_do_too(name: str, make, settings) -> None:
    env = DummyVecEnv([lambda: DenoisingEnv(device="cpu", **settings)] * 2)
    agent = make(name, env)
    before = weights(agent)
    agent.learn(2 * T)
    assert not same(before, weights(agent))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_pictures_without_a_reward_are_not_learned_from(name: str, make, settings) -> None:
    def never(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.full((len(images),), torch.nan)

    never.differentiable = True  # type: ignore[attr-defined]
    env = DenoisingVectorEnv(N, device="cpu", **(settings | {"reward": never, "non_finite": "mask"}))
    agent = make(name, env, **({"batch_size": None} if name == "DRaFT" else {}))
    before = weights(agent)
    if isinstance(agent, Supervised):
        with pytest.raises(ValueError, match="no picture got a reward"):
            agent.learn(N * T)
    else:
        agent.learn(N * T)
    assert same(before, weights(agent))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("DPOK", {}),
        ("DDPO-IS", {}),
        ("DDPO-SF", {"learning_rate": 6e-3}),
        ("GRPO", {"group_size": 24}),
        ("REINFORCE", {"learning_rate": 6e-3}),
        ("SFT-KL-D", {"gamma_kl": 0.0}),
        ("SFT-KL-O", {"gamma_kl": 0.1}),
        ("RWR", {"temperature": 0.02}),
        ("BestOfN", {"n": 8}),
        ("DRaFT", {"batch_size": 12}),
    ],
)
def test_improves_its_reward_on_the_embedded_world(name: str, kwargs: dict[str, Any]) -> None:
    """Three rollouts of 24 make the pictures brighter."""
    algorithm, own = ALGORITHMS[name]
    prompt = "three green squares"
    n, steps = 24, 5
    world: dict[str, Any] = {"prompts": prompt, "num_inference_steps": steps, "decode_batch_size": n, "device": "cpu"}
    reward = (lambda images, prompts: 20 * (images.mean((1, 2, 3)) - 0.7)) if "SFT" in name else Brightness()
    env = DenoisingVectorEnv(n, reward=reward, **world)
    common = {"policy_kwargs": {"lora_rank": 8, "target_modules": "all"}, "learning_rate": 3e-3, "seed": 0}
    if issubclass(algorithm, Supervised):
        own = {"n_gradient_steps": 40, "batch_size": 24}
        own |= {"regularization": "KL-O"} if name == "SFT-KL-O" else {}
    elif algorithm in (DPOK, DDPO, GRPO) and "SF" not in name:
        own = {"batch_size": 36}
    agent: Any = algorithm("DenoisingPolicy", env, device="cpu", **(common | own | kwargs))
    before = evaluate(agent.policy, env, [prompt] * 48, 1000)
    agent.learn(3 * n * steps)
    after = evaluate(agent.policy, env, [prompt] * 48, 1000)
    gain = (after.reward - before.reward).mean() / before.reward.std()
    error = (after.reward - before.reward).std() / before.reward.std() / np.sqrt(48)
    assert gain > 3 * error, f"{gain:.2f} +- {error:.2f} standard deviations"


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("DDPO-SF", {"batch_size": 2}, "leave batch_size None"),
        ("DDPO-IS", {"min_count": 0}, "min_count must be an integer of at least 1"),
        ("DDPO-IS", {"statistics_size": 8}, "min_count must be at most statistics_size, got 16 and 8"),
        ("DDPO-IS", {"advantage_clip": -1.0}, "advantage_clip must be a number of at least 0"),
        ("DDPO-IS", {"timestep_fraction": 0.0}, "timestep_fraction must lie in"),
        ("REINFORCE", {"n_epochs": 2}, "one optimiser step in each rollout"),
        ("GRPO", {"group_size": 1}, "group_size must be at least 2"),
        ("GRPO", {"group_size": 3}, "4 environments cannot be split into groups of 3"),
        ("GRPO", {"kl_coef": -1.0}, "kl_coef must be a number of at least 0"),
        ("SFT-KL-D", {"regularization": "KL"}, "regularization must be one of 'KL-D', 'KL-O', 'none'"),
        ("SFT-KL-D", {"gamma_kl": float("nan")}, "gamma_kl must be a number of at least 0"),
        ("SFT-KL-D", {"n_gradient_steps": 0}, "n_gradient_steps must be an integer of at least 1"),
        ("RWR", {"temperature": 0.0}, "temperature must be a number above 0"),
        ("RWR", {"sparse_fraction": 1.5}, "sparse_fraction must lie in"),
        ("BestOfN", {"n": 1}, "n must be at least 2"),
        ("DRaFT", {"n_last_steps": 4}, "n_last_steps must be from 1 to the 3 denoising steps, got 4"),
        ("DPOK", {"target_kl_to_pretrained": 0.0}, "target_kl_to_pretrained must be a number of nats above 0"),
        ("DPOK", {"target_kl_to_pretrained": 1.0, "kl_coef": 0.0}, "with a kl_coef above 0"),
        ("DPOK", {"kl_in": "reward", "reward_weight": 0.0}, "reward_weight must be above 0"),
        ("DPOK", {"gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
        ("DPOK", {"gae_lambda": -0.1}, r"gae_lambda must lie in \[0, 1\]"),
        ("DPOK", {"vf_learning_rate": -1.0}, "vf_learning_rate must be a number of at least 0"),
        ("DPOK", {"vf_epochs": True}, "vf_epochs must be an integer of at least 1, got True"),
        ("DPOK", {"max_grad_norm": 0.0}, "max_grad_norm must be a number above 0"),
    ],
)
def test_bad_arguments(name: str, kwargs: dict[str, Any], message: str, make) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **kwargs)


def test_unknown_arguments_are_named(make) -> None:
    with pytest.raises(TypeError, match="kl_coef"):
        make("DDPO-IS", kl_coef=0.1)


# --- DPOK's adaptive coefficient


def test_the_coefficient_follows_the_kl(make) -> None:
    agent = make("DPOK", kl_coef=0.1, target_kl_to_pretrained=2.0)
    agent.learn(1)  # the first update sees a KL of 0
    assert agent.kl_coef == pytest.approx(0.1 * 0.8)
    for kl, factor in {4.0: 1.2, 2.2: 1.1, 1.0: 0.8, 1.9: 0.95}.items():
        agent.kl_coef = 0.1
        agent._adapt_kl_coef({"kl_to_pretrained": [tensor([kl, kl])]}, 2.0)
        assert agent.kl_coef == pytest.approx(0.1 * factor)


# --- What the policy gradients share


POLICY_GRADIENTS = [name for name, (algorithm, _) in ALGORITHMS.items() if issubclass(algorithm, PolicyGradient)]


def gradient(agent: Any, batch: Transitions, reference: Tensor | None) -> Tensor:
    with agent.policy.tuned():
        loss = agent._loss(batch, reference, defaultdict(list)).sum()
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, agent.policy.denoiser_parameters())])


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_transitions_count_by_their_weights(name: str, make) -> None:
    agent = make(name)
    (batch,) = (rollout(agent), agent.rollout_buffer.get(None))[1]
    reference = agent._reference(batch)
    expected = gradient(agent, batch, reference)
    assert expected.abs().max() > 0
    weighted = gradient(agent, replace(batch, weight=3 * batch.weight), reference)
    torch.testing.assert_close(weighted, 3 * expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_steps_are_chosen_by_their_weights(name: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a KL beside the policy gradient half of the choice is for that, which has no weights."""
    asked = []
    for weighting in ("output", "likelihood"):
        agent = make(name, step_weighting=weighting, timestep_fraction=0.5)
        rollout(agent)
        get = agent.rollout_buffer.get
        monkeypatch.setattr(agent.rollout_buffer, "get", lambda *args, get=get: (asked.append(args), get(*args))[1])
        agent.train()
    weights = agent.policy.schedule.output_weights()
    (_, fraction, importance), (_, _, plain) = (args for args in asked if len(args) == 3)
    assert fraction == 0.5
    torch.testing.assert_close(importance, (weights + 1) / 2 if name in ("DPOK", "GRPO") else weights)
    assert plain is None


@pytest.mark.parametrize("weighting", ["output", "likelihood"])
def test_the_score_function_is_the_gradient_of_the_log_density(weighting: str, make) -> None:
    agent = make("DDPO-SF", log_prob_reduction="sum", step_weighting=weighting)
    (batch,) = (rollout(agent), agent.rollout_buffer.get(None))[1]
    factor = agent.policy.schedule.output_weights()[batch.step] if weighting == "output" else 1
    with agent.policy.tuned():
        _, log_prob, _ = agent.policy.evaluate_actions(batch.observation, batch.actions)
        loss = (-factor * batch.advantages * log_prob).sum()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, agent.policy.denoiser_parameters())])
    torch.testing.assert_close(
        gradient(agent, batch, None), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grpo_pays_for_the_kl(reduction: str, make) -> None:
    agent = make("GRPO", kl_coef=0.5, log_prob_reduction=reduction)
    (batch,) = (rollout(agent), agent.rollout_buffer.get(None))[1]
    batch.advantages = torch.zeros_like(batch.advantages)
    with torch.no_grad():
        for value in agent.policy.denoiser_parameters():
            value.add_(0.1)
        reference = agent._reference(batch)
        loss = agent._loss(batch, reference, defaultdict(list))
        mean, std = agent.policy.transition(batch.observation)
    kl = diffusion.kl_divergence(mean, reference, std)
    assert kl.min() > 1e-3
    torch.testing.assert_close(loss, 0.5 * kl / (mean[0].numel() if reduction == "mean" else 1))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_is_clipped_to_its_norm(name: str, make) -> None:
    """The critic has steps of its own."""
    agent = make(name, learning_rate=1.0, max_grad_norm=1e-6, batch_size=None, **ONE_STEP.get(name, {}))
    agent.policy.optimizer = torch.optim.SGD(agent.policy.optimizer.param_groups, lr=1.0)
    before = weights(agent)
    agent.learn(N * T)
    change = [value - before[name] for name, value in weights(agent).items() if "adapter" in name]
    assert torch.cat([part.flatten() for part in change]).norm().item() == pytest.approx(1e-6, rel=0.05)


# --- Advantages


def test_ddpo_standardises_by_prompt(make) -> None:
    agent = make("DDPO-IS", statistics_size=4, min_count=3, advantage_clip=1.2)
    first, second = tensor([[1, 0]]), tensor([[2, 0]])
    prompts = torch.cat([first, second, first, second])
    rewards = tensor([0.0, 10.0, 2.0, 14.0])
    # Two rewards of each prompt are too few: those of all four stand in.
    expected = ((rewards - 6.5) / rewards.std(correction=0)).clamp(max=1.2)
    torch.testing.assert_close(agent._advantages(rewards, prompts, torch.arange(4)), expected)
    # Now (0, 2, 1, 3) are known of the first prompt and (10, 14, 18, 10) of the second; -1.34 and 1.5 are clipped.
    found = agent._advantages(tensor([1.0, 18.0, 3.0, 10.0]), prompts, torch.arange(4))
    expected = tensor([-0.5 / 1.25**0.5, 1.2, 1.2, -3 / 11**0.5])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # The oldest is forgotten.
    agent._advantages(tensor([7.0]), first, torch.arange(1))
    assert list(agent._latest_rewards[first[0].numpy().tobytes().hex()]) == [2.0, 1.0, 3.0, 7.0]


def test_grpo_compares_within_the_group(make) -> None:
    agent = make("GRPO")
    rewards, rows = tensor([1.0, 3.0, 5.0, 5.0, 9.0]), tensor([0, 1, 2, 3, 7])  # a group and a half were masked
    found = agent._advantages(rewards, torch.zeros(5, 2), rows)
    torch.testing.assert_close(found, tensor([-1.0, 1.0, 0.0, 0.0, 0.0]), rtol=1e-4, atol=1e-4)


def test_reinforce_leaves_the_picture_itself_out(make) -> None:
    agent = make("REINFORCE")
    prompts = tensor([[1], [1], [1], [2]])
    found = agent._advantages(tensor([1.0, 2.0, 6.0, 4.0]), prompts, torch.arange(4))
    # The lonely one is compared with all others.
    torch.testing.assert_close(found, tensor([1 - 4, 2 - 3.5, 6 - 1.5, 4 - 3.0]))
    assert agent._advantages(tensor([5.0]), prompts[:1], torch.arange(1)).tolist() == [5.0]


@pytest.mark.parametrize("name", ["DDPO-IS", "GRPO", "REINFORCE"])
def test_all_steps_of_a_picture_share_its_advantage(name: str, make) -> None:
    agent = make(name)
    buffer = rollout(agent)
    expected = agent._advantages(buffer.rewards[:, -1], buffer.prompt, torch.arange(N))
    if name == "DDPO-IS":  # whose statistics have seen the pictures twice now, which changes nothing about them
        assert len(next(iter(agent._latest_rewards.values()))) > 1
    torch.testing.assert_close(buffer.advantages, expected[:, None].expand(-1, T))


@pytest.mark.parametrize("same_noise", [False, True])
def test_grpo_draws_groups(same_noise: bool, make) -> None:
    agent = make("GRPO", same_noise=same_noise, n_steps=2 * T)
    buffer = rollout(agent)
    groups = zip(buffer.prompt.split(2), buffer.latents[:, 0].split(2), strict=True)
    starts = []
    for prompts, noise in groups:
        assert torch.equal(prompts[0], prompts[1])
        assert torch.equal(noise[0], noise[1]) == same_noise
        starts.append(noise[0])
    assert not any(torch.equal(starts[0], start) for start in starts[1:])
    assert [text in PROMPTS for text in buffer.texts] == [True] * 2 * N


# --- Supervised learning


def test_the_rate_falls_with_each_step_of_a_fit(make) -> None:
    agent = make("SFT-KL-D", learning_rate=1.0, final_lr_fraction=0.2)  # four steps, logged after three
    taken = []
    take_step = agent.policy.optimizer.step

    def step() -> None:
        taken.append(agent.policy.optimizer.param_groups[0]["lr"])
        take_step()

    agent.policy.optimizer.step = step
    agent.learn(N * T)
    assert taken == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_the_set_of_pictures_is_the_pretrained_models(make) -> None:
    """Drawn once: they do not change with what is learned, and are those that the untrained policy draws."""
    agent = make("RWR", n_gradient_steps=1)
    agent.set_random_seed(0)
    agent.learn(2 * N * T)
    assert len(agent.pictures) == 2 * N
    pictures = agent.policy.model.decode(agent.pictures.latents)
    torch.testing.assert_close(pictures.mean((1, 2, 3)), agent.pictures.rewards)
    drawn = agent.pictures.latents
    with torch.no_grad():
        for value in agent.policy.denoiser_parameters():
            value.add_(0.1)
    agent.set_random_seed(0)
    agent.learn(2 * N * T)
    torch.testing.assert_close(agent.pictures.latents, drawn)


@pytest.mark.parametrize("name", ["BestOfN", "SFT-KL-D"])
def test_an_interrupted_fit_goes_on(
    name: str, make, fresh_models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = make(name, n_gradient_steps=9)
    uninterrupted.learn(N * T)
    uninterrupted.learn(N * T, reset_num_timesteps=False)
    fresh_models()
    agent = make(name, n_gradient_steps=9)
    agent.learn(N * T)

    def interrupt(self: Any, iteration: int) -> None:
        if iteration > 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(agent), "dump_logs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            agent.learn(N * T, reset_num_timesteps=False)
    assert agent._n_updates == 15
    assert not agent.is_done(2 * N * T)
    agent.save(tmp_path / "agent")
    loaded = type(agent).load(tmp_path / "agent", agent.env, device="cpu")
    assert torch.equal(loaded.pictures.latents, agent.pictures.latents)
    loaded.learn(0, reset_num_timesteps=False)
    assert loaded._n_updates == 18
    assert loaded.num_timesteps == 2 * N * T
    assert same(weights(loaded), weights(uninterrupted))


def test_more_pictures_are_fitted_too(make) -> None:
    agent = make("RWR")
    agent.learn(N * T)
    before = weights(agent)
    agent.learn(N * T, reset_num_timesteps=False)
    assert len(agent.pictures) == 2 * N
    assert agent._n_updates == 2 * agent.n_gradient_steps
    assert agent.is_done(2 * N * T)
    assert not same(before, weights(agent))


def test_weights_by_hand(make) -> None:
    rewards, prompts = tensor([-2.0, 0.5, 1.0, 3.0]), tensor([[1], [1], [2], [2]])
    sft = make("SFT-KL-D", gamma_kl=0.5)
    assert sft.picture_weights(rewards, prompts).tolist() == [0.0, 1.0, 1.5, 3.5]
    assert make("SFT-KL-O").picture_weights(rewards, prompts).tolist() == [0.0, 0.5, 1.0, 3.0]
    centered = make("SFT-KL-D", gamma_kl=0.5, center_rewards=True)
    assert centered.picture_weights(rewards, prompts).tolist() == [0.0, 1.75, 0.0, 1.5]
    rwr = make("RWR", temperature=2.0).picture_weights(rewards, prompts)
    expected = torch.cat([torch.softmax(rewards[:2] / 2, 0), torch.softmax(rewards[2:] / 2, 0)]) * 2
    torch.testing.assert_close(rwr, expected)
    sparse = make("RWR", sparse_fraction=0.5)
    assert sparse.picture_weights(tensor([1.0, 2.0, 3.0, 3.0]), tensor([[1]] * 4)).tolist() == [0, 0, 1, 1]
    assert sparse.picture_weights(rewards, prompts).tolist() == [0, 1, 0, 1]
    assert make("RWR", sparse_fraction=0.6).picture_weights(rewards, prompts).tolist() == [1, 1, 1, 1]
    winners = make("BestOfN", n=2).picture_weights(tensor([1.0, 5.0, 2.0, 4.0, 3.0]), tensor([[1], [2], [1], [1], [1]]))
    assert winners.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(("name", "expected"), [("SFT-KL-D", {1, 3}), ("SFT-KL-O", {0, 1, 2, 3})])
def test_which_pictures_are_learned_from(name: str, expected: set[int], make, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL-O holds the model to the pre-trained one on those without a reward, too."""
    agent = make(name, gamma_kl=0.0, n_gradient_steps=16)
    monkeypatch.setattr(agent, "picture_weights", lambda rewards, prompts: tensor([0.0, 1.0, 0.0, 2.0]))
    learned, take_step = [], agent._take_step

    def take(batch: Any, found: Any) -> None:
        learned.append(batch)
        take_step(batch, found)

    monkeypatch.setattr(agent, "_take_step", take)
    agent.learn(N * T)
    rows = {
        (int((agent.pictures.latents == latents).flatten(1).all(1).nonzero()), float(weight))
        for batch in learned
        for latents, weight in zip(batch.latents, batch.weight, strict=True)
    }
    assert rows == {(row, [0.0, 1.0, 0.0, 2.0][row]) for row in expected}


def test_the_loss_is_the_weighted_error_of_the_output(make) -> None:
    agent = make("SFT-KL-O", gamma_kl=2.0)
    agent.learn(N * T)
    part = agent._add_noise(agent.pictures, tensor([1.0, 0.0, 2.0, 3.0]))
    alpha = agent.policy.schedule.alpha[part.step][:, None, None, None]
    noise = (part.noisy - alpha.sqrt() * part.latents) / (1 - alpha).sqrt()
    with agent.policy.tuned():
        output = agent.policy.denoise(part.observation)
    reference = agent._reference(part)
    assert not torch.allclose(output, reference)
    mse = (output - noise).square().mean((1, 2, 3))  # the tiny model predicts the noise
    pull = (output - reference).square().mean((1, 2, 3))
    with agent.policy.tuned():
        found = agent._loss(part, reference, {"denoising_loss": []})
    torch.testing.assert_close(found, part.weight * mse + 2 * pull, rtol=1e-3, atol=1e-4)


def test_nothing_to_learn_from(make) -> None:
    agent = make("SFT-KL-D", gamma_kl=0.0)
    agent.picture_weights = lambda rewards, prompts: torch.zeros_like(rewards)
    with pytest.raises(ValueError, match="none of the 4 pictures has a positive weight"):
        agent.learn(N * T)


# --- DRaFT


def test_draft_draws_the_same_pictures_again(make) -> None:
    agent = make("DRaFT", learning_rate=0.0, batch_size=None)
    buffer = rollout(agent)
    agent.train()
    expected = buffer.rewards[:, -1].mean().item()
    assert agent.logger.name_to_value["train/reward"] == pytest.approx(expected, rel=1e-4)


def test_draft_follows_the_reward(make) -> None:
    """Its gradient is that of the mean reward, by finite differences along itself."""
    agent = make("DRaFT", learning_rate=300.0, batch_size=None, max_grad_norm=1e9)
    agent.policy.optimizer = torch.optim.SGD(agent.policy.optimizer.param_groups, lr=1.0)
    with torch.no_grad():
        for value in agent.policy.denoiser_parameters():
            value.add_(0.1 * torch.randn_like(value))
    rollout(agent)
    agent.train()  # a step against the gradient
    before, slope = (agent.logger.name_to_value[f"train/{name}"] for name in ("reward", "grad_norm"))
    agent.train()  # in the same trajectories, from where the step has led
    gain = agent.logger.name_to_value["train/reward"] - before
    assert gain == pytest.approx(300 * slope**2, rel=0.05)


def test_draft_needs_a_gradient(make, settings) -> None:
    env = DenoisingVectorEnv(N, device="cpu", **(settings | {"reward": "jpeg-compressibility"}))
    with pytest.raises(ValueError, match="'jpeg-compressibility' has no gradient"):
        make("DRaFT", env)
    moving = {Brightness(): {"weight": 1.0, "normalize": "running"}}
    with pytest.raises(ValueError, match="running statistics"):
        make("DRaFT", DenoisingVectorEnv(N, device="cpu", **(settings | {"reward": moving})))
