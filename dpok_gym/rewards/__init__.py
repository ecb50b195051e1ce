"""Rewards: functions that score an image for its prompt.

A reward function is any callable ``(images, prompts) -> (B,)`` or ``-> {name: (B,)}``, with the images (B, 3, H, W) in
[0, 1], floating point, and B prompts. It must be a pure function of them. :func:`make_reward` turns a registered name,
such a callable, the address of a server (:class:`RemoteReward`), or ``{name: weight}`` into a :class:`Reward`;
:func:`register_reward` adds names. Importing this package imports no torch. Built in:

==========================  =====================================================================
name                        reward
==========================  =====================================================================
``jpeg-compressibility``    minus the size of the image as a JPEG file, kilobytes
``jpeg-incompressibility``  the size of the image as a JPEG file, kilobytes
``image-reward``            ImageReward-v1.0: people's rating of the image for its prompt
``pickscore``               PickScore: how likely people are to pick the image for its prompt
``hpsv2``, ``hpsv2.1``      Human Preference Score: people's ranking of the image for its prompt
``clip-score``              the cosine between CLIP's embeddings of image and prompt
``aesthetic``               LAION's aesthetic predictor: how much people like the image
==========================  =====================================================================

The embedded worlds register rewards of their own; :func:`list_rewards` names them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpok_gym.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dpok_gym.rewards.base import NonFiniteError as NonFiniteError
    from dpok_gym.rewards.base import Reward as Reward
    from dpok_gym.rewards.base import RewardBatch as RewardBatch
    from dpok_gym.rewards.make import check_reward as check_reward
    from dpok_gym.rewards.make import make_reward as make_reward
    from dpok_gym.rewards.registry import RewardFunction as RewardFunction
    from dpok_gym.rewards.registry import list_rewards as list_rewards
    from dpok_gym.rewards.registry import register_reward as register_reward
    from dpok_gym.rewards.remote.client import RemoteReward as RemoteReward
    from dpok_gym.rewards.workers import judge_chunks as judge_chunks

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "NonFiniteError": "base",
        "RemoteReward": "remote.client",
        "Reward": "base",
        "RewardBatch": "base",
        "RewardFunction": "registry",
        "check_reward": "make",
        "judge_chunks": "workers",
        "list_rewards": "registry",
        "make_reward": "make",
        "register_reward": "registry",
    },
)
