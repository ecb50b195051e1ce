"""Published rewards that are networks, each with its authors' own preprocessing.

:func:`~dpok_gym.rewards.make_reward` makes them by their names, with weights from the Hugging Face cache or hub. To use
files of your own, or another device, call one of the classes here and pass the instance to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpok_gym.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dpok_gym.rewards.networks.aesthetic import Aesthetic as Aesthetic
    from dpok_gym.rewards.networks.base import NetworkReward as NetworkReward
    from dpok_gym.rewards.networks.clip_score import ClipScore as ClipScore
    from dpok_gym.rewards.networks.hpsv2 import HPSv2 as HPSv2
    from dpok_gym.rewards.networks.hpsv2 import HPSv21 as HPSv21
    from dpok_gym.rewards.networks.image_reward import ImageReward as ImageReward
    from dpok_gym.rewards.networks.pickscore import PickScore as PickScore

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Aesthetic": "aesthetic",
        "ClipScore": "clip_score",
        "HPSv2": "hpsv2",
        "HPSv21": "hpsv2",
        "ImageReward": "image_reward",
        "NetworkReward": "base",
        "PickScore": "pickscore",
    },
)
