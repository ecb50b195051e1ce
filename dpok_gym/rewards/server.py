"""A server for any reward, by the contract of :mod:`dpok_gym.rewards.remote`; ``dpok serve-reward`` runs it.

It needs the extra ``serve``. There is no authentication: whoever reaches the port can have pictures judged.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpok_gym.checks import integer
from dpok_gym.rewards.base import make_reward

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

#: Pixels of a picture, at most: twice those of SDXL's 1024x1024. A file of some kB could hold millions more.
MAX_PIXELS = 2**21


def make_app(spec: Any, max_batch: int = 64) -> Starlette:
    """The server as an ASGI application, its reward loaded.

    ``POST /`` judges; ``GET /health`` says that the server is there, also while it judges. Requests are judged one at a
    time, in the order in which they were read. What is wrong with a request is said with status 400, 413 (too large)
    or 422 (the reward raised ValueError or TypeError, for a prompt that it cannot read, say); any other failure of the
    reward is status 500. Components are returned weighted, so that their sum is the reward, and ``null`` for a
    picture that has none; ``"running"`` normalisation is left out, as it would mix the requests of different runs.

    Args:
        spec: what :func:`~dpok_gym.rewards.make_reward` takes.
        max_batch: pictures in a request, at most.

    Raises:
        ImportError: if the extra ``serve`` is not installed.
        ValueError: if ``max_batch`` is less than 1, or as make_reward does.
    """
    with _extra():
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    integer("max_batch", max_batch)
    reward = make_reward(spec, "mask")
    reward.training = False
    one_at_a_time = asyncio.Lock()

    def failed(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": message}, status)

    async def judge(request: Request) -> JSONResponse:
        body = await _read_body(request, 4 * MAX_PIXELS * max_batch)  # 3 bytes a pixel are 4 in base64
        if body is None:
            return failed(413, f"the request is too large; at most {max_batch} pictures of {MAX_PIXELS} pixels")
        try:
            images, prompts = await run_in_threadpool(_read_request, body, max_batch)
        except _TooLargeError as error:
            return failed(413, str(error))
        except ValueError as error:
            return failed(400, str(error))
        async with one_at_a_time:
            if await request.is_disconnected():  # it may have waited so long that the client has asked again
                return failed(408, "the client has gone")
            try:
                judged = await run_in_threadpool(reward, images, prompts)
            except (TypeError, ValueError) as error:
                return failed(422, str(error))
        return JSONResponse({"rewards": {name: _to_json(values) for name, values in judged.weighted.items()}})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "rewards": reward.names, "max_batch": max_batch})

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return failed(error.status_code, f"{error.detail}: there are POST / and GET /health")

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return failed(500, f"the reward failed: {type(error).__name__}: {error}")  # the log gets the traceback

    return Starlette(
        routes=[Route("/", judge, methods=["POST"]), Route("/health", health)],
        exception_handlers={HTTPException: on_http_error, Exception: on_error},
    )


def serve(spec: Any, host: str = "127.0.0.1", port: int = 8000, max_batch: int = 64) -> None:
    """Serves a reward until Ctrl-C.

    Args:
        spec: as for :func:`make_app`, and ``max_batch`` too.
        host: interface to listen on; "0.0.0.0" for all, so that other machines reach it.
        port: 0 for any free one.
        max_batch: pictures in a request, at most.

    Raises:
        OSError: if the port is taken.
        ImportError: if the extra ``serve`` is not installed.
    """
    app = make_app(spec, max_batch)
    with _extra():
        import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        address = f"[{host}]" if ":" in host else host
        print(f"serving at http://{address}:{listener.getsockname()[1]}; Ctrl-C ends it", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(f"this needs the extra 'serve' ({error}): pip install 'dpok-gym[serve]'") from error


class _TooLargeError(ValueError):
    """More pictures, or larger ones, than the server takes."""


async def _read_body(request: Request, limit: int) -> bytes | None:
    """The body of a request; None if it is longer than ``limit`` bytes, of which no more are read."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            return None
    return bytes(body)


def _read_request(body: bytes, max_batch: int) -> tuple[Tensor, list[str]]:
    """The pictures (B, 3, H, W) in [0, 1] and the prompts of a request."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request is no JSON") from None
    if not isinstance(request, dict):
        raise ValueError('the request must be {"prompts": [...], "images": [...]}')
    prompts, images = (_read_texts(request, name) for name in ("prompts", "images"))
    if len(prompts) != len(images):
        raise ValueError(f"there must be as many prompts as images, not {len(prompts)} and {len(images)}")
    if len(prompts) > max_batch:
        raise _TooLargeError(f"{len(prompts)} pictures in one request are too many, at most {max_batch}")
    pictures = [_read_picture(text, index) for index, text in enumerate(images)]
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"the pictures of a request must have one size, not {sorted(shape[:2] for shape in shapes)}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, prompts


def _read_texts(request: dict[str, Any], name: str) -> list[str]:
    texts = request.get(name)
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"'{name}' must be a list of texts, at least one")
    return texts


def _read_picture(text: str, index: int) -> np.ndarray:
    """A picture (H, W, 3) uint8 from its file in base64."""
    from PIL import Image, UnidentifiedImageError

    try:
        file = io.BytesIO(base64.b64decode(text, validate=True))
        with Image.open(file, formats=("PNG", "JPEG")) as picture:
            if math.prod(picture.size) > MAX_PIXELS:  # known before anything is decoded
                raise _TooLargeError(f"image {index} has {picture.size} pixels; at most {MAX_PIXELS} in all")
            return np.asarray(picture.convert("RGB"))
    except _TooLargeError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"image {index} is neither PNG nor JPEG") from None
    except Exception as error:  # Pillow has many kinds for damaged files, SyntaxError among them
        raise ValueError(f"image {index} cannot be read: {error}") from error


def _to_json(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
