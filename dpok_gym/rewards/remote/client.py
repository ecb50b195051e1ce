"""A reward that other processes or machines compute: a client of reward servers, over HTTP.

This is the protocol, which ``dpok serve-reward`` implements too. The client sends a POST request with JSON: the
prompts, and as many images of one size, as PNG or JPEG files in base64.

    {"prompts": ["a red circle", ...], "images": ["iVBORw0KGgo...", ...]}

The server answers with status 200 and one number for each image, or with several by name, whose sum is the reward. An
image without a reward gets ``null``.

    {"rewards": [0.25, ...]}    or    {"rewards": {"colour": [0.25, ...], "shape": [0.5, ...]}}

Status 413 (too large) and 422 (the reward cannot read a prompt or an image) refuse the request, with the reason in
``{"error": "..."}``. Any other status, and an answer that is not as above, is a failure of the server. The client then
asks another one, or the same one later: after ``Retry-After`` seconds if the server says so.

A request has at most 2**24 pixels in all. A token is sent as ``Authorization: Bearer TOKEN``.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpok_gym.rewards.remote.access import TOKEN_VARIABLE, check_address, check_no_secret
from dpok_gym.utils.images import to_uint8
from dpok_gym.utils.serving import find_token
from dpok_gym.utils.threads import DaemonExecutor
from dpok_gym.utils.validation import (
    check_choice,
    check_finite,
    check_integer,
    check_non_negative,
    check_positive,
    shorten,
)

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

#: The share of batches in which an endpoint that failed is tried again while others answer.
RETRY_SHARE = 0.1
#: Seconds to wait for a connection; a machine that runs accepts one in far less.
CONNECT_TIMEOUT = 10.0
JPEG_QUALITY = 95
#: Most pixels of a request, all images together: 16 images of 1024x1024.
MAX_REQUEST_PIXELS = 2**24
#: The status of an answer to a request without the right token.
UNAUTHORIZED = 401
#: Most bytes of an answer; a thousand numbers have 20 kB.
MAX_ANSWER_BYTES = 2**24
MAX_REWARD = torch.finfo(torch.float32).max

Reply = dict[str, list[float]]  # by component; "" stands for the rewards of a reply without names


class RemoteReward:
    """Sends images and prompts to servers, and returns their rewards; for the protocol see the module.

    A batch is cut into requests. An endpoint (the address of a server) gets its next request when it has answered the
    one before. If a request fails, the next free endpoint takes it over: each image has one reward, whatever fails. The
    endpoint that failed rests, longer after each failure in a row. Later batches ask it again in one of ten cases, and
    whenever no other endpoint is left. So a bad endpoint costs its share of the speed, and in one batch of ten the wait
    for its failure. Images are sent with 8 bits per channel. The extra ``reward-client`` must be installed.

    The token is no attribute, and pickles do not hold it. A pickled copy takes that of its environment.

    Args:
        urls: the address of one endpoint, or of several that compute the same reward; with http:// or https://, and
            without user, password and query, because addresses are written into logs and files.
        name: name of the reward; None for the first address without http:// ("localhost:8000"). If the reply has names,
            the components are called "name/theirs".
        timeout: longest time for one answer, seconds, above 0. If it is too short, servers that are only busy count as
            failed.
        attempts: failures in a row after which this batch asks an endpoint no more, 1 or more. The eight of the default
            take a minute, in which a server can start anew.
        backoff: seconds, 0 or more, that an endpoint rests after its first failure. The rest doubles with each further
            failure. It varies at random by a half, so that many clients do not come back at the same time.
        batch_size: largest number of images in a request, 1 or more.
        image_format: "png", which is exact, or "jpeg" of quality 95, which is smaller, for slow networks.
        token: what the servers ask for; None for the environment variable ``DPOK_REWARD_TOKEN``, if it is set.

    Raises:
        ImportError: if the extra ``reward-client`` is not installed.
        ValueError: if an argument is out of range; in a call, if a server refuses the images or the prompts (status 413
            or 422), or two servers answer with different names.
        ConnectionError: in a call, when no endpoint is left. The message names each, its attempts and its last failure.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        name: str | None = None,
        timeout: float = 120.0,
        attempts: int = 8,
        backoff: float = 0.5,
        batch_size: int = 16,
        image_format: Literal["png", "jpeg"] = "png",
        token: str | None = None,
    ) -> None:
        if not isinstance(urls, str | Sequence):
            raise TypeError(f"the addresses of a remote reward are a text or a list of texts, not {shorten(urls)}")
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise TypeError(f"the name of a remote reward is a text that is not blank, or None, not {shorten(name)}")
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ValueError(f"a remote reward needs one address or several different ones, not {self.urls}")
        check_no_secret(" ".join(map(str, self.urls)))  # a password with a space would look like two addresses
        for url in self.urls:
            check_address(url)
        find_token(token, TOKEN_VARIABLE)
        attempts, batch_size = check_integer("attempts", attempts), check_integer("batch_size", batch_size)
        check_positive("timeout (seconds)", check_finite("timeout (seconds)", timeout))
        check_non_negative("backoff (seconds)", backoff)
        check_choice("image_format", image_format, "png", "jpeg")
        try:
            # Here as well, so that a missing package shows when the reward is made, not after the first images.
            import httpx2  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"a reward behind an address needs the extra 'reward-client' ({error}): "
                "pip install 'dpok-gym[reward-client]'"
            ) from error
        self.__name__ = name or self.urls[0].split("://", 1)[1].rstrip("/")
        self.timeout, self.attempts, self.backoff = timeout, attempts, backoff
        self.batch_size, self.image_format, self._token = batch_size, image_format, token
        self._failing: set[str] = set()
        self._random = random.Random()  # its own, because a reward must not change the state of seeded generators

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor | dict[str, Tensor]:
        """Returns (B,), or (B,) by name, with NaN for images without a reward."""
        if not prompts:
            return torch.zeros(0)
        pixels = to_uint8(images)
        size = min(self.batch_size, math.ceil(len(prompts) / len(self.urls)))
        size = max(1, min(size, MAX_REQUEST_PIXELS // math.prod(pixels.shape[1:3])))
        chunks = [slice(first, first + size) for first in range(0, len(prompts), size)]
        replies = self._share([(pixels[chunk], list(prompts[chunk])) for chunk in chunks])
        names = list(replies[0])
        for reply in replies:
            if reply.keys() != replies[0].keys():
                raise ValueError(
                    f"the endpoints of the reward {self.__name__!r} answer with different names, {names} and "
                    f"{list(reply)}; all must compute the same"
                )
        rewards: dict[str, Tensor] = {}
        for name in names:
            rewards[name] = torch.cat([torch.tensor(reply[name]) for reply in replies])
        if names == [""]:
            return rewards[""]
        return {f"{self.__name__}/{name}": values for name, values in rewards.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Open connections cannot be pickled, and the token must not be.
        return {name: value for name, value in self.__dict__.items() if name != "_client"} | {"_token": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteReward:
        return self  # Gymnasium copies an environment's arguments; the copy shares the connections

    @functools.cached_property
    def _client(self) -> httpx2.Client:
        import httpx2

        timeout = httpx2.Timeout(self.timeout, connect=min(self.timeout, CONNECT_TIMEOUT))
        headers = {"content-type": "application/json"}
        if token := find_token(self._token, TOKEN_VARIABLE):
            headers["authorization"] = f"Bearer {token}"
        return httpx2.Client(timeout=timeout, headers=headers)

    def _share(self, jobs: Sequence[tuple[NDArray[np.uint8], list[str]]]) -> list[Reply]:
        """Sends the jobs to the endpoints in parallel, and returns the replies in the order of the jobs."""
        waiting = deque(range(len(jobs)))
        # An endpoint that failed in an earlier batch is asked only if no other is left; some batches try it anyway.
        spare = [url for url in self.urls if url in self._failing and self._random.random() >= RETRY_SHARE]
        free = deque(url for url in self.urls if url not in spare)
        replies: dict[int, Reply] = {}
        failures, last_error = dict.fromkeys(self.urls, 0), dict.fromkeys(self.urls, "")
        running: dict[Future[Any], tuple[str, int | None]] = {}  # the endpoint and its job; None while it rests
        client, over = self._client, threading.Event()
        pool = DaemonExecutor(len(self.urls), "remote-reward")
        try:
            while len(replies) < len(jobs):
                while free and waiting:
                    url, job = free.popleft(), waiting.popleft()
                    running[pool.submit(self._send, client, url, *jobs[job])] = url, job
                if not running and spare:
                    free, spare = deque(spare), []
                    continue
                if not running:  # every endpoint was given up
                    raise ConnectionError(self._no_answer(failures, last_error))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    url, done = running.pop(future)
                    try:
                        result = future.result()
                    except _FailureError as error:
                        assert done is not None
                        waiting.appendleft(done)  # another endpoint, or this one after its rest, takes it
                        failures[url] += 1
                        last_error[url] = str(error)
                        self._report(url, str(error))
                        # A token that is wrong will not become right.
                        if failures[url] < self.attempts and error.status != UNAUTHORIZED:
                            rest = self.backoff * 2 ** (failures[url] - 1) * self._random.uniform(0.5, 1.5)
                            rest = max(rest, min(error.retry_after, self.timeout))
                            running[pool.submit(over.wait, rest)] = url, None
                    else:
                        if done is not None:
                            replies[done] = result
                            failures[url] = 0
                            self._report(url, None)
                        free.append(url)
            return [replies[job] for job in range(len(jobs))]
        finally:
            over.set()
            # Requests that still run after an error or Ctrl-C are not waited for.
            pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, client: httpx2.Client, url: str, pixels: NDArray[np.uint8], prompts: list[str]) -> Reply:
        """Sends one request.

        Args:
            client: the connections.
            url: the endpoint.
            pixels: images (B, H, W, 3).
            prompts: B texts.

        Raises:
            _FailureError: if the endpoint fails; another one, or this one later, may not.
            ValueError: if it refuses the images or prompts.
        """
        import httpx2

        images = [base64.b64encode(self._encode(image)).decode() for image in pixels]
        content, body = json.dumps({"prompts": prompts, "images": images}).encode(), bytearray()
        deadline = time.monotonic() + self.timeout
        try:
            with client.stream("POST", url, content=content) as response:
                for part in response.iter_bytes():
                    body += part
                    if len(body) > MAX_ANSWER_BYTES:
                        raise _FailureError(f"its answer has more than {MAX_ANSWER_BYTES} bytes")
                    if time.monotonic() > deadline:  # the client's own timeout starts again with each part
                        raise httpx2.ReadTimeout("timed out")
        except httpx2.TimeoutException as error:
            raise _FailureError(f"no answer in {self.timeout:g} seconds ({type(error).__name__})") from error
        except httpx2.RequestError as error:
            raise _FailureError(f"{type(error).__name__}: {error}") from error
        status, reason = response.status_code, _reason(body)
        if status in (413, 422):
            raise ValueError(f"the reward server {url} refused the images or prompts: status {status}{reason}")
        if status != 200:
            after = response.headers.get("retry-after", "")  # it may be a date too, which is not read
            raise _FailureError(f"status {status}{reason}", float(after) if after.isdecimal() else 0.0, status)
        return _read_reply(body, len(prompts))

    def _encode(self, image: NDArray[np.uint8]) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        # Stronger compression takes longer than the transfer of the bytes that it saves.
        options = {"compress_level": 1} if self.image_format == "png" else {"quality": JPEG_QUALITY}
        Image.fromarray(image).save(buffer, self.image_format, **options)
        return buffer.getvalue()

    def _report(self, url: str, error: str | None) -> None:
        """Remembers whether an endpoint fails. Only changes are logged, because a dead endpoint is tried many times."""
        if error is not None and url not in self._failing:
            self._failing.add(url)
            logger.warning("the reward server %s failed and will be tried again: %s", url, error)
        elif error is None and url in self._failing:
            self._failing.discard(url)
            logger.warning("the reward server %s answers again", url)

    def _no_answer(self, failures: Mapping[str, int], last_error: Mapping[str, str]) -> str:
        times = {url: "once" if failures[url] == 1 else f"{failures[url]} times in a row" for url in self.urls}
        each = "; ".join(f"{url} failed {times[url]}, last: {last_error[url].rstrip('.')}" for url in self.urls)
        return (
            f"no server of the reward {self.__name__!r} is left: {each}. Check that it runs and can be reached from "
            f"here, or give it more time (timeout={self.timeout:g}, attempts={self.attempts})"
        )


class _FailureError(Exception):
    """A failure of an endpoint: another one, or the same one later, may not fail."""

    def __init__(self, message: str, retry_after: float = 0.0, status: int | None = None) -> None:
        super().__init__(message)
        self.retry_after, self.status = retry_after, status


def _reason(body: bytes | bytearray) -> str:
    """Returns the reason that a server gives for its failure, in short; "" for none."""
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, TypeError, LookupError, RecursionError):
        text = body.decode(errors="replace")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:200]).split())
    return f" ({text})" if text else ""


def _read_reply(body: bytes | bytearray, n_images: int) -> Reply:
    """Returns the rewards in a reply, with NaN for null.

    Raises:
        _FailureError: if the reply breaks the protocol.
    """
    try:
        reply = json.loads(body, parse_int=float, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _FailureError(f"its answer is no JSON but {bytes(body[:100])!r}") from None
    rewards = reply.get("rewards") if isinstance(reply, dict) else None
    by_name = {"": rewards} if isinstance(rewards, list) else rewards
    if not isinstance(by_name, dict) or not by_name:
        raise _FailureError(f"its answer has no list or mapping 'rewards': {bytes(body[:100])!r}")
    replies: Reply = {}
    for name, values in by_name.items():
        where = f"the rewards {name!r}" if name else "the rewards"
        if not isinstance(values, list) or len(values) != n_images:
            count = len(values) if isinstance(values, list) else "no list"
            raise _FailureError(f"{where} must be {n_images} numbers for as many images, got {count}")
        for value in values:
            if not (value is None or (isinstance(value, float) and abs(value) <= MAX_REWARD)):
                raise _FailureError(f"{where} must be numbers within float32's range or null, got {value!r}")
        replies[name] = [math.nan if value is None else value for value in values]
    return replies


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")  # Python's reader takes NaN and Infinity, which are not JSON
