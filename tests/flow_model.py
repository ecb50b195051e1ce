"""A small flow-matching model whose data are Gaussian, so that its velocity is exact. It needs no files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpok_gym.models import TextToImageModel
from dpok_gym.models.base import Conditioning, GuidanceGradient

#: The mean of the data that each prompt stands for; their std is 1.
MEANS = {"dark": -1.0, "bright": 1.0}


class GaussianVelocity(nn.Module):
    """E[eps - x_0 | x_s], plus what is learned."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.learned = nn.Linear(dims + 2, dims)
        nn.init.zeros_(self.learned.weight)
        nn.init.zeros_(self.learned.bias)

    def forward(self, latents: Tensor, timesteps: Tensor, mean: Tensor) -> Tensor:
        """The velocity (B, C, h, w) of latents at 1000 s, (B,), for data of some means (B,)."""
        s = (timesteps.float() / 1000)[:, None]
        x, centre = latents.flatten(1).float(), mean[:, None]
        away = (x - (1 - s) * centre) / ((1 - s) ** 2 + s**2)
        velocity = s * away - (centre + (1 - s) * away)
        learned = self.learned(torch.cat([x, s, centre], dim=1))
        return (velocity + learned).reshape(latents.shape)


class FlowModel(TextToImageModel):
    """Draws a brightness of 2 x 2 pixels, with the scheduler of Stable Diffusion 3.5."""

    default_lora_rank = 0

    def __init__(self, **scheduler: Any) -> None:
        super().__init__()
        self.name = "a small flow model"
        self.device = torch.device("cpu")
        self.latent_shape = (1, 2, 2)
        self.image_shape = (2, 2)
        self.text_width = 1
        self.scheduler_config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, **scheduler}
        self.denoiser = GaussianVelocity(4).eval().requires_grad_(False)

    def find_unreadable(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """See the base class."""
        return ((index, f"unknown prompt {prompt!r}") for index, prompt in enumerate(prompts) if prompt not in MEANS)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        return {"mean": torch.tensor([MEANS[prompt] for prompt in prompts])}

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class."""
        return conditioning["mean"][:, None]

    def num_forward_passes(self, guidance_scale: float) -> int:
        """See the base class."""
        return 1

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        denoiser: nn.Module | None = None,
        guidance_gradient: GuidanceGradient = "both",
    ) -> Tensor:
        """See the base class."""
        return (denoiser or self.denoiser)(latents, timesteps, **conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        """See the base class."""
        return latents.sigmoid().expand(-1, 3, -1, -1)
