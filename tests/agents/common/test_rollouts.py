"""The images of an iteration: whole trajectories of the policy, or nothing."""

import itertools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor

from agents import DDPO, DPOK, GRPO, RewardWeightedSFT
from agents.common.evaluation import sample_images
from agents.common.rollouts import draw_prompts, shorten_names
from dpok_gym import DenoisingVectorEnv, diffusion, reference_policy
from tests.agents.common.support import PROMPTS, Watch, collect, perturb, snapshot
from tests.support import always_nan, assert_same, colours, every_other_fails, redness

N, T = 4, 3
UPDATE = N * T  # denoising steps of one iteration


# --- What is drawn


@pytest.mark.slow
@pytest.mark.parametrize("images", [N, 6])
def test_a_rollout_equals_stepping_the_environment_with_its_actions(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], images: int
) -> None:
    agent = make_agent(images_per_iteration=images)
    perturb(agent.policy)
    for _ in range(2):  # a second iteration overwrites all of the first
        buffer = collect(agent)
    env = make_env(images)
    observation, _ = env.reset(options={"prompt": buffer.prompts, "latent": buffer.latents[:, 0].numpy()})
    rewards = np.zeros(0)
    for t in range(T):
        assert_same(torch.from_numpy(observation["latent"]), buffer.latents[:, t])
        assert observation["step"].tolist() == [t] * images
        observation, rewards, terminated, _, infos = env.step(buffer.latents[:, t + 1].numpy())
        assert terminated.all() == (t == T - 1)
    final = np.stack([last["latent"] for last in infos["final_obs"]])
    assert_same(torch.from_numpy(final), buffer.latents[:, -1])
    assert_same(torch.from_numpy(rewards).float(), buffer.final_rewards)
    assert not buffer.rewards[:, :-1].any()


@pytest.mark.slow
def test_actions_are_samples_of_the_policy(make_agent: Callable[..., Any]) -> None:
    agent = make_agent(images_per_iteration=2 * N)
    perturb(agent.policy)
    buffer = collect(agent)
    assert len(buffer.latents[:, 0].flatten(1).unique(dim=0)) == 2 * N
    noises = [buffer.latents[:, 0]]
    for t in range(T):
        with torch.no_grad():
            mean, std = agent.policy.transition(buffer.state_at(t))
        torch.testing.assert_close(mean, buffer.means[:, t], rtol=1e-4, atol=1e-5)
        noises.append(diffusion.recover_noise(buffer.latents[:, t + 1], mean, std))
    for noise in noises:
        assert noise.mean().item() == pytest.approx(0, abs=0.1)
        assert noise.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 3.0}, {"policy_kwargs": {"precision": "bfloat16"}}, {"policy_kwargs": {"lora_rank": 0}}],
    ids=str,
)
def test_before_the_first_update_ratios_are_1_and_the_kl_is_0(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], options: dict[str, Any]
) -> None:
    env = make_env(guidance_scale=options.get("guidance_scale", 1.0))
    agent = make_agent(env, policy_kwargs=options.get("policy_kwargs"))
    buffer = collect(agent)
    for t in range(T):
        mean, std = agent.policy.transition(buffer.state_at(t))
        reference, _ = agent.policy.reference_transition(buffer.state_at(t))
        log_ratio = diffusion.log_ratio(buffer.latents[:, t + 1], mean, buffer.means[:, t], std)
        assert log_ratio.exp().tolist() == [1.0] * N
        assert diffusion.kl_divergence(mean, reference, std).tolist() == [0.0] * N


@pytest.mark.slow
def test_the_kl_to_the_reference_is_recorded_if_it_is_asked_for(make_agent: Callable[..., Any]) -> None:
    agent = make_agent(kl_placement="reward")
    perturb(agent.policy)
    buffer = collect(agent)
    for t in range(T):
        state = buffer.state_at(t)
        with torch.no_grad():
            mean, std = agent.policy.transition(state)
            reference, _ = agent.policy.reference_transition(state)
        expected = diffusion.kl_divergence(mean, reference, std)
        assert (expected > 1e-3).all()
        torch.testing.assert_close(buffer.kl[:, t], expected, rtol=1e-4, atol=1e-6)
    assert not collect(make_agent()).kl.any()


@pytest.mark.slow
def test_the_reference_draws_for_those_who_learn_from_its_images(make_agent: Callable[..., Any]) -> None:
    agent = make_agent(algorithm=RewardWeightedSFT)
    expected = collect(agent).latents.clone()
    perturb(agent.policy)
    assert_same(collect(agent).latents, expected)


@pytest.mark.slow
def test_images_of_a_group_have_one_prompt(make_agent: Callable[..., Any]) -> None:
    agent = make_agent(algorithm=GRPO, group_size=2, same_noise="group", images_per_iteration=16)
    agent.images_drawn = 32
    buffer = collect(agent)
    assert buffer.prompts[::2] == buffer.prompts[1::2] == draw_prompts(agent, range(32, 48))[::2]
    assert len(set(buffer.prompts)) > 1
    assert torch.equal(buffer.latents[::2, 0], buffer.latents[1::2, 0])
    assert not (buffer.latents[::2, 1] == buffer.latents[1::2, 1]).any()
    assert len(buffer.latents[::2, 0].flatten(1).unique(dim=0)) == 8


@pytest.mark.slow
def test_prompts_come_from_the_environments_set(make_env: Callable[..., Any], make_agent: Callable[..., Any]) -> None:
    prompts = draw_prompts(make_agent(), range(300))
    assert set(prompts) == set(PROMPTS)
    assert min(prompts.count(prompt) for prompt in PROMPTS) > 70
    assert draw_prompts(make_agent(), range(290, 300)) == prompts[290:]
    assert set(draw_prompts(make_agent(make_env(prompts="the moon")), range(9))) == {"the moon"}


# --- What callbacks see


@pytest.mark.slow
def test_callbacks_are_asked_after_each_step(make_env: Callable[..., Any], make_agent: Callable[..., Any]) -> None:
    agent = make_agent(make_env(3, reward={colours: 2.0}), images_per_iteration=5)
    seen: list[tuple[int, dict[str, Any]]] = []

    def look(watch: Watch) -> None:
        values = {name: watch.locals[name] for name in ("infos", "rewards", "dones")}
        seen.append((watch.num_timesteps, values))

    buffer = collect(agent, Watch(look))
    assert [steps for steps, _ in seen] == [3, 6, 9, 11, 13, 15]
    for number, (_, values) in enumerate(seen):
        n, is_last = (3 if number < T else 2), number % T == T - 1
        assert values["dones"].tolist() == [is_last] * n
        assert len(values["infos"]) == len(values["rewards"]) == n
        if not is_last:
            assert not values["rewards"].any()
            assert values["infos"] == [{}] * n
    infos = seen[T - 1][1]["infos"] + seen[-1][1]["infos"]
    rewards = np.concatenate([seen[T - 1][1]["rewards"], seen[-1][1]["rewards"]])
    assert [info["prompt"] for info in infos] == buffer.prompts
    for image, info in enumerate(infos):
        assert info["image"].shape == (16, 16, 3)
        assert info["episode"]["l"] == T
        assert info["episode"]["r"] == rewards[image] == pytest.approx(2 * sum(info["rewards"].values()))
    assert_same(torch.from_numpy(rewards), buffer.final_rewards)
    assert [episode["r"] for episode in agent.ep_info_buffer] == rewards.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [DPOK, RewardWeightedSFT])
def test_callbacks_find_the_pretrained_model_in_the_environment(
    make_agent: Callable[..., Any], algorithm: type
) -> None:
    agent = make_agent(algorithm=algorithm)
    env = agent.denoising_env
    observation, _ = env.reset(seed=0)
    expected = reference_policy(env, seed=0)(observation)
    perturb(agent.policy)
    acted = []
    collect(agent, Watch(lambda _: acted.append(reference_policy(env, seed=0)(observation))))
    assert len(acted) == T
    for action in acted:
        assert_same(action, expected)


# --- Interruptions


class Interrupting:
    """A reward that raises an error in its n-th call."""

    def __init__(self, error: type[BaseException] | None, call: int) -> None:
        self.error, self.call, self.calls = error, call, 0

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        if self.error is not None and self.calls == self.call:
            raise self.error
        return redness(images, prompts)


def make_ddpo(
    make_env: Callable[..., Any],
    make_agent: Callable[..., Any],
    error: type[BaseException] | None = None,
    call: int = 0,
) -> DDPO:
    """Makes an agent with statistics that an image must not enter twice; its iterations have two chunks of images."""
    env = make_env(2, reward={Interrupting(error, call): 1.0})
    kwargs: dict[str, Any] = {"normalize_rewards": True, "statistics_size": 4, "min_count": 1}
    return make_agent(env, DDPO, images_per_iteration=N, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2 * T, 2 * T + 1, 4 * T - 1])
def test_a_callback_that_stops_an_iteration(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], step: int
) -> None:
    """The callback is asked 2 T times in an iteration."""
    agent = make_ddpo(make_env, make_agent)
    agent.learn(3 * UPDATE, Watch(lambda watch: watch.n_calls < step))
    n_whole = (step - 1) // (2 * T)
    assert agent._n_updates == n_whole
    assert_goes_on(agent, n_whole, make_ddpo(make_env, make_agent))


@pytest.mark.slow
@pytest.mark.parametrize(("error", "call"), [(KeyboardInterrupt, 2), (KeyboardInterrupt, 3), (ValueError, 4)])
def test_an_error_in_an_iteration(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], error: type[BaseException], call: int
) -> None:
    """The reward is called twice in an iteration."""
    agent = make_ddpo(make_env, make_agent, error, call)
    with pytest.raises(error):
        agent.learn(3 * UPDATE)
    assert_goes_on(agent, (call - 1) // 2, make_ddpo(make_env, make_agent))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [DPOK, DDPO])
def test_an_interrupt_in_an_update_counts_no_images(
    algorithm: type[DPOK | DDPO], make_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor their rewards: the images are drawn again, and no statistics see one of them twice."""
    agent = make_agent(algorithm=algorithm, normalize_rewards=True)
    agent.learn(UPDATE)
    statistics = deepcopy(agent.algorithm_state())

    def interrupted(batch: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(agent, "backward", interrupted)  # the advantages are computed by then
    with pytest.raises(KeyboardInterrupt):
        agent.learn(UPDATE, reset_num_timesteps=False)
    assert (agent.iteration, agent.images_drawn, agent.num_timesteps) == (1, N, UPDATE)
    assert agent.algorithm_state() == statistics


def assert_goes_on(agent: DDPO, n_whole: int, other: DDPO) -> None:
    """Asserts that whole iterations are counted, and that the agent ends as another one that is not interrupted."""
    assert (agent.iteration, agent.images_drawn, agent.num_timesteps) == (n_whole, n_whole * N, n_whole * UPDATE)
    agent.learn((3 - n_whole) * UPDATE, reset_num_timesteps=False)
    other.learn(3 * UPDATE)
    assert agent.state_dict()["state"] == other.state_dict()["state"]
    assert_same(snapshot(agent), snapshot(other))
    assert_same([episode["r"] for episode in agent.ep_info_buffer], [episode["r"] for episode in other.ep_info_buffer])


@pytest.mark.slow
def test_an_iteration_that_a_callback_ends_with_its_last_step_is_not_complete(make_agent: Callable[..., Any]) -> None:
    agent = make_agent()
    agent.learn(UPDATE, Watch(lambda watch: not watch.locals["dones"].any()))
    assert (agent.iteration, agent.images_drawn, agent.num_timesteps) == (0, 0, 0)


# --- Rewards


@pytest.mark.slow
def test_rewards_that_are_not_finite_are_not_valid(
    make_env: Callable[..., Any], make_agent: Callable[..., Any]
) -> None:
    agent = make_agent(make_env(reward={every_other_fails: 1.0}, non_finite="mask", decode_batch_size=4))
    buffer = collect(agent)
    assert buffer.valid.tolist() == [True, False] * (N // 2)
    assert buffer.final_rewards.isfinite().all()
    assert buffer.final_rewards[1::2].tolist() == [0.0, 0.0]
    assert len(agent.ep_info_buffer) == 2
    assert agent.logger.name_to_value["rollout/valid_share"] == 0.5
    expected = buffer.final_rewards[::2].mean().item()
    assert agent.logger.name_to_value["rollout/every_other_fails"] == pytest.approx(expected)


@pytest.mark.slow
def test_without_any_valid_reward_there_is_no_mean(
    make_env: Callable[..., Any], make_agent: Callable[..., Any]
) -> None:
    agent = make_agent(make_env(reward={always_nan: 1.0}, non_finite="mask"))
    collect(agent)
    assert agent.logger.name_to_value["rollout/valid_share"] == 0
    assert "rollout/always_nan" not in agent.logger.name_to_value


def test_a_reward_with_other_components_for_some_images(
    make_env: Callable[..., Any], make_agent: Callable[..., Any]
) -> None:
    n_calls = itertools.count()

    def changing(images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {f"component {next(n_calls)}": torch.zeros(len(images))}

    env = make_env(2, reward={changing: 1.0})
    with pytest.raises(ValueError, match=r"has \['component 0'\] for some and \['component 1'\] for others"):
        make_agent(env, images_per_iteration=4).learn(UPDATE)
    with pytest.raises(ValueError, match="must have the same components for all images"):
        sample_images(env.process, env, list(env.prompts.train[:1]) * 3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("n_envs", [2, 4])
def test_rewards_are_normalized_for_learning_only(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], n_envs: int
) -> None:
    """By the statistics of all images so far, those of the iteration included, however it is cut into chunks."""
    raw: list[float] = []
    agent = make_agent(make_env(n_envs, reward={colours: 2.0}), images_per_iteration=N, normalize_rewards=True)
    components: dict[str, list[float]] = {"red": [], "blue": []}

    def look(watch: Watch) -> None:
        if watch.locals["dones"].all():
            raw.extend(watch.locals["rewards"].tolist())
            for info in watch.locals["infos"]:
                for name, values in components.items():
                    values.append(info["rewards"][name])

    for iteration in range(2):
        buffer = collect(agent, Watch(look))
        agent.images_drawn += N
        expected = np.zeros(N)
        for values in components.values():
            expected += 2 * (np.array(values) - np.mean(values))[-N:] / np.std(values)
        np.testing.assert_allclose(buffer.final_rewards, expected, rtol=1e-3, atol=1e-4)
        totals = 2 * (np.array(components["red"]) + np.array(components["blue"]))
        np.testing.assert_allclose(raw, totals, rtol=1e-5)
        latest = totals[iteration * N :]
        logged = agent.logger.name_to_value
        assert 2 * (logged["rollout/red"] + logged["rollout/blue"]) == pytest.approx(latest.mean(), rel=1e-4)


# --- The log


def test_names_in_the_log_are_short_and_different() -> None:
    long = "a-reward-with-a-name-that-is-much-too-long-for-the-console"
    names = ["red", long, "x" + long, long + "2", "red"]
    short = shorten_names(names)
    assert short[0] == "red"
    assert all(len(name) <= 28 for name in short)
    assert len(set(short)) == len(names)
    assert short[1] == long[-28:]


@pytest.mark.slow
def test_log_of_a_rollout(make_env: Callable[..., Any], make_agent: Callable[..., Any]) -> None:
    agent = make_agent(make_env(2, reward={colours: 1.0}), images_per_iteration=N)
    agent.set_logger(Logger(None, []))
    agent.images_drawn = 2 * N
    collect(agent)
    logged = agent.logger.name_to_value
    assert logged["rollout/images"] == 3 * N
    assert logged["time/rollout_images_per_second"] > 0
    assert {"rollout/red", "rollout/blue", "rollout/valid_share"} <= logged.keys()


def test_the_environment_is_not_stepped(
    make_env: Callable[..., DenoisingVectorEnv], make_agent: Callable[..., Any]
) -> None:
    """Its episodes are someone else's; only its model, prompts and reward are used."""
    env = make_env()
    agent = make_agent(env)
    _, callback = agent._setup_learn(1)  # SB3's, which resets the environment
    state = [generator.bit_generator.state for generator in env.np_random]
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
    assert [generator.bit_generator.state for generator in env.np_random] == state
    env.step(np.zeros((N, 4, 8, 8), np.float32))  # its episode goes on
