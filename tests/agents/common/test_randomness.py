"""Random numbers are a function of (seed, purpose, index), and of nothing else."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import DDPO, GRPO, REINFORCE, RewardWeightedSFT, evaluate
from agents.common.randomness import ImageNoise, Purpose, make_generator
from tests.agents.common.support import PROMPTS, Watch, collect, snapshot
from tests.support import assert_same

T = 3
SHAPE = (4, 8, 8)


def first_numbers(seed: int, purpose: Purpose, *index: int) -> tuple[float, ...]:
    return tuple(make_generator(seed, purpose, *index).standard_normal(3).tolist())


# --- Generators


def test_a_generator_depends_on_seed_purpose_and_index() -> None:
    keys = []
    for seed in (0, 1, 2**32):
        for purpose in Purpose:
            keys += [
                (seed, purpose),
                (seed, purpose, 0),
                (seed, purpose, 1),
                (seed, purpose, 0, 1),
                (seed, purpose, 1, 0),
            ]
    numbers = {key: first_numbers(*key) for key in keys}
    assert len(set(numbers.values())) == len(keys)
    assert {key: first_numbers(*key) for key in reversed(keys)} == numbers


def test_the_numbers_are_part_of_every_run() -> None:
    """Other numbers would be other images of every published run: whoever changes them must mean to."""
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "PROMPT": 0,
        "INITIAL_NOISE": 1,
        "ACTION_NOISE": 2,
        "BATCHES": 3,
        "WEIGHTS": 4,
        "FIT": 5,
        "EVALUATION_INITIAL_NOISE": 6,
        "EVALUATION_ACTION_NOISE": 7,
        "STEERING": 8,
        "ANCHOR": 9,
        "ANCHOR_BATCHES": 10,
        "DRIFT": 11,
    }
    numbers = make_generator(3, Purpose.INITIAL_NOISE, 5).standard_normal(2, np.float32)
    np.testing.assert_allclose(numbers, [-0.67565238, 0.34180197], rtol=1e-6)


# --- The noise of images


def draw(noise: ImageNoise, n_steps: int = T) -> Tensor:
    """Draws all the noise there is, (B, 1 + T, C, h, w)."""
    return torch.stack([noise.initial_latents(), *[noise(step) for step in range(n_steps)]], dim=1)


def test_noise_is_standard_normal_and_nowhere_the_same() -> None:
    noise = draw(ImageNoise.for_training(0, range(32), SHAPE, "cpu"))
    assert noise.shape == (32, 1 + T, *SHAPE)
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert len(noise.flatten(0, 1).flatten(1).unique(dim=0)) == 32 * (1 + T)


def test_the_noise_of_an_image_depends_on_its_number_alone() -> None:
    whole = draw(ImageNoise.for_training(3, range(10), SHAPE, "cpu"))
    assert torch.equal(draw(ImageNoise.for_training(3, range(4, 7), SHAPE, "cpu")), whole[4:7])
    assert torch.equal(draw(ImageNoise.for_training(3, [9, 0], SHAPE, "cpu")), whole[[9, 0]])
    assert not (draw(ImageNoise.for_training(4, range(10), SHAPE, "cpu")) == whole).any()


def test_images_can_share_their_initial_noise() -> None:
    plain = draw(ImageNoise.for_training(3, range(4), SHAPE, "cpu"))
    shared = draw(ImageNoise.for_training(3, range(4), SHAPE, "cpu", initial_images=[0, 0, 2, 2]))
    assert torch.equal(shared[:, 0], plain[[0, 0, 2, 2], 0])
    assert torch.equal(shared[:, 1:], plain[:, 1:])


def test_evaluation_noise_is_never_training_noise() -> None:
    training = [draw(ImageNoise.for_training(seed, range(16), SHAPE, "cpu")) for seed in range(8)]
    evaluation = draw(ImageNoise.for_evaluation(range(16), SHAPE, "cpu"))
    trained_on = torch.cat(training).flatten(0, 1).flatten(1)
    for noise in evaluation.flatten(0, 1).flatten(1):
        assert not (trained_on == noise).any()
    assert torch.equal(draw(ImageNoise.for_evaluation([7], SHAPE, "cpu")), evaluation[7:8])


def test_the_particles_of_an_image_have_noise_of_their_own() -> None:
    """The first has that of the image that is drawn alone, and more particles only add to fewer."""
    alone = draw(ImageNoise.for_evaluation([3, 4], SHAPE, "cpu"))
    three = draw(ImageNoise.for_evaluation([3, 4], SHAPE, "cpu", n_particles=3))
    two = draw(ImageNoise.for_evaluation([4], SHAPE, "cpu", n_particles=2))
    assert torch.equal(three[[0, 3]], alone)
    assert torch.equal(three[3:5], two)
    assert len(three.flatten(0, 1).flatten(1).unique(dim=0)) == 6 * (1 + T)


# --- The images of a run


def rollouts(agent: Any, n_iterations: int = 2) -> list[dict[str, Any]]:
    """Trains; returns prompts and latents of each iteration."""
    kept: list[dict[str, Any]] = []

    def keep(watch: Watch) -> None:
        buffer = agent.rollout_buffer
        if watch.locals["dones"].all() and agent.num_timesteps % (len(buffer) * T) == 0:
            kept.append(
                {"prompts": list(buffer.prompts), "latents": buffer.latents.clone(), "means": buffer.means.clone()}
            )

    agent.learn(n_iterations * agent.images_per_iteration * T, Watch(keep))
    assert len(kept) == n_iterations
    return kept


def noise_of(rollout: dict[str, Any]) -> Tensor:
    """Returns what was added to the means, in any unit."""
    return rollout["latents"][:, 1:] - rollout["means"]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "kwargs"), [(DDPO, {}), (GRPO, {"group_size": 4, "same_noise": "group"})])
def test_the_images_of_an_iteration_do_not_depend_on_how_many_are_drawn_side_by_side(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], algorithm: type, kwargs: dict[str, Any]
) -> None:
    kwargs = {"images_per_iteration": 16, "batch_size": 12, "timestep_fraction": 0.5} | kwargs
    runs = []
    for n_envs in (8, 16, 64, 5):
        # One state at a time in the network: else its last bits may depend on the others of the batch.
        agent = make_agent(make_env(n_envs), algorithm, policy_kwargs={"max_batch_size": 1}, **kwargs)
        runs.append((rollouts(agent), snapshot(agent)))
    assert set(runs[0][0][0]["prompts"]) == set(PROMPTS)
    assert not torch.equal(runs[0][0][0]["latents"][:, 0], runs[0][0][1]["latents"][:, 0])
    for run in runs[1:]:
        assert_same(run, runs[0])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"micro_batch_size": None}, {"batch_size": 5}], ids=str)
def test_prompts_and_noise_do_not_depend_on_how_the_update_is_cut(
    make_agent: Callable[..., Any], changes: dict[str, Any]
) -> None:
    one, other = rollouts(make_agent()), rollouts(make_agent(**changes))
    assert_same(other[0], one[0])
    # The weights differ now, in the last bits or in more; prompts and noise do not.
    assert other[1]["prompts"] == one[1]["prompts"]
    assert torch.equal(other[1]["latents"][:, 0], one[1]["latents"][:, 0])
    torch.testing.assert_close(noise_of(other[1]), noise_of(one[1]), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_agent_draws_what_the_first_one_would_have_drawn(
    make_env: Callable[..., Any], make_agent: Callable[..., Any]
) -> None:
    whole = make_agent()
    expected = rollouts(whole, 3)
    first = make_agent()
    rollouts(first, 1)
    resumed = make_agent(make_env(2), images_per_iteration=4, seed=99)  # the seed comes with the state
    resumed.load_state_dict(first.state_dict())
    rest = rollouts(resumed, 2)
    for iteration, rollout in zip(expected[1:], rest, strict=True):
        assert rollout["prompts"] == iteration["prompts"]
        assert torch.equal(rollout["latents"][:, 0], iteration["latents"][:, 0])
        torch.testing.assert_close(noise_of(rollout), noise_of(iteration), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_each_iteration_and_each_seed_has_images_of_its_own(make_agent: Callable[..., Any]) -> None:
    latents = []
    for seed in (0, 1):
        for rollout in rollouts(make_agent(seed=seed)):
            latents += list(rollout["latents"][:, :-1].flatten(0, 1))
    assert len(torch.stack(latents).flatten(1).unique(dim=0)) == len(latents) == 2 * 2 * 4 * T


@pytest.mark.slow
def test_without_a_seed_every_run_is_another_one(make_agent: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    one = collect(make_agent(seed=None)).latents.clone()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (SB3's)
    other = collect(make_agent(seed=None)).latents
    assert not (one == other).any()


# --- Other people's generators


def global_states() -> list[Any]:
    return [torch.get_rng_state().clone(), np.random.get_state(), random.getstate()]  # noqa: NPY002 (libraries' own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [
        (REINFORCE, {}),
        (DDPO, {"batch_size": 5, "timestep_fraction": 0.5}),
        (RewardWeightedSFT, {"n_gradient_steps": 2, "batch_size": 3}),
    ],
)
def test_no_global_generator_is_read_or_changed(
    make_agent: Callable[..., Any], algorithm: type, kwargs: dict[str, Any]
) -> None:
    trained = []
    for seed in (1, 2):
        agent = make_agent(algorithm=algorithm, **kwargs)
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (libraries' own)
        random.seed(seed)
        before = global_states()
        agent.learn(2 * 4 * T)
        evaluate(agent.policy, agent.denoising_env, PROMPTS, 0)
        assert_same(global_states(), before)
        trained.append(snapshot(agent))
    assert_same(trained[0], trained[1])


@pytest.mark.slow
def test_new_weights_depend_on_the_seed_alone(make_agent: Callable[..., Any]) -> None:
    agents = []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(global_seed)
        agents.append(snapshot(make_agent(seed=seed, critic_kind="network")))
    assert_same(agents[0], agents[1])
    different = {name for name, value in agents[0].items() if not torch.equal(value, agents[2][name])}
    assert {name.partition(".")[0] for name in different} == {"lora", "critic"}


def test_an_agent_without_a_seed_takes_no_global_numbers(make_agent: Callable[..., Any]) -> None:
    make_agent()  # modules that are imported only now may draw some
    before = global_states()
    make_agent(seed=None)
    assert_same(global_states(), before)
