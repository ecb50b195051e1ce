"""The mixture model: an exact denoiser with a small network beside it that fine-tuning can train.

Letters used for shapes: B pictures, N prompts, L tokens of a prompt, P prompts that the model knows, d dimensions.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpok_gym.mixture.data import MIXTURES, GaussianMixture
from dpok_gym.mixture.picture import SIZE, draw_dots
from dpok_gym.models.base import Conditioning, GuidanceGradient, TextToImageModel

#: Names of :func:`dpok_gym.models.load_model`, and the dimensions of each.
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
    """The noise in x_t, from the posterior of x_0 given x_t and the prompt, which is known exactly.

        noise = (x_t - sqrt(alpha_bar_t) x_0') / sqrt(1 - alpha_bar_t),    x_0' = E[x_0 | x_t] + Cov[x_0 | x_t] tilt

    The tilt is the output of a small network, which starts as zero. Fine-tuning for a reward of slope a ought to tilt
    the data by exp(a . x_0 / beta), and data tilted by exp(h . x_0) have their posterior's mean moved by Cov h: exactly
    if they are Gaussian, to first order otherwise. So in these units the network has an answer of one size at all noise
    levels, and learning is well-conditioned; what is beyond first order is left for it to find.

    Args:
        mixtures: of the P prompts.
        alphas_cumprod: alpha_bar at each training timestep.
        hidden: width of the network's two hidden layers.
    """

    alphas_cumprod: Tensor
    _N_WAVES = 8

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
        """The noise (B, 1, 1, d) in latents (B, 1, 1, d) at timesteps (B,), for prompts number (B,)."""
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
    """Draws a point of a Gaussian mixture, as the picture of a dot; which mixture is what the prompt says.

    Args:
        name: "mixture", points of two dimensions, or "mixture-1d".
        device: of the denoiser.
    """

    denoiser: MixtureDenoiser
    default_lora_rank = 0

    def __init__(self, name: str = "mixture", device: str | torch.device = "cpu") -> None:
        from diffusers import DDIMScheduler

        super().__init__()
        self.name = name
        self.options = {}
        self.device = torch.device(device)
        #: What each prompt stands for.
        self.mixtures = MIXTURES[DIMENSIONS[name]]
        self.latent_shape = (1, 1, DIMENSIONS[name])
        self.image_shape = (SIZE, SIZE)
        words = dict.fromkeys(word for prompt in self.mixtures for word in prompt.split())
        self._ids = {word: index for index, word in enumerate(words, start=1)}  # 0 is padding
        self.vocab_size = len(words) + 1
        self.max_tokens = max(len(prompt.split()) for prompt in self.mixtures)
        self.text_width = len(self.mixtures)
        self._known = self.tokenize(list(self.mixtures))
        self.scheduler_config = SCHEDULER_CONFIG
        alphas_cumprod = DDIMScheduler.from_config(dict(SCHEDULER_CONFIG)).alphas_cumprod
        with torch.random.fork_rng(devices=[]):  # the initial network is part of the model
            torch.manual_seed(0)
            self.denoiser = MixtureDenoiser(list(self.mixtures.values()), alphas_cumprod)
        self.denoiser.to(self.device).eval().requires_grad_(False)

    def configured(self, image_size: int | Sequence[int] | None, negative_prompt: str | None) -> MixtureModel:
        """The same denoiser, for options of its own; there are no other pictures and no negative prompts.

        Raises:
            ValueError: if either is asked for.
        """
        if image_size is not None or negative_prompt is not None:
            raise ValueError(
                f"the model {self.name!r} draws {SIZE}x{SIZE} pictures without guidance: leave out image_size and "
                "negative_prompt"
            )
        other = copy.copy(self)
        other._encoded = OrderedDict()
        return other

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """See the base class."""
        unknown = [prompt for prompt in prompts if " ".join(prompt.split()) not in self.mixtures]
        if unknown:
            raise ValueError(
                f"the model {self.name!r} cannot read the prompt {unknown[0]!r}; it knows {', '.join(self.mixtures)}"
            )
        rows = [[self._ids[word] for word in prompt.split()] for prompt in prompts]
        return torch.tensor([row + [0] * (self.max_tokens - len(row)) for row in rows], dtype=torch.int64)

    def _encode(self, tokens: Tensor) -> Conditioning:
        same = (tokens[:, None] == self._known.to(tokens.device)).all(-1)
        if not bool(same.any(1).all()):
            raise ValueError(f"these tokens are none of a prompt that the model {self.name!r} knows: {tokens.tolist()}")
        return {"mixture": same.int().argmax(1)}

    def park_text_encoder(self) -> None:
        """Does nothing: there is none."""

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: which of the prompts it is, as a vector with a single 1."""
        return nn.functional.one_hot(conditioning["mixture"], self.text_width).float()

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
        if guidance_scale != 1:
            raise ValueError(
                f"the model {self.name!r} has no unconditional data to guide away from: use guidance_scale=1, not "
                f"{guidance_scale}"
            )
        denoiser = self.denoiser if denoiser is None else denoiser
        return denoiser(latents, timesteps, **conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        """See the base class; latents too are drawn where the point would be."""
        return draw_dots(latents.to(self.device).flatten(1))
