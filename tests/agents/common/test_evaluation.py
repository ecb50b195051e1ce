import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import obs_as_tensor
from torch.distributions import Independent, Normal, kl_divergence

from agents import DPOK, DenoisingPolicy, Evaluation, evaluate
from agents.common.evaluation import draw, spread
from dpok_gym import DenoisingVectorEnv, pretrained_policy
from dpok_gym.models.lora import LoRA

PROMPTS = ["a green star", "three green squares", "a red circle and a blue square"]


def _env(num_envs: int, num_inference_steps: int = 2) -> DenoisingVectorEnv:
    return DenoisingVectorEnv(num_envs, num_inference_steps=num_inference_steps, device="cpu")


def _policy(env: DenoisingVectorEnv, tuned: bool = True) -> DenoisingPolicy:
    policy = DPOK("DenoisingPolicy", env, device="cpu", policy_kwargs={"lora_rank": 2}).policy
    if tuned:
        with torch.no_grad():
            for value in policy.denoiser_parameters():
                value.add_(0.05 * torch.randn_like(value))
    return policy


def _same(one: Evaluation, other: Evaluation) -> bool:
    return bool((one.pictures == other.pictures).all()) and bool((one.reward == other.reward).all())


def test_an_untrained_policy_draws_the_pretrained_pictures_bit_for_bit():
    env = _env(2)
    policy = _policy(env, tuned=False)
    one, other = evaluate(policy, env, PROMPTS, 5), evaluate(policy, env, PROMPTS, 5, reference=True)
    assert _same(one, other)
    assert (one.kl == 0).all()
    assert (other.kl == 0).all()
    assert one.pictures.shape == (3, 64, 64, 3)
    assert one.pictures.dtype == np.uint8
    assert one.prompts == PROMPTS
    assert one.rewards["shapes-alignment"].shape == one.reward.shape == (3,)


def test_the_reference_does_not_see_the_training():
    env = _env(2)
    untrained, trained = _policy(env, tuned=False), _policy(env)
    reference = evaluate(trained, env, PROMPTS, 5, reference=True)
    assert _same(reference, evaluate(untrained, env, PROMPTS, 5))
    assert not _same(reference, evaluate(trained, env, PROMPTS, 5))


def test_pictures_and_kl_are_those_of_the_seeded_environment():
    env = _env(1)
    policy = _policy(env)
    found = evaluate(policy, env, PROMPTS[1:2], 7)

    observation, _ = env.reset(seed=7, options={"prompt": PROMPTS[1]})
    kl = 0.0
    with torch.no_grad():
        for _ in range(2):
            tensors = obs_as_tensor(observation, torch.device("cpu"))
            mean, std = policy.transition(tensors)
            reference, _ = policy.transition(tensors, reference=True)
            std = std.reshape(-1, 1, 1, 1)
            here, there = (Independent(Normal(m.double(), std.double()), 3) for m in (mean, reference))
            kl += float(kl_divergence(here, there))
            noise = env.np_random[0].standard_normal(mean.shape[1:], np.float32)
            observation, _, _, _, infos = env.step((mean + std * torch.from_numpy(noise)).numpy())
    assert kl > 0.01
    np.testing.assert_allclose(found.kl, [kl], rtol=1e-4)
    assert (found.pictures[0] == infos["final_info"]["image"][0]).all()


def test_a_picture_depends_on_its_own_seed_and_prompt_only():
    env = _env(2)
    policy = _policy(env)
    all_three = evaluate(policy, env, PROMPTS, 3)
    last = evaluate(policy, env, PROMPTS[2:], 5)
    np.testing.assert_allclose(last.kl, all_three.kl[2:], rtol=1e-3)
    assert np.abs(last.pictures[0].astype(int) - all_three.pictures[2]).max() <= 1


def test_random_states_stay_as_they_were():
    env = _env(2)
    env.reset(seed=0)
    policy = _policy(env)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 (SB3's)
    states = [generator.bit_generator.state for generator in env.np_random]
    evaluate(policy, env, PROMPTS, 0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert [generator.bit_generator.state for generator in env.np_random] == states


def test_a_saved_lora_draws_the_same_pictures(tmp_path):
    env = _env(2)
    policy = _policy(env)
    policy.save_lora(tmp_path)
    with LoRA.from_folder(env.model.denoiser, tmp_path).switched_on():
        drawn = draw(env.pretrained_transition, env, PROMPTS[:2], 5)
    assert _same(drawn, evaluate(policy, env, PROMPTS[:2], 5))


def test_what_cannot_be_evaluated_is_refused():
    env = _env(2)
    policy = _policy(env)
    with pytest.raises(ValueError, match="give at least one"):
        evaluate(policy, env, [], 0)
    with pytest.raises(ValueError, match="same num_inference_steps"):
        evaluate(policy, _env(2, 3), PROMPTS, 0)
    with pytest.raises(ValueError, match="best_of must be an integer of at least 1, got 0"):
        evaluate(policy, env, PROMPTS, 0, best_of=0)


@pytest.mark.parametrize("reference", [False, True])
def test_best_of_is_the_best_of_consecutive_seeds(tiny_sd_folder, reference):
    # Their sum tells which is the best, neither of them alone does.
    rewards = {"jpeg-compressibility": 1.0, lambda images, prompts: 10 * images.mean((1, 2, 3)): -1.0}
    prompts = ["a dog", "a rabbit", "the moon"]
    model = str(tiny_sd_folder)
    env = DenoisingVectorEnv(2, model=model, prompts=prompts, reward=rewards, num_inference_steps=2, device="cpu")
    policy = _policy(env)
    drawn = evaluate(policy, env, [prompt for prompt in prompts for _ in range(3)], 5, reference)
    best = [max(range(first, first + 3), key=drawn.reward.__getitem__) for first in (0, 3, 6)]
    found = evaluate(policy, env, prompts, 5, reference, best_of=3)
    assert found.prompts == prompts
    assert (found.pictures == drawn.pictures[best]).all()
    assert (found.reward == drawn.reward[best]).all()
    assert (found.kl == drawn.kl[best]).all()
    assert found.rewards.keys() == drawn.rewards.keys()
    for name, values in found.rewards.items():
        assert (values == drawn.rewards[name][best]).all()


def test_best_of_by_hand():
    pictures = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    rewards = {"shapes-alignment": np.array([0.0, 1.0, 1.0, 0.5, 0.0, 1.0])}
    total, kl = np.array([-3.0, -1.0, -2.0, 0.5, 0.5, 0.0]), np.arange(6.0)
    found = Evaluation(["a"] * 3 + ["b"] * 3, pictures, total, rewards, kl[:, None]).best_of(3)
    assert found.prompts == ["a", "b"]
    assert found.pictures[:, 0, 0, 0].tolist() == [1, 3]  # of two that are as good the first
    assert found.reward.tolist() == [-1.0, 0.5]
    assert found.rewards["shapes-alignment"].tolist() == [1.0, 0.5]
    assert found.kl.tolist() == [1.0, 3.0]
    assert found.aligned_share == 0.5


def test_shares_and_means():
    rewards = {"shapes-alignment": np.array([1.0, 0.75, 1.0, 0.0]), "shapes-quality": np.array([0.5, 0.5, 0.7, np.nan])}
    found = Evaluation(["a green star"] * 4, np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4), rewards, np.zeros((4, 1)))
    assert found.aligned.tolist() == [True, False, True, False]
    assert found.aligned_share == 0.5
    assert found.mean("shapes-quality") == pytest.approx(1.7 / 3)
    assert found.mean("jpeg-compressibility") is None
    found.rewards = {}
    assert found.aligned is None
    assert found.aligned_share is None


def test_spread():
    assert spread(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert spread(["a", "b", "c", "d"], 2) == ["a", "c"]
    assert spread(["a"], 1) == ["a"]


def test_running_normalisation_is_left_out():
    reward = {"shapes-quality": {"weight": 2.0, "normalize": "running"}}
    env = DenoisingVectorEnv(2, reward=reward, num_inference_steps=2, device="cpu")
    found = draw(env.pretrained_transition, env, PROMPTS, 5)
    np.testing.assert_allclose(found.reward, 2 * found.rewards["shapes-quality"], rtol=1e-6)
    assert env.reward.state_dict() == {}


def test_the_best_is_never_one_without_a_reward():
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    values = np.array([np.nan, -3.0, -2.0, -1.0])
    found = Evaluation(["a"] * 4, pictures, values, {"r": values}, np.zeros((4, 1)))
    assert found.best_of(2).reward.tolist() == [-3.0, -1.0]
    for n in (0, 3):
        with pytest.raises(ValueError, match="4 pictures cannot be split into groups"):
            found.best_of(n)


def test_pictures_without_a_reward_do_not_count():
    def every_other(images, prompts):
        return torch.tensor([-1.0, torch.nan, -3.0, torch.inf])[: len(images)]

    env = DenoisingVectorEnv(
        4, reward=every_other, non_finite="mask", num_inference_steps=1, decode_batch_size=4, device="cpu"
    )
    found = draw(env.pretrained_transition, env, ["a green star"] * 4, 5)
    np.testing.assert_array_equal(found.reward, [-1.0, np.nan, -3.0, np.nan])
    assert found.mean_reward == found.mean("every_other") == -2.0


def test_what_is_handed_over_must_be_of_the_right_kind():
    env = _env(1)
    policy = _policy(env)
    with pytest.raises(TypeError, match="must be a DenoisingPolicy, such as"):
        evaluate(pretrained_policy(env), env, PROMPTS, 5)
    with pytest.raises(TypeError, match=r"must be one that gymnasium\.make_vec makes"):
        evaluate(policy, gymnasium.make("DPOK-Shapes-v0", num_inference_steps=2), PROMPTS, 5)
    with pytest.raises(ValueError, match="are a list of texts; give at least one, not 'a green star'"):
        evaluate(policy, env, "a green star", 5)
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
    assert _same(evaluate(policy, wrapped, PROMPTS[:1], 5), evaluate(policy, env, PROMPTS[:1], 5))
