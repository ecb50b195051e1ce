"""What the supervised algorithms share: pictures drawn once from the pre-trained model, and weights for each.

Letters used for shapes: N pictures, B of them in a batch, C x h x w a latent, L tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import Tensor

from agents import losses
from agents.on_policy import DenoisingAlgorithm, Found
from agents.rollout_buffer import Batch, TrajectoryBuffer
from dpok_gym.checks import integer


@dataclass
class Pictures(Batch):
    """Finished pictures: latents (N, C, h, w), prompt (N, L), rewards (N,)."""

    latents: Tensor
    prompt: Tensor
    rewards: Tensor


@dataclass
class NoisyPictures(Batch):
    """A batch to learn from: latents and noisy (B, C, h, w), step (B,), prompt (B, L), weight (B,)."""

    latents: Tensor
    noisy: Tensor
    step: Tensor
    prompt: Tensor
    weight: Tensor

    @property
    def observation(self) -> dict[str, Tensor]:
        """The noisy pictures as states of the denoising."""
        return {"latent": self.noisy, "step": self.step, "prompt": self.prompt}


class Supervised(DenoisingAlgorithm):
    """Learns from a fixed set of pictures of the pre-trained model, by the loss that diffusion models are trained with.

    ``learn(total_timesteps)`` draws ``total_timesteps / T`` pictures, and then takes ``n_gradient_steps`` on

        E[ w(x_0, z) || output_theta(x_t, t, z) - target ||^2 ],   x_t ~ q(x_t | x_0), t one of the sampler's timesteps.

    Subclasses say what the weights w are. Without guidance, as diffusion models are trained. SB3's callbacks are asked
    after each step of the drawing, and before and after every ``log_every`` optimiser steps as around a rollout.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`.
        n_gradient_steps: optimiser steps in all.
        batch_size: pictures in each of them.
        log_every: optimiser steps that the means in the log go over; an interrupted ``learn`` loses none.
        **kwargs: further arguments of :class:`~agents.on_policy.DenoisingAlgorithm`.

    Raises:
        ValueError: if an argument is out of range, or the environment is no denoising environment.
    """

    def __init__(
        self,
        policy: Any = "DenoisingPolicy",
        env: Any = None,
        *,
        n_gradient_steps: int = 1000,
        batch_size: int | None = 64,
        log_every: int = 50,
        **kwargs: Any,
    ) -> None:
        self.n_gradient_steps = integer("n_gradient_steps", n_gradient_steps)
        self.log_every = integer("log_every", log_every)
        #: Optimiser steps taken before the last pictures came; the fit of all of them starts there.
        self._n_updates_before = 0
        super().__init__(policy, env, batch_size=batch_size, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        buffer = self.rollout_buffer
        #: What was drawn so far; saved with the agent.
        self.pictures = Pictures(
            *(part[:0].clone() for part in (buffer.latents[:, -1], buffer.prompt, buffer.rewards[:, -1]))
        )

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Draws the pictures that are still missing, then takes the optimiser steps that are; arguments as SB3's."""
        if reset_num_timesteps:
            self.pictures, self._n_updates, self._n_updates_before = self.pictures.take(slice(0, 0)), 0, 0
        name = tb_log_name or type(self).__name__
        total, callback = self._setup_learn(total_timesteps, callback, reset_num_timesteps, name, progress_bar)
        callback.on_training_start(locals(), globals())
        assert self.env is not None
        self._restore_random_state(self.env)
        iteration, going = 0, True
        while going and self.num_timesteps < total:
            going = self.collect_rollouts(self.env, callback, self.rollout_buffer, self.n_steps)
            if going:
                self._keep(self.rollout_buffer)
                iteration += 1
                if iteration % log_interval == 0:
                    self.dump_logs(iteration)
        while going and not self.is_done(total):
            callback.on_rollout_start()  # where callbacks save
            self.train()
            callback.on_rollout_end()
            iteration += 1
            if iteration % log_interval == 0:
                self.dump_logs(iteration)
        callback.on_training_end()
        return self

    def is_done(self, total_timesteps: int) -> bool:
        """Whether all pictures are drawn and all optimiser steps taken."""
        return super().is_done(total_timesteps) and self._n_fitted >= self.n_gradient_steps

    @property
    def _n_fitted(self) -> int:
        """Optimiser steps taken on the pictures there are."""
        return self._n_updates - self._n_updates_before

    def train(self) -> None:
        """Some optimiser steps on batches of the pictures."""
        if not len(self.pictures):
            raise ValueError("no picture got a reward that is finite, so there is nothing to learn from")
        weights = self.picture_weights(self.pictures.rewards, self.pictures.prompt)
        if not (weights > 0).any():
            raise ValueError(
                f"none of the {len(weights)} pictures has a positive weight (rewards {self.pictures.rewards.min():.3g} "
                f"to {self.pictures.rewards.max():.3g}), so there is nothing to learn from: use a reward that is above "
                "0 for good pictures, or let RewardWeightedSFT shift it (center_rewards, gamma_kl)"
            )
        rows = self._rows(weights)
        batch_size = self.batch_size or len(rows)
        n_steps = min(self.log_every, self.n_gradient_steps - self._n_fitted)
        with self._update(n_steps * batch_size) as found:
            for _ in range(n_steps):
                self._update_current_progress_remaining(self._n_fitted + 1, self.n_gradient_steps)
                self._update_learning_rate(self.policy.optimizer)
                chosen = rows[torch.randint(len(rows), (batch_size,)).to(rows.device)]
                self._take_step(self._add_noise(self.pictures.take(chosen), weights[chosen]), found)

    @abstractmethod
    def picture_weights(self, rewards: Tensor, prompts: Tensor) -> Tensor:
        """What each picture's loss is multiplied by.

        Args:
            rewards: (N,).
            prompts: (N, L) tokens.

        Returns:
            (N,) at least 0.
        """

    def _rows(self, weights: Tensor) -> Tensor:
        """The pictures that batches are drawn from: those whose loss has a weight."""
        return torch.nonzero(weights).flatten()

    def _add_noise(self, pictures: Pictures, weights: Tensor) -> NoisyPictures:
        schedule = self.policy.schedule
        step = torch.randint(len(schedule), (len(pictures),)).to(weights.device)
        noisy = schedule.add_noise(step, pictures.latents, torch.randn_like(pictures.latents))
        return NoisyPictures(pictures.latents, noisy, step, pictures.prompt, weights)

    def _loss(self, part: NoisyPictures, reference: Any, found: Found) -> Tensor:
        """w || output - target ||^2 of each picture, (B,)."""
        return self._weighted_loss(part, self.policy.denoise(part.observation), found)

    def _weighted_loss(self, part: NoisyPictures, output: Tensor, found: Found) -> Tensor:
        loss = losses.denoising_loss(output, self.policy.schedule.target(part.step, part.latents, part.noisy))
        found["denoising_loss"].append(loss.detach())
        return part.weight * loss

    def _act(self, observation: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.policy.act(observation, reference=True)

    def _keep(self, buffer: TrajectoryBuffer) -> None:
        """Adds a rollout's pictures to those there are; what was fitted before is fitted again, with them."""
        self._n_updates_before = self._n_updates
        sound = buffer.valid
        new = Pictures(buffer.latents[sound, -1], buffer.prompt[sound], buffer.rewards[sound, -1])
        kept = vars(self.pictures)
        self.pictures = Pictures(*(torch.cat([kept[name], values]) for name, values in vars(new).items()))

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return state_dicts, [*variables, *(f"pictures.{name}" for name in vars(self.pictures))]


def same_prompt(prompts: Tensor) -> Tensor:
    """(N, L) tokens as (N,) int64: the number of each prompt among those there are."""
    return torch.unique(prompts, dim=0, return_inverse=True)[1]
