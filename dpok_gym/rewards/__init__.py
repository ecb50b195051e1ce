"""Rewards: what a picture is worth for its prompt.

A reward is any callable ``(images, prompts) -> (B,)`` or ``-> {name: (B,)}``, with the images (B, 3, H, W) in [0, 1],
floating point, and B prompts. :func:`make_reward` turns a registered name, such a callable, or ``{name: weight}`` into
a :class:`Reward`; :func:`register_reward` adds names. Built in:

==========================  ===================================================================
name                        reward
==========================  ===================================================================
``shapes-alignment``        how well the embedded world's judge finds the prompt in the picture
``shapes-quality``          how clean the same judge finds the picture, whatever the prompt
``jpeg-compressibility``    minus the size of the picture as a JPEG file, kilobytes
``jpeg-incompressibility``  the size of the picture as a JPEG file, kilobytes
==========================  ===================================================================
"""

from dpok_gym.rewards.base import Reward, RewardBatch, RewardFunction, make_reward
from dpok_gym.rewards.registry import list_rewards, register_reward

__all__ = ["Reward", "RewardBatch", "RewardFunction", "list_rewards", "make_reward", "register_reward"]

register_reward("shapes-alignment", "dpok_gym.rewards.shapes:ShapesAlignment")
register_reward("shapes-quality", "dpok_gym.rewards.shapes:ShapesQuality")
register_reward("jpeg-compressibility", "dpok_gym.rewards.jpeg:JpegCompressibility")
register_reward("jpeg-incompressibility", "dpok_gym.rewards.jpeg:JpegIncompressibility")
