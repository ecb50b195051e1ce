"""A server for any reward, with the protocol of :mod:`dpok_gym.rewards.remote.client`; ``dpok serve-reward`` runs it.

It needs the extra ``serve``. It speaks plain HTTP: a token and the images can be read on the way. Between machines that
do not trust their network, put it behind a proxy with TLS.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpok_gym.rewards.make import make_reward
from dpok_gym.rewards.remote.access import TOKEN_VARIABLE
from dpok_gym.rewards.remote.client import MAX_REQUEST_PIXELS
from dpok_gym.utils.serving import (
    check_host,
    find_token,
    is_called_by,
    is_token,
    names_of_server,
    needs_extra,
    run_server,
)
from dpok_gym.utils.threads import DaemonExecutor
from dpok_gym.utils.validation import check_integer

if TYPE_CHECKING:
    import PIL.Image
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

#: Largest number of pixels in an image: twice that of SDXL's 1024x1024. A file of a few kB could hold millions more.
MAX_PIXELS = 2**21
#: Most bytes of a request. Three bytes per pixel are four in base64; a fifth is for the prompts and the files' headers.
MAX_BODY_BYTES = 5 * MAX_REQUEST_PIXELS
#: Requests that are read, wait or are scored at a time, and their bytes in all. One more is answered with status 503.
MAX_REQUESTS, MAX_BYTES = 64, 2**30
#: Requests whose images are decoded at a time: while one is scored, the next one is prepared.
MAX_DECODED = 2
#: Seconds in which a client must have sent its request.
RECEIVE_TIMEOUT = 30.0
#: Seconds that requests which are being scored get at the server's end.
GRACE = 30


class Refusal(Exception):
    """A request that is not scored: the status of the answer and its reason, which the client may read."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def make_app(
    spec: Any, max_batch: int = 64, *, token: str | None = None, allowed_hosts: Sequence[str] = ()
) -> Starlette:
    """Makes the server, an ASGI application, and loads its reward.

    ``POST /`` scores images; ``GET /health`` answers ``{"status": "ok"}`` at any time, also without the token. Requests
    are scored one at a time, in the order in which they were read. Components are returned weighted, so that their sum
    is the reward, and as ``null`` where they are not finite.

    A request that is not scored is answered with ``{"error": "..."}``. The reason is one of a few fixed texts; what a
    reward raised stands in the log only.

    ====== =============================================================================================
    status meaning
    ====== =============================================================================================
    400    the request breaks the protocol, an image is damaged, or the Host header names another server
    401    the token is missing or wrong
    403    a web page sent the request
    408    the request did not come within 30 seconds
    413    too many images or pixels: at most ``max_batch`` images, 2**21 pixels in each and 2**24 in all
    422    the reward raised ValueError or TypeError, for example because it cannot read a prompt
    500    any other failure of the reward
    503    64 requests, or requests of 1 GiB, are waiting already; ``Retry-After`` says when to come back
    ====== =============================================================================================

    Args:
        spec: see :func:`~dpok_gym.rewards.make_reward`.
        max_batch: largest number of images in a request, 1 or more.
        token: what clients must send as ``Authorization: Bearer TOKEN``; None for the environment variable
            ``DPOK_REWARD_TOKEN``. If there is neither, everyone who reaches the server can use it.
        allowed_hosts: names by which clients may call the server, beside "localhost", the name of this machine and all
            numeric addresses. A web page that points its own name here ("DNS rebinding") is refused so.

    Raises:
        ImportError: if the extra ``serve`` is not installed.
        ValueError: if ``max_batch`` is less than 1, the token is empty, two rewards differ in the folders of their
            paths only, or as :func:`~dpok_gym.rewards.make_reward`.
    """
    with needs_extra("serve"):
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    check_integer("max_batch", max_batch)
    token = find_token(token, TOKEN_VARIABLE)
    reward = make_reward(spec, "mask")
    public = [_public_name(name) for name in reward.names]
    if len(set(public)) < len(public):
        twice = next(name for name in public if public.count(name) > 1)
        raise ValueError(
            f"two rewards are named {twice!r}, as the folders of a path are not told to clients: rename one of them"
        )
    load = _Load()
    decoding, scoring = asyncio.Semaphore(MAX_DECODED), asyncio.Lock()
    # Threads, so that other requests are answered meanwhile.
    decoder, scorer = DaemonExecutor(1, "decode-images"), DaemonExecutor(1, "score-images")

    def score_images(images: Tensor, prompts: list[str]) -> dict[str, list[float | None]]:
        try:
            weighted = reward.weigh(reward.components(images, prompts))
        except (TypeError, ValueError) as error:
            logger.warning("the reward refused images or prompts", exc_info=True)
            reason = "the reward cannot read a prompt or an image; the server's log says why"
            raise Refusal(422, reason) from error
        except Exception as error:
            logger.exception("the reward failed")
            raise Refusal(500, "the reward failed; the server's log says why") from error
        return {_public_name(name): _to_json(values) for name, values in weighted.items()}

    async def score(request: Request) -> JSONResponse:
        run = asyncio.get_running_loop().run_in_executor
        async with load.receive(request) as body, decoding:
            images, prompts = await run(decoder, _read_request, body, max_batch)
            async with scoring:
                if await request.is_disconnected():  # after a long wait the client may have sent it again
                    raise Refusal(408, "the client has gone")
                return JSONResponse({"rewards": await run(scorer, score_images, images, prompts)})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def on_refusal(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        return JSONResponse({"error": error.reason}, error.status, error.headers)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": "there are POST / and GET /health"}, error.status_code, error.headers)

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the server failed; its log says why"}, 500)  # the log gets the traceback

    return Starlette(
        routes=[Route("/", score, methods=["POST"]), Route("/health", health)],
        middleware=[Middleware(_Door, token=token, allowed_hosts=allowed_hosts)],
        exception_handlers={Refusal: on_refusal, HTTPException: on_http_error, Exception: on_error},
    )


def serve(
    spec: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch: int = 64,
    *,
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serves a reward until SIGTERM or Ctrl-C.

    Requests that are being answered then get 30 seconds more. A second Ctrl-C ends the server at once.

    Args:
        spec: see :func:`~dpok_gym.rewards.make_reward`.
        host: network interface to listen on; "0.0.0.0" for all, so that other machines reach it.
        port: port number; 0 for any free one.
        max_batch: largest number of images in a request, 1 or more.
        token: see :func:`make_app`.
        allowed_hosts: see :func:`make_app`; ``host`` is one of them.

    Raises:
        OSError: if the port is taken, or there is no such interface.
        ImportError: if the extra ``serve`` is not installed.
        ValueError: if ``host`` is empty, or as :func:`make_app`.
    """
    check_host(host)
    app = make_app(spec, max_batch, token=token, allowed_hosts=[host, *allowed_hosts])
    with needs_extra("serve"):
        from dpok_gym.rewards.remote.connections import RewardConnection

    def announce(address: str, is_private: bool) -> None:
        print(f"serving at {address}; Ctrl-C ends it", flush=True)
        if find_token(token, TOKEN_VARIABLE) is None and not is_private:
            logger.warning("everyone who reaches this port can use the reward; %s sets a token", TOKEN_VARIABLE)

    # Clients close idle connections after 5 seconds. If the server did so too, it could cut off their next request.
    run_server(
        app,
        host,
        port,
        announce,
        http=RewardConnection,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE,
    )


class _Door:
    """Lets requests in that have the token, and that call this server by one of its names."""

    def __init__(self, app: ASGIApp, token: str | None, allowed_hosts: Sequence[str]) -> None:
        self.app, self.token = app, token
        self.names = names_of_server(*allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import JSONResponse

        app = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if not is_called_by(headers.get("host", ""), self.names):
                reason = "the Host header names another server; dpok serve-reward --allowed-host adds a name"
                app = JSONResponse({"error": reason}, 400)
            elif "origin" in headers:  # which browsers add to what a page of another site sends
                app = JSONResponse({"error": "web pages cannot use this server"}, 403)
            elif scope["path"] != "/health" and not self._has_token(headers.get("authorization", "")):
                reason = f"the token is missing or wrong; the client takes it from {TOKEN_VARIABLE}"
                app = JSONResponse({"error": reason}, 401, {"www-authenticate": "Bearer"})
        await app(scope, receive, send)

    def _has_token(self, authorization: str) -> bool:
        if self.token is None:
            return True
        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and is_token(given, self.token)


class _Load:
    """The requests that the server holds. It bounds their number and their bytes."""

    def __init__(self) -> None:
        self.requests, self.bytes = 0, 0

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytearray]:
        """Yields the body of a request, and counts it until the end of the block."""
        from starlette.requests import ClientDisconnect

        busy = Refusal(503, "the server is busy", retry_after="1")
        if self.requests >= MAX_REQUESTS:
            raise busy
        body = bytearray()
        self.requests += 1
        try:
            async with asyncio.timeout(RECEIVE_TIMEOUT):
                async for part in request.stream():
                    body += part
                    self.bytes += len(part)
                    if len(body) > MAX_BODY_BYTES:
                        raise Refusal(413, f"the request is too large; at most {MAX_REQUEST_PIXELS} pixels in all")
                    if self.bytes > MAX_BYTES:
                        raise busy
            yield body
        except ClientDisconnect:
            raise Refusal(408, "the client has gone") from None
        except TimeoutError:
            reason = f"the request did not come within {RECEIVE_TIMEOUT:g} seconds"
            raise Refusal(408, reason, connection="close") from None
        finally:
            self.requests -= 1
            self.bytes -= len(body)


def _read_request(body: bytearray, max_batch: int) -> tuple[Tensor, list[str]]:
    """Returns the images (B, 3, H, W) in [0, 1] and the prompts of a request.

    Raises:
        Refusal: if the request breaks the protocol or is too large, before any image is decoded; or if one is damaged.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the request is no JSON") from None
    if not isinstance(request, dict):
        raise Refusal(400, 'the request must be {"prompts": [...], "images": [...]}')
    prompts, files = _read_texts(request, "prompts"), _read_texts(request, "images")
    if len(prompts) != len(files):
        raise Refusal(400, f"there must be as many prompts as images, not {len(prompts)} and {len(files)}")
    if len(prompts) > max_batch:
        raise Refusal(413, f"{len(prompts)} images in one request are too many, at most {max_batch}")
    images = [_open_image(text, index) for index, text in enumerate(files)]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise Refusal(400, f"the images of a request must have one size, not {sorted(sizes)}")
    n_pixels = math.prod(images[0].size)
    if n_pixels > MAX_PIXELS or n_pixels * len(images) > MAX_REQUEST_PIXELS:
        raise Refusal(
            413,
            f"{len(images)} images of {n_pixels} pixels are too large, at most {MAX_PIXELS} pixels in each and "
            f"{MAX_REQUEST_PIXELS} in all; send fewer at a time (batch_size)",
        )
    pixels = np.empty((len(images), *images[0].size[::-1], 3), np.uint8)
    for index, image in enumerate(images):
        pixels[index] = _decode(image, index)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, prompts


def _read_texts(request: dict[str, Any], name: str) -> list[str]:
    texts = request.get(name)
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise Refusal(400, f"'{name}' must be a list of texts, at least one")
    return texts


def _open_image(text: str, index: int) -> PIL.Image.Image:
    """Opens the file of an image, in base64. It tells the size, and decodes nothing.

    Args:
        text: the file in base64.
        index: number of the image in the request, for error messages.

    Raises:
        Refusal: if the file is no image.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "JPEG"))
    except Image.DecompressionBombError:
        raise Refusal(413, f"image {index} is too large; at most {MAX_PIXELS} pixels") from None
    except Exception:  # Pillow has many kinds for damaged files, SyntaxError among them
        raise Refusal(400, f"image {index} is neither PNG nor JPEG in base64") from None
    if image.info.get("progressive"):  # a file of a few kB could have thousands of scans, each of all pixels
        raise Refusal(400, f"image {index} is a progressive JPEG, which is not read; save it as a plain one")
    return image


def _decode(image: PIL.Image.Image, index: int) -> NDArray[np.uint8]:
    """Returns the pixels (H, W, 3) of the image with this number; a Refusal if it is damaged."""
    try:
        return np.asarray(image.convert("RGB"))
    except Exception:  # as above
        raise Refusal(400, f"image {index} is damaged") from None


def _public_name(name: str) -> str:
    """Returns the name of a component without the folders of a reward that was loaded from a path."""
    return Path(name).name if os.path.isabs(name) else name


def _to_json(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
