"""What the policy gradients share: batches of transitions, and the clipped gradient of their log-densities."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from agents import losses
from agents.on_policy import DenoisingAlgorithm, Found
from agents.rollout_buffer import TrajectoryBuffer, Transitions
from dpok_gym import diffusion
from dpok_gym.checks import integer, one_of, positive


class PolicyGradient(DenoisingAlgorithm):
    """Minimises E[ sum_t  -A_t rho_t ], rho_t = p_theta(x_{t-1} | x_t, z) / p_old(x_{t-1} | x_t, z), clipped.

    Subclasses say what the advantages A_t are, and may add to the loss.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`.
        n_epochs: passes over the rollout. Above 1, the ratio and its clipping matter more.
        timestep_fraction: random share of the transitions that is trained on, in (0, 1]; cheaper, and noisier. With
            ``step_weighting="output"``, steps that weigh more are chosen more often, and weighed less for that.
        clip_range: how far the log-ratio of the whole transition may move, in nats, whatever the latent's size and the
            reduction are. 1.64 is the papers' 1e-4 per dimension at 4x64x64. Smaller learns more slowly.
        clipping: "pessimistic" (PPO) or "clamp", see :func:`agents.losses.policy_gradient_loss`.
        log_prob_reduction: "mean" takes densities and KL per latent dimension, which keeps ratios near 1 (the published
            codes); "sum" takes them as they are (the equations), with much more variable weights.
        step_weighting: "likelihood" sums the policy gradient over the steps as it is (the papers and their codes);
            "output" lets it reach the network's output equally strong from every step, so that the early ones, which
            decide most of a picture, are heard, see :meth:`dpok_gym.diffusion.Schedule.output_weights`. It scales the
            policy gradient alone, not the ratio and not a KL beside it: with one, each step has a beta of its own, and
            what the algorithm comes to is the optimum of its equation with "likelihood" only.
        **kwargs: further arguments of :class:`~agents.on_policy.DenoisingAlgorithm`; batches are of transitions.

    Raises:
        ValueError: if an argument is out of range, or the environment is no denoising environment.
    """

    def __init__(
        self,
        policy: Any = "DenoisingPolicy",
        env: Any = None,
        *,
        n_epochs: int = 1,
        timestep_fraction: float = 1.0,
        clip_range: float = 1.64,
        clipping: losses.Clipping = "pessimistic",
        log_prob_reduction: diffusion.Reduction = "mean",
        step_weighting: Literal["likelihood", "output"] = "output",
        **kwargs: Any,
    ) -> None:
        self.n_epochs = integer("n_epochs", n_epochs)
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction must lie in (0, 1], got {timestep_fraction}")
        self.timestep_fraction = timestep_fraction
        self.clip_range = positive("clip_range", clip_range)
        self.clipping: losses.Clipping = one_of("clipping", clipping, "pessimistic", "clamp")
        self.log_prob_reduction: diffusion.Reduction = one_of("log_prob_reduction", log_prob_reduction, "mean", "sum")
        self.step_weighting = one_of("step_weighting", step_weighting, "likelihood", "output")
        super().__init__(policy, env, **kwargs)

    def train(self) -> None:
        """One update: every batch of the rollout takes a step of the denoiser."""
        with self._update(len(self.rollout_buffer.means)) as found:
            self._train_denoiser(found)

    def _train_denoiser(self, found: Found) -> None:
        importance = None
        if self.step_weighting == "output":
            importance = self._step_importance(self.policy.schedule.output_weights())
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size, self.timestep_fraction, importance):
                self._take_step(batch, found)

    def _step_importance(self, output_weights: Tensor) -> Tensor:
        """How often each step is to be learned from, (T,), where it is not every time."""
        return output_weights

    def _loss(self, part: Transitions, reference: Any, found: Found) -> Tensor:
        """-A rho of each transition, clipped, (B,)."""
        mean, std = self.policy.transition(part.observation)
        return part.weight * self._policy_loss(part, mean, std, found)

    @property
    def _dims(self) -> int:
        """What nats of a transition are divided by."""
        return self.rollout_buffer.means[0, 0].numel() if self.log_prob_reduction == "mean" else 1

    def _policy_loss(self, part: Transitions, mean: Tensor, std: Tensor, found: Found) -> Tensor:
        log_ratio = diffusion.log_ratio(part.actions, mean, part.old_means, std, self.log_prob_reduction)
        clip_range = self.clip_range / self._dims
        loss = losses.policy_gradient_loss(log_ratio, part.advantages, clip_range, self.clipping)
        loss = self._weigh_step(part, loss)
        for name, values in {
            "policy_gradient_loss": loss,
            "mean_ratio": log_ratio.exp(),
            "clip_fraction": (log_ratio.abs() > clip_range).float(),
        }.items():
            found[name].append(part.weight * values.detach())
        return loss

    def _score_function_loss(self, part: Transitions) -> Tensor:
        """-A log p_theta of each transition, up to a constant: only its gradient counts; (B,)."""
        mean, std = self.policy.transition(part.observation)
        log_prob = diffusion.log_ratio(part.actions, mean, mean.detach(), std, self.log_prob_reduction)
        return self._weigh_step(part, -part.advantages * log_prob)

    def _weigh_step(self, part: Transitions, loss: Tensor) -> Tensor:
        return self.policy.schedule.output_weights()[part.step] * loss if self.step_weighting == "output" else loss

    def _kl(self, part: Transitions, mean: Tensor, reference: Tensor, std: Tensor, found: Found) -> Tensor:
        """KL of each transition to the pre-trained model's, in nats, (B,)."""
        kl = diffusion.kl_divergence(mean, reference, std)
        found["kl_to_pretrained"].append(part.weight * kl.detach() * len(self.policy.schedule))
        return kl

    @torch.no_grad()
    def _pretrained_means(self, observation: dict[str, Tensor]) -> Tensor:
        """Where the pre-trained model would go from the same states, (B, C, h, w)."""
        return self.policy.transition(observation, reference=True)[0]

    def _compute_advantages(self, buffer: TrajectoryBuffer) -> None:
        """One advantage for each picture: all its steps share the reward that it got in the end."""
        advantages = torch.zeros_like(buffer.advantages[:, 0])
        if buffer.valid.any():
            rows = torch.nonzero(buffer.valid).flatten()
            advantages[rows] = self._advantages(buffer.rewards[rows].sum(dim=1), buffer.prompt[rows], rows)
        buffer.advantages = advantages[:, None].expand_as(buffer.rewards)

    def _advantages(self, rewards: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
        """How much better each picture is than was to be expected; without a baseline, its reward.

        Args:
            rewards: (N,) of the pictures that have a valid one.
            prompts: (N, L) tokens of their prompts.
            rows: (N,) int64, which of the rollout's pictures they are.

        Returns:
            (N,).
        """
        return rewards
