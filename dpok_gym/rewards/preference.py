"""A reward learned from feedback: a small network that says which of two pictures people like better for a prompt.

By the Bradley-Terry model the probability that picture a is preferred to picture b for the prompt z is

    P(a > b | z) = sigmoid(s(a, z) - s(b, z))

so the difference of two scores s is the log-odds of the choice, and only differences mean something: fitting leaves a
constant open. :mod:`dpok_gym.rewards.preference_fit` learns s; ImageReward and PickScore, learned the same way from
far more choices, are for photographs.

Letters used for shapes: B pictures with their prompts, H x W pixels, S the side that the network takes, K = (S / 8)^2
places in it, L words, D the width.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dpok_gym.rewards.network import NetworkReward

CONFIG, WEIGHTS = "config.json", "model.safetensors"

_STRIDE = 8  # pixels from one of the network's places to the next
_PADDING, _UNKNOWN = 0, 1  # numbers of words; the vocabulary's follow


@dataclass(frozen=True)
class PreferenceConfig:
    """What a :class:`PreferenceNetwork` is made of.

    Attributes:
        words: the vocabulary, see :func:`split_words`; any other word tells the network nothing.
        max_words: words of a prompt that are read, from its beginning.
        picture_size: S, to which pictures are resized, a multiple of 8; finer details than S shows are not seen.
        width: D, a multiple of 32 and of ``heads``.
        layers: of the transformer.
        heads: of its attention.

    Raises:
        ValueError: if the picture size is not a multiple of 8, or below 16.
    """

    words: tuple[str, ...]
    max_words: int
    picture_size: int = 64
    width: int = 64
    layers: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        if self.picture_size < 2 * _STRIDE or self.picture_size % _STRIDE:
            raise ValueError(f"the picture size must be a multiple of {_STRIDE} from 16 on, got {self.picture_size}")


def split_words(prompt: str) -> list[str]:
    """The words of a prompt, in lower case; each punctuation mark is one."""
    return re.findall(r"\w+|[^\w\s]", prompt.lower())


def resize(images: Tensor, size: int) -> Tensor:
    """Squeezes or stretches (B, 3, H, W) to (B, 3, size, size); the gradient goes through."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


class _Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


class PreferenceNetwork(nn.Module):
    """s(picture, prompt): the words, in their order, look at each other and at the places of the picture.

    Convolutions make K vectors of the picture. The words, each with its neighbours', and before them one that collects
    the score, go through a transformer whose layers attend to the words and to the picture. Besides its K places they
    can attend to a vector that is the same for all pictures: how much of the attention that takes tells how many
    things are there.
    """

    def __init__(self, config: PreferenceConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.picture_size // _STRIDE
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, stride=2, padding=1),
            nn.GroupNorm(8, width // 4),
            nn.SiLU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            _Block(width // 2),
            nn.GroupNorm(8, width // 2),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            _Block(width),
            nn.GroupNorm(8, width),
        )
        self.places = nn.Parameter(0.1 * torch.randn(side * side, width))
        self.nowhere = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.words = nn.Embedding(len(config.words) + 2, width, padding_idx=_PADDING)
        nn.init.normal_(self.words.weight, std=0.3)
        with torch.no_grad():
            self.words.weight[: _UNKNOWN + 1] = 0  # never trained, an unknown word tells nothing
        self.neighbours = nn.Conv1d(width, width, 3, padding=1)
        self.order = nn.Parameter(0.1 * torch.randn(config.max_words, width))
        self.verdict = nn.Parameter(0.1 * torch.randn(1, 1, width))
        layer = nn.TransformerDecoderLayer(
            width, config.heads, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerDecoder(layer, config.layers, nn.LayerNorm(width))
        self.score = nn.Linear(width, 1)
        self._number = {word: number for number, word in enumerate(config.words, _UNKNOWN + 1)}

    def read(self, prompts: Sequence[str]) -> Tensor:
        """The numbers of the prompts' words, (B, L) int64, with 0 after the last one."""
        rows = [
            [self._number.get(word, _UNKNOWN) for word in split_words(prompt)[: self.config.max_words]]
            for prompt in prompts
        ]
        return torch.tensor([row + [_PADDING] * (self.config.max_words - len(row)) for row in rows])

    def look(self, pictures: Tensor) -> Tensor:
        """What can be attended to in pictures (B, 3, S, S) in [0, 1]: (B, K + 1, D)."""
        places = self.trunk(2 * pictures - 1).flatten(2).transpose(1, 2) + self.places
        return torch.cat([places, self.nowhere.expand(len(pictures), -1, -1)], dim=1)

    def judge(self, seen: Tensor, words: Tensor) -> Tensor:
        """The scores (B,) of what :meth:`look` saw (B, K + 1, D), for words (B, L) of :meth:`read`."""
        embedded = self.words(words)
        embedded = embedded + self.neighbours(embedded.transpose(1, 2)).transpose(1, 2) + self.order
        queries = torch.cat([self.verdict.expand(len(words), -1, -1), embedded], dim=1)
        absent = F.pad(words == _PADDING, (1, 0), value=False)  # the first is the verdict
        return self.score(self.transformer(queries, seen, tgt_key_padding_mask=absent)[:, 0])[:, 0]

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        """The scores (B,) of pictures (B, 3, S, S) in [0, 1], for words (B, L)."""
        return self.judge(self.look(pictures), words)


class PreferenceReward(NetworkReward):
    """The score of a :class:`PreferenceNetwork`, differentiable in the pictures.

    Args:
        network: fitted; its parameters are frozen.
        device: see :class:`~dpok_gym.rewards.network.NetworkReward`; the network runs in float32.
        batch_size: see there.
    """

    half_on_gpu = False
    #: :meth:`score` has a gradient in the pictures.
    differentiable = True

    def __init__(self, network: PreferenceNetwork, device: str = "auto", batch_size: int = 64) -> None:
        super().__init__(device, "float32", batch_size)
        self.network = network.to(self.device).eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The log-odds, up to a constant, with which a picture is preferred.

        Args:
            images: (B, 3, H, W) in [0, 1], of any size.
            prompts: B texts of any length, of which the first ``max_words`` words count.

        Returns:
            (B,) float32, with a gradient if the images have one.
        """
        pictures = resize(images.to(self.device, torch.float32), self.network.config.picture_size)
        return self.network(pictures, self.network.read(prompts).to(self.device))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the folder that :meth:`load` reads, the weights in half precision."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(asdict(self.network.config), indent=2) + "\n", encoding="utf-8")
        state = {name: weights.half().contiguous().cpu() for name, weights in self.network.state_dict().items()}
        save_file(state, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **options: Any) -> PreferenceReward:
        """Reads a folder that :meth:`save` or ``dpok fit-reward`` wrote.

        Args:
            folder: its path.
            **options: further arguments of the class.

        Raises:
            FileNotFoundError: if it does not hold a reward.
            ValueError: if what it holds is damaged.
        """
        folder = Path(folder)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"the folder {str(folder)!r} holds no reward: it has no {' and no '.join(missing)}, as dpok fit-reward "
                "writes them"
            )
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            network = PreferenceNetwork(PreferenceConfig(**config | {"words": tuple(config["words"])}))
            network.load_state_dict({name: weights.float() for name, weights in load_file(folder / WEIGHTS).items()})
        except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"the reward in {str(folder)!r} is damaged, or of another version: {error}") from error
        return cls(network, **options)


def shapes_preference() -> PreferenceReward:
    """The shipped reward of the embedded world, made by :mod:`dpok_gym.shapes.choices`."""
    from dpok_gym.shapes import PREFERENCE

    return PreferenceReward.load(PREFERENCE)
