"""Rewards: what a picture is worth for its prompt.

A reward is any callable ``(images, prompts) -> (B,)`` or ``-> {name: (B,)}``, with the images (B, 3, H, W) in [0, 1],
floating point, and B prompts. :func:`make_reward` turns a registered name, such a callable, the address of a server
(:class:`RemoteReward`), or ``{name: weight}`` into a :class:`Reward`; :func:`register_reward` adds names. Built in:

==========================  ===================================================================
name                        reward
==========================  ===================================================================
``shapes-alignment``        how well the embedded world's judge finds the prompt in the picture
``shapes-quality``          how clean the same judge finds the picture, whatever the prompt
``shapes-preference``       which pictures a simulated person likes better, learned from 20,000 choices
``mixture-linear``          how far right the dot of the mixture model is
``mixture-quadratic``       minus the squared distance of that dot from (1, 0)
``jpeg-compressibility``    minus the size of the picture as a JPEG file, kilobytes
``jpeg-incompressibility``  the size of the picture as a JPEG file, kilobytes
``image-reward``            ImageReward-v1.0: how people would rate the picture for its prompt
``pickscore``               PickScore: how likely people are to pick it for its prompt
``hpsv2``, ``hpsv2.1``      Human Preference Score: how people would rank it for its prompt
``clip-score``              the cosine between CLIP's embeddings of picture and prompt
``aesthetic``               LAION's aesthetic predictor: how much people like the picture
==========================  ===================================================================
"""

from dpok_gym.rewards.base import Reward, RewardBatch, RewardFunction, make_reward
from dpok_gym.rewards.registry import list_rewards, register_reward
from dpok_gym.rewards.remote import RemoteReward
from dpok_gym.rewards.workers import judge_chunks

__all__ = [
    "RemoteReward",
    "Reward",
    "RewardBatch",
    "RewardFunction",
    "judge_chunks",
    "list_rewards",
    "make_reward",
    "register_reward",
]

register_reward("shapes-alignment", "dpok_gym.rewards.shapes:ShapesAlignment")
register_reward("shapes-quality", "dpok_gym.rewards.shapes:ShapesQuality")
register_reward("shapes-preference", "dpok_gym.rewards.preference:shapes_preference")
register_reward("mixture-linear", "dpok_gym.rewards.mixture:MixtureLinear")
register_reward("mixture-quadratic", "dpok_gym.rewards.mixture:MixtureQuadratic")
register_reward("jpeg-compressibility", "dpok_gym.rewards.jpeg:JpegCompressibility")
register_reward("jpeg-incompressibility", "dpok_gym.rewards.jpeg:JpegIncompressibility")
register_reward("image-reward", "dpok_gym.rewards.image_reward:ImageReward")
register_reward("pickscore", "dpok_gym.rewards.pickscore:PickScore")
register_reward("hpsv2", "dpok_gym.rewards.hpsv2:HPSv2")
register_reward("hpsv2.1", "dpok_gym.rewards.hpsv2:HPSv21")
register_reward("clip-score", "dpok_gym.rewards.clip_score:ClipScore")
register_reward("aesthetic", "dpok_gym.rewards.aesthetic:Aesthetic")
