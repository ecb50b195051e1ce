"""A reward that other processes or machines compute, asked over HTTP.

The contract, which ``dpok serve-reward`` keeps as well. JSON goes to the address as a POST request: prompts, and as
many pictures of one size as PNG or JPEG files in base64.

    {"prompts": ["a red circle", ...], "images": ["iVBORw0KGgo...", ...]}

Status 200 comes back, with a number for each picture, or several by name, whose sum is the reward; ``null`` for a
picture that has none.

    {"rewards": [0.25, ...]}    or    {"rewards": {"colour": [0.25, ...], "shape": [0.5, ...]}}

Any other status is a failure, its reason in ``{"error": "..."}``. 429 and 5xx say that it may pass, and ``Retry-After``
in how many seconds.
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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpok_gym.checks import integer, one_of
from dpok_gym.images import to_uint8

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

#: Share of the batches in which an endpoint that failed is tried again, while others answer.
TRIED_AGAIN = 0.1
#: Seconds until a connection stands; a machine that is there answers in far less.
CONNECT_TIMEOUT = 10.0
JPEG_QUALITY = 95

Reply = dict[str, list[float]]  # by component; "" for a reply without names


class RemoteReward:
    """Pictures and prompts out, rewards back; see :mod:`dpok_gym.rewards.remote` for the contract.

    A batch is cut into requests, and each endpoint takes the next one when it has answered the last. What it failed
    at goes to the endpoint that is free next, while it rests, longer after each failure in a row. In later batches it
    is tried now and then, or when no other is left. So one that is dead costs its share of the speed, and in one batch
    of ten the wait until that is noticed. Pictures are sent with 8 bits a channel.

    Args:
        urls: the address of an endpoint, or of several that compute the same; with http:// or https://.
        name: of the reward; None for the first address without http:// ("localhost:8000"). If the reply has names, the
            components are called "name/theirs".
        timeout: seconds that an answer may take.
        attempts: requests in a row that an endpoint may fail before it is given up for this batch. Failures to
            connect, timeouts, and status 429 and 5xx count; anything else is an error at once.
        backoff: seconds of rest after the first failure, about: it doubles with each, and varies by a half at random,
            so that many clients do not come back at the same time.
        batch_size: pictures in a request, at most.
        image_format: "png", exact, or "jpeg" of quality 95, smaller: for slow networks, and rewards that do not mind.
        headers: sent along, such as ``{"Authorization": "Bearer ..."}``.

    Raises:
        ValueError: if an argument makes no sense; in a call, if an endpoint refuses the pictures or answers with
            something else than the contract says.
        ConnectionError: in a call, when no endpoint is left. The message names each, its attempts and its last failure.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        name: str | None = None,
        timeout: float = 120.0,
        attempts: int = 5,
        backoff: float = 0.5,
        batch_size: int = 16,
        image_format: Literal["png", "jpeg"] = "png",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ValueError(f"a remote reward needs one address or several different ones, not {self.urls}")
        for url in self.urls:
            _check_address(url)
        attempts, batch_size = integer("attempts", attempts), integer("batch_size", batch_size)
        if not (0 < timeout < math.inf and 0 <= backoff < math.inf):
            raise ValueError(f"timeout must be positive and backoff at least 0 seconds, got {timeout} and {backoff}")
        one_of("image_format", image_format, "png", "jpeg")
        self.__name__ = name or self.urls[0].split("://", 1)[1].rstrip("/")
        self.timeout, self.attempts, self.backoff = timeout, attempts, backoff
        self.batch_size, self.image_format, self.headers = batch_size, image_format, dict(headers or {})
        self._failing: set[str] = set()
        self._random = random.Random()  # its own: rewards leave the seeded generators alone

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor | dict[str, Tensor]:
        """Returns (B,), or (B,) by name; NaN where the endpoint has no reward."""
        if not prompts:
            return torch.zeros(0)
        pixels = to_uint8(images)
        size = min(self.batch_size, math.ceil(len(prompts) / len(self.urls)))
        chunks = [slice(first, first + size) for first in range(0, len(prompts), size)]
        replies = self._share([(pixels[chunk], list(prompts[chunk])) for chunk in chunks])
        names = list(replies[0])
        for reply in replies:
            if reply.keys() != replies[0].keys():
                raise ValueError(
                    f"the endpoints of the reward {self.__name__!r} answer with different names, {names} and "
                    f"{list(reply)}; all must compute the same"
                )
        values = {name: torch.tensor([value for reply in replies for value in reply[name]]) for name in names}
        return values[""] if names == [""] else {f"{self.__name__}/{name}": found for name, found in values.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Gymnasium copies an environment's arguments; open connections cannot be, and are made anew.
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    @functools.cached_property
    def _client(self) -> httpx2.Client:
        import httpx2

        timeout = httpx2.Timeout(self.timeout, connect=min(self.timeout, CONNECT_TIMEOUT))
        return httpx2.Client(timeout=timeout, headers={**self.headers, "content-type": "application/json"})

    def _share(self, jobs: Sequence[tuple[NDArray[np.uint8], list[str]]]) -> list[Reply]:
        """Has the endpoints work off the jobs side by side; returns the replies in the order of the jobs."""
        waiting = deque(range(len(jobs)))
        spare = [url for url in self.urls if url in self._failing and self._random.random() >= TRIED_AGAIN]
        free = deque(url for url in self.urls if url not in spare)
        replies: dict[int, Reply] = {}
        failures, last_error = dict.fromkeys(self.urls, 0), dict.fromkeys(self.urls, "")
        running: dict[Future[Any], tuple[str, int | None]] = {}  # the endpoint and its job, None for a rest
        client, over = self._client, threading.Event()
        pool = ThreadPoolExecutor(len(self.urls), "remote-reward")
        try:
            while len(replies) < len(jobs):
                while free and waiting:
                    url, job = free.popleft(), waiting.popleft()
                    running[pool.submit(self._send, client, url, *jobs[job])] = url, job
                if not running and spare:
                    free, spare = deque(spare), []
                    continue
                if not running:
                    raise ConnectionError(self._no_answer(last_error))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    url, done = running.pop(future)
                    try:
                        result = future.result()
                    except _MayPassError as error:
                        assert done is not None
                        waiting.appendleft(done)
                        failures[url] += 1
                        last_error[url] = str(error)
                        self._report(url, str(error))
                        if failures[url] < self.attempts:
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
            # After an error or Ctrl-C nobody waits for the others, until Python ends.
            pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, client: httpx2.Client, url: str, pixels: NDArray[np.uint8], prompts: list[str]) -> Reply:
        """One request with pictures (B, H, W, 3)."""
        import httpx2

        pictures = [base64.b64encode(self._encode(picture)).decode() for picture in pixels]
        content, body = json.dumps({"prompts": prompts, "images": pictures}).encode(), b""
        deadline = time.monotonic() + self.timeout
        try:
            with client.stream("POST", url, content=content) as response:
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > deadline:  # the client's own timeout begins anew with each part
                        raise httpx2.ReadTimeout("timed out")
        except httpx2.TimeoutException as error:
            raise _MayPassError(f"no answer in {self.timeout:g} seconds ({type(error).__name__})") from error
        except httpx2.TransportError as error:
            raise _MayPassError(f"{type(error).__name__}: {error}") from error
        except httpx2.RequestError as error:
            raise ValueError(f"the reward server {url} sent an answer that cannot be decoded: {error}") from error
        if response.status_code == 429 or response.status_code >= 500:
            after = response.headers.get("retry-after", "")
            reason = f"status {response.status_code}{_reason(body)}"
            raise _MayPassError(reason, float(after) if after.isdecimal() else 0.0)
        if response.status_code != 200:
            raise ValueError(f"the reward server {url} refused: status {response.status_code}{_reason(body)}")
        try:
            return _read_reply(body, len(prompts))
        except ValueError as error:
            raise ValueError(
                f"the reward server {url} does not keep the contract of dpok_gym.rewards.remote: {error}"
            ) from error

    def _encode(self, picture: NDArray[np.uint8]) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        # Little compression: more of it takes longer than the bytes it saves do on the way.
        options = {"compress_level": 1} if self.image_format == "png" else {"quality": JPEG_QUALITY}
        Image.fromarray(picture).save(buffer, self.image_format, **options)
        return buffer.getvalue()

    def _report(self, url: str, error: str | None) -> None:
        """Notes that an endpoint fails, or answers again, and logs it: once, as a dead one is tried many times."""
        if error is not None and url not in self._failing:
            self._failing.add(url)
            logger.warning("the reward server %s failed and will be tried again: %s", url, error)
        elif error is None and url in self._failing:
            self._failing.discard(url)
            logger.warning("the reward server %s answers again", url)

    def _no_answer(self, last_error: Mapping[str, str]) -> str:
        each = "; ".join(f"{url} failed {self.attempts} times in a row, last: {last_error[url]}" for url in self.urls)
        return (
            f"no server of the reward {self.__name__!r} is left: {each}. Check that it runs and can be reached from "
            f"here, or give it more time (timeout={self.timeout:g}, attempts={self.attempts})"
        )


class _MayPassError(Exception):
    """A failure after which another attempt makes sense."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def is_address(name: str) -> bool:
    """Whether a reward's name is an address, or several with spaces between them."""
    return name.strip().lower().startswith(("http://", "https://"))


def _check_address(url: Any) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, AttributeError):  # the port is no number, or the whole no text
        sound = False
    if not sound:
        raise ValueError(f"the address of a reward server is written http://host:port, not {url!r}")


def _reason(body: bytes) -> str:
    """What a server says of its failure, in short."""
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, TypeError, LookupError, RecursionError):
        text = body[:200].decode(errors="replace")
    return f" ({' '.join(text.split())})" if text.strip() else ""


def _read_reply(body: bytes, n_pictures: int) -> Reply:
    """The rewards in a reply, NaN for null."""
    try:
        reply = json.loads(body, parse_int=float)
    except (ValueError, RecursionError):
        raise ValueError(f"its answer is no JSON but {body[:100]!r}") from None
    rewards = reply.get("rewards") if isinstance(reply, dict) else None
    by_name = {"": rewards} if isinstance(rewards, list) else rewards
    if not isinstance(by_name, dict) or not by_name:
        raise ValueError(f"its answer has no list or mapping 'rewards': {body[:100]!r}")
    for name, values in by_name.items():
        where = f"the rewards {name!r}" if name else "the rewards"
        if not isinstance(values, list) or len(values) != n_pictures:
            count = len(values) if isinstance(values, list) else "no list"
            raise ValueError(f"{where} must be {n_pictures} numbers for as many pictures, got {count}")
        for value in values:
            if not (value is None or isinstance(value, float)):
                raise ValueError(f"{where} must be numbers or null, got {value!r}")
    return {name: [math.nan if value is None else value for value in values] for name, values in by_name.items()}
