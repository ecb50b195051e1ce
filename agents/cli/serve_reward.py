"""``dpok serve-reward``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from agents.cli.arguments import parse_options


@dataclass
class ServeReward:
    """Serve a reward over HTTP, for dpok train --reward http://HOST:PORT.

    There is no authentication: everyone who can reach the port can have images scored.
    """

    reward: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REWARD")]
    """The reward, written as in dpok train: NAME, or NAME=WEIGHT,NAME=WEIGHT."""
    host: str = "127.0.0.1"
    """Network interface to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on, 0 for any free one."""
    max_batch: int = 64
    """Images in a request, 1 or more; larger requests are refused."""


def parse(argv: Sequence[str]) -> ServeReward:
    """Reads the options."""
    return parse_options(ServeReward, "dpok serve-reward", argv)


def run(options: ServeReward) -> int:
    """Serves the reward until Ctrl-C; returns the exit code.

    Raises:
        ValueError: if an option is out of range, or there is no such reward.
        OSError: if the port is taken.
    """
    # These load torch; the help does not need it.
    from agents.cli.environments import parse_reward
    from dpok_gym.rewards.remote.server import serve

    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, got {options.port}")
    serve(parse_reward(options.reward), options.host, options.port, options.max_batch)
    return 130  # only Ctrl-C ends the server; uvicorn does not always raise KeyboardInterrupt then
