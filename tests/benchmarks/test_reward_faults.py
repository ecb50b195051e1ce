"""The benchmarks of rewards that fail and of slow rewards, in short."""

import pytest

from benchmarks import reward_faults, reward_threads
from dpok_gym import RemoteReward


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(reward_faults, "TIMEOUT", 0.5)
    defaults = RemoteReward.__init__.__kwdefaults__ or {}
    monkeypatch.setattr(RemoteReward.__init__, "__kwdefaults__", defaults | {"backoff": 0})


@pytest.mark.slow
def test_faults_change_nothing() -> None:
    with reward_faults.serving(0.0) as good:
        expected = reward_faults.train(12, good)
    with reward_faults.serving(0.4) as faulty:
        reward_faults._compare(reward_faults.train(12, faulty), expected)
    assert set(faulty.faults) == set(reward_faults.FAULTS)
    with reward_faults.serving(1.0) as bad, reward_faults.serving(0.0) as good:
        reward_faults._compare(reward_faults.train(12, bad, good), expected)
    assert bad.faults.total() >= 1  # then it rests, perhaps until the end
    with reward_faults.serving(0.0) as good, pytest.raises(RuntimeError, match="the weights are not those"):
        reward_faults._compare(reward_faults.train(11, good), expected)


@pytest.mark.slow
def test_what_was_learned_is_saved_when_the_server_goes_away(tmp_path, capsys) -> None:
    reward_faults.train_until_it_goes_away(2, tmp_path / "run")
    assert "no server of the reward" in capsys.readouterr().err


def test_threads_of_slow_rewards(capsys) -> None:
    ratios = reward_threads.main(["--images", "2", "--seconds", "0.01"])
    assert set(ratios) == {"waiting", "computing"}
    assert "times as fast" in capsys.readouterr().out
