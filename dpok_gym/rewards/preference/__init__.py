"""Rewards that are learned from choices between two images: the choices, the networks, the fit.

:func:`.fit.fit` learns a reward from the choices that :func:`load_comparisons` reads: a :class:`PreferenceReward`, a
small network for simple images, or a :class:`ClipReward`, a head on CLIP's features for images of the real world. It is
saved as a folder, whose path is a name that :func:`~dpok_gym.rewards.make_reward` knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpok_gym.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dpok_gym.rewards.preference.clip import ClipReward as ClipReward
    from dpok_gym.rewards.preference.data import Comparisons as Comparisons
    from dpok_gym.rewards.preference.data import load_comparisons as load_comparisons
    from dpok_gym.rewards.preference.network import PreferenceConfig as PreferenceConfig
    from dpok_gym.rewards.preference.network import PreferenceNetwork as PreferenceNetwork
    from dpok_gym.rewards.preference.reward import LearnedReward as LearnedReward
    from dpok_gym.rewards.preference.reward import PreferenceReward as PreferenceReward

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ClipReward": "clip",
        "Comparisons": "data",
        "LearnedReward": "reward",
        "PreferenceConfig": "network",
        "PreferenceNetwork": "network",
        "PreferenceReward": "reward",
        "load_comparisons": "data",
    },
)
