"""Images of fixed seeds: the same before and after training, but for the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from agents import DenoisingPolicy, Evaluation, GymnasiumVecEnv, evaluate
from agents.common.evaluation import cycle_prompts, sample_images, shown_images
from agents.common.randomness import ImageNoise
from dpok_gym import DenoisingEnv, DenoisingVectorEnv, reference_policy
from dpok_gym.models.lora import LoRA
from tests.agents.common.support import PROMPTS, perturb
from tests.support import assert_same, colours

T = 3


@pytest.fixture
def make_policy(make_agent: Callable[..., Any]) -> Callable[..., DenoisingPolicy]:
    """Makes the policy of an environment's process, trained or not."""

    def make(env: DenoisingVectorEnv, trained: bool = True, **kwargs: Any) -> DenoisingPolicy:
        policy = make_agent(env, policy_kwargs=kwargs).policy
        return perturb(policy) if trained else policy

    return make


def is_same(one: Evaluation, other: Evaluation) -> bool:
    return bool((one.images == other.images).all()) and bool((one.reward == other.reward).all())


# --- Two policies on the same noise


@pytest.mark.slow
def test_an_untrained_policy_draws_the_pretrained_images_bit_for_bit(
    make_env: Callable[..., Any], make_policy: Callable[..., Any]
) -> None:
    env = make_env(2)
    policy = make_policy(env, trained=False)
    one, other = evaluate(policy, env, PROMPTS, 5), evaluate(policy, env, PROMPTS, 5, reference=True)
    plain = sample_images(env.process, env, PROMPTS, 5)
    assert_same(one, other)
    assert_same(plain, other)
    assert one.step_kl.shape == (3, T)
    assert (one.kl == 0).all()
    assert one.images.shape == (3, 16, 16, 3)
    assert one.images.dtype == np.uint8
    assert one.prompts == list(PROMPTS)
    assert one.rewards["redness"].shape == one.reward.shape == (3,)
    assert len(one) == 3


@pytest.mark.slow
def test_the_reference_does_not_see_the_training(make_env: Callable[..., Any], make_policy: Callable[..., Any]) -> None:
    env = make_env(2)
    untrained, trained = make_policy(env, trained=False), make_policy(env)
    reference = evaluate(trained, env, PROMPTS, 5, reference=True)
    assert (reference.kl == 0).all()
    assert is_same(reference, evaluate(untrained, env, PROMPTS, 5))
    assert not is_same(reference, evaluate(trained, env, PROMPTS, 5))


@pytest.mark.slow
def test_images_and_kl_are_those_of_an_episode(make_env: Callable[..., Any], make_policy: Callable[..., Any]) -> None:
    """An episode of the environment with the evaluation's noise."""
    env = make_env(1)
    policy = make_policy(env)
    evaluation = evaluate(policy, env, PROMPTS[1:2], 7)

    noise = ImageNoise.for_evaluation([7], (4, 8, 8), "cpu")
    options = {"prompt": PROMPTS[1], "latent": noise.initial_latents().numpy()}
    observation, _ = env.reset(options=options)
    kl, mse = [], []
    with torch.no_grad():
        for step in range(T):
            state = env.state_of(observation)
            mean, std = policy.transition(state)
            reference, _ = policy.reference_transition(state)
            std = std.reshape(-1, 1, 1, 1)
            here, there = (Independent(Normal(m.double(), std.double()), 3) for m in (mean, reference))
            kl.append(float(kl_divergence(here, there)))
            outputs = (policy.predict_output(state, reference=each) for each in (False, True))
            mse.append(float((next(outputs) - next(outputs)).square().mean()))
            observation, rewards, _, _, infos = env.step((mean + std * noise(step)).numpy())
    assert min(kl) > 1e-3
    np.testing.assert_allclose(evaluation.step_kl, [kl], rtol=1e-4)
    np.testing.assert_allclose(evaluation.step_mse, [mse], rtol=1e-3)
    # The first of three steps explores.
    np.testing.assert_allclose(evaluation.kl, kl[:1], rtol=1e-4)
    assert evaluation.late_drift == pytest.approx(np.sqrt((mse[1] + mse[2]) / 2), rel=1e-3)
    assert (evaluation.images[0] == infos["final_info"]["image"][0]).all()
    assert evaluation.reward.tolist() == rewards.tolist()
    assert evaluation.rewards["redness"].tolist() == rewards.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("n_envs", [1, 2, 8])
def test_an_image_depends_on_its_own_seed_and_prompt_only(
    make_env: Callable[..., Any], make_policy: Callable[..., Any], n_envs: int
) -> None:
    # One state at a time in the network: else its last bits may depend on the others of the batch.
    env, other = make_env(4), make_env(n_envs)
    policy = make_policy(env, max_batch_size=1)
    all_three = evaluate(policy, env, PROMPTS, 3)
    assert_same(evaluate(policy, other, PROMPTS, 3), all_three)
    last = evaluate(policy, other, PROMPTS[2:], 5)
    assert_same(last.images, all_three.images[2:])
    assert_same(last.step_kl, all_three.step_kl[2:])


@pytest.mark.slow
def test_random_states_stay_as_they_were(make_env: Callable[..., Any], make_policy: Callable[..., Any]) -> None:
    env = make_env(2)
    env.reset(seed=0)
    policy = make_policy(env)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 (libraries' own)
    states = [generator.bit_generator.state for generator in env.np_random]
    evaluate(policy, env, PROMPTS, 0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert_same(np.random.get_state(), numpy_state)  # noqa: NPY002
    assert [generator.bit_generator.state for generator in env.np_random] == states


@pytest.mark.slow
def test_a_saved_lora_draws_the_same_images(
    make_env: Callable[..., Any], make_policy: Callable[..., Any], tmp_path: Path
) -> None:
    env = make_env(2)
    policy = make_policy(env)
    policy.save_lora(tmp_path)
    with LoRA.from_folder(env.model.denoiser, tmp_path, env.model.lora_prefix).enabled():
        drawn = sample_images(env.process, env, PROMPTS[:2], 5)
    assert is_same(drawn, evaluate(policy, env, PROMPTS[:2], 5))


# --- Some of the images


def test_rows_by_hand() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    rewards = {"judged": np.array([0.0, 1.0, 0.5])}
    whole = Evaluation(
        ["a", "b", "c"], images, np.array([-3.0, -1.0, 2.0]), rewards, np.eye(3), np.eye(3), np.ones(3, bool), "judged"
    )
    for rows in (slice(1, 3), np.array([1, 2])):
        part = whole[rows]
        assert part.prompts == ["b", "c"]
        assert part.images[:, 0, 0, 0].tolist() == [1, 2]
        assert part.reward.tolist() == [-1.0, 2.0]
        assert part.rewards["judged"].tolist() == [1.0, 0.5]
        assert part.step_kl.tolist() == [[0, 1, 0], [0, 0, 1]]
        assert part.aligned_share == 0.5
    assert whole[np.array([2, 0])].prompts == ["c", "a"]


# --- Shares and means


def test_shares_and_means() -> None:
    rewards = {"judged": np.array([1.0, 0.75, 1.0, 0.0]), "clean": np.array([0.5, 0.5, 0.7, np.nan])}
    images, kl = np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 1))
    evaluation = Evaluation(["a"] * 4, images, np.zeros(4), rewards, kl, kl, np.ones(1, bool), "judged", "clean")
    assert evaluation.aligned.tolist() == [True, False, True, False]
    assert evaluation.aligned_share == 0.5
    assert evaluation.mean("clean") == evaluation.mean_quality == pytest.approx(1.7 / 3)
    assert evaluation.mean("jpeg-compressibility") is None
    unjudged = Evaluation(["a"] * 4, images, np.zeros(4), rewards, kl, kl, np.ones(1, bool))
    assert unjudged.aligned is None
    assert unjudged.aligned_share is None
    assert unjudged.mean_quality is None


def test_the_kl_counts_the_steps_that_explore() -> None:
    kl, mse = np.array([[1.0, 2.0, 100.0], [3.0, 4.0, 300.0]]), np.array([[9.0, 9.0, 0.25], [9.0, 9.0, 0.75]])
    exploring, images = np.array([True, True, False]), np.zeros((2, 8, 8, 3), np.uint8)
    evaluation = Evaluation(["a"] * 2, images, np.zeros(2), {}, kl, mse, exploring)
    assert evaluation.kl.tolist() == [3.0, 7.0]
    assert evaluation.late_drift == pytest.approx(0.5**0.5)
    assert evaluation[1:].late_drift == pytest.approx(0.75**0.5)
    assert Evaluation(["a"] * 2, images, np.zeros(2), {}, kl, mse, np.ones(3, bool)).late_drift == 0


@pytest.mark.slow
def test_the_world_says_which_rewards_judge(make_env: Callable[..., Any]) -> None:
    reward = {"shapes-alignment": 1.0, "shapes-quality": 0.2}
    env = DenoisingVectorEnv(2, reward=reward, num_inference_steps=1, device="cpu")
    evaluation = sample_images(env.process, env, ["a red star"], 0)
    assert (evaluation.alignment_reward, evaluation.quality_reward) == ("shapes-alignment", "shapes-quality")
    assert evaluation.aligned_share in (0, 1)
    quality = evaluation.mean_quality
    assert quality is not None
    assert 0 <= quality <= 1
    env = make_env()
    evaluation = sample_images(env.process, env, PROMPTS, 0)
    assert (evaluation.alignment_reward, evaluation.quality_reward) == (None, None)
    assert evaluation.aligned_share is None


def test_the_reward_is_weighted_and_its_components_are_raw(make_env: Callable[..., Any]) -> None:
    env = make_env(2, reward={colours: {"weight": 2.0}, "jpeg-compressibility": {"normalize": [-2.0, 0.5]}})
    evaluation = sample_images(env.process, env, PROMPTS, 5)
    components = evaluation.rewards
    assert components.keys() == {"red", "blue", "jpeg-compressibility"}
    expected = 2 * (components["red"] + components["blue"]) + (components["jpeg-compressibility"] + 2) / 0.5
    np.testing.assert_allclose(evaluation.reward, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_learners_normalization_is_left_out(make_env: Callable[..., Any], make_agent: Callable[..., Any]) -> None:
    env = make_env()
    agent = make_agent(env, normalize_rewards=True)
    agent.learn(4 * T)
    statistics = agent.reward_normalizer.state_dict()
    evaluation = evaluate(agent.policy, env, PROMPTS, 5)
    assert_same(evaluation.reward, evaluation.rewards["redness"])
    assert agent.reward_normalizer.state_dict() == statistics


def test_images_without_a_reward_do_not_count(make_env: Callable[..., Any]) -> None:
    def every_other(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([-1.0, torch.nan, -3.0, torch.inf])[: len(images)]

    env = make_env(4, reward=every_other, non_finite="mask", decode_batch_size=4)
    evaluation = sample_images(env.process, env, ["the moon"] * 4, 5)
    np.testing.assert_array_equal(evaluation.reward, [-1.0, np.nan, -3.0, np.nan])
    assert evaluation.mean_reward == evaluation.mean("every_other") == -2.0
    nothing, exploring = np.zeros((1, 1)), np.ones(1, bool)
    alone = Evaluation(["a"], np.zeros((1, 1, 1, 3), np.uint8), np.array([np.nan]), {}, nothing, nothing, exploring)
    assert np.isnan(alone.mean_reward)


def test_cycle_prompts() -> None:
    assert cycle_prompts(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert cycle_prompts(["a", "b", "c", "d"], 2) == ["a", "c"]
    assert cycle_prompts(["a", "b", "c", "d", "e"], 3) == ["a", "b", "d"]
    assert cycle_prompts(["a"], 1) == ["a"]


# --- What can be evaluated


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_refused(make_env: Callable[..., Any], make_policy: Callable[..., Any]) -> None:
    env = make_env(2)
    policy = make_policy(env)
    with pytest.raises(ValueError, match="give at least one"):
        evaluate(policy, env, [], 0)
    with pytest.raises(ValueError, match="are a list of texts; give at least one, not 'the moon'"):
        evaluate(policy, env, "the moon", 5)
    with pytest.raises(ValueError, match="num_inference_steps 3 there, 4 here"):
        evaluate(policy, make_env(2, num_inference_steps=4), PROMPTS, 0)
    with pytest.raises(TypeError, match=r"steering must be BestOf\(n\), FKSteering\(...\) or SVDD\(...\), not 8"):
        evaluate(policy, env, PROMPTS, 0, steering=8)
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        evaluate(policy, env, PROMPTS, -1)
    with pytest.raises(ValueError, match="tokens"):
        evaluate(policy, env, ["the moon", "a dog " * 100], 0)
    with pytest.raises(TypeError, match="must be a DenoisingPolicy, such as"):
        evaluate(reference_policy(env), env, PROMPTS, 5)


@pytest.mark.slow
def test_environments_that_can_score(
    make_env: Callable[..., Any], make_policy: Callable[..., Any], settings: dict[str, Any]
) -> None:
    env = make_env(1)
    policy = make_policy(env)
    expected = evaluate(policy, env, PROMPTS, 5)
    for other in (DenoisingEnv(**settings), GymnasiumVecEnv(make_env(1))):
        assert_same(evaluate(policy, other, PROMPTS, 5), expected)
    recording = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
    with pytest.raises(ValueError, match="would not notice the wrapper RecordEpisodeStatistics; take it off"):
        evaluate(policy, recording, PROMPTS, 5)
    with pytest.raises(ValueError, match="needs a denoising environment"):
        evaluate(policy, gymnasium.make("CartPole-v1"), PROMPTS, 5)


@pytest.mark.parametrize(
    ("prompts", "n", "expected"),
    [
        (["a"] * 256, 4, [0, 1, 2, 3]),
        (["a"] * 3, 4, [0, 1, 2]),
        (["a", "b", "c"] * 64, 4, [0, 1, 2, 3]),  # a distance of 48 would always show "a"
        ([str(k) for k in range(100)] * 2, 4, [0, 25, 50, 75]),
    ],
)
def test_shown_images_have_different_prompts(prompts: list[str], n: int, expected: list[int]) -> None:
    assert shown_images(prompts, n) == expected
