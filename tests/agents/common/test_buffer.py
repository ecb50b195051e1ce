"""What goes into the buffer of trajectories, and what comes out as transitions."""

import pytest
import torch
from torch import Tensor

from agents.common.buffer import Normalization, TrajectoryBuffer, Transitions, inclusion_probabilities

N, T, SHAPE, TOKENS = 4, 3, (1, 2, 2), 2
REWARDS = torch.tensor([1.0, 2.0, 3.0, 6.0])


def filled(numbers: Tensor) -> Tensor:
    """Latents of one number each."""
    return numbers.float().reshape(-1, 1, 1, 1).expand(-1, *SHAPE)


def full_buffer(normalize: Normalization = False, gamma: float = 1.0, **valid: list[bool]) -> TrajectoryBuffer:
    """Two pictures from each of two environments; every number tells the trajectory n and the step t it belongs to."""
    buffer = TrajectoryBuffer(N, T, SHAPE, TOKENS, "cpu")
    for rows in (slice(0, 2), slice(2, 4)):
        n = torch.arange(N)[rows]
        for t in range(T):
            state = 10 * n + t
            observation = {
                "latent": filled(state),
                "step": torch.full((2,), t),
                "prompt": n[:, None].expand(-1, TOKENS),
            }
            buffer.add(rows, t, observation, filled(state + 1), filled(-state), state / 100)
    buffer.rewards[:, -1] = REWARDS
    if valid:
        buffer.valid = torch.tensor(valid["valid"])
    buffer.finish(gamma, 1.0, normalize)
    return buffer


def states(batches: list[Transitions]) -> list[int]:
    """10 n + t of each transition."""
    return [int(10 * n + t) for batch in batches for n, t in zip(batch.prompt[:, 0], batch.step, strict=True)]


EVERYTHING = [10 * n + t for n in range(N) for t in range(T)]


def test_each_latent_is_stored_once() -> None:
    buffer = full_buffer()
    assert buffer.latents.shape == (N, T + 1, *SHAPE)
    assert torch.equal(buffer.latents[:, :, 0, 0, 0], 10.0 * torch.arange(N)[:, None] + torch.arange(T + 1))
    assert buffer.means.shape == (N, T, *SHAPE)


def test_what_belongs_together_stays_together() -> None:
    (batch,) = full_buffer().get(None)
    assert sorted(states([batch])) == EVERYTHING
    state = 10 * batch.prompt[:, 0] + batch.step
    assert torch.equal(batch.latents, filled(state))
    assert torch.equal(batch.actions, filled(state + 1))
    assert torch.equal(batch.old_means, filled(-state))
    rewards = REWARDS[batch.prompt[:, 0]]
    torch.testing.assert_close(batch.advantages, rewards - state / 100)
    torch.testing.assert_close(batch.returns, rewards)
    assert batch.prompt.shape == (N * T, TOKENS)
    assert batch.observation == {"latent": batch.latents, "step": batch.step, "prompt": batch.prompt}


def test_discount() -> None:
    buffer = full_buffer(gamma=0.5)
    torch.testing.assert_close(buffer.returns, REWARDS[:, None] * torch.tensor([0.25, 0.5, 1.0]))


def test_normalized_advantages() -> None:
    plain, normal = full_buffer().advantages, full_buffer(normalize=True).advantages
    torch.testing.assert_close(normal, (plain - plain.mean()) / plain.std(correction=0))
    torch.testing.assert_close(full_buffer(normalize=True).returns, full_buffer().returns)


def test_centred_advantages() -> None:
    plain, centred = full_buffer().advantages, full_buffer(normalize="center").advantages
    torch.testing.assert_close(centred.mean(dim=0), torch.zeros(T), atol=1e-6, rtol=0)
    torch.testing.assert_close(centred - plain, (centred - plain)[:1].expand(N, T))  # a shift of each step
    some = full_buffer(normalize="center", valid=[True, False, True, False]).advantages[[0, 2]]
    torch.testing.assert_close(some.mean(dim=0), torch.zeros(T), atol=1e-6, rtol=0)


def test_invalid_trajectories_count_for_nothing() -> None:
    buffer = full_buffer(normalize=True, valid=[True, False, True, False])
    assert buffer.advantages[[0, 2]].mean().item() == pytest.approx(0, abs=1e-6)
    assert buffer.advantages[[0, 2]].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    for _ in range(5):
        assert sorted(states(list(buffer.get(2)))) == [0, 1, 2, 20, 21, 22]
        assert set(states(list(buffer.get(2, fraction=0.5)))) < {0, 1, 2, 20, 21, 22}


def test_nothing_valid() -> None:
    buffer = full_buffer(normalize=True, valid=[False] * N)
    assert buffer.advantages.isfinite().all()
    for batch_size in (None, 2):
        assert list(buffer.get(batch_size)) == []


@pytest.mark.parametrize(("batch_size", "sizes"), [(5, [5, 5, 2]), (4, [4, 4, 4]), (100, [12]), (None, [12])])
def test_batches_are_a_partition(batch_size: int | None, sizes: list[int]) -> None:
    batches = list(full_buffer().get(batch_size))
    assert [len(batch) for batch in batches] == sizes
    assert sorted(states(batches)) == EVERYTHING


@pytest.mark.parametrize(("fraction", "counts"), [(1.0, {12}), (0.5, {6}), (0.32, {3, 4}), (0.01, {0, 1})])
@pytest.mark.parametrize("importance", [None, torch.tensor([3.0, 1.0, 0.1])])
def test_fraction(fraction: float, counts: set[int], importance: torch.Tensor | None) -> None:
    for _ in range(5):
        found = states(list(full_buffer().get(5, fraction, importance)))
        assert len(set(found)) == len(found)
        assert len(found) in counts
        assert set(found) <= set(EVERYTHING)


def test_weighted_means_do_not_depend_on_what_is_chosen_more_often() -> None:
    """Over many draws, the weighted mean of the chosen ones is the mean of all, each entry's share included."""
    buffer, importance = full_buffer(), torch.tensor([3.0, 1.0, 0.1])
    totals, n_draws = dict.fromkeys(EVERYTHING, 0.0), 4000
    for _ in range(n_draws):
        for batch in buffer.get(None, 0.5, importance):
            for state, weight in zip(states([batch]), batch.weight.tolist(), strict=True):
                totals[state] += weight / 6
    for state, total in totals.items():
        assert total / n_draws == pytest.approx(1 / 12, abs=0.025), state  # 0.006 is a standard deviation of the rarest


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 1.0])
def test_inclusion_probabilities(fraction: float) -> None:
    importance = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1])
    probability = inclusion_probabilities(importance, fraction)
    assert probability.mean().item() == pytest.approx(fraction)
    assert probability.max() <= 1
    proportional = probability[probability < 1] / importance[probability < 1]
    torch.testing.assert_close(proportional, proportional[:1].expand_as(proportional))
    assert torch.equal(inclusion_probabilities(torch.ones(4), fraction), torch.full((4,), fraction))


def test_order_is_random() -> None:
    buffer = full_buffer()
    torch.manual_seed(1)
    first, second = states(list(buffer.get(4))), states(list(buffer.get(4)))
    torch.manual_seed(1)
    assert states(list(buffer.get(4))) == first != second
    assert first != EVERYTHING


@pytest.mark.parametrize(("size", "sizes"), [(5, [5, 5, 2]), (12, [12]), (50, [12]), (None, [12])])
def test_split(size: int | None, sizes: list[int]) -> None:
    (batch,) = full_buffer().get(None)
    parts = list(batch.split(size))
    assert [len(part) for part in parts] == sizes
    for name in vars(batch):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
