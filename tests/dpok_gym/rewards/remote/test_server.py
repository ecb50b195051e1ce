"""The reference server: the same rewards as without it, and what it says of bad requests."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from dpok_gym.rewards import RemoteReward, Reward, make_reward
from dpok_gym.rewards.base import Part
from dpok_gym.rewards.remote import connections, server
from dpok_gym.rewards.remote.connections import RewardConnection
from dpok_gym.rewards.remote.server import MAX_BODY_BYTES, MAX_PIXELS, make_app, serve
from tests.support import ending

PROMPTS = ["a red circle", "three blue stars", "a green square"]
JPEG_SIZE = "jpeg-incompressibility"


@pytest.fixture
def start() -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:

        def started(*args: Any, **kwargs: Any) -> str:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            config = uvicorn.Config(make_app(*args, **kwargs), log_level="critical", http=RewardConnection)
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield started


@pytest.fixture
def images() -> torch.Tensor:
    """With 8 bits a channel, as they are sent."""
    return torch.randint(256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)) / 255


def file(image: Any = None, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    (Image.new("RGB", (4, 4)) if image is None else image).save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def asked(n: int = 1, **changes: Any) -> dict[str, Any]:
    return {"prompts": ["a red circle"] * n, "images": [file()] * n} | changes


def post(url: str, request: Any, path: str = "/", **headers: str) -> tuple[int, Any]:
    kwargs = {"content": request} if isinstance(request, bytes) else {"json": request}
    response = httpx2.post(url + path, timeout=30, headers=headers, **kwargs)
    return response.status_code, response.json()


def ones(images: torch.Tensor, prompts: list[str]) -> list[float]:
    return [1.0] * len(prompts)


def say(url: str, words: bytes) -> socket.socket:
    """Opens a connection and sends a part of a request."""
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
    connection.sendall(words)
    return connection


def answer_of(connection: socket.socket) -> bytes:
    """Returns all that the server sends until it closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_rewards_are_the_same_as_without_it(start, images) -> None:
    url = start({"shapes-alignment": 1.0, JPEG_SIZE: -0.25})
    here, there = make_reward({"shapes-alignment": 1.0, JPEG_SIZE: -0.25}), make_reward(url)
    expected, answered = here(images, PROMPTS), there(images, PROMPTS)
    assert torch.equal(answered.total, expected.total)
    name = url.removeprefix("http://")
    assert list(answered.components) == [f"{name}/shapes-alignment", f"{name}/{JPEG_SIZE}"]
    for key, values in expected.components.items():
        assert torch.equal(answered.components[f"{name}/{key}"], expected.weights[key] * values)


def test_jpeg_and_grey_images_are_read(start) -> None:
    def seen(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    grey, coloured = Image.new("L", (8, 8), 51), Image.new("RGBA", (8, 8), (102, 102, 102, 255))
    request = asked(3, images=[file(grey), file(grey, "JPEG"), file(coloured)])
    status, reply = post(start(seen), request)
    assert status == 200
    np.testing.assert_allclose(reply["rewards"]["seen"], [0.2, 0.2, 0.4], atol=1e-6)


def test_no_finite_number_is_null(start, images) -> None:
    def broken(images: torch.Tensor, prompts: list[str]) -> dict[str, list[float]]:
        return {"sharp": [1.0, float("nan"), float("inf")], "dark": [1.0, 2.0, 3.0]}

    url = start(broken)
    _, reply = post(url, asked(3))
    assert reply == {"rewards": {"sharp": [1.0, None, None], "dark": [1.0, 2.0, 3.0]}}
    assert make_reward(url, "mask")(images, PROMPTS).valid.tolist() == [True, False, False]


def test_fixed_normalisation_is_part_of_the_reward(start, images) -> None:
    spec = {JPEG_SIZE: {"weight": 2.0, "normalize": [1.0, 0.5]}}
    url = start(spec)
    here, there = make_reward(spec)(images, PROMPTS), make_reward(url)(images, PROMPTS)
    assert torch.equal(here.total, there.total)
    assert torch.equal(here.total, (2 * ((here.components[JPEG_SIZE].double() - 1.0) / 0.5).float()))


def test_running_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be 'running'"):
        make_app({JPEG_SIZE: {"normalize": "running"}})


def test_rewards_of_one_public_name_are_refused() -> None:
    """Clients do not see the folders of a path, and would get one of the two."""
    part = Part(lambda images, prompts: torch.zeros(len(prompts)), 1.0, None)
    reward = Reward({"/runs/a/reward": part, "/runs/b/reward": part})
    with pytest.raises(ValueError, match="two rewards are named 'reward'"):
        make_app(reward)


@pytest.mark.slow
def test_health_is_answered_while_it_scores_one_request_at_a_time(start, images) -> None:
    lock, release, most = threading.Lock(), threading.Event(), []

    def slow(images: torch.Tensor, prompts: list[str]) -> list[float]:
        most.append(lock.acquire(blocking=False))
        release.wait(20)
        time.sleep(0.05)
        lock.release()
        return [1.0] * len(prompts)

    url = start(slow, max_batch=5)
    with ThreadPoolExecutor(3) as pool:
        pending = [pool.submit(post, url, asked()) for _ in range(3)]
        health = httpx2.get(url + "/health", timeout=20)
        release.set()
        assert [future.result()[0] for future in pending] == [200] * 3
    assert most == [True] * 3
    assert health.status_code == 200
    assert health.json() == {"status": "ok"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (b"hello", 400, "the request is no JSON"),
        (b"[" * 100_000, 400, "the request is no JSON"),
        ([1], 400, "the request must be"),
        ({}, 400, "'prompts' must be a list of texts, at least one"),
        (asked(0), 400, "'prompts' must be a list of texts, at least one"),
        (asked(images="x"), 400, "'images' must be a list of texts"),
        (asked(prompts=[3]), 400, "'prompts' must be a list of texts"),
        (asked(prompts=["a", "b"]), 400, "as many prompts as images, not 2 and 1"),
        (asked(images=["!"]), 400, "image 0 is neither PNG nor JPEG in base64"),
        (asked(images=["AAAA"]), 400, "image 0 is neither PNG nor JPEG"),
        (asked(images=[file(kind="GIF")]), 400, "image 0 is neither PNG nor JPEG"),
        (asked(images=[file()[:64]]), 400, "^image 0 is damaged$"),
        (asked(images=[file(kind="JPEG", progressive=True)]), 400, "image 0 is a progressive JPEG"),
        (asked(2, images=[file(), file(Image.new("RGB", (4, 5)))]), 400, r"one size, not \[\(4, 4\), \(4, 5\)\]"),
        (asked(5), 413, "5 images in one request are too many, at most 4"),
        (asked(images=[file(Image.new("1", (MAX_PIXELS // 8 + 1, 8)))]), 413, f"at most {MAX_PIXELS} pixels in each"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "the request is too large; at most 16777216 pixels in all"),
        (
            asked(prompts=["a purple cow"]),
            422,
            "^the reward cannot read a prompt or an image; the server's log says why$",
        ),
    ],
)
def test_bad_requests(start, request_, status, message) -> None:
    url = start("shapes-alignment", max_batch=4)
    answered, reply = post(url, request_)
    assert answered == status
    assert re.search(message, reply["error"])
    assert post(url, asked(images=[file(Image.new("RGB", (64, 64)))]))[0] == 200  # it goes on


def test_no_such_path(start) -> None:
    url = start(JPEG_SIZE)
    assert post(url, asked(), "/rewards") == (404, {"error": "there are POST / and GET /health"})
    assert httpx2.get(url, timeout=30).status_code == 405


def test_a_reward_that_fails(start, images, caplog) -> None:
    calls = []

    def failing(images: torch.Tensor, prompts: list[str]) -> list[float]:
        calls.append(0)
        if len(calls) < 3:
            raise RuntimeError("out of memory in /home/ada")
        return [1.0] * len(prompts)

    url = start(failing)
    assert post(url, asked()) == (500, {"error": "the reward failed; the server's log says why"})
    assert "out of memory in /home/ada" in caplog.text
    # The client takes that for something that may pass.
    assert make_reward(RemoteReward(url, backoff=0.001))(images, PROMPTS).total.tolist() == [1.0] * 3
    assert len(calls) == 3


def test_the_path_of_a_reward_is_not_told(start, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(server, "make_reward", lambda spec, non_finite: make_reward(ones, non_finite))
    monkeypatch.setattr(ones, "__name__", str(tmp_path / "my_reward"))
    assert post(start("any"), asked()) == (200, {"rewards": {"my_reward": [1.0]}})


def test_large_images_are_refused_before_they_are_decoded(start, monkeypatch) -> None:
    """64 files of 6 kB, which decode to 400 MB."""
    monkeypatch.setattr(server, "_decode", lambda image, index: pytest.fail("decoded"))
    large = file(Image.new("RGB", (2048, 1024)))
    assert len(large) < 10_000
    status, reply = post(start(ones), asked(64, images=[large] * 64))
    assert (status, reply["error"][:41]) == (413, "64 images of 2097152 pixels are too large")


def test_the_token(start, monkeypatch) -> None:
    url = start(ones, token="SECRET")
    refused = (401, {"error": "the token is missing or wrong; the client takes it from DPOK_REWARD_TOKEN"})
    for headers in (
        {},
        {"Authorization": "SECRET"},
        {"Authorization": "Bearer SECRE"},
        {"Authorization": "Basic SECRET"},
    ):
        assert post(url, asked(), **headers) == refused
    assert post(url, asked(), "/other") == refused
    assert post(url, asked(), Authorization="Bearer SECRET")[0] == 200
    assert httpx2.get(url + "/health").json() == {"status": "ok"}
    monkeypatch.setenv("DPOK_REWARD_TOKEN", "SECRET-2")
    of_variable = start(ones)
    assert post(of_variable, asked()) == refused
    assert make_reward(of_variable)(torch.zeros(1, 3, 4, 4), ["a"]).total.tolist() == [1.0]


def test_the_host_is_checked(start) -> None:
    """A page of another server, whose name was pointed here, must not use this one."""
    url = start(ones, allowed_hosts=["gpu-box"])
    for name in ("localhost:8000", "127.0.0.1", "[::1]:80", "10.0.0.7:8000", "GPU-box:1", socket.gethostname()):
        assert post(url, asked(), Host=name)[0] == 200, name
    for name in ("evil.example", "localhost.evil.example:8000", "", "[", "gpu-box.evil"):
        for path in ("/", "/health"):
            status, reply = post(url, asked(), path, Host=name)
            assert (status, "the Host header names another server" in reply["error"]) == (400, True), name


def test_web_pages_cannot_use_it(start) -> None:
    """A page that somebody has open on this machine could send requests to it."""
    refused = (403, {"error": "web pages cannot use this server"})
    assert post(start(ones), asked(), Origin="https://evil.example") == refused


def test_slow_senders_are_timed_out(start, monkeypatch) -> None:
    # They hold for a good request too, which may take a while on a busy machine.
    monkeypatch.setattr(server, "RECEIVE_TIMEOUT", 2.0)
    monkeypatch.setattr(connections, "HEADER_TIMEOUT", 2.0)
    url = start(ones)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    half, silent, mumbling = say(url, head + b"100\r\n\r\n{"), say(url, b""), say(url, head)
    endless = say(url, b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert post(url, asked())[0] == 200
    reply = answer_of(half)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b"the request did not come within 2 seconds" in reply
    assert answer_of(silent) == answer_of(mumbling) == b""
    assert answer_of(endless).startswith(b"HTTP/1.1 404 ")


def test_too_many_requests_are_sent_away(start, monkeypatch) -> None:
    monkeypatch.setattr(server, "MAX_REQUESTS", 2)
    release = threading.Event()

    def slow(images: torch.Tensor, prompts: list[str]) -> list[float]:
        release.wait(20)
        return ones(images, prompts)

    url = start(slow)
    with ThreadPoolExecutor(3) as pool:
        pending = [pool.submit(httpx2.post, url, json=asked(), timeout=20) for _ in range(3)]
        busy = next(as_completed(pending)).result()
        assert (busy.status_code, busy.headers["retry-after"], busy.json()) == (
            503,
            "1",
            {"error": "the server is busy"},
        )
        release.set()
        assert sorted(future.result().status_code for future in pending) == [200, 200, 503]
    assert post(url, asked())[0] == 200
    monkeypatch.setattr(server, "MAX_BYTES", 100)
    assert post(url, asked())[0] == 503
    assert post(url, b"{}")[0] == 400  # the bytes of the last request are no longer counted


def test_a_client_that_has_gone_is_not_scored_for(start, monkeypatch) -> None:
    """Its request waits for that of another one, and it does not wait any longer."""
    read, is_scoring, is_read, release = server._read_request, threading.Event(), threading.Event(), threading.Event()
    calls = []

    def held(images: torch.Tensor, prompts: list[str]) -> list[float]:
        calls.append(prompts)
        is_scoring.set()
        release.wait(20)
        return ones(images, prompts)

    def note(body: bytearray, max_batch: int) -> Any:
        if is_scoring.is_set():
            is_read.set()
        return read(body, max_batch)

    monkeypatch.setattr(server, "_read_request", note)
    url = start(held)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url, asked(prompts=["first"]))
        assert is_scoring.wait(20)
        body = json.dumps(asked(prompts=["gone"])).encode()
        with say(url, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)):
            assert is_read.wait(20)
        assert httpx2.get(url + "/health").status_code == 200  # by then the server knows that it has gone
        release.set()
        assert first.result()[0] == 200
    assert post(url, asked(prompts=["last"]))[0] == 200  # they are scored in their order
    assert calls == [["first"], ["last"]]


@pytest.mark.parametrize("body", [b'{"prompts": ["a red', json.dumps(asked()).encode()], ids=["half", "whole"])
def test_a_client_that_goes_is_no_failure(body: bytes) -> None:
    """While it sends the request, or after that."""
    calls: list[int] = []
    app = make_app({lambda images, prompts: calls.append(0) or ones(images, prompts): 1.0})
    is_whole = body.endswith(b"}")
    request = {"type": "http.request", "body": body, "more_body": not is_whole}
    received: list[dict[str, Any]] = [request, {"type": "http.disconnect"}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return received.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": [(b"host", b"localhost")]}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"]) == {"error": "the client has gone"}
    assert not calls


@pytest.mark.parametrize(
    ("is_private", "token", "variable", "is_open"),
    [(False, None, None, True), (True, None, None, False), (False, "A", None, False), (False, None, "A", False)],
)
def test_an_open_port_is_said(monkeypatch, caplog, capsys, is_private, token, variable, is_open) -> None:
    def run_server(app: Any, host: str, port: int, ready: Callable[[str, bool], None], **settings: Any) -> None:
        ready(f"http://{host}:{port}", is_private)

    monkeypatch.setattr(server, "run_server", run_server)
    if variable is not None:
        monkeypatch.setenv("DPOK_REWARD_TOKEN", variable)
    serve(JPEG_SIZE, "0.0.0.0", 1, token=token)
    assert capsys.readouterr().out == "serving at http://0.0.0.0:1; Ctrl-C ends it\n"
    warning = "everyone who reaches this port can use the reward; DPOK_REWARD_TOKEN sets a token"
    assert caplog.messages == ([warning] if is_open else [])


def test_bad_arguments(monkeypatch) -> None:
    with pytest.raises(ValueError, match="max_batch must be an integer of at least 1, got 0"):
        make_app(JPEG_SIZE, max_batch=0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match=r"cannot listen on .* in use"):
        serve(JPEG_SIZE, port=taken.getsockname()[1])
    with pytest.raises(OSError, match="cannot listen on nowhere port 8000"):
        serve(JPEG_SIZE, "nowhere")
    for host in ("", " "):
        with pytest.raises(ValueError, match="must name a network interface"):
            serve(JPEG_SIZE, host)
    with pytest.raises(ValueError, match="the token must be one or more visible ASCII characters"):
        make_app(JPEG_SIZE, token="")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(ImportError, match=r"this needs the extra 'serve' .*: pip install 'dpok-gym\[serve\]'"):
        make_app(JPEG_SIZE)


@contextmanager
def command(folder: Path, module: str, *words: str) -> Iterator[tuple[subprocess.Popen, str, Callable[[], str]]]:
    """Runs ``dpok serve-reward mine:reward``; yields the process, its address, and how to read its next line."""
    (folder / "mine.py").write_text(textwrap.dedent(module))
    path = os.pathsep.join([str(Path(__file__).parents[4]), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-m", "agents", "serve-reward", "mine:reward", "--port", "0", *words]
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHONPATH": path}}
    with subprocess.Popen(arguments, cwd=folder, **settings) as process, ending(process):
        assert process.stdout is not None
        address = re.search(r"http://\S+(?=;)", process.stdout.readline())
        assert address is not None
        yield process, address.group(), process.stdout.readline


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command(tmp_path, number) -> None:
    """With a reward of one's own and a token. The end waits for a request that is being scored."""
    module = """
        import time

        def reward(images, prompts):
            print("scoring", flush=True)
            time.sleep(0.5)
            return 2 * images[:, 0].mean((1, 2))
        """
    with command(tmp_path, module, "--token", "SECRET") as (process, url, line), ThreadPoolExecutor(1) as pool:
        answered = pool.submit(make_reward(RemoteReward(url, token="SECRET")), torch.ones(2, 3, 8, 8), PROMPTS[:2])
        assert line() == "scoring\n"
        process.send_signal(number)
        assert answered.result().total.tolist() == [2.0, 2.0]
        assert process.wait(30) == 0


@pytest.mark.slow
def test_the_end_does_not_wait_for_a_reward_that_hangs(tmp_path) -> None:
    module = """
        import torch
        from dpok_gym.rewards.remote import server

        server.GRACE = 0
        ones = torch.ones(500, 500)

        def reward(images, prompts):
            print("scoring", flush=True)
            while True:
                ones @ ones
        """
    with command(tmp_path, module) as (process, url, line), ThreadPoolExecutor(1) as pool:
        answered = pool.submit(httpx2.post, url, json=asked(), timeout=30)
        assert line() == "scoring\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert answered.exception() or answered.result().status_code == 500
