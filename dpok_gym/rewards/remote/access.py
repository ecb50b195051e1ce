"""The addresses of reward servers, and the token that they may ask for."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

#: The environment variable that holds the token of client and server.
TOKEN_VARIABLE = "DPOK_REWARD_TOKEN"


def is_address(name: str) -> bool:
    """Returns True if a reward's name is an address, or several with spaces between them."""
    return name.strip().lower().startswith(("http://", "https://"))


def check_no_secret(text: str) -> None:
    """Makes sure that no address in a text has a place for a secret, because addresses stand in logs and in files.

    Raises:
        ValueError: if there is a user, a password or a query. The message does not show it.
    """
    if re.search(r"https?://", text, re.IGNORECASE) and re.search(r"[@?#]", text):
        raise ValueError(
            "the address of a reward server must have no user, password or query, because it is written into logs and "
            f"files: write http://host:port/path, and put a token into the environment variable {TOKEN_VARIABLE}"
        )


def check_address(url: Any) -> None:
    """Checks the address of a server.

    Raises:
        ValueError: if it is not written ``http://host:port/path``, or as :func:`check_no_secret`.
    """
    sound = isinstance(url, str) and url.isprintable() and " " not in url
    if sound:
        check_no_secret(url)
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is no number, or the host no IPv6 address
            sound = False
    if not sound:
        raise ValueError(f"the address of a reward server is written http://host:port, not {url!r}")
