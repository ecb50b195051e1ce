"""The base of the policy gradients: REINFORCE, DDPO, GRPO and DPOK.

Letters used for shapes: B transitions, N images, T denoising steps.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from agents.common import losses
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.buffer import TrajectoryBuffer, Transitions
from agents.common.losses import ClipType, Metrics
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import Purpose, make_generator
from dpok_gym.diffusion import Reduction
from dpok_gym.samplers import State
from dpok_gym.utils.validation import check_choice, check_integer, check_positive


class PolicyGradient(DenoisingAlgorithm):
    """Minimises E[ sum_t -A_t rho_t ], with rho_t = p_theta(x_{t-1} | x_t, z) / p_old(x_{t-1} | x_t, z), clipped.

    Subclasses write :meth:`advantages`, and :meth:`loss` if they minimise more than that.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        n_epochs: passes over the images of an iteration, at least 1, usually 1 to 4; more learn more from each image,
            as far as the clipping of the ratio lets them.
        timestep_fraction: random share of the denoising steps that is trained on, in (0, 1]; less is faster and
            noisier. With ``step_weighting="output"``, steps of larger weight are chosen more often, and weigh less for
            that.
        clip_range: largest change of a transition's log-probability in an iteration, in nats of the whole latent, above
            0; smaller learns more slowly and more safely. 1.64 is the papers' 1e-4 per dimension at 4x64x64.
        clip_type: "ppo" clips as PPO does; "clamp" has no gradient outside the range, as DPOK's published code.
        log_prob_reduction: "mean" takes densities and KL per latent dimension, which keeps ratios near 1 (the published
            codes); "sum" takes them as they are (the papers' equations), and weights vary much more.
        step_weighting: "likelihood" sums the policy gradient over the steps as it is (the papers and their codes);
            "output" scales it so that it reaches the network's output with the same strength at every step, and the
            early steps, which decide most of an image, count. It does not scale the KL: with a KL, each step has its
            own balance, and the optimum is that of the paper's objective with "likelihood" only. See
            :meth:`dpok_gym.samplers.TransitionTable.output_weights`.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        n_epochs: int = 1,
        timestep_fraction: float = 1.0,
        clip_range: float = 1.64,
        clip_type: ClipType = "ppo",
        log_prob_reduction: Reduction = "mean",
        step_weighting: Literal["likelihood", "output"] = "output",
        **kwargs: Any,
    ) -> None:
        self.n_epochs = check_integer("n_epochs", n_epochs)
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction must lie in (0, 1], got {timestep_fraction}")
        self.timestep_fraction = timestep_fraction
        self.clip_range = check_positive("clip_range", clip_range)
        self.clip_type: ClipType = check_choice("clip_type", clip_type, "ppo", "clamp")
        self.log_prob_reduction: Reduction = check_choice("log_prob_reduction", log_prob_reduction, "mean", "sum")
        self.step_weighting = check_choice("step_weighting", step_weighting, "likelihood", "output")
        super().__init__(policy, env, **kwargs)

    def train(self) -> None:
        """One update: passes over the iteration's transitions, with an optimiser step for each batch.

        The first batch finds the policy as it was when it drew the images, so its ratios are exactly 1.
        """
        buffer = self.rollout_buffer
        # Before any step is taken: advantages are about the policy that drew the images.
        buffer.advantages = self.advantages(buffer)
        weights, importance = self.step_weights(), None
        if self.step_weighting == "output":
            # A step that counts for more is looked at more often; batches() lets it count for less in return.
            importance = self.step_importance(weights)
        for epoch in range(self.n_epochs):
            # Keyed by iteration and epoch, so that a resumed run makes the same batches.
            rng = make_generator(self.run_seed, Purpose.BATCHES, self.iteration, epoch)
            for batch in buffer.batches(self.batch_size, rng, self.timestep_fraction, importance, weights):
                with self.optimizer_step():
                    self.backward(batch)

    def loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """-A rho of each transition, clipped, (B,)."""
        mean, std = self.policy.transition(batch.state)
        policy_loss, metrics = self.policy_gradient_loss(batch, mean, std)
        return batch.weight * batch.step_weight * policy_loss, metrics

    def policy_gradient_loss(self, batch: Transitions, mean: Tensor, std: Tensor) -> tuple[Tensor, Metrics]:
        """-A rho of each transition without weights, (B,); see :func:`agents.common.losses.policy_gradient_loss`.

        Args:
            batch: B transitions.
            mean: (B, C, h, w) of the current policy.
            std: (B,).
        """
        policy_loss, metrics = losses.policy_gradient_loss(
            batch.actions,
            mean,
            batch.old_means,
            std,
            batch.advantages,
            self.clip_range,
            self.clip_type,
            self.log_prob_reduction,
        )
        metrics["policy_gradient_loss"] = batch.step_weight * policy_loss
        return policy_loss, {name: batch.weight * values for name, values in metrics.items()}

    def reference_mean(self, state: State) -> Tensor:
        """Mean (B, C, h, w) of the pre-trained model's transition from the same states, without a gradient."""
        return self.policy.reference_transition(state)[0]

    def kl_metrics(self, batch: Transitions, kl: Tensor) -> Metrics:
        """Metrics for a KL (B,) of transitions to the reference's: nats of a whole image, T steps together."""
        return {"kl_to_reference": batch.weight * kl * self.process.num_inference_steps}

    def step_weights(self) -> Tensor:
        """Weight of each denoising step in the policy gradient, (T,)."""
        weights = self.process.table.output_weights()
        return weights if self.step_weighting == "output" else torch.ones_like(weights)

    def step_importance(self, weights: Tensor) -> Tensor:
        """Relative frequency with which each step is chosen if not all are trained on, (T,)."""
        return weights

    def advantages(self, buffer: TrajectoryBuffer) -> Tensor:
        """The advantage of each transition, (N, T): here the reward that the image got in the end.

        Subclasses with one advantage for all steps of an image write :meth:`image_advantages` instead.
        """
        # Images without a valid reward keep 0; batches() leaves them out.
        advantages = torch.zeros_like(buffer.final_rewards)
        if buffer.valid.any():
            images = torch.nonzero(buffer.valid).flatten()
            prompts = [buffer.prompts[image] for image in images.tolist()]
            advantages[images] = self.image_advantages(buffer.final_rewards[images], prompts, images)
        # The reward comes at the end and belongs to all steps alike.
        return advantages[:, None].expand_as(buffer.rewards)

    def image_advantages(self, rewards: Tensor, prompts: list[str], images: Tensor) -> Tensor:
        """The advantage of each image: its reward, less a baseline in subclasses.

        Args:
            rewards: (n,) of the images that have a valid one.
            prompts: their n prompts.
            images: (n,) int64, their rows in the rollout.

        Returns:
            (n,).
        """
        return rewards
