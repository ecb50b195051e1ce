"""A reward that is learned from choices: a small network tells which of two images people prefer for a prompt.

By the Bradley-Terry model the probability that image a is preferred to image b for the prompt z is

    P(a > b | z) = sigmoid(s(a, z) - s(b, z))

so the difference of two scores s is the log-odds of the choice. Only differences have a meaning: choices say nothing
about a constant that is added to all scores of a prompt. :mod:`dpok_gym.rewards.preference.fit` learns s. ImageReward
and PickScore were learned in the same way, from far more choices between photographs.

Letters used for shapes: B images with their prompts, H x W pixels.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dpok_gym.rewards.networks.base import NetworkReward
from dpok_gym.rewards.networks.checkpoints import build
from dpok_gym.rewards.preference.network import PreferenceConfig, PreferenceNetwork, resize
from dpok_gym.utils.files import write_text
from dpok_gym.utils.reading import read_json, read_tensors
from dpok_gym.utils.tensors import save_tensors
from dpok_gym.utils.validation import check_path

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class PreferenceReward(NetworkReward):
    """The score of a :class:`PreferenceNetwork`, differentiable in the images.

    Args:
        network: a fitted network; its parameters are frozen.
        device: see :class:`~dpok_gym.rewards.networks.base.NetworkReward`; the network runs in float32.
        batch_size: see there.
    """

    half_on_gpu = False
    #: :meth:`score` has a gradient in the images.
    differentiable = True

    def __init__(self, network: PreferenceNetwork, device: str = "auto", batch_size: int = 64) -> None:
        super().__init__(device, "float32", batch_size)
        self.network = network.to(self.device).eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the log-odds, up to a constant, with which each image is preferred.

        Args:
            images: (B, 3, H, W) in [0, 1], of any size.
            prompts: B texts of any length, of which the first ``max_words`` words count.

        Returns:
            (B,) float32, with a gradient if the images have one.
        """
        resized = resize(images.to(self.device, torch.float32), self.network.config.image_size)
        return self.network(resized, self.network.tokenize(prompts).to(self.device))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that :meth:`load` reads, with the weights in half precision."""
        folder = check_path("the folder of the reward", folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, json.dumps(asdict(self.network.config), indent=2) + "\n")
        save_tensors(folder / WEIGHTS, {name: weights.half() for name, weights in self.network.state_dict().items()})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **options: Any) -> PreferenceReward:
        """Reads a folder that :meth:`save` or ``dpok fit-reward`` wrote.

        Args:
            folder: its path.
            **options: further arguments of the class.

        Raises:
            FileNotFoundError: if the folder does not hold a reward.
            ValueError: if a file in it is damaged.
        """
        folder = check_path("the folder of the reward", folder)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"the folder {str(folder)!r} holds no reward: it has no {' and no '.join(missing)}, as dpok fit-reward "
                "writes them"
            )
        try:
            config = read_json(folder / CONFIG)
            if not isinstance(config, dict):
                raise ValueError(f"{folder / CONFIG} is no mapping of keys to values")
            made = PreferenceConfig(**config | {"words": tuple(config["words"])})
            weights = {name: values.float() for name, values in read_tensors(folder / WEIGHTS).items()}
            network = build(folder / WEIGHTS, lambda: PreferenceNetwork(made), weights)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"the reward in {str(folder)!r} is damaged, or of another version: {error}; fit it again with dpok "
                "fit-reward"
            ) from error
        return cls(network, **options)
