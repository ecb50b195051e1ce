"""Rewards asked over HTTP: real servers on this machine that answer well, late, wrongly or not at all."""

import base64
import copy
import io
import json
import math
import pickle
import socket
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
    rewards = remote(endpoint.url, batch_size=3, headers={"X-Key": "secret"})(images, PROMPTS)
    assert rewards.tolist() == locally(images)
    assert [len(request["prompts"]) for request in endpoint.requests] == [3, 3, 2]
    assert [prompt for request in endpoint.requests for prompt in request["prompts"]] == PROMPTS
    assert endpoint.headers["X-Key"] == "secret"
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


@pytest.mark.parametrize("failure", [(503, b"busy"), (500, {"error": "out of memory"}), (429, b""), "dropped", "slow"])
def test_what_may_pass_is_tried_again(start, images, failure, caplog) -> None:
    def twice(request: dict, number: int) -> Any:
        if number > 2:
            return brightness(request)
        if failure == "dropped":
            raise ConnectionAbortedError  # the connection ends without an answer
        return after(1.2, {}) if failure == "slow" else failure

    endpoint = start(twice)
    rewards = remote(endpoint.url, timeout=0.7 if failure == "slow" else 20)(images, PROMPTS)
    assert rewards.tolist() == locally(images)
    assert len(endpoint.requests) == 3
    assert f"{endpoint.url} answers again" in caplog.text


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>hello</html>", "its answer is no JSON but b'<html>hello</html>'"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        ([1.0] * N, "no list or mapping 'rewards'"),
        ({"reward": [1.0] * N}, "no list or mapping 'rewards'"),
        ({"rewards": {}}, "no list or mapping 'rewards'"),
        ({"rewards": 1.0}, "no list or mapping 'rewards'"),
        ({"rewards": [1.0] * (N - 1)}, "the rewards must be 8 numbers for as many images, got 7"),
        ({"rewards": {"sharp": [1.0] * (N + 1)}}, "the rewards 'sharp' must be 8 numbers .* got 9"),
        ({"rewards": {"sharp": 1.0}}, "the rewards 'sharp' must be 8 numbers .* got no list"),
        ({"rewards": ["1.0"] * N}, "must be numbers or null, got '1.0'"),
        ({"rewards": [True] * N}, "must be numbers or null, got True"),
        ({"rewards": [[1.0]] * N}, r"must be numbers or null, got \[1.0\]"),
        ((400, {"error": "no such\nprompt"}), r"refused: status 400 \(no such prompt\)"),
        ((404, b""), "refused: status 404"),
        ((307, b"", ("location", "http://127.0.0.1:1/")), "refused: status 307"),
        ((200, b"not zipped", ("content-encoding", "gzip")), "cannot be decoded"),
    ],
)
def test_what_will_not_pass_is_an_error_at_once(start, images, answer, message) -> None:
    endpoint = start(lambda request, number: answer)
    with pytest.raises(ValueError, match=message) as raised:
        remote(endpoint.url)(images, PROMPTS)
    assert endpoint.url in str(raised.value)
    assert len(endpoint.requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("value", "shown"), [(None, "nan"), (math.nan, "nan"), (-math.inf, "-inf")])
def test_no_finite_number(start, images, value, shown) -> None:
    endpoint = start(lambda request, number: {"rewards": [1, value] + [3.0] * (N - 2)})
    with pytest.raises(
        ValueError, match=rf"reward '{endpoint.name}' for the prompt 'prompt 1' is not finite \({shown}; 1 of 8"
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
    slow, wrong = start(lambda request, number: release.wait(20) and {}), start(lambda request, number: (400, b""))
    with pytest.raises(ValueError, match="status 400"):
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
        ("http://a", {"attempts": 0}, "attempts must be an integer of at least 1, got 0"),
        ("http://a", {"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ("http://a", {"timeout": 0}, "timeout must be positive"),
        ("http://a", {"timeout": math.inf}, "timeout must be positive"),
        ("http://a", {"backoff": -1}, "backoff at least 0"),
        ("http://a", {"image_format": "webp"}, "image_format must be one of 'png', 'jpeg', got 'webp'"),
    ],
)
def test_bad_arguments(urls, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        RemoteReward(urls, **kwargs)


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
