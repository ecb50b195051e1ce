"""The command that serves a reward: what it passes on, and what it refuses."""

from typing import Any

import pytest

from agents.cli import serve_reward
from agents.cli.main import main
from dpok_gym.rewards.remote import server


def test_options_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *args, **kwargs: served.append((args, kwargs)))
    words = ["serve-reward", "mixture-bump=2", "--port", "80", "--token", "SECRET", "--allowed-host", "a", "b"]
    assert main(words) == 0
    assert served == [
        (({"mixture-bump": 2.0}, "127.0.0.1", 80, 64), {"token": "SECRET", "allowed_hosts": ("a", "b")}),
    ]
    assert "SECRET" not in repr(serve_reward.parse(words[1:]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", ""], "the host must name a network interface, such as 127.0.0.1; 0.0.0.0 stands for all of them"),
        (["--token", ""], "the token must be one or more visible ASCII characters"),
        (["--token", "SEC RET"], "the token must be one or more visible ASCII characters"),
        (["--host", "nowhere"], "cannot listen on nowhere port 8000"),
    ],
)
def test_bad_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve-reward", "mixture-bump", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "SEC" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("address", ["http://ada:SECRET@host:1", "http://ada:SEC=RET@host", "http://host?key=SECRET"])
def test_no_secret_of_an_address_is_written(address: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--env", "DPOK-Mixture-v0", "--reward", address, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "put a token into the environment variable DPOK_REWARD_TOKEN" in error
    assert "SEC" not in error
    assert not (tmp_path / "run").exists()
