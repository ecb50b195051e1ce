"""Rewards asked over HTTP: real servers on this machine that answer well, late, wrongly or not at all."""

import base64
import copy
import io
import json
import math
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpok_gym.rewards import RemoteReward, make_reward
from dpok_gym.rewards.remote import client

N = 8
PROMPTS = [f"prompt {i}" for i in range(N)]
Answer = Callable[[dict, int], Any]


class Endpoint(ThreadingHTTPServer):
    """Answers with what a function makes of a request and its number: a status and JSON or bytes, or only these."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[dict] = []
        self.headers: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.name = f"127.0.0.1:{self.server_port}"

    def handle_error(self, *args: Any) -> None:
        """Clients that went away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(request)
        self.server.headers = dict(self.headers)
        answer = self.server.answer(request, len(self.server.requests))
        status, body, *headers = answer if isinstance(answer, tuple) else (200, answer)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def start() -> Iterator[Callable[[Answer], Endpoint]]:
    with ExitStack() as stack:

        def started(answer: Answer) -> Endpoint:
            endpoint = Endpoint(answer)
            stack.callback(endpoint.server_close)
            stack.callback(endpoint.shutdown)
            threading.Thread(target=endpoint.serve_forever, args=[0.01], daemon=True).start()
            return endpoint

        yield started


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(N, 3, 6, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dead() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def pixels(images: torch.Tensor) -> np.ndarray:
    return (255 * images).round().byte().permute(0, 2, 3, 1).numpy()


def opened(request: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in request["images"]]


def brightness(request: dict, number: int = 0) -> dict:
    return {"rewards": [float(np.asarray(image).mean()) for image in opened(request)]}


def locally(images: torch.Tensor) -> list[float]:
    return torch.tensor([float(image.mean()) for image in pixels(images)]).tolist()


def remote(*urls: str, **kwargs: Any) -> Any:
    options: dict[str, Any] = {"backoff": 0.001, "timeout": 20.0}
    return RemoteReward(urls, **options | kwargs)


def after(seconds: float, answer: Any) -> Any:
    time.sleep(seconds)
    return answer


def test_images_and_prompts_arrive_as_they_are(start, images) -> None:
    endpoint = start(brightness)
    rewards = remote(endpoint.url, batch_size=3)(images, PROMPTS)
    assert rewards.tolist() == locally(images)
    assert [len(request["prompts"]) for request in endpoint.requests] == [3, 3, 2]
    assert [prompt for request in endpoint.requests for prompt in request["prompts"]] == PROMPTS
    assert "authorization" not in {name.lower() for name in endpoint.headers}
    assert endpoint.headers["content-type"] == "application/json"
    arrived = [image for request in endpoint.requests for image in opened(request)]
    assert {image.format for image in arrived} == {"PNG"}
    assert np.array_equal(np.stack([np.asarray(image) for image in arrived]), pixels(images))


def test_jpeg(start, images) -> None:
    endpoint = start(brightness)
    rewards = remote(endpoint.url, image_format="jpeg")(images, PROMPTS)
    assert {image.format for image in opened(endpoint.requests[0])} == {"JPEG"}
    torch.testing.assert_close(rewards, torch.tensor(locally(images)), rtol=0, atol=3)


def test_by_address(start, images) -> None:
    endpoint = start(brightness)
    batch = make_reward({endpoint.url + "/": 2.0})(images, PROMPTS)
    assert list(batch.components) == [endpoint.name]
    assert batch.components[endpoint.name].tolist() == locally(images)
    assert batch.total.tolist() == [2 * value for value in locally(images)]
    other = start(brightness)
    assert make_reward(f"{endpoint.url} {other.url}")(images, PROMPTS).total.tolist() == locally(images)
    assert [len(asked.requests) for asked in (endpoint, other)] == [2, 1]


def test_settings_of_an_address(start, images) -> None:
    endpoint = start(brightness)
    settings = {"weight": 2.0, "name": "mine", "batch_size": 3}
    batch = make_reward({endpoint.url: settings})(images, PROMPTS)
    assert batch.components["mine"].tolist() == locally(images)
    assert [len(request["prompts"]) for request in endpoint.requests] == [3, 3, 2]
    assert settings == {"weight": 2.0, "name": "mine", "batch_size": 3}
    with pytest.raises(ValueError, match="unexpected keyword argument 'timout'"):
        make_reward({endpoint.url: {"timout": 1}})


def test_named_rewards_are_components(start, images) -> None:
    endpoint = start(lambda request, number: {"rewards": {"sharp": [1] * N, "dark": [0.5] * N}})
    batch = make_reward(remote(endpoint.url))(images, PROMPTS)
    assert list(batch.components) == [f"{endpoint.name}/sharp", f"{endpoint.name}/dark"]
    assert batch.total.tolist() == [1.5] * N
    named = make_reward(remote(endpoint.url, name="mine"))(images, PROMPTS)
    assert list(named.components) == ["mine/sharp", "mine/dark"]


def test_several_endpoints_share_the_work_at_the_same_time(start, images) -> None:
    both = threading.Barrier(2, timeout=20)

    def together(request: dict, number: int) -> dict:
        both.wait()  # an error, if one request came after the other
        return brightness(request)

    endpoints = start(together), start(together)
    rewards = remote(*(endpoint.url for endpoint in endpoints))(images, PROMPTS)
    assert rewards.tolist() == locally(images)
    assert [len(endpoint.requests) for endpoint in endpoints] == [1, 1]
    assert sorted(prompt for endpoint in endpoints for prompt in endpoint.requests[0]["prompts"]) == PROMPTS


@pytest.mark.slow
def test_a_fast_endpoint_takes_more(start, images) -> None:
    fast, slow = start(brightness), start(lambda request, number: after(0.5, brightness(request)))
    rewards = remote(fast.url, slow.url, batch_size=1)(images, PROMPTS)
    assert rewards.tolist() == locally(images)
    assert len(fast.requests) > len(slow.requests)


@pytest.mark.slow
def test_the_others_take_over_from_a_dead_endpoint(start, images, dead, caplog) -> None:
    endpoint = start(brightness)
    reward = remote(dead, endpoint.url, batch_size=2)
    for _ in range(3):
        assert reward(images, PROMPTS).tolist() == locally(images)
    assert sum(len(request["prompts"]) for request in endpoint.requests) == 3 * N
    assert caplog.text.count(f"{dead} failed and will be tried again: ConnectError") == 1


@pytest.mark.slow
def test_an_endpoint_that_failed_is_spared(start, images, monkeypatch) -> None:
    """It is tried again now and then, or when the others fail."""
    working = {"second"}

    def only_if(name: str) -> Answer:
        return lambda request, number: brightness(request) if name in working else (503, b"busy")

    first, second = start(only_if("first")), start(only_if("second"))
    reward = remote(first.url, second.url, batch_size=1, attempts=1)
    monkeypatch.setattr(client, "RETRY_SHARE", 0.0)
    for _ in range(5):
        assert reward(images, PROMPTS).tolist() == locally(images)
    assert len(first.requests) == 1
    working = {"first"}
    assert reward(images, PROMPTS).tolist() == locally(images)
    assert len(first.requests) > 1


#: What a bad server may answer, and what is said of it.
FAILURES: dict[str, tuple[Any, str]] = {
    "busy": ((503, b"busy"), r"status 503 \(busy\)"),
    "too many": ((429, b""), "status 429"),
    "error": ((500, {"error": "out of\nmemory"}), r"status 500 \(out of memory\)"),
    "bad request": ((400, {"error": "no"}), r"status 400 \(no\)"),
    "elsewhere": ((404, b"<html>\x1b[31mnone</html>"), r"status 404 \(<html> \[31mnone</html>\)"),
    "redirect": ((307, b"", ("location", "http://127.0.0.1:1/")), "status 307"),
    "created": ((201, {"rewards": [1.0] * N}), "status 201"),
    "html": (b"<html>hello</html>", "its answer is no JSON but b'<html>hello</html>'"),
    "no text": (b"\xff\xfe", "no JSON"),
    "nested": (b"[" * 100_000, "no JSON"),
    "cut off": (b'{"rewards": [1.0, 2.', "no JSON"),
    "NaN": (b'{"rewards": [' + b"NaN, " * (N - 1) + b"1.0]}", "no JSON"),
    "infinity": (b'{"rewards": [' + b"-Infinity, " * (N - 1) + b"1.0]}", "no JSON"),
    "overflow": ({"rewards": [1e39] * N}, r"within float32's range or null, got 1e\+39"),
    "list": ([1.0] * N, "no list or mapping 'rewards'"),
    "misnamed": ({"reward": [1.0] * N}, "no list or mapping 'rewards'"),
    "empty": ({"rewards": {}}, "no list or mapping 'rewards'"),
    "scalar": ({"rewards": 1.0}, "no list or mapping 'rewards'"),
    "few": ({"rewards": [1.0] * (N - 1)}, "the rewards must be 8 numbers for as many images, got 7"),
    "many": ({"rewards": {"sharp": [1.0] * (N + 1)}}, "the rewards 'sharp' must be 8 numbers .* got 9"),
    "no list": ({"rewards": {"sharp": 1.0}}, "the rewards 'sharp' must be 8 numbers .* got no list"),
    "text": ({"rewards": ["1.0"] * N}, "must be numbers .* got '1.0'"),
    "bool": ({"rewards": [True] * N}, "must be numbers .* got True"),
    "lists": ({"rewards": [[1.0]] * N}, r"must be numbers .* got \[1.0\]"),
    "no gzip": ((200, b"not zipped", ("content-encoding", "gzip")), "DecodingError"),
    "long": (b" " * (client.MAX_ANSWER_BYTES + 1), "its answer has more than 16777216 bytes"),
    "dropped": ("dropped", "RemoteProtocolError"),
    "slow": ("slow", r"no answer in 3 seconds \(ReadTimeout\)"),
}
Bad = Callable[[str], Answer]


@pytest.fixture
def bad() -> Iterator[Bad]:
    """Makes the answer of a bad server; one that is slow answers when the test has ended."""
    ended = threading.Event()

    def make(failure: str) -> Answer:
        def answer(request: dict, number: int) -> Any:
            if failure == "dropped":
                raise ConnectionAbortedError  # the connection ends without an answer
            return FAILURES[failure][0] if failure != "slow" else ended.wait(60) and {}

        return answer

    yield make
    ended.set()


def patience(failure: str) -> float:
    """Returns the timeout: it holds for good answers too, which may take a while on a busy machine."""
    return 3.0 if failure == "slow" else 20.0


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_tried_again(start, images, failure, bad, caplog) -> None:
    endpoint = start(lambda request, number: bad(failure)(request, number) if number < 2 else brightness(request))
    rewards = remote(endpoint.url, timeout=patience(failure))(images, PROMPTS)
    assert rewards.tolist() == locally(images)
    assert len(endpoint.requests) == 2
    assert re.search(f"{endpoint.url} failed and will be tried again: .*{FAILURES[failure][1]}", caplog.text)
    assert f"{endpoint.url} answers again" in caplog.text


@pytest.mark.parametrize("failure", ["elsewhere", "cut off", "few", "NaN", "dropped", "slow"])
def test_one_bad_server_of_two_does_not_end_the_batch(start, images, failure, bad) -> None:
    good = start(brightness)
    reward = remote(start(bad(failure)).url, good.url, batch_size=2, timeout=patience(failure))
    assert reward(images, PROMPTS).tolist() == locally(images)
    scored = [prompt for request in good.requests for prompt in request["prompts"]]
    assert sorted(scored) == PROMPTS  # each image once


def test_the_last_failure_of_each_server_is_said(start, images) -> None:
    few, none = start(lambda request, number: {"rewards": [1.0]}), start(lambda request, number: (404, b""))
    with pytest.raises(ConnectionError) as raised:
        remote(few.url, none.url, attempts=2)(images, PROMPTS)
    for part in (
        f"{few.url} failed 2 times in a row, last: the rewards must be 4 numbers for as many images, got 1",
        f"{none.url} failed 2 times in a row, last: status 404",
    ):
        assert part in str(raised.value)


def test_rests_grow_and_vary(start, images, monkeypatch) -> None:
    rests, waited = [], threading.Event.wait

    def wait(self: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread().name.startswith("remote-reward"):
            rests.append(timeout)
            return True
        return waited(self, timeout)

    monkeypatch.setattr(threading.Event, "wait", wait)
    endpoint = start(lambda request, number: (503, b"") if number < 6 else brightness(request))
    remote(endpoint.url, attempts=6, backoff=1.0)(images, PROMPTS)
    assert all(0.5 * 2**k <= rest <= 1.5 * 2**k for k, rest in enumerate(rests))
    assert len({rest / 2**k for k, rest in enumerate(rests)}) == len(rests) == 5
    rests.clear()
    later = start(lambda request, number: (429, b"", ("retry-after", "7")) if number < 2 else brightness(request))
    remote(later.url, backoff=1.0)(images, PROMPTS)
    assert rests == [7.0]


def test_down(images, dead) -> None:
    with pytest.raises(ConnectionError) as raised:
        remote(dead, attempts=3)(images, PROMPTS)
    for part in (dead, "failed 3 times in a row, last: ConnectError: ", "refused", "Check that it runs"):
        assert part in str(raised.value)


def test_all_down(start, images, dead) -> None:
    endpoint = start(lambda request, number: (502, b"<html>bad  gateway</html>"))
    with pytest.raises(ConnectionError) as raised:
        remote(dead, endpoint.url, attempts=2)(images, PROMPTS)
    for part in (
        f"{dead} failed 2 times in a row, last: ConnectError",
        f"{endpoint.url} failed 2 times in a row, last: status 502 (<html>bad gateway</html>)",
    ):
        assert part in str(raised.value)
    assert len(endpoint.requests) == 2


@pytest.mark.slow
def test_slow(start, images) -> None:
    endpoint = start(lambda request, number: after(1, brightness(request)))
    with pytest.raises(ConnectionError, match=r"no answer in 0.2 seconds \(ReadTimeout\).*timeout=0.2, attempts=2"):
        remote(endpoint.url, timeout=0.2, attempts=2)(images, PROMPTS)
    assert len(endpoint.requests) == 2


@pytest.mark.slow
def test_drop_by_drop(images) -> None:
    """Each byte comes in time, and the whole would take minutes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
                try:
                    while True:
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=r"no answer in 0\.5 seconds"):
            remote(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.5, attempts=1)(images, PROMPTS)
        assert time.monotonic() - started < 10
        thread.join()


@pytest.mark.parametrize("status", [413, 422])
def test_a_refusal_is_an_error_at_once(start, images, status) -> None:
    """No other server would take such images or prompts."""
    endpoint = start(lambda request, number: (status, {"error": "no such\nprompt"}))
    message = rf"{endpoint.url} refused the images or prompts: status {status} \(no such prompt\)"
    with pytest.raises(ValueError, match=message):
        remote(endpoint.url)(images, PROMPTS)
    assert len(endpoint.requests) == 1


def test_an_image_without_a_reward(start, images) -> None:
    endpoint = start(lambda request, number: {"rewards": [1, None] + [3.0] * (N - 2)})
    with pytest.raises(
        ValueError, match=rf"reward '{endpoint.name}' for the prompt 'prompt 1' is not finite \(nan; 1 of 8"
    ):
        make_reward(endpoint.url)(images, PROMPTS)
    batch = make_reward(endpoint.url, non_finite="mask")(images, PROMPTS)
    assert batch.total.tolist() == [1.0, 0.0] + [3.0] * (N - 2)
    assert batch.valid.tolist() == [True, False] + [True] * (N - 2)


def test_endpoints_that_compute_something_else(start, images) -> None:
    def named(name: str) -> Answer:
        return lambda request, number: {"rewards": {name: [1.0] * len(request["prompts"])}}

    with pytest.raises(ValueError, match=r"different names, \['sharp'\] and \['dark'\]"):
        remote(start(named("sharp")).url, start(named("dark")).url, name="mine")(images, PROMPTS)


def test_an_error_does_not_wait_for_the_other_endpoints(start, images) -> None:
    release = threading.Event()
    slow, wrong = start(lambda request, number: release.wait(20) and {}), start(lambda request, number: (422, b""))
    with pytest.raises(ValueError, match="status 422"):
        remote(slow.url, wrong.url)(images, PROMPTS)
    assert not release.is_set()
    release.set()


def test_copies_work(start, images) -> None:
    endpoint = start(brightness)
    reward = remote(endpoint.url)
    expected = reward(images, PROMPTS)  # which opens a connection
    for again in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert torch.equal(again(images, PROMPTS), expected)


@pytest.mark.slow
def test_seeded_generators_are_left_alone(start, images, dead) -> None:
    import random

    def numpy_state() -> list[int]:
        state: Any = np.random.get_state()  # noqa: NPY002
        return state[1].tolist()

    states = random.getstate(), numpy_state(), torch.get_rng_state()
    remote(dead, start(brightness).url, batch_size=1)(images, PROMPTS)
    assert states[0] == random.getstate()
    assert states[1] == numpy_state()
    assert torch.equal(states[2], torch.get_rng_state())


@pytest.mark.parametrize(
    ("urls", "kwargs", "message"),
    [
        ([], {}, "needs one address or several different ones"),
        (["http://a", "http://a"], {}, "several different ones"),
        ("localhost:8000", {}, "written http://host:port, not 'localhost:8000'"),
        ("ftp://localhost", {}, "written http://host:port"),
        ("http://", {}, "written http://host:port"),
        ("http://host:many", {}, "written http://host:port"),
        ([3], {}, "written http://host:port, not 3"),
        ("http://a b", {}, "written http://host:port, not 'http://a b'"),
        ("http://[::", {}, "written http://host:port"),
        ("http://a", {"token": ""}, "the token must be one or more visible ASCII characters"),
        ("http://a", {"attempts": 0}, "attempts must be an integer of at least 1, got 0"),
        ("http://a", {"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ("http://a", {"timeout": 0}, r"timeout \(seconds\) must be a number above 0"),
        ("http://a", {"timeout": math.inf}, r"timeout \(seconds\) must be finite"),
        ("http://a", {"backoff": -1}, r"backoff \(seconds\) must be a number of at least 0"),
        ("http://a", {"image_format": "webp"}, "image_format must be one of 'png', 'jpeg', got 'webp'"),
    ],
)
def test_bad_arguments(urls, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        RemoteReward(urls, **kwargs)


@pytest.mark.parametrize(
    "urls",
    [
        "http://ada:SECRET@host:1",
        "https://SECRET@host",
        "http://ada:SEC RET@host",
        "http://host/score?key=SECRET",
        "http://host/#SECRET",
        ["http://host", "HTTP://ada:SECRET@other"],
    ],
)
def test_an_address_holds_no_secret(urls) -> None:
    specs: list[Callable[[], Any]] = [lambda: RemoteReward(urls)]
    if isinstance(urls, str):
        specs += [lambda: make_reward(urls), lambda: make_reward({urls: {"timout": 1}})]
    for make in specs:
        with pytest.raises(ValueError, match=r"no user, password or query.*DPOK_REWARD_TOKEN") as raised:
            make()
        assert "SEC" not in str(raised.value)


def test_a_wrong_token_is_not_tried_again(start, images) -> None:
    endpoint = start(lambda request, number: (401, {"error": "the token is wrong"}))
    with pytest.raises(ConnectionError, match=r"failed once, last: status 401 \(the token is wrong\)"):
        remote(endpoint.url)(images, PROMPTS)
    assert len(endpoint.requests) == 1
    other = start(brightness)
    assert remote(endpoint.url, other.url)(images, PROMPTS).tolist() == locally(images)


def test_the_token_is_sent_and_kept_nowhere(start, images, monkeypatch, caplog) -> None:
    endpoint = start(lambda request, number: (503, b"") if number < 2 else brightness(request))
    explicit, by_name = remote(endpoint.url, token="SECRET"), make_reward(endpoint.url)
    monkeypatch.setenv("DPOK_REWARD_TOKEN", "SECRET-2")
    for reward, token in ((explicit, "SECRET"), (remote(endpoint.url), "SECRET-2"), (by_name, "SECRET-2")):
        reward(images, PROMPTS)
        assert endpoint.headers["authorization"] == f"Bearer {token}"
    assert copy.deepcopy(explicit) is explicit
    public = {name: value for name, value in vars(explicit).items() if not name.startswith("_")}
    for written in (pickle.dumps(explicit), repr(explicit).encode(), repr(public).encode(), caplog.text.encode()):
        assert b"SECRET" not in written
    pickle.loads(pickle.dumps(explicit))(images, PROMPTS)
    assert endpoint.headers["authorization"] == "Bearer SECRET-2"
    with pytest.raises(ValueError, match="put the token into the environment variable DPOK_REWARD_TOKEN") as raised:
        make_reward({endpoint.url: {"token": "SECRET"}})
    assert "SECRET" not in str(raised.value)
    monkeypatch.setenv("DPOK_REWARD_TOKEN", "SECRET\n")
    with pytest.raises(ValueError, match="DPOK_REWARD_TOKEN must be one or more visible ASCII") as raised:
        RemoteReward("http://a")
    assert "SECRET" not in str(raised.value)


def test_large_images_go_in_small_requests(start, images, monkeypatch) -> None:
    monkeypatch.setattr(client, "MAX_REQUEST_PIXELS", 3 * 6 * 4 + 1)
    endpoint = start(brightness)
    assert remote(endpoint.url)(images, PROMPTS).tolist() == locally(images)
    assert [len(request["prompts"]) for request in endpoint.requests] == [3, 3, 2]


@pytest.mark.slow
def test_a_hanging_request_does_not_delay_the_end_of_python(start) -> None:
    asked = threading.Event()
    hanging = start(lambda request, number: asked.set() or after(60, {}))
    code = f"import torch, dpok_gym; dpok_gym.RemoteReward({hanging.url!r})(torch.zeros(1, 3, 4, 4), ['a'])"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as python:
        try:
            assert asked.wait(40)
            python.send_signal(signal.SIGINT)
            assert "KeyboardInterrupt" in python.communicate(timeout=20)[1]
        finally:
            python.kill()


def test_the_extra_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    message = r"needs the extra 'reward-client' \(.*httpx2.*\): pip install 'dpok-gym\[reward-client\]'"
    with pytest.raises(ImportError, match=message):
        make_reward("http://a:1")


def test_addresses_in_mappings() -> None:
    with pytest.raises(ValueError, match="two rewards are named 'a:1'"):
        make_reward({"http://a:1": 1.0, "http://a:1/": 1.0})
    with pytest.raises(ValueError, match="written http://host:port, not 'b'"):
        make_reward("http://a:1 b")
