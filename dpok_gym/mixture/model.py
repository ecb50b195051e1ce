"""The mixture model: an exact denoiser, and in it a small network that fine-tuning can train.

Letters used for shapes: B images, N prompts, P prompts that the model knows, d dimensions of a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpok_gym.mixture.data import MIXTURES, GaussianMixture
from dpok_gym.mixture.image import IMAGE_SIZE, draw_dots, read_dots
from dpok_gym.models.base import Conditioning, GuidanceGradient, TextToImageModel
from dpok_gym.utils.validation import check_choice

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: The registered names of the model, and the dimensions d of each.
DIMENSIONS = {"mixture": 2, "mixture-1d": 1}

#: The noise schedule of Stable Diffusion.
SCHEDULER_CONFIG: Mapping[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


class MixtureDenoiser(nn.Module):
    """Predicts the noise in x_t from the posterior of x_0 given x_t and the prompt, which is known exactly.

        noise = (x_t - sqrt(alpha_bar_t) x_0') / sqrt(1 - alpha_bar_t),    x_0' = E[x_0 | x_t] + Cov[x_0 | x_t] tilt

    A small network computes the tilt; before fine-tuning it is zero. The tilt is a good output to learn: fine-tuning
    for a reward of slope a should multiply the density of the data by exp(a . x_0 / beta). Multiplying it by
    exp(h . x_0) moves the posterior mean by Cov[x_0 | x_t] h, exactly for Gaussian data, otherwise to first order. So
    the right output, h = a / beta, has the same size at all noise levels, which makes learning well-conditioned.

    Args:
        mixtures: the data of each of the P prompts.
        alphas_cumprod: alpha_bar at each training timestep.
        hidden: width of the network's two hidden layers.
    """

    alphas_cumprod: Tensor
    _N_WAVES = 8  # cosines that tell the network the timestep

    def __init__(self, mixtures: Sequence[GaussianMixture], alphas_cumprod: Tensor, hidden: int = 64) -> None:
        super().__init__()
        stacked = GaussianMixture.stack(mixtures)
        self._names = tuple(vars(stacked))
        for name, values in vars(stacked).items():
            self.register_buffer(name, values.float(), persistent=False)
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)
        d, self.n_prompts = stacked.means.shape[-1], len(mixtures)
        last = nn.Linear(hidden, d)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(
            nn.Linear(2 * d + self._N_WAVES + self.n_prompts, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            last,
        )

    def forward(self, latents: Tensor, timesteps: Tensor, mixture: Tensor) -> Tensor:
        """Predicts the noise.

        Args:
            latents: (B, 1, 1, d) x_t.
            timesteps: (B,) int64.
            mixture: (B,) int64, number of each prompt.

        Returns:
            (B, 1, 1, d).
        """
        x, alpha_bar = latents.flatten(1).float(), self.alphas_cumprod[timesteps]
        data = GaussianMixture(*(getattr(self, name)[mixture] for name in self._names))
        mean, covariance = data.posterior(x, alpha_bar)
        time = timesteps[:, None] / len(self.alphas_cumprod) * torch.arange(self._N_WAVES, device=x.device)
        prompt = nn.functional.one_hot(mixture, self.n_prompts)
        tilt = self.network(torch.cat([x, mean, (math.pi * time).cos(), prompt.to(x)], dim=1))
        clean = mean + (covariance * tilt[:, None]).sum(-1)
        noise = (x - alpha_bar.sqrt()[:, None] * clean) / (1 - alpha_bar).sqrt()[:, None]
        return noise.reshape(latents.shape)

    def enable_gradient_checkpointing(self) -> None:
        """Refuses.

        Raises:
            ValueError: always.
        """
        raise ValueError("the mixture model is too small for gradient checkpointing: leave gradient_checkpointing off")


class MixtureModel(TextToImageModel):
    """Draws a point of a Gaussian mixture, as the image of a dot. The prompt says which mixture.

    Args:
        name: "mixture" for points of two dimensions, or "mixture-1d".
        device: of the denoiser.

    Attributes:
        mixtures: the mixture that each prompt stands for.

    Raises:
        ValueError: if the name is another one.
    """

    denoiser: MixtureDenoiser
    #: The network in the denoiser is small enough to be trained whole.
    default_lora_rank = 0

    def __init__(self, name: str = "mixture", device: str | torch.device = "cpu") -> None:
        from diffusers import DDIMScheduler

        super().__init__()
        check_choice("the name of a mixture model", name, *DIMENSIONS)
        self.name = name
        self.device = torch.device(device)
        self.mixtures = MIXTURES[DIMENSIONS[name]]
        self.latent_shape = (1, 1, DIMENSIONS[name])
        self.image_shape = (IMAGE_SIZE, IMAGE_SIZE)
        self.text_width = len(self.mixtures)
        self.scheduler_config = SCHEDULER_CONFIG
        alphas_cumprod = DDIMScheduler.from_config(dict(SCHEDULER_CONFIG)).alphas_cumprod
        # The initial weights are part of the model, so they do not depend on the caller's random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.denoiser = MixtureDenoiser(list(self.mixtures.values()), alphas_cumprod)
        self.denoiser.to(self.device).eval().requires_grad_(False)

    def find_unreadable(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """See the base class."""
        for index, prompt in enumerate(prompts):
            if _normalise(prompt) not in self.mixtures:
                known = ", ".join(self.mixtures)
                yield index, f"the model {self.name!r} cannot read the prompt {prompt!r}; it knows {known}"

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        known = list(self.mixtures)
        return {"mixture": torch.tensor([known.index(_normalise(prompt)) for prompt in prompts], device=self.device)}

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: a one-hot vector that says which of the P prompts it is."""
        return nn.functional.one_hot(conditioning["mixture"], self.text_width).float()

    def num_forward_passes(self, guidance_scale: float) -> int:
        """See the base class: always 1.

        Raises:
            ValueError: if the guidance scale is not 1.
        """
        if guidance_scale != 1:
            raise ValueError(
                f"the model {self.name!r} has no unconditional data to guide away from: use guidance_scale=1, not "
                f"{guidance_scale}"
            )
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
        """See the base class.

        Raises:
            ValueError: if the guidance scale is not 1.
        """
        self.num_forward_passes(guidance_scale)
        network = self.denoiser if denoiser is None else denoiser
        return network(latents, timesteps, **conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        """See the base class. A noisy latent is a point too, and is drawn in the same way."""
        return draw_dots(latents.to(self.device).flatten(1))

    def encode_images(self, images: Tensor) -> Tensor:
        """See the base class: reads the position of the dot. In one dimension the height of the dot is left out."""
        points = read_dots(images.to(self.device))[:, : self.latent_shape[-1]]
        return points.float().reshape(-1, *self.latent_shape)

    def to_pipeline(self, denoiser: nn.Module | None = None) -> DiffusionPipeline:
        """Refuses.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"diffusers has no pipeline for the model {self.name!r}: its denoiser is no diffusers network. Draw with "
            "a DenoisingProcess instead"
        )


def _normalise(prompt: str) -> str:
    """Returns the prompt with single spaces between its words."""
    return " ".join(prompt.split())
