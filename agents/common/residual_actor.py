"""A policy for stock agents of Stable-Baselines3 that starts as the pre-trained model.

Letters used for shapes: B states, T denoising steps, F text features, C x h x w a latent, K channels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from dpok_gym.utils.validation import check_integer, check_positive
from dpok_gym.wrappers import NOISE_BOUND

#: What the networks see: "latent" (B, C, h, w), "step" (B, T) one-hot, "prompt" (B, F).
Features = dict[str, Tensor]


class ResidualActorPolicy(ActorCriticPolicy):
    """An actor-critic policy of the noise, for PPO and A2C of Stable-Baselines3.

        noise ~ N(f(x_t, t, z), noise_std^2 I),    x_{t-1} = mean_pre(x_t, t, z) + std(t) * noise.

    f, the residual, is a small UNet whose last layer starts at 0. With ``noise_std=1`` the untrained policy is then
    exactly the pre-trained model. The standard deviation is fixed: DPOK's policies keep theirs too. The critic is a
    network of its own.

    It acts in an environment inside ``NoiseAction`` and ``TextFeatures``::

        env = dpok_gym.VectorTextFeatures(dpok_gym.VectorNoiseAction(gymnasium.make_vec("DPOK-SD15-v0", num_envs=8)))
        model = PPO(ResidualActorPolicy, agents.GymnasiumVecEnv(env), gamma=1.0, gae_lambda=1.0)

    Args:
        observation_space: of the environment, with text features.
        action_space: of the environment, the noise.
        lr_schedule: learning rate, a function of the progress that remains.
        use_sde: always False.
        hidden_channels: K, channels of the networks at the latent's full size, a multiple of 8.
        noise_std: standard deviation of the noise, above 0; 1 is the pre-trained model's, less explores less.
        optimizer_class: of both networks.
        optimizer_kwargs: its further arguments.

    Raises:
        ValueError: if the spaces are others, or an argument is out of range.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        use_sde: bool = False,
        hidden_channels: int = 32,
        noise_std: float = 1.0,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        _check_spaces(observation_space, action_space)
        if use_sde:
            raise ValueError("the residual actor's noise does not depend on the state: leave use_sde off")
        check_integer("hidden_channels", hidden_channels, minimum=8)
        if hidden_channels % 8:
            raise ValueError(f"hidden_channels must be a multiple of 8, got {hidden_channels}")
        self.hidden_channels, self.noise_std = hidden_channels, check_positive("noise_std", noise_std)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            log_std_init=math.log(noise_std),
            features_extractor_class=_AsObserved,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        networks: Any = _ActorAndCritic(self.observation_space, self.hidden_channels)
        self.mlp_extractor = networks  # the base class calls it; here it gives the mean and the value themselves
        self.action_net = nn.Identity()  # type: ignore[assignment]
        self.value_net = nn.Identity()  # type: ignore[assignment]
        size = int(np.prod(self.action_space.shape or ()))
        self.log_std = nn.Parameter(torch.full((size,), self.log_std_init), requires_grad=False)
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = self.optimizer_class(learned, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,  # the optimiser's own state brings the learning rate
            "hidden_channels": self.hidden_channels,
            "noise_std": self.noise_std,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


def _check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    known = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    prompt = known.get("prompt")
    if not {"latent", "step"} <= known.keys() or not isinstance(prompt, spaces.Box) or prompt.dtype != np.float32:
        raise ValueError(
            "the residual actor observes a latent, a step and text features: wrap the denoising environment in "
            f"TextFeatures, or VectorTextFeatures; its observation space is {observation_space}"
        )
    if action_space != spaces.Box(-NOISE_BOUND, NOISE_BOUND, known["latent"].shape, np.float32):
        raise ValueError(
            "the residual actor's action is the noise: wrap the denoising environment in NoiseAction, or "
            f"VectorNoiseAction, without squashed=True; its action space is {action_space}"
        )


class _AsObserved(BaseFeaturesExtractor):
    """Hands the observation on: the networks read its parts themselves."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, features_dim=1)  # the base class asks for a number; nothing reads it

    def forward(self, observation: Features) -> Features:
        return observation


class _ActorAndCritic(nn.Module):
    """The two networks, under the names that ActorCriticPolicy calls them by."""

    def __init__(self, observation_space: Any, channels: int) -> None:
        super().__init__()
        self.actor, self.critic = _Actor(observation_space, channels), _Critic(observation_space, channels)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Features) -> Tensor:
        """Returns the mean of the noise, (B, C * h * w)."""
        return self.actor(features).flatten(1)

    def forward_critic(self, features: Features) -> Tensor:
        """Returns the value, (B, 1)."""
        return self.critic(features)


class _Block(nn.Module):
    """Two convolutions with a skip; scale and shift depend on the step and the prompt (FiLM, Perez et al. 2018)."""

    def __init__(self, channels_in: int, channels: int, condition_width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels, 3, padding=1)
        )
        self.norm = nn.GroupNorm(8, channels, affine=False)
        self.scale_and_shift = nn.Linear(condition_width, 2 * channels)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift(condition)[..., None, None].chunk(2, dim=1)
        return self.skip(x) + self.second(self.norm(self.first(x)) * (1 + scale) + shift)


class _Encoder(nn.Module):
    """The way down: K channels at full size, 2K at half size."""

    def __init__(self, observation_space: Any, channels: int) -> None:
        super().__init__()
        width = 4 * channels
        n_inputs = int(observation_space["step"].n) + observation_space["prompt"].shape[0]
        self.condition = nn.Sequential(nn.Linear(n_inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.start = nn.Conv2d(observation_space["latent"].shape[0], channels, 3, padding=1)
        self.at_full = _Block(channels, channels, width)
        self.at_half = _Block(channels, 2 * channels, width)

    def forward(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the condition, and what was computed at full and at half size."""
        condition = self.condition(torch.cat([features["step"].flatten(1), features["prompt"]], dim=1))
        full = self.at_full(self.start(features["latent"]), condition)
        # A side of one pixel stays as it is.
        return condition, full, self.at_half(nn.functional.avg_pool2d(full, 2, ceil_mode=True), condition)


class _Actor(nn.Module):
    """The UNet of the residual; 0 at first."""

    def __init__(self, observation_space: Any, channels: int) -> None:
        super().__init__()
        self.down = _Encoder(observation_space, channels)
        self.up = _Block(3 * channels, channels, 4 * channels)
        self.last = nn.Conv2d(channels, observation_space["latent"].shape[0], 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, features: Features) -> Tensor:
        condition, full, half = self.down(features)
        enlarged = nn.functional.interpolate(half, size=full.shape[2:])
        return self.last(nn.functional.silu(self.up(torch.cat([full, enlarged], dim=1), condition)))


class _Critic(nn.Module):
    """The value of a state."""

    def __init__(self, observation_space: Any, channels: int) -> None:
        super().__init__()
        self.down = _Encoder(observation_space, channels)
        self.last = nn.Linear(2 * channels, 1)

    def forward(self, features: Features) -> Tensor:
        _, _, half = self.down(features)
        return self.last(nn.functional.silu(half).mean((2, 3)))
