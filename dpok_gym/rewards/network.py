"""What the rewards that are networks have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpok_gym.checks import integer


class NetworkReward:
    """A reward that a network gives: on a device, in a number format, some pictures at a time.

    A subclass loads its network and implements :meth:`score`.

    Args:
        device: "auto" (a GPU if there is one), or any torch device.
        dtype: "float32", "bfloat16", "float16", or "auto": float16 on a GPU for rewards whose authors run them so,
            float32 otherwise. Norms, cosines and heads are float32 in any case.
        batch_size: pictures that go through the network at once; fewer take less memory.

    Raises:
        ValueError: if the device cannot be used, or the dtype or the batch size is none.
    """

    #: Whether the authors run the network in float16 on a GPU.
    half_on_gpu = True

    def __init__(self, device: str = "auto", dtype: str = "auto", batch_size: int = 16) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(f"device {device!r} cannot be used here: {error}") from error
        if dtype == "auto":
            dtype = "float16" if self.half_on_gpu and self.device.type == "cuda" else "float32"
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.batch_size = integer("batch_size", batch_size)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Judges at most ``batch_size`` pictures.

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
        starts = range(0, len(prompts), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        return torch.cat([self.score(images[part].to(self.device), prompts[part]) for part in parts])


class Head(nn.Module):
    """Five linear layers from a feature to a score, without anything between them: LAION's and ImageReward's.

    Their dropout layers, which do nothing when scoring, show in the numbers of the checkpoint's keys only.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for key, wide in (("0", 1024), ("2", 128), ("4", 64), ("6", 16), ("7", 1)):
            self.layers[key] = nn.Linear(width, wide)
            width = wide

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) to (B,), both float32."""
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]
