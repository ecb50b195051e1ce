"""What is missing in a model's files, and whether there is a hub; the models' tests see it in whole models."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from dpok_gym.utils.hub import check_hub_id, describe_wrong_weights, find_outage, has_vocabulary


@pytest.mark.parametrize(
    ("missing", "mismatched", "expected"),
    [
        ([], [], ""),
        (["b"], [], "lacks 1 weights or has them in another shape, such as b"),
        ({"b", "a"}, [("c", (1,), (2,))], "lacks 3 weights or has them in another shape, such as a, b, c"),
        ([], ["d", "c", "b", "a"], "lacks 4 weights or has them in another shape, such as a, b, c"),
    ],
)
def test_wrong_weights(missing: object, mismatched: object, expected: str) -> None:
    assert describe_wrong_weights({"missing_keys": missing, "mismatched_keys": mismatched}) == expected


@pytest.mark.parametrize(("size", "expected"), [(0, False), (2, False), (3, True), (49408, True)])
def test_vocabulary(size: int, expected: bool) -> None:
    """The special tokens alone make no vocabulary, though one of them may have several roles."""
    tokenizer = SimpleNamespace(vocab_size=size, all_special_ids=[0, 1, 1])
    assert has_vocabulary(tokenizer) is expected


class _Refuses(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        self.send_error(503)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name in the base class)
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Refuses)
    server.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_answers_is_there(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers: the libraries then say what is wrong."""
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert find_outage() is None
    assert len(server.requests) == 1  # type: ignore[attr-defined]


def test_a_hub_that_is_not_there_is_asked_once(
    server: HTTPServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = HTTPServer(("127.0.0.1", 0), _Refuses)
    free.server_close()  # nothing answers at its port
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.server_port}")
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)  # what a retry would do
    assert "ConnectError" in str(find_outage())
    assert (slept, caplog.messages) == ([], [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert find_outage() == "HF_HUB_OFFLINE is set"
    assert server.requests == []  # type: ignore[attr-defined]


def test_hub_ids_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("gpt2", "openai/clip-vit-large-patch14", "stabilityai/sd-vae-ft-mse", "models/sd15"):
        check_hub_id("the model", name)
    for name in ("./a", "../a", "/a", "~/a", "a/b/c", "a/", "my model", "a.safetensors", "a/b.ckpt", "C:\\a", ""):
        with pytest.raises(FileNotFoundError, match="the model: there is no file or folder '"):
            check_hub_id("the model", name)
    check_hub_id("the model", "openai/clip", is_unknown=True)
    with pytest.raises(FileNotFoundError, match="no file or folder 'models/sd15'; check the path and the working"):
        check_hub_id("the model", "models/sd15", is_unknown=True)
