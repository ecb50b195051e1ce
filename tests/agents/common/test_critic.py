"""The critic that rewards the predicted image: its regression, its memory, and what it explains."""

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

from agents import DPOK
from agents.common.buffer import TrajectoryBuffer
from agents.common.critic import MAX_LATENT_DIMS, Regression, RewardCritic, ValueNetwork
from agents.common.memory import LiveMemory
from dpok_gym import DenoisingVectorEnv
from dpok_gym.prompts import prompt_to_bytes
from tests.agents.common.support import PROMPTS, collect, perturb
from tests.support import assert_same

N, T = 4, 3


def ridge(design: Tensor, target: Tensor, weights: Tensor, penalty: list[float]) -> Tensor:
    """Coefficients of a weighted ridge regression, from its normal equations."""
    return torch.linalg.solve(
        design.T @ (weights[:, None] * design) + torch.tensor(penalty, dtype=torch.float64).diag(),
        design.T @ (weights * target),
    )


@pytest.fixture
def numbers() -> dict[str, Tensor]:
    """Guesses and returns of 12 images of three prompts in two steps; the first step has no guesses."""
    generator = torch.Generator().manual_seed(0)
    guesses = torch.randn(12, 2, generator=generator)
    guesses[:, 0] = math.nan
    prompt = torch.arange(12) % 3
    text = torch.randn(3, 5, generator=generator)[prompt]
    returns = torch.randn(12, 2, generator=generator) + prompt[:, None]
    weights = 0.5 + torch.rand(12, generator=generator).double()
    return {"guesses": guesses, "returns": returns, "text": text, "weights": weights, "prompt": prompt}


def test_the_regression_solves_its_normal_equations(numbers: dict[str, Tensor]) -> None:
    strength, w = 3.0, numbers["weights"]
    regression = Regression(numbers["guesses"], numbers["returns"], numbers["text"], w, strength)
    # The kernel of the prompts, written as columns: the features, and an indicator of each prompt.
    text = numbers["text"].double()
    text = text - text.mean(0)
    text = text / text.square().mean().sqrt() / math.sqrt(5)
    prompts = torch.nn.functional.one_hot(numbers["prompt"]).double()
    q = numbers["guesses"][:, 1].double()
    q = q - (w * q).sum() / w.sum()
    q = q / ((w * q.square()).sum() / w.sum()).sqrt()
    expected = []
    for t, column in enumerate([torch.zeros_like(q), q]):
        design = torch.cat([torch.ones(12, 1).double(), column[:, None], text, prompts], dim=1)
        coefficients = ridge(design, numbers["returns"][:, t].double(), w, [0.0, 1.0] + [strength] * 8)
        expected.append(design @ coefficients)
    torch.testing.assert_close(regression(numbers["guesses"], numbers["text"]), torch.stack(expected, 1).float())


def test_unknown_prompts_have_no_term_of_their_own(numbers: dict[str, Tensor]) -> None:
    """With features that are all alike, a prompt that was never seen is worth the intercept."""
    text = torch.eye(3)[numbers["prompt"]] * 1e-9
    returns = torch.where(numbers["prompt"] == 0, 1.0, 0.0)[:, None].expand(12, 2)
    regression = Regression(torch.full((12, 2), math.nan), returns, text, torch.ones(12).double(), 1.0)
    seen = regression(torch.full((3, 2), math.nan), torch.eye(3) * 1e-9)[:, 0]
    unseen = regression(torch.full((1, 2), math.nan), torch.full((1, 3), 2e-9))[0, 0]
    assert seen[1] == pytest.approx(seen[2])
    assert seen[1] < unseen < seen[0]


def test_one_prompt_without_guesses_is_worth_its_mean() -> None:
    returns = torch.tensor([[1.0], [2.0], [6.0]])
    weights = torch.tensor([1.0, 1.0, 0.5]).double()
    regression = Regression(torch.full((3, 1), math.nan), returns, torch.ones(3, 2), weights, 1.0)
    values = regression(torch.full((1, 1), math.nan), torch.ones(1, 2))
    assert values.item() == pytest.approx((1 + 2 + 3) / 2.5, abs=1e-5)


def fill(buffer: TrajectoryBuffer, critic: RewardCritic, seed: int, slope: float) -> None:
    """Fills a buffer with returns that are linear in the reward of the predicted image at the last step."""
    generator = torch.Generator().manual_seed(seed)
    buffer.latents = torch.randn(buffer.latents.shape, generator=generator)
    buffer.means = torch.randn(buffer.means.shape, generator=generator)
    buffer.prompts = [PROMPTS[i % 2] for i in range(len(buffer))]
    buffer.conditioning = critic.process.encode(buffer.prompts)
    buffer.valid[:] = True
    clean = critic.process.predicted_clean(buffer.state_at(T - 1), buffer.means[:, T - 1])
    assert critic.judge is not None
    reward = critic.judge(clean, buffer.prompts).rewards.total
    of_prompt = torch.tensor([PROMPTS.index(prompt) for prompt in buffer.prompts])
    buffer.rewards[:, -1] = slope * reward + of_prompt
    buffer.returns = buffer.rewards[:, -1:].expand(-1, T).clone()


@pytest.fixture
def critic(make_env: Callable[..., DenoisingVectorEnv]) -> RewardCritic:
    env = make_env(1)
    critic = RewardCritic(env.process, look_fraction=0.5)
    critic.judge = env.judge
    return critic


def make_buffer(critic: RewardCritic, n: int = 32) -> TrajectoryBuffer:
    return TrajectoryBuffer(n, T, critic.process.model.latent_shape, "cpu")


def test_it_learns_what_can_be_known(critic: RewardCritic) -> None:
    buffer = make_buffer(critic)
    for seed in range(3):
        fill(buffer, critic, seed, slope=5.0)
        critic.values(buffer)
        critic.fit(buffer)
    fill(buffer, critic, 3, slope=5.0)
    values = critic.values(buffer)
    errors = (buffer.returns - values).var(0) / buffer.returns.var(0)
    assert errors[2] < 0.01
    # The first step is not looked at: only the prompt's mean is known there.
    within = torch.stack([buffer.returns[i::2, 0].var() for i in range(2)]).mean()
    assert (buffer.returns - values)[:, 0].var() == pytest.approx(within.item(), rel=0.4)


def test_it_begins_with_the_mean_reward(critic: RewardCritic) -> None:
    buffer = make_buffer(critic)
    fill(buffer, critic, 0, slope=1.0)
    buffer.valid[0], buffer.rewards[0, -1] = False, math.nan
    expected = buffer.rewards[1:, -1].mean().item()
    torch.testing.assert_close(critic.values(buffer), torch.full((32, T), expected))


def test_it_forgets_old_rollouts(critic: RewardCritic) -> None:
    critic.n_rollouts = 2
    buffer = make_buffer(critic)
    kept = []
    for seed in range(4):
        fill(buffer, critic, seed, slope=1.0)
        buffer.valid[:seed] = False
        critic.values(buffer)
        critic.fit(buffer)
        kept.append(buffer.returns[buffer.valid].clone())
    assert torch.equal(critic.state_dict()["returns"], torch.cat(kept[2:]))
    assert critic.state_dict()["age"].tolist() == [1] * 30 + [0] * 29


def test_it_keeps_a_bounded_number_of_images(critic: RewardCritic, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest: the memory of the regression grows with the square of their number."""
    monkeypatch.setattr("agents.common.critic.MAX_IMAGES", 40)
    buffer = make_buffer(critic)
    returns = []
    for seed in range(2):
        fill(buffer, critic, seed, slope=1.0)
        critic.values(buffer)
        critic.fit(buffer)
        returns.append(buffer.returns.clone())
    state = critic.state_dict()
    assert torch.equal(state["returns"], torch.cat(returns)[-40:])
    assert {len(values) for values in state.values()} == {40}
    assert critic.values(buffer).isfinite().all()


def test_the_memory_of_the_regression() -> None:
    m = 500
    inputs = torch.randn(m, 3), torch.randn(m, 3), torch.randn(20, 8)[torch.arange(m) % 20]
    with LiveMemory(inputs) as memory:
        Regression(*inputs, torch.ones(m).double(), 4.0)
    assert 15 * m**2 < memory.peak < 30 * m**2  # the docstrings have 25


def test_its_state_is_all_that_it_learned(critic: RewardCritic) -> None:
    buffer = make_buffer(critic)
    fill(buffer, critic, 0, slope=2.0)
    critic.values(buffer)
    critic.fit(buffer)
    other = RewardCritic(critic.process, look_fraction=0.5)
    other.judge = critic.judge
    other.load_state_dict({name: value.clone() for name, value in critic.state_dict().items()})
    for seed in (1, 2):
        fill(buffer, critic, seed, slope=2.0)
        assert_same(other.values(buffer), critic.values(buffer))
        critic.fit(buffer)
        other.fit(buffer)
    assert_same(other.state_dict(), critic.state_dict())
    with pytest.raises(RuntimeError, match="not the state of a RewardCritic"):
        other.load_state_dict({"returns": torch.zeros(1, 5)})


def test_values_of_observations_are_those_of_the_rollout(make_agent: Callable[..., Any]) -> None:
    agent = make_agent(images_per_iteration=8)
    perturb(agent.policy)
    agent.learn(8 * T)
    buffer = collect(agent)
    values = agent.policy.critic.values(buffer)
    prompts = torch.from_numpy(prompt_to_bytes(buffer.prompts, 512))
    for index in range(T):
        step = torch.full((8,), index)
        observation = {"latent": buffer.latents[:, index], "step": step, "prompt": prompts}
        torch.testing.assert_close(agent.policy.predict_values(observation), values[:, index], rtol=1e-4, atol=1e-5)
        forward = agent.policy.forward(observation)[1]
        torch.testing.assert_close(forward, values[:, index], rtol=1e-4, atol=1e-5)


def test_without_a_judge_it_says_what_to_do(critic: RewardCritic) -> None:
    buffer = make_buffer(critic)
    fill(buffer, critic, 0, slope=1.0)
    critic.judge = None
    with pytest.raises(ValueError, match=r"set policy\.critic\.judge"):
        critic.values(buffer)


@pytest.mark.parametrize(
    "wrong", [{"look_fraction": 1.5}, {"n_rollouts": 0}, {"forgetting": 0.0}, {"prompt_strength": 0.0}], ids=str
)
def test_bad_arguments(make_env: Callable[..., DenoisingVectorEnv], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RewardCritic(make_env(1).process, **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", ["three green squares", "shapes"])
def test_it_explains_the_rewards_of_shapes(prompts: str) -> None:
    """On rollouts that it has not seen, a third of the variance in the last quarter of the steps."""
    env = gymnasium.make_vec(
        "DPOK-Shapes-v0",
        num_envs=64,
        vectorization_mode="vector_entry_point",
        prompts=prompts,
        num_inference_steps=10,
        decode_batch_size=16,
    )
    agent = DPOK(env=env, seed=0, device="cpu", learning_rate=0.0, critic_kind="reward")
    critic = agent.policy.critic
    assert isinstance(critic, RewardCritic)
    for _ in range(2):
        buffer = collect(agent)
        buffer.values = critic.values(buffer)
        buffer.returns = buffer.final_rewards[:, None].expand(64, 10)
        explained = 1 - (buffer.returns - buffer.values).var(0) / buffer.returns.var(0)
        critic.fit(buffer)
        agent.images_drawn += 64  # the next images are others
    assert (explained[-3:] > 1 / 3).all(), explained


@pytest.mark.parametrize(
    ("shape", "square", "dims"),
    [
        ((4, 64, 64), 1, 4 * 64 * 64),  # Stable Diffusion 1.5
        ((4, 96, 96), 2, 4 * 48 * 48),
        ((16, 128, 128), 4, 16 * 32 * 32),  # FLUX and Stable Diffusion 3
        ((32, 32, 32), 2, 32 * 16 * 16),  # Sana
        ((16, 512, 384), 15, 16 * 35 * 26),
        ((3, 2, 9000), 2, 3 * 4500),
        ((2, 1, 1), 1, 2),
    ],
)
def test_the_network_does_not_grow_with_the_latent(shape: tuple[int, int, int], square: int, dims: int) -> None:
    network = ValueNetwork(shape, 768, 10)
    assert (network.square, network.layers[0].in_features) == (square, dims + 768)
    assert dims <= MAX_LATENT_DIMS
    assert sum(value.numel() for value in network.parameters()) < 5e6
    assert network(torch.randn(2, *shape), torch.tensor([0, 9]), torch.randn(2, 768)).shape == (2,)


def test_the_network_of_a_small_latent_is_the_papers() -> None:
    """A multilayer perceptron on all numbers, with gains for each step."""
    network = ValueNetwork((4, 8, 8), 5, T, hidden=16)
    torch.nn.init.normal_(network.head.weight)
    latents, step, text = torch.randn(6, 4, 8, 8), torch.arange(6) % T, torch.randn(6, 5)
    hidden = torch.cat([latents.flatten(1), text], dim=1)
    layers: Any = zip(network.layers, network.gains, strict=True)
    for layer, gain in layers:
        hidden = torch.relu(hidden @ layer.weight.T + layer.bias) * gain.weight[step]
    torch.testing.assert_close(network(latents, step, text), (hidden @ network.head.weight.T).squeeze(1))


def test_the_network_sees_a_large_latent() -> None:
    """It learns where the bright part of a noisy FLUX latent is, of images that it has not seen."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        is_left = torch.arange(n) % 2 == 0
        latents = torch.randn(n, 16, 128, 128, generator=generator)
        latents[is_left, :4, :, :64] += 0.5
        latents[~is_left, :4, :, 64:] += 0.5
        return latents, is_left.float()

    network = ValueNetwork((16, 128, 128), 2, T, hidden=32)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    latents, rewards = draw(48)
    inputs = (torch.zeros(48, dtype=torch.int64), torch.zeros(48, 2))
    for _ in range(30):
        optimizer.zero_grad()
        (network(latents, *inputs) - rewards).square().mean().backward()
        optimizer.step()
    latents, rewards = draw(16)
    with torch.no_grad():
        errors = network(latents, inputs[0][:16], inputs[1][:16]) - rewards
    assert errors.square().mean() < 0.1 * rewards.var()


def test_the_networks_state_is_that_of_one_shape() -> None:
    network, same = (ValueNetwork((16, 128, 128), 8, T, hidden=16) for _ in range(2))
    torch.nn.init.normal_(network.head.weight)
    same.load_state_dict(network.state_dict())
    inputs = (torch.randn(2, 16, 128, 128), torch.zeros(2, dtype=torch.int64), torch.randn(2, 8))
    assert_same(same(*inputs), network(*inputs))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ValueNetwork((4, 64, 32), 8, T, hidden=16).load_state_dict(network.state_dict())
