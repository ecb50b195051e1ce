"""Rewards that other processes or machines compute: the client, and a server for any reward.

The client's module :mod:`.client` describes the requests and answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpok_gym.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dpok_gym.rewards.remote.client import RemoteReward as RemoteReward
    from dpok_gym.rewards.remote.server import make_app as make_app
    from dpok_gym.rewards.remote.server import serve as serve

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"RemoteReward": "client", "make_app": "server", "serve": "server"}
)
