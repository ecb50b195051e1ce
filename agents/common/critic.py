"""The value function."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """V(x_t, t, z): the reward that a half-denoised image and its prompt lead to, on average.

    The network of DPOK (Fan et al. 2023, App. A.5): a multilayer perceptron on the latent and the prompt's features.
    Each hidden layer is multiplied by gains that are learned for each denoising step.

    Args:
        latent_dims: D, dimensions of a latent.
        text_width: F, features of a prompt.
        num_inference_steps: T.
        hidden: width of each of the three hidden layers.
    """

    def __init__(self, latent_dims: int, text_width: int, num_inference_steps: int, hidden: int = 256) -> None:
        super().__init__()
        widths = [latent_dims + text_width, hidden, hidden, hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.gains = nn.ModuleList()
        for _ in self.layers:
            self.gains.append(nn.Embedding.from_pretrained(torch.rand(num_inference_steps, hidden), freeze=False))
        self.head = nn.Linear(hidden, 1)
        # V is 0 at first: random values would add more noise to the first advantages than small rewards have.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Values (B,) of latents (B, ...), denoising steps (B,) and prompt features (B, F)."""
        hidden = torch.cat([latents.flatten(1).float(), text.float()], dim=1)
        for layer, gain in zip(self.layers, self.gains, strict=True):
            hidden = torch.relu(layer(hidden)) * gain(step)
        return self.head(hidden).squeeze(1)
