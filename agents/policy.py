"""The denoising network as an actor, with a critic beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from agents.critic import Critic
from dpok_gym import diffusion
from dpok_gym.checks import one_of
from dpok_gym.memory import BatchSize
from dpok_gym.models import load_model
from dpok_gym.models.base import GuidanceGradient
from dpok_gym.models.lora import LoRA, pretrained_copy


class DenoisingPolicy(ActorCriticPolicy):
    """p_theta(x_{t-1} | x_t, z) of a diffusion model, and V(x_t, t, z).

    What is trained is a LoRA on the denoiser, which leaves the shared model as it was, or a copy of the whole denoiser.
    The reference policy is the pre-trained model: the LoRA switched off, or the original network. Parameters of the
    policy, and so the optimiser and what is saved, are only those that are trained.

    ``predict(..., deterministic=True)`` takes the mean of each step. A diffusion sampler without its noise draws poor
    pictures, so evaluate with ``deterministic=False``.

    Args:
        observation_space: of a denoising environment.
        action_space: of a denoising environment.
        lr_schedule: learning rate of the denoiser by remaining progress (1 to 0).
        use_sde: must be False.
        model: name or path, as are the next four given by the environment's ``sampler``.
        model_kwargs: further arguments of :func:`dpok_gym.models.load_model`.
        num_inference_steps: T.
        eta: DDIM's share of noise, in (0, 1].
        guidance_scale: of classifier-free guidance, in training as in sampling; 1 is none and halves the cost.
        guidance_gradient: "both" differentiates the guided output; "conditional" takes its unconditional part as a
            constant, which saves about a third of the update's time and half of its memory.
        device: of the networks.
        lora_rank: of the LoRA; 0 trains a copy of the whole denoiser instead; None for what suits the model, 8 for
            diffusion models of the usual size.
        target_modules: the layers that get a LoRA: "attention", "all" (convolutions and feed-forward layers too, which
            small models need), or ends of their names.
        autocast: run the denoiser in bfloat16, where the device is faster at it; the transitions stay float32.
        gradient_checkpointing: compute parts of the denoiser again in the backward pass instead of keeping all of it:
            about a third slower, for a fraction of the memory.
        max_batch_size: most transitions in one call of the denoiser when no gradient is needed; None for no limit,
            "auto" for as many as fit into memory.
        critic_hidden: width of the critic's layers.
        optimizer_class: a torch optimiser.
        optimizer_kwargs: its arguments but the learning rate.
    """

    optimizer: torch.optim.Optimizer
    #: Latents that the denoiser was applied to so far: for each, one forward pass; guidance makes it two.
    network_calls: int = 0

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        model: str = "shapes",
        model_kwargs: Mapping[str, Any] | None = None,
        num_inference_steps: int = 20,
        eta: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "both",
        device: str = "auto",
        lora_rank: int | None = None,
        target_modules: str | Sequence[str] = "attention",
        autocast: bool = False,
        gradient_checkpointing: bool = False,
        max_batch_size: int | Literal["auto"] | None = 64,
        critic_hidden: int = 256,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise ValueError("use_sde must be False: the noise of a denoising step is that of the diffusion")
        one_of("guidance_gradient", guidance_gradient, "both", "conditional")
        # ActorCriticPolicy would build feature extractors and an action head; its interface is all that is wanted.
        BasePolicy.__init__(
            self,
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs or {"weight_decay": 0.0},
        )
        self._constructor = {
            "model": model,
            "model_kwargs": dict(model_kwargs or {}),
            "num_inference_steps": num_inference_steps,
            "eta": eta,
            "guidance_scale": guidance_scale,
            "guidance_gradient": guidance_gradient,
            "lora_rank": lora_rank,
            "target_modules": target_modules if isinstance(target_modules, str) else tuple(target_modules),
            "autocast": autocast,
            "gradient_checkpointing": gradient_checkpointing,
            "max_batch_size": max_batch_size,
            "critic_hidden": critic_hidden,
            "optimizer_class": optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }
        # No nn.Module: its frozen weights are not the policy's.
        self.model = load_model(model, device, **(model_kwargs or {}))
        schedule = diffusion.make_schedule(self.model.scheduler_config, num_inference_steps, eta)
        self.schedule = schedule.to(self.model.device)
        self.guidance_scale = guidance_scale
        self.guidance_gradient: GuidanceGradient = guidance_gradient
        self.autocast = autocast
        self._batch_size = BatchSize("max_batch_size", max_batch_size)

        self._make_trainable(self.model.default_lora_rank if lora_rank is None else lora_rank, target_modules)
        if gradient_checkpointing:
            # It has no effect on passes without a gradient, so it may stay in a network that others use.
            network: Any = self.denoiser or self.model.denoiser
            network.enable_gradient_checkpointing()
        dims = int(np.prod(self.model.latent_shape))
        self.critic = Critic(dims, self.model.text_width, num_inference_steps, critic_hidden).to(self.model.device)
        # In two groups, so that whoever trains the critic can give it a rate of its own.
        groups = [{"params": self.denoiser_parameters()}, {"params": list(self.critic.parameters())}]
        self.optimizer = optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _make_trainable(self, lora_rank: int, target_modules: str | Sequence[str]) -> None:
        """Makes the LoRA, or for rank 0 the copy of the denoiser."""
        self.lora: LoRA | None = None
        self.denoiser: nn.Module | None = None
        if lora_rank:
            self.lora = LoRA(self.model.denoiser, lora_rank, target_modules)
            # A parameter's name in a module must have no dots.
            self.adapter = nn.ParameterDict({k.replace(".", "/"): v for k, v in self._lora_parameters().items()})
            return
        if "dtype" in self.model.options:
            raise ValueError(
                f"the steps of an optimiser are lost in the digits of {self.model.options['dtype']}: to train the "
                "whole denoiser, use dtype='float32', with autocast=True for speed; or train a LoRA"
            )
        self.denoiser = pretrained_copy(self.model.denoiser).requires_grad_(True)
        if self.model.options.get("compile"):
            self.denoiser.compile()

    def _lora_parameters(self) -> dict[str, nn.Parameter]:
        """The LoRA's parameters by names that do not depend on how many LoRAs were made before."""
        assert self.lora is not None
        return {name.replace(f".{self.lora.name}.", "."): value for name, value in self.lora.parameters.items()}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            **self._constructor,
        }

    def denoiser_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the denoiser, without the critic's."""
        trained = self.adapter if self.lora else self.denoiser
        assert trained is not None
        return list(trained.parameters())

    def set_training_mode(self, mode: bool) -> None:
        """Does nothing: in training mode, dropout would make the first importance ratio differ from 1."""

    @contextmanager
    def tuned(self) -> Iterator[None]:
        """Within the block the denoiser is the trained one, backward passes included."""
        if self.lora is None:
            yield
        else:
            with self.lora.switched_on():
                yield

    def transition(self, obs: PyTorchObs, reference: bool = False) -> tuple[Tensor, Tensor]:
        """Mean (B, C, h, w) and std (B,) of p(x_{t-1} | x_t, z), float32.

        Args:
            obs: ``latent`` (B, C, h, w), ``step`` (B,) or (B, 1), ``prompt`` (B, L).
            reference: whether to ask the pre-trained model.
        """
        output = self.denoise(obs, reference, self.guidance_scale)
        assert isinstance(obs, dict)
        step = obs["step"].long().flatten()
        return self.schedule.mean(step, obs["latent"], output), self.schedule.std[step]

    def denoise(self, obs: PyTorchObs, reference: bool = False, guidance_scale: float = 1.0) -> Tensor:
        """The denoiser's output for states as in :meth:`transition`, (B, C, h, w) float32; unguided by default."""
        assert isinstance(obs, dict)
        latents, step = obs["latent"], obs["step"].long().flatten()
        conditioning = self.model.encode(obs["prompt"].long())
        timesteps = self.schedule.timesteps[step]
        self.network_calls += len(latents) * (1 if guidance_scale == 1 else 2)

        def predict(part: slice) -> Tensor:
            told = {name: values[part] for name, values in conditioning.items()}
            denoiser = None if reference else self.denoiser
            return self.model.predict(
                latents[part], timesteps[part], told, guidance_scale, denoiser, self.guidance_gradient
            )

        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast), ExitStack() as stack:
            if not reference:
                stack.enter_context(self.tuned())
            everything = torch.is_grad_enabled()
            return predict(slice(None)) if everything else self._batch_size.map(predict, len(latents))

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """V(x_t, t, z), (B,)."""
        assert isinstance(obs, dict)
        text = self.model.text_features(self.model.encode(obs["prompt"].long()))
        return self.critic(obs["latent"], obs["step"].long().flatten(), text)

    def act(
        self, obs: PyTorchObs, deterministic: bool = False, reference: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """An action, the mean it was drawn around (both (B, C, h, w)) and its log-probability (B,) in nats."""
        mean, std = self.transition(obs, reference)
        noise = torch.zeros_like(mean) if deterministic else torch.randn_like(mean)
        action, log_prob = diffusion.sample_with_log_prob(mean, std, noise)
        return action, mean, log_prob

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (B, C, h, w), values (B,) and log-probabilities (B,) in nats."""
        action, _, log_prob = self.act(obs, deterministic)
        return action, self.predict_values(obs), log_prob

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self.act(observation, deterministic)[0]

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log-probabilities and entropies of actions (B, C, h, w) or (B, C*h*w); all (B,), in nats."""
        mean, std = self.transition(obs)
        log_prob = diffusion.log_prob(actions.reshape(mean.shape), mean, std)
        entropy = -diffusion.log_prob(mean, mean, std) + 0.5 * mean[0].numel()
        return self.predict_values(obs), log_prob, entropy

    def get_distribution(self, obs: PyTorchObs) -> DiagGaussianDistribution:
        """The Gaussian over the flattened next latent."""
        mean, std = self.transition(obs)
        flat = mean.flatten(1)
        return DiagGaussianDistribution(flat.shape[1]).proba_distribution(flat, std.log()[:, None].expand_as(flat))

    def save_lora(self, folder: str | Path) -> Path:
        """Writes the LoRA as diffusers' ``load_lora_weights(folder)`` reads it; returns the file's path."""
        if self.lora is None:
            raise ValueError("this policy trains the whole denoiser (lora_rank=0) and has no LoRA to save")
        return self.lora.save(folder)

    def load_lora(self, folder: str | Path) -> None:
        """Reads a LoRA of the same model, rank and layers; errors as :meth:`dpok_gym.models.lora.LoRA.load`."""
        if self.lora is None:
            raise ValueError("this policy trains the whole denoiser (lora_rank=0) and takes no LoRA")
        self.lora.load(folder)
