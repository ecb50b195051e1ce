"""The base of the algorithms that learn by the loss diffusion models are trained with, on images of a fixed set.

Letters used for shapes: N images, B of them in a batch, C x h x w a latent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import Tensor

from agents.common import losses
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.buffer import TrajectoryBuffer
from agents.common.losses import Metrics
from agents.common.matching import NoisyImages, add_noise, choose_batch, draw_noise, encode_distinct
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import Purpose, make_generator
from dpok_gym.samplers import Transition
from dpok_gym.utils.validation import check_integer


class ForwardProcess(DenoisingAlgorithm):
    """Learns from a fixed set of images of the pre-trained model, by the loss that diffusion models are trained with.

    ``learn(total_timesteps)`` draws ``total_timesteps / T`` images, and then takes ``n_gradient_steps`` on

        E[ w(x_0, z) || output_theta(x_t, t, z) - target ||^2 ],   x_t ~ q(x_t | x_0), t one of the sampler's timesteps.

    Subclasses write :meth:`image_weights`, the weights w. There is no guidance, as diffusion models are trained. SB3's
    callbacks are asked after each denoising step of the drawing, and around every ``log_every`` optimiser steps.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        n_gradient_steps: optimiser steps in all, at least 1.
        batch_size: images of an optimiser step, chosen at random, so that one may come twice; at least 1. None for all
            there are, each once.
        log_every: optimiser steps that the means in the log go over, at least 1.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        n_gradient_steps: int = 1000,
        batch_size: int | None = 64,
        log_every: int = 50,
        **kwargs: Any,
    ) -> None:
        self.n_gradient_steps = check_integer("n_gradient_steps", n_gradient_steps)
        self.log_every = check_integer("log_every", log_every)
        #: Optimiser steps taken before the latest images came; the fit of all images starts there.
        self._n_updates_before = 0
        #: What was drawn so far: x_0 (N, C, h, w), the rewards (N,) and the N prompts.
        self.image_latents = torch.zeros(0)
        self.image_rewards = torch.zeros(0)
        self.image_prompts: list[str] = []
        super().__init__(policy, env, batch_size=batch_size, **kwargs)

    @property
    def drawing_transition(self) -> Transition:
        """The pre-trained model draws the images."""
        return self.policy.reference_transition

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Draws the images that are still missing, then takes the optimiser steps that are; arguments as SB3's."""
        if reset_num_timesteps:
            # A new training begins with no images; a continued one keeps what it has drawn.
            self.image_latents, self.image_rewards, self.image_prompts = torch.zeros(0), torch.zeros(0), []
            self._n_updates, self._n_updates_before = 0, 0
        name = tb_log_name or type(self).__name__
        total, callback = self._setup_learn(total_timesteps, callback, reset_num_timesteps, name, progress_bar)
        callback.on_training_start(locals(), globals())
        is_going_on = True
        while is_going_on and self.num_timesteps < total:
            with self._whole_iteration():
                is_going_on = self.collect_rollouts(self.env, callback, self.rollout_buffer, self.n_steps)
                if is_going_on:
                    self._keep_images(self.rollout_buffer)
                    self._finish_iteration(log_interval)
        # All images are drawn before the fit begins: their weights depend on all rewards.
        while is_going_on and not self.is_done(total):
            n_steps = min(self.log_every, self.n_gradient_steps - self.n_fitted)
            self._fit_iteration(callback, log_interval, n_steps * (self.batch_size or len(self.image_prompts)))
        callback.on_training_end()
        return self

    def is_done(self, total_timesteps: int) -> bool:
        """Returns whether all images are drawn and all optimiser steps taken."""
        return super().is_done(total_timesteps) and self.n_fitted >= self.n_gradient_steps

    def count_optimizer_steps(self, total_images: int) -> int:
        """Returns the optimiser steps of a training, which are as many for any number of images."""
        return self.n_gradient_steps

    @property
    def n_fitted(self) -> int:
        """Optimiser steps taken on the images there are."""
        return self._n_updates - self._n_updates_before

    def train(self) -> None:
        """Takes up to ``log_every`` optimiser steps, each on a random batch of the images."""
        # Weights first: an image of weight 0 is never put into a batch.
        weights = self._checked_weights()
        rows = self.rows_to_fit(weights)
        for _ in range(min(self.log_every, self.n_gradient_steps - self.n_fitted)):
            self._update_current_progress_remaining(self.n_fitted + 1, self.n_gradient_steps)
            self._update_learning_rate(self.policy.optimizer)
            rng = make_generator(self.run_seed, Purpose.FIT, self._n_updates)
            chosen = rows[choose_batch(len(rows), self.batch_size, rng)]
            prompts = [self.image_prompts[row] for row in chosen.tolist()]
            step, noise = draw_noise(self.process, len(chosen), rng)
            latents, conditioning = self.image_latents[chosen], encode_distinct(self.process, prompts)
            batch = add_noise(self.process, latents, step, noise, weights[chosen], *conditioning)
            with self.optimizer_step():
                self.backward(batch.share())

    @abstractmethod
    def image_weights(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """The weight of each image's loss.

        Args:
            rewards: (N,).
            prompts: the N prompts.

        Returns:
            (N,) at least 0.
        """

    def rows_to_fit(self, weights: Tensor) -> Tensor:
        """Returns the images that batches are drawn from, (n,) int64: those whose loss has a weight."""
        return torch.nonzero(weights).flatten()

    def _checked_weights(self) -> Tensor:
        if not self.image_prompts:
            raise ValueError("no image got a reward that is finite, so there is nothing to learn from")
        weights = self.image_weights(self.image_rewards, self.image_prompts)
        if not (weights > 0).any():
            raise ValueError(
                f"none of the {len(weights)} images has a positive weight (rewards {self.image_rewards.min():.3g} "
                f"to {self.image_rewards.max():.3g}), so there is nothing to learn from: use a reward that is above "
                "0 for good images, or let RewardWeightedSFT shift it (center_rewards, gamma_kl)"
            )
        return weights

    def loss(self, batch: NoisyImages) -> tuple[Tensor, Metrics]:
        """w || output - target ||^2 of each image, (B,)."""
        output = self.policy.predict_output(batch.state, guidance_scale=1.0)
        return self.weighted_loss(batch, output)

    def weighted_loss(self, batch: NoisyImages, output: Tensor) -> tuple[Tensor, Metrics]:
        """w || output - target ||^2 of each image for an output (B, C, h, w), (B,)."""
        loss = losses.denoising_loss(output, batch.target)
        return batch.weight * loss, {"denoising_loss": loss.detach()}

    def _keep_images(self, buffer: TrajectoryBuffer) -> None:
        """Adds an iteration's images to those there are; the fit starts anew, with all of them."""
        self._n_updates_before = self._n_updates
        images = torch.nonzero(buffer.valid).flatten()
        latents, rewards = buffer.gather(buffer.latents[:, -1])[images], buffer.final_rewards[images]
        if self.image_prompts:
            latents = torch.cat([self.image_latents, latents])
            rewards = torch.cat([self.image_rewards, rewards])
        self.image_latents, self.image_rewards = latents, rewards
        self.image_prompts += [buffer.prompts[image] for image in images.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Adds the images to what :meth:`DenoisingAlgorithm.state_dict` returns, as the group "images"."""
        state = super().state_dict()
        state["tensors"]["images"] = {"latents": self.image_latents, "rewards": self.image_rewards}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with what :meth:`state_dict` returned; errors as the base class."""
        super().load_state_dict(state)
        device = self.process.model.device
        images = state["tensors"]["images"]
        self.image_latents, self.image_rewards = images["latents"].to(device), images["rewards"].to(device)

    def algorithm_state(self) -> dict[str, Any]:
        """Adds the images' prompts, and where their fit started."""
        state = {"image_prompts": list(self.image_prompts), "n_updates_before": self._n_updates_before}
        return super().algorithm_state() | state

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with the images' prompts, and where their fit started."""
        super().load_algorithm_state(state)
        self.image_prompts = list(state["image_prompts"])
        self._n_updates_before = state["n_updates_before"]
