"""A server for any reward, with the protocol of :mod:`dpok_gym.rewards.remote.client`; ``dpok serve-reward`` runs it.

It needs the extra ``serve``. There is no authentication: everyone who reaches the port can use the reward.
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
from numpy.typing import NDArray
from torch import Tensor

from dpok_gym.rewards.make import make_reward
from dpok_gym.utils.validation import check_integer

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

#: Largest number of pixels in an image: twice that of SDXL's 1024x1024. A file of a few kB could hold millions more.
MAX_PIXELS = 2**21


def make_app(spec: Any, max_batch: int = 64) -> Starlette:
    """Makes the server, an ASGI application, and loads its reward.

    ``POST /`` scores images; ``GET /health`` answers at any time. Requests are scored one at a time, in the order in
    which they were read. A bad request is answered with status 400, 413 (too large) or 422 (the reward raised
    ValueError or TypeError, for example because it cannot read a prompt); any other failure of the reward with status
    500. Components are returned weighted, so that their sum is the reward, and as ``null`` where they are not finite.

    Args:
        spec: see :func:`~dpok_gym.rewards.make_reward`.
        max_batch: largest number of images in a request, 1 or more.

    Raises:
        ImportError: if the extra ``serve`` is not installed.
        ValueError: if ``max_batch`` is less than 1, or as :func:`~dpok_gym.rewards.make_reward`.
    """
    with _extra():
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    check_integer("max_batch", max_batch)
    reward = make_reward(spec, "mask")
    one_at_a_time = asyncio.Lock()

    def score_images(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return reward.weigh(reward.components(images, prompts))

    def failed(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": message}, status)

    async def score(request: Request) -> JSONResponse:
        body = await _read_body(request, 4 * MAX_PIXELS * max_batch)  # 3 bytes per pixel are 4 in base64
        if body is None:
            return failed(413, f"the request is too large; at most {max_batch} images of {MAX_PIXELS} pixels")
        try:
            images, prompts = await run_in_threadpool(_read_request, body, max_batch)
        except _TooLargeError as error:
            return failed(413, str(error))
        except ValueError as error:
            return failed(400, str(error))
        async with one_at_a_time:
            if await request.is_disconnected():  # after a long wait the client may have sent it again
                return failed(408, "the client has gone")
            try:
                rewards = await run_in_threadpool(score_images, images, prompts)
            except (TypeError, ValueError) as error:
                return failed(422, str(error))
        return JSONResponse({"rewards": {name: _to_json(values) for name, values in rewards.items()}})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "rewards": reward.names, "max_batch": max_batch})

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return failed(error.status_code, f"{error.detail}: there are POST / and GET /health")

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return failed(500, f"the reward failed: {type(error).__name__}: {error}")  # the log gets the traceback

    return Starlette(
        routes=[Route("/", score, methods=["POST"]), Route("/health", health)],
        exception_handlers={HTTPException: on_http_error, Exception: on_error},
    )


def serve(spec: Any, host: str = "127.0.0.1", port: int = 8000, max_batch: int = 64) -> None:
    """Serves a reward until Ctrl-C.

    Args:
        spec: see :func:`~dpok_gym.rewards.make_reward`.
        host: network interface to listen on; "0.0.0.0" for all, so that other machines reach it.
        port: port number; 0 for any free one.
        max_batch: largest number of images in a request, 1 or more.

    Raises:
        OSError: if the port is taken.
        ImportError: if the extra ``serve`` is not installed.
        ValueError: as :func:`make_app`.
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
    """A request has more images, or larger ones, than the server takes."""


async def _read_body(request: Request, limit: int) -> bytes | None:
    """Returns the body of a request; None if it is longer than ``limit`` bytes, without reading all of it."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            return None
    return bytes(body)


def _read_request(body: bytes, max_batch: int) -> tuple[Tensor, list[str]]:
    """Returns the images (B, 3, H, W) in [0, 1] and the prompts of a request."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request is no JSON") from None
    if not isinstance(request, dict):
        raise ValueError('the request must be {"prompts": [...], "images": [...]}')
    prompts, files = _read_texts(request, "prompts"), _read_texts(request, "images")
    if len(prompts) != len(files):
        raise ValueError(f"there must be as many prompts as images, not {len(prompts)} and {len(files)}")
    if len(prompts) > max_batch:
        raise _TooLargeError(f"{len(prompts)} images in one request are too many, at most {max_batch}")
    images = [_read_image(text, index) for index, text in enumerate(files)]
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise ValueError(f"the images of a request must have one size, not {sorted(sizes)}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255, prompts


def _read_texts(request: dict[str, Any], name: str) -> list[str]:
    texts = request.get(name)
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"'{name}' must be a list of texts, at least one")
    return texts


def _read_image(text: str, index: int) -> NDArray[np.uint8]:
    """Decodes an image (H, W, 3) uint8 from its file in base64.

    Args:
        text: the file in base64.
        index: number of the image in the request, for error messages.

    Raises:
        ValueError: if the file is no image, or the image is too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        file = io.BytesIO(base64.b64decode(text, validate=True))
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if math.prod(image.size) > MAX_PIXELS:  # the size is known before anything is decoded
                raise _TooLargeError(f"image {index} has {image.size} pixels; at most {MAX_PIXELS} in all")
            return np.asarray(image.convert("RGB"))
    except _TooLargeError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"image {index} is neither PNG nor JPEG") from None
    except Exception as error:  # Pillow has many kinds for damaged files, SyntaxError among them
        raise ValueError(f"image {index} cannot be read: {error}") from error


def _to_json(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
