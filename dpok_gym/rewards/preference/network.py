"""The network of a reward that is learned from choices: a score for an image and a prompt.

Letters used for shapes: B images with their prompts, S x S pixels, K = (S / 8)^2 places in an image, L words, D the
width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpok_gym.utils.validation import check_integer

#: The network attends to (S / 8)^2 places, so larger images cost too much.
MAX_IMAGE_SIZE = 1024

_STRIDE = 8  # pixels between neighbouring places
_PADDING, _UNKNOWN = 0, 1  # numbers of words; the vocabulary's follow


@dataclass(frozen=True)
class PreferenceConfig:
    """The sizes and the vocabulary of a :class:`PreferenceNetwork`.

    Attributes:
        words: the vocabulary, see :func:`split_words`; any other word tells the network nothing.
        max_words: only the first ``max_words`` words of a prompt are read.
        image_size: S, to which images are resized, a multiple of 8; details that are too fine for S are not seen.
        width: D, a multiple of 32 and of ``heads``, at most 4,096.
        layers: number of transformer layers, at most 100.
        heads: number of attention heads.

    Raises:
        TypeError: if a word is no text.
        ValueError: if a number is out of range, or the image size or the width is no such multiple.
    """

    words: tuple[str, ...]
    max_words: int
    image_size: int = 64
    width: int = 64
    layers: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        # The bounds keep a config that is damaged from making a network without end.
        bounds = {"max_words": 2**16, "image_size": MAX_IMAGE_SIZE, "width": 2**12, "layers": 100, "heads": 2**12}
        for name, maximum in bounds.items():
            check_integer(name, getattr(self, name), maximum=maximum)
        if self.image_size < 2 * _STRIDE or self.image_size % _STRIDE:
            raise ValueError(f"the image size must be a multiple of {_STRIDE} from 16 on, got {self.image_size}")
        if self.width % 32 or self.width % self.heads:
            raise ValueError(f"the width must be a multiple of 32 and of the {self.heads} heads, got {self.width}")
        if not all(isinstance(word, str) for word in self.words):
            raise TypeError("the words must be texts")


def split_words(prompt: str) -> list[str]:
    """Returns the words of a prompt in lower case; each punctuation mark is a word of its own."""
    return re.findall(r"\w+|[^\w\s]", prompt.lower())


def resize(images: Tensor, size: int) -> Tensor:
    """Resizes (B, 3, H, W) to (B, 3, size, size), without keeping the proportions. It is differentiable."""
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
    """The score s(image, prompt): the words attend to each other and to the places of the image.

    Convolutions turn the image into K vectors, one for each place. The words, each mixed with its neighbours, go
    through a transformer whose layers attend to the words and to the image; before them stands one extra vector, whose
    output gives the score. Besides the K places, the words can attend to one vector that is the same for all images.
    The share of attention that it gets tells how many things are in the image, so the network can count.
    """

    def __init__(self, config: PreferenceConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.image_size // _STRIDE
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
            self.words.weight[: _UNKNOWN + 1] = 0  # never trained, so that an unknown word tells nothing
        self.neighbours = nn.Conv1d(width, width, 3, padding=1)
        self.order = nn.Parameter(0.1 * torch.randn(config.max_words, width))
        self.verdict = nn.Parameter(0.1 * torch.randn(1, 1, width))
        layer = nn.TransformerDecoderLayer(
            width, config.heads, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerDecoder(layer, config.layers, nn.LayerNorm(width))
        self.score = nn.Linear(width, 1)
        self._number = {word: number for number, word in enumerate(config.words, _UNKNOWN + 1)}

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Returns the numbers of the prompts' words, (B, L) int64, filled up with 0 after the last word."""
        length = self.config.max_words
        rows: list[list[int]] = []
        for prompt in prompts:
            numbers = [self._number.get(word, _UNKNOWN) for word in split_words(prompt)[:length]]
            rows.append(numbers + [_PADDING] * (length - len(numbers)))
        return torch.tensor(rows)

    def encode_images(self, images: Tensor) -> Tensor:
        """Returns the vectors that words can attend to, (B, K + 1, D), of images (B, 3, S, S) in [0, 1]."""
        places = self.trunk(2 * images - 1).flatten(2).transpose(1, 2) + self.places  # (B, K, D)
        return torch.cat([places, self.nowhere.expand(len(images), -1, -1)], dim=1)

    def score_features(self, features: Tensor, words: Tensor) -> Tensor:
        """Scores images that are encoded already, so that several prompts can share the work.

        Args:
            features: (B, K + 1, D), see :meth:`encode_images`.
            words: (B, L), see :meth:`tokenize`.

        Returns:
            (B,).
        """
        embedded = self.words(words)  # (B, L, D)
        embedded = embedded + self.neighbours(embedded.transpose(1, 2)).transpose(1, 2) + self.order
        queries = torch.cat([self.verdict.expand(len(words), -1, -1), embedded], dim=1)
        is_padding = F.pad(words == _PADDING, (1, 0), value=False)  # the first query is the verdict
        return self.score(self.transformer(queries, features, tgt_key_padding_mask=is_padding)[:, 0])[:, 0]

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """Returns the scores (B,) of images (B, 3, S, S) in [0, 1], for words (B, L)."""
        return self.score_features(self.encode_images(images), words)
