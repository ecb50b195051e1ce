"""Rewards that are learned from choices: a network tells which of two images people prefer for a prompt.

By the Bradley-Terry model the probability that image a is preferred to image b for the prompt z is

    P(a > b | z) = sigmoid(s(a, z) - s(b, z))

so the difference of two scores s is the log-odds of the choice. Only differences have a meaning: choices say nothing
about a constant that is added to all scores of a prompt. :mod:`dpok_gym.rewards.preference.fit` learns s. ImageReward
and PickScore were learned in the same way, from far more choices between photographs.

Letters used for shapes: N choices, M different images, B images with their prompts, H x W pixels, S x S after resizing.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from dpok_gym.rewards.networks.base import NetworkReward
from dpok_gym.rewards.networks.checkpoints import build, check_keys
from dpok_gym.rewards.preference.network import PreferenceConfig, PreferenceNetwork, resize
from dpok_gym.utils.files import write_text
from dpok_gym.utils.reading import read_json, read_tensors
from dpok_gym.utils.tensors import save_tensors
from dpok_gym.utils.validation import check_path

if TYPE_CHECKING:
    from dpok_gym.rewards.preference.data import Comparisons

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class LearnedReward(NetworkReward):
    """A reward that is learned from choices, and differentiable in the images.

    Attributes:
        kind: name of the kind of network, which the folder's config has.
        network: what scores; its parameters are frozen, but during a fit.
        learning_rate: what a fit takes if it is given none.
        image_size: S, which :func:`~dpok_gym.rewards.preference.data.load_comparisons` resizes images to.
        resize: resizes images (B, 3, H, W) to squares of S pixels for this network.
    """

    kind: ClassVar[str]
    half_on_gpu = False
    #: :meth:`score` has a gradient in the images.
    differentiable = True

    network: nn.Module
    learning_rate: float
    image_size: int
    resize: Callable[[Tensor, int], Tensor]

    def learned(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that a fit changes, by name."""
        return dict(self.network.named_parameters())

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns what makes the network, without what was learned, as JSON can keep it."""

    def encode(self, comparisons: Comparisons) -> Comparisons:
        """Returns choices whose images are already what does not change in a fit, if there is such a part."""
        return comparisons

    @abstractmethod
    def compare(self, batch: Comparisons) -> tuple[Tensor, Tensor]:
        """Returns the scores (N,) of the first images and of the second ones, for choices that may be encoded."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that :meth:`load` reads, with what was learned in half precision."""
        folder = check_path("the folder of the reward", folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, json.dumps({"network": self.kind} | self.config(), indent=2) + "\n")
        save_tensors(folder / WEIGHTS, {name: weights.half() for name, weights in self.learned().items()})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **options: Any) -> Self:
        """Reads a folder that :meth:`save` or ``dpok fit-reward`` wrote.

        Args:
            folder: its path.
            **options: further arguments of the class.

        Raises:
            FileNotFoundError: if the folder does not hold a reward, or CLIP is not there.
            ValueError: if a file in it is damaged, or it is a reward of another class than this one.
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
            found = _find_class(config.pop("network", None))
            weights = {name: values.float() for name, values in read_tensors(folder / WEIGHTS).items()}
            if not issubclass(found, cls):
                raise ValueError(f"it is a reward of the network {found.kind!r}, and one of {cls.kind!r} is needed")
            return cast(Self, found._make(config, weights, folder / WEIGHTS, options))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"the reward in {str(folder)!r} is damaged, or of another version: {error}; fit it again with dpok "
                "fit-reward"
            ) from error

    @classmethod
    @abstractmethod
    def _make(
        cls, config: dict[str, Any], weights: dict[str, Tensor], path: Path, options: Mapping[str, Any]
    ) -> LearnedReward:
        """Makes the reward of a folder: of its config and its weights, which are from ``path``."""

    def _restore(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Copies what was learned into the network."""
        learned = self.learned()
        check_keys(path, weights, learned)
        for name, parameter in learned.items():
            parameter.data.copy_(weights[name])


def _find_class(kind: Any) -> type[LearnedReward]:
    if kind == PreferenceReward.kind:
        return PreferenceReward
    from dpok_gym.rewards.preference.clip import ClipReward  # it loads transformers

    if kind == ClipReward.kind:
        return ClipReward
    raise ValueError(f"'network' must be {PreferenceReward.kind!r} or {ClipReward.kind!r}, not {kind!r}")


class PreferenceReward(LearnedReward):
    """The score of a :class:`PreferenceNetwork`, a small network for small and simple images.

    Args:
        network: its parameters are frozen.
        device: see :class:`~dpok_gym.rewards.networks.base.NetworkReward`; the network runs in float32.
        batch_size: see there.
    """

    kind = "small"
    learning_rate = 3e-4  # of a network that has learned something; an untrained one takes more
    network: PreferenceNetwork

    def __init__(self, network: PreferenceNetwork, device: str = "auto", batch_size: int = 64) -> None:
        super().__init__(device, "float32", batch_size)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.image_size = network.config.image_size
        self.resize = resize

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the log-odds, up to a constant, with which each image is preferred.

        Args:
            images: (B, 3, H, W) in [0, 1], of any size.
            prompts: B texts of any length, of which the first ``max_words`` words count.

        Returns:
            (B,) float32, with a gradient if the images have one.
        """
        resized = resize(images.to(self.device, torch.float32), self.image_size)
        return self.network(resized, self.network.tokenize(prompts).to(self.device))

    def compare(self, batch: Comparisons) -> tuple[Tensor, Tensor]:
        """Returns the scores (N,) of the first images and of the second ones."""
        features = self.network.encode_images(batch.images.to(self.device).float() / 255)  # (M, K + 1, D): each once
        words = self.network.tokenize(batch.prompts).to(self.device)
        first, second = batch.pairs.to(self.device).T
        scores = self.network.score_features(features[torch.cat([first, second])], words.repeat(2, 1))
        return scores[: len(words)], scores[len(words) :]

    def config(self) -> dict[str, Any]:
        """Returns the fields of the network's config."""
        return asdict(self.network.config)

    @classmethod
    def _make(
        cls, config: dict[str, Any], weights: dict[str, Tensor], path: Path, options: Mapping[str, Any]
    ) -> PreferenceReward:
        made = PreferenceConfig(**config | {"words": tuple(config["words"])})
        return cls(build(path, lambda: PreferenceNetwork(made), weights), **options)
