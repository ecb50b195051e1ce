"""What the servers of this package share: a port, signals, tokens, and the names that they are called by."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import uvicorn


def check_host(host: str) -> None:
    """Checks the name of a network interface.

    Raises:
        ValueError: if it is blank.
    """
    if not host.strip():
        raise ValueError("the host must name a network interface, such as 127.0.0.1; 0.0.0.0 stands for all of them")


def find_token(token: str | None, variable: str) -> str | None:
    """Returns a token, or that of the environment, or None if there is neither.

    Args:
        token: the token; None for that of the environment.
        variable: the environment variable.

    Raises:
        ValueError: if the token is empty, or has characters that a header cannot hold. The message does not show it.
    """
    where = "the token" if token is not None else f"the environment variable {variable}"
    token = os.environ.get(variable) if token is None else token
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ValueError(f"{where} must be one or more visible ASCII characters without spaces")
    return token


def is_token(given: str, token: str) -> bool:
    """Returns whether somebody gave the token; the time it takes does not tell how many characters are right."""
    return secrets.compare_digest(given.encode(), token.encode())


def names_of_server(*allowed_hosts: str) -> set[str]:
    """Returns the names by which clients may call a server: "localhost", this machine's, and those that are allowed."""
    return {name.lower() for name in ("localhost", socket.gethostname(), *allowed_hosts)}


def is_called_by(host: str, names: Collection[str]) -> bool:
    """Returns whether a Host header has one of the names of the server, or a numeric address.

    A web page that points its own name here ("DNS rebinding") has another one.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name not in names:
            ipaddress.ip_address(name)  # an address in numbers cannot be pointed elsewhere
    except ValueError:
        return False
    return True


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Lets an import that fails in the block name the extra of this package that it needs."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"this needs the extra {name!r} ({error}): pip install 'dpok-gym[{name}]'") from error


def run_server(app: Any, host: str, port: int, ready: Callable[[str, bool], None], **settings: Any) -> None:
    """Serves an application until SIGTERM or Ctrl-C. A second Ctrl-C ends it at once.

    Args:
        app: an ASGI application.
        host: network interface to listen on.
        port: port number; 0 for any free one.
        ready: is called with the server's address, and whether only this machine reaches it.
        **settings: further arguments of uvicorn's ``Config``.

    Raises:
        OSError: if the port is taken, or there is no such interface.
    """
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", **settings))
    with _listen(host, port) as listener, _signals_end(server):
        name = f"[{host}]" if ":" in host else host
        is_private = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        ready(f"http://{name}:{listener.getsockname()[1]}", is_private)
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another host or port"
        ) from error


@contextmanager
def _signals_end(server: uvicorn.Server) -> Iterator[None]:
    """Lets SIGINT and SIGTERM do nothing in the block but end the server, also while it starts.

    Once it runs, uvicorn handles them itself. After its end it sends them to the process again, which would kill it.
    """
    if threading.current_thread() is not threading.main_thread():  # which has no signals
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
