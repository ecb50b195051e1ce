"""What goes into the buffer of trajectories, and what comes out as transitions."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.common.buffer import (
    TrajectoryBuffer,
    Transitions,
    even_sizes,
    inclusion_probabilities,
    number_groups,
    select,
    split_evenly,
    systematic_sample,
    within,
)
from dpok_gym.samplers import DenoisingStep, State
from tests.support import assert_same

N, T, SHAPE = 4, 3, (1, 2, 2)
REWARDS = torch.tensor([1.0, 2.0, 3.0, 6.0])
PROMPTS = ["a", "b", "c", "d"]
EVERYTHING = [10 * n + t for n in range(N) for t in range(T)]


def filled(numbers: Tensor) -> Tensor:
    """Returns latents of one number each."""
    return numbers.float().reshape(-1, 1, 1, 1).expand(-1, *SHAPE)


def add_images(buffer: TrajectoryBuffer, rows: slice, shift: int = 0) -> None:
    """Stores trajectories whose numbers tell the image n and the step t that they belong to."""
    n = torch.arange(N)[rows]
    conditioning = {"embedding": filled(n), "pooled": n[:, None].to(torch.bfloat16)}
    buffer.begin(rows, conditioning)
    for t in range(T):
        number = 10 * n + t + shift
        state = State(filled(number), torch.full((len(n),), t), conditioning)
        buffer.add(rows, DenoisingStep(t, state, filled(-number), torch.ones(len(n)), filled(number + 1)))


def full_buffer(valid: list[bool] | None = None) -> TrajectoryBuffer:
    """Returns two images from each of two chunks."""
    buffer = TrajectoryBuffer(N, T, SHAPE, "cpu")
    buffer.prompts = list(PROMPTS)
    for rows in (slice(0, 2), slice(2, 4)):
        add_images(buffer, rows)
    buffer.finish(REWARDS, torch.ones(N, dtype=torch.bool))
    number = 10 * torch.arange(N)[:, None] + torch.arange(T)
    buffer.advantages, buffer.returns = number / 100, number / 1000
    if valid is not None:
        buffer.valid = torch.tensor(valid)
    return buffer


def test_actions_that_were_not_taken_are_refused() -> None:
    """A network that writes into its latents would leave others in the buffer than the policy has drawn."""
    buffer = TrajectoryBuffer(N, T, SHAPE, "cpu")
    latents, step = filled(torch.arange(N)).clone(), torch.zeros(N, dtype=torch.int64)
    noisy, mean, std = latents + 1, -latents, torch.ones(N)
    noisy[0] = torch.nan  # a model that diverged draws these; they are refused elsewhere
    buffer.begin(slice(N), {})
    buffer.add(slice(N), DenoisingStep(0, State(latents, step, {}), mean, std, noisy))
    buffer.add(slice(N), DenoisingStep(1, State(noisy, step + 1, {}), mean, std, noisy))
    noisy *= 0.999
    with pytest.raises(RuntimeError, match="latents of denoising step 2 are not the action of the step before it"):
        buffer.add(slice(N), DenoisingStep(2, State(noisy, step + 2, {}), mean, std, noisy))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def numbers(batches: list[Transitions]) -> list[int]:
    """Returns 10 n + t of each transition."""
    return [number for batch in batches for number in (10 * batch.image + batch.step).tolist()]


def test_each_latent_is_stored_once() -> None:
    buffer = full_buffer()
    assert len(buffer) == N
    assert buffer.num_inference_steps == T
    assert buffer.latents.shape == (N, T + 1, *SHAPE)
    assert torch.equal(buffer.latents[:, :, 0, 0, 0], 10.0 * torch.arange(N)[:, None] + torch.arange(T + 1))
    assert torch.equal(buffer.means[:, :, 0, 0, 0], -10.0 * torch.arange(N)[:, None] - torch.arange(T))


def test_rewards_come_with_the_last_step() -> None:
    buffer = full_buffer()
    assert torch.equal(buffer.rewards, REWARDS[:, None] * torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(buffer.final_rewards, REWARDS)
    assert buffer.valid.all()


def test_a_new_rollout_replaces_the_old_one() -> None:
    buffer = full_buffer(valid=[False] * N)
    buffer.rewards[:, 0] = 7  # as an algorithm that charges the KL may leave it
    for rows in (slice(0, 1), slice(1, 4)):  # and in other chunks
        add_images(buffer, rows, shift=5)
    expected = TrajectoryBuffer(N, T, SHAPE, "cpu")
    add_images(expected, slice(0, N), shift=5)
    for each in (buffer, expected):
        each.finish(REWARDS, torch.tensor([True, False, True, True]))
    for name in ("latents", "means", "rewards", "valid", "conditioning"):
        assert_same(getattr(buffer, name), getattr(expected, name), name)


def test_the_conditioning_is_that_of_each_image() -> None:
    buffer = full_buffer()
    assert buffer.prompts == PROMPTS
    assert buffer.conditioning["pooled"].dtype == torch.bfloat16
    assert buffer.conditioning["pooled"].flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(buffer.conditioning["embedding"], filled(torch.arange(N)))
    for rows in (slice(1, 3), torch.tensor([3, 0])):
        assert_same(
            select(buffer.conditioning, rows), {name: values[rows] for name, values in buffer.conditioning.items()}
        )


def test_states_at_a_step() -> None:
    state = full_buffer().state_at(1)
    assert torch.equal(state.latents, filled(10 * torch.arange(N) + 1))
    assert state.step.tolist() == [1] * N
    assert state.conditioning["pooled"].flatten().tolist() == [0, 1, 2, 3]


def test_what_belongs_together_stays_together() -> None:
    buffer = full_buffer()
    (batch,) = buffer.batches(None, rng())
    assert sorted(numbers([batch])) == EVERYTHING
    number = 10 * batch.image + batch.step
    assert torch.equal(batch.latents, filled(number))
    assert torch.equal(batch.actions, filled(number + 1))
    assert torch.equal(batch.old_means, filled(-number))
    assert torch.equal(batch.advantages, number / 100)
    assert torch.equal(batch.returns, number / 1000)
    assert batch.weight.tolist() == [1.0] * (N * T)
    assert_same(batch.state.latents, batch.latents)
    assert_same(batch.state.step, batch.step)
    assert torch.equal(batch.state.conditioning["embedding"], filled(batch.image))
    assert batch.state.conditioning["pooled"].flatten().tolist() == batch.image.tolist()


def test_images_that_are_not_valid_are_left_out() -> None:
    buffer = full_buffer(valid=[True, False, True, False])
    for seed in range(5):
        assert sorted(numbers(list(buffer.batches(2, rng(seed))))) == [0, 1, 2, 20, 21, 22]
        assert set(numbers(list(buffer.batches(2, rng(seed), fraction=0.5)))) < {0, 1, 2, 20, 21, 22}


@pytest.mark.parametrize("batch_size", [None, 2])
def test_nothing_valid(batch_size: int | None) -> None:
    assert list(full_buffer(valid=[False] * N).batches(batch_size, rng())) == []


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(5, [6, 6]), (4, [4, 4, 4]), (8, [6, 6]), (9, [12]), (100, [12]), (None, [12])]
)
def test_batches_are_a_partition(batch_size: int | None, sizes: list[int]) -> None:
    batches = list(full_buffer().batches(batch_size, rng()))
    assert [len(batch) for batch in batches] == sizes
    assert sorted(numbers(batches)) == EVERYTHING


@pytest.mark.parametrize(("fraction", "counts"), [(1.0, {12}), (0.5, {6}), (0.32, {3, 4}), (0.01, {0, 1})])
@pytest.mark.parametrize("importance", [None, torch.tensor([3.0, 1.0, 0.1])])
def test_fraction(fraction: float, counts: set[int], importance: Tensor | None) -> None:
    for seed in range(10):
        chosen = numbers(list(full_buffer().batches(5, rng(seed), fraction, importance)))
        assert len(set(chosen)) == len(chosen)
        assert len(chosen) in counts
        assert set(chosen) <= set(EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("valid", [None, [True, False, True, True]])
def test_weighted_means_do_not_depend_on_what_is_chosen_more_often(valid: list[bool] | None) -> None:
    """Over many draws, the weighted mean of the chosen ones is the mean of all, each entry's share included."""
    buffer, importance = full_buffer(valid), torch.tensor([3.0, 1.0, 0.1])
    entries = [number for number in EVERYTHING if buffer.valid[number // 10]]
    totals, n_draws, generator = dict.fromkeys(entries, 0.0), 4000, rng()
    for _ in range(n_draws):
        for batch in buffer.batches(None, generator, 0.5, importance):
            for number, weight in zip(numbers([batch]), batch.weight.tolist(), strict=True):
                totals[number] += weight / (0.5 * len(entries))
    for number, total in totals.items():
        # 0.008 is a standard deviation of the rarest.
        assert total / n_draws == pytest.approx(1 / len(entries), abs=0.03), number


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_transitions_of_no_importance_are_never_chosen(fraction: float) -> None:
    """The others stand for themselves: on average, the weights count each of them once."""
    buffer, importance = full_buffer(), torch.tensor([3.0, 0.0, 1.0])
    totals, n_draws, generator = dict.fromkeys(EVERYTHING, 0.0), 1000, rng()
    for _ in range(n_draws):
        batches = list(buffer.batches(3, generator, fraction, importance))
        assert abs(len(numbers(batches)) - fraction * 2 * N) < 1
        for batch in batches:
            for number, weight in zip(numbers([batch]), batch.weight.tolist(), strict=True):
                totals[number] += weight / fraction / n_draws
    for number, total in totals.items():
        # 0.055 is a standard deviation of the rarer ones.
        assert total == pytest.approx(0 if number % 10 == 1 else 1, abs=1e-9 if fraction == 1 else 0.2), number


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 1.0])
def test_inclusion_probabilities(fraction: float) -> None:
    importance = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1])
    probability = inclusion_probabilities(importance, fraction)
    assert probability.mean().item() == pytest.approx(fraction)
    assert probability.max() <= 1
    proportional = probability[probability < 1] / importance[probability < 1]
    torch.testing.assert_close(proportional, proportional[:1].expand_as(proportional))
    assert torch.equal(inclusion_probabilities(torch.ones(4), fraction), torch.full((4,), fraction))
    # What has no importance is no part of the mean.
    with_zero = inclusion_probabilities(torch.cat([importance, torch.zeros(3)]), fraction)
    torch.testing.assert_close(with_zero, torch.cat([probability, torch.zeros(3)]))


def test_systematic_sample_by_hand() -> None:
    entries = torch.tensor([10, 11, 12, 13])
    probability = torch.tensor([0.5, 0.25, 1.0, 0.25])  # sums 0.5, 0.75, 1.75, 2
    assert systematic_sample(entries, probability, 0.0).tolist() == [12, 13]  # past 1 and 2
    assert systematic_sample(entries, probability, 0.5).tolist() == [10, 12]  # 1, 1.25, 2.25, 2.5
    assert systematic_sample(entries, probability, 0.3).tolist() == [11, 12]  # 0.8, 1.05, 2.05, 2.3


def test_the_order_is_decided_by_the_generator_alone() -> None:
    buffer = full_buffer()
    torch.manual_seed(1)
    first, second = numbers(list(buffer.batches(4, rng(1)))), numbers(list(buffer.batches(4, rng(2))))
    torch.manual_seed(2)
    assert numbers(list(buffer.batches(4, rng(1)))) == first
    assert first != second
    assert EVERYTHING not in (first, second)


@pytest.mark.parametrize(("size", "sizes"), [(5, [5, 5, 2]), (12, [12]), (50, [12]), (None, [12])])
def test_split(size: int | None, sizes: list[int]) -> None:
    (batch,) = full_buffer().batches(None, rng())
    parts = list(batch.split(size))
    assert [len(part) for part in parts] == sizes
    for field in fields(batch):
        whole = getattr(batch, field.name)
        if isinstance(whole, Tensor):
            assert torch.equal(torch.cat([getattr(part, field.name) for part in parts]), whole)
        else:
            assert all(getattr(part, field.name) is whole for part in parts)  # the images' conditioning is not cut


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (66, 64, [66]),  # not 64 and 2
        (126, 64, [63, 63]),
        (96, 64, [48, 48]),  # a half is rounded up
        (160, 64, [54, 53, 53]),
        (3, 64, [3]),
        (5, 1, [1, 1, 1, 1, 1]),
        (7, None, [7]),
    ],
)
def test_a_remainder_is_spread(n: int, batch_size: int | None, sizes: list[int]) -> None:
    assert even_sizes(n, batch_size) == sizes


@pytest.mark.parametrize(("size", "sizes"), [(5, [6, 6]), (8, [6, 6]), (2, [2] * 6), (None, [12])])
def test_split_evenly(size: int | None, sizes: list[int]) -> None:
    elements = torch.arange(12)
    parts = split_evenly(elements, size)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(list(parts)), elements)
    assert split_evenly(elements[:0], size) == ()


def test_a_blank_element_is_one_of_zeros() -> None:
    (batch,) = full_buffer().batches(None, rng())
    blank = batch.take(slice(0, 0)).blank()
    assert len(blank) == 1
    assert not blank.latents.any()
    assert (blank.step.tolist(), blank.image.tolist()) == ([0], [0])
    assert_same(blank.state.conditioning, select(batch.image_conditioning, slice(0, 1)))


def test_within() -> None:
    assert within(torch.tensor([5, 2, 4, 3, 7]), range(3, 6)).tolist() == [2, 1, 0]


def test_take() -> None:
    (batch,) = full_buffer().batches(None, rng())
    rows = torch.tensor([7, 2])
    assert numbers([batch.take(rows)]) == [numbers([batch])[row] for row in (7, 2)]
    assert numbers([batch.take(slice(3, 5))]) == numbers([batch])[3:5]


def test_groups_are_numbered_as_they_appear() -> None:
    assert number_groups(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]
    assert number_groups([]).shape == (0,)
