"""``dpok serve-reward``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from agents.cli.arguments import parse_options


@dataclass
class ServeReward:
    """Serve a reward over HTTP, for dpok train --reward http://HOST:PORT.

    With a token, only clients that have it are answered; without one, everyone who reaches the port. SIGTERM and Ctrl-C
    end the server, after the requests that are being answered.
    """

    reward: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REWARD")]
    """The reward, written as in dpok train: NAME, or NAME=WEIGHT,NAME=WEIGHT."""
    host: str = "127.0.0.1"
    """Network interface to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on, 0 for any free one."""
    max_batch: int = 64
    """Images in a request, 1 or more; larger requests are refused."""
    token: str | None = field(default=None, repr=False)
    """Token that clients must send. Other users of the machine can read a command line: better set the environment
    variable DPOK_REWARD_TOKEN, here and for dpok train."""
    allowed_host: tuple[str, ...] = ()
    """Names by which clients call this server, beside localhost, the machine's name and numeric addresses."""


def parse(argv: Sequence[str]) -> ServeReward:
    """Reads the options."""
    return parse_options(ServeReward, "dpok serve-reward", argv)


def run(options: ServeReward) -> int:
    """Serves the reward until SIGTERM or Ctrl-C; returns the exit code.

    Raises:
        ValueError: if an option is out of range, or there is no such reward.
        OSError: if the port is taken, or there is no such interface.
    """
    # These load torch; the help does not need it.
    from agents.cli.environments import parse_reward
    from dpok_gym.rewards.remote.server import serve
    from dpok_gym.utils.threads import is_busy

    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, got {options.port}")
    serve(
        parse_reward(options.reward),
        options.host,
        options.port,
        options.max_batch,
        token=options.token,
        allowed_hosts=options.allowed_host,
    )
    if is_busy():
        # The reward hangs. Python would stop its thread by force, and torch may abort the process then.
        sys.stderr.flush()
        os._exit(0)
    return 0
