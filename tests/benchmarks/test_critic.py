"""The benchmark of the critics."""

import pytest
import torch

from benchmarks import critic


def test_quarters() -> None:
    # Ten steps: 0 to 2, 3 and 4, 5 to 7, 8 and 9.
    assert critic.quarters(torch.arange(10.0)) == [1.0, 3.5, 6.0, 8.5]


def test_images_needed() -> None:
    rewards = [0.0, 3.0, 0.0, 1.0, 2.0]
    assert critic.images_needed(rewards, 1.0) == 3 * 64
    assert critic.images_needed(rewards, 1.2) == 4 * 64
    assert critic.images_needed(rewards, 2.0) is None


@pytest.mark.slow
def test_what_can_be_explained_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = critic.ceiling("one prompt", n_states=8, n_continuations=4)
    assert shares[0] < 0.5 < shares[3] <= 1
    monkeypatch.setattr(critic, "N_IMAGES", 16)
    explained = critic.explained_variances("one prompt", ["reward, no look", "reward"], n_rollouts=2, n_scored=1)
    assert explained["reward"][3] > 1 / 3 > explained["reward, no look"][3]
