"""The common part of all rewards that are networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpok_gym.utils.device import find_device
from dpok_gym.utils.validation import check_integer


class NetworkReward:
    """A reward that a network computes: on a device, in a number format, a few images at a time.

    A subclass loads its network and implements :meth:`score`.

    Args:
        device: "auto" (a GPU if there is one), or any torch device.
        dtype: "float32", "bfloat16", "float16", or "auto": float16 on a GPU for rewards whose authors use it there,
            float32 otherwise. Cosines and heads are computed in float32 in any case.
        batch_size: images that go through the network at once, 1 or more; fewer take less memory.

    Raises:
        ValueError: if the device cannot be used, or the dtype or the batch size is out of range.
    """

    #: True if the authors run the network in float16 on a GPU.
    half_on_gpu = True

    def __init__(self, device: str = "auto", dtype: str = "auto", batch_size: int = 16) -> None:
        self.device = find_device(device)
        if dtype == "auto":
            dtype = "float16" if self.half_on_gpu and self.device.type == "cuda" else "float32"
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.batch_size = check_integer("batch_size", batch_size)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores at most ``batch_size`` images.

        Args:
            images: (B, 3, H, W) in [0, 1], on the reward's device.
            prompts: B texts.

        Returns:
            (B,) float32.
        """
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns (B,) float32 for ``images`` (B, 3, H, W) in [0, 1] of any size, and B prompts of any length."""
        scores: list[Tensor] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores.append(self.score(images[part].to(self.device), prompts[part]))
        return torch.cat(scores)


class Head(nn.Module):
    """Five linear layers from a feature to a score, as LAION's predictor and ImageReward have them.

    The published networks have dropout layers between them. Dropout does nothing when a network scores, so it is left
    out here. The gaps in the keys of the checkpoint ("0", "2", ...) are the places of these layers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for key, out_features in (("0", 1024), ("2", 128), ("4", 64), ("6", 16), ("7", 1)):
            self.layers[key] = nn.Linear(width, out_features)
            width = out_features

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (B, width) to scores (B,), both float32."""
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]
