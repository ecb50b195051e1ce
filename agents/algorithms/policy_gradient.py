"""The base of the policy gradients: REINFORCE, DDPO, GRPO and DPOK.

Letters used for shapes: B transitions, N images, T denoising steps, D dimensions of a latent.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from agents.common import losses
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.buffer import TrajectoryBuffer, Transitions
from agents.common.losses import ClipType, Metrics, Ratio
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import Purpose, make_generator
from dpok_gym import diffusion
from dpok_gym.samplers import State
from dpok_gym.utils.validation import check_choice, check_fraction, check_integer, check_positive


class PolicyGradient(DenoisingAlgorithm):
    """Minimises E[ sum_t -A_t rho_t ], with rho_t = p_theta(x_{t-1} | x_t, z) / p_old(x_{t-1} | x_t, z), clipped.

    Subclasses write :meth:`advantages`, and :meth:`loss` if they minimise more than that. All terms are in nats of the
    whole latent. The loss is divided by ``loss_scale``, which AdamW does not notice, so that the same limits on the
    gradient's norm suit latents of all sizes.

    Deterministic steps of the sampler have no density, so nothing is learned from them: they are left out of both
    terms, and of ``timestep_fraction``. Hence with ``sde_steps=(first, number)`` of the environment an image has that
    many transitions.

    The defaults are those of the published codes of DDPO, DanceGRPO and Flow-GRPO.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        n_epochs: passes over the images of an iteration, at least 1, usually 1 to 4; more learn more from each image,
            as far as the clipping of the ratio lets them.
        timestep_fraction: random share of the denoising steps that is trained on, in (0, 1]; less is faster and
            noisier. Steps of larger weight are chosen more often, and weigh less for that.
        skip_last_steps: denoising steps at the end that the policy gradient leaves out, at least 0 and below T. "auto"
            leaves out those that explore nothing, the last two of Stable Diffusion's; see
            :attr:`dpok_gym.samplers.TransitionTable.exploring`.
        ratio: form of the importance ratio: "joint" is that of the whole latent (the papers' equations);
            "per-dimension" is its D-th root (the published codes); "centred" is that root without its drift
            (GRPO-Guard). See :func:`agents.common.losses.importance_ratio`.
        clip_type: "ppo" clips as PPO does; "clamp" has no gradient outside the range, as DPOK's published code; "kl"
            leaves out transitions whose KL to the old policy is too large and still growing (Flow-DPPO).
        clip_range: largest change of a transition in an iteration, in nats of the whole latent, above 0; of its
            log-probability or, with "kl", its KL. Smaller learns more slowly and more safely. 1.64 is the papers' 1e-4
            per dimension at 4x64x64.
        step_weighting: weights of the denoising steps. "likelihood" gives all the weight 1 (the papers and their
            codes). "output" scales the terms of each step, so that the policy gradient reaches the network's output
            with the same strength at every step. A KL term gets the same weights, so that both terms keep their balance
            at each step, and the optimum stays where it is. See
            :meth:`dpok_gym.samplers.TransitionTable.output_weights`.
    """

    #: Weight of the KL to the pre-trained model; subclasses may have one.
    kl_coef: float = 0.0

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        n_epochs: int = 1,
        timestep_fraction: float = 1.0,
        skip_last_steps: int | Literal["auto"] = 0,
        ratio: Ratio = "per-dimension",
        clip_type: ClipType = "ppo",
        clip_range: float = 1.64,
        step_weighting: Literal["likelihood", "output"] = "likelihood",
        **kwargs: Any,
    ) -> None:
        self.n_epochs = check_integer("n_epochs", n_epochs)
        check_fraction("timestep_fraction", timestep_fraction, zero=False)
        self.timestep_fraction = timestep_fraction
        if not (isinstance(skip_last_steps, str) and skip_last_steps == "auto"):
            check_integer("skip_last_steps (or 'auto')", skip_last_steps, minimum=0)
        self.skip_last_steps = skip_last_steps
        self.ratio: Ratio = check_choice("ratio", ratio, "joint", "per-dimension", "centred")
        self.clip_type: ClipType = check_choice("clip_type", clip_type, "ppo", "clamp", "kl")
        self.clip_range = check_positive("clip_range", clip_range)
        self.step_weighting = check_choice("step_weighting", step_weighting, "likelihood", "output")
        super().__init__(policy, env, **kwargs)

    def check_setup(self) -> None:
        """Checks that a denoising step is left to learn from, and finds the weights of the steps."""
        super().check_setup()
        self.step_weights = self._make_step_weights()

    def _make_step_weights(self) -> Tensor:
        """The weight of each step in the policy gradient, (T,): a mean of 1 over the steps that are not left out."""
        table = self.process.table
        if not table.stochastic.any():
            raise ValueError(
                f"no denoising step adds noise (sampler={self.process.config.sampler!r}, "
                f"eta={self.process.config.eta}), so none has a density to learn from: choose an eta above 0, or an "
                "algorithm that learns from finished images"
            )
        trained = table.stochastic.clone()
        if self.skip_last_steps == "auto":
            trained[int(table.exploring.nonzero().max()) + 1 :] = False
        elif self.skip_last_steps >= len(table):
            raise ValueError(
                f"skip_last_steps must be below the {len(table)} denoising steps, or nothing is left to train on, got "
                f"{self.skip_last_steps}"
            )
        else:
            trained[len(table) - self.skip_last_steps :] = False
        if not trained.any():
            raise ValueError(
                f"skip_last_steps={self.skip_last_steps} leaves out all stochastic steps, the last of which is step "
                f"{int(table.stochastic.nonzero().max())} of {len(table)}: skip fewer"
            )
        weights = table.output_weights() if self.step_weighting == "output" else torch.ones_like(table.std)
        return trained * weights / weights[trained].mean()

    @property
    def kl_step_weights(self) -> Tensor:
        """The weight of each step in the KL, (T,): that in the policy gradient, if the step has one there.

        So the two terms keep their balance wherever there are two, and the other steps are held where they are. With
        hardly any noise, a KL is huge: it would be all that the optimiser sees. So a step that is held counts as if its
        std were at least a fortieth of the largest. At T = 10, Stable Diffusion's last step has a 37th, so it counts in
        full, but flow matching's last but one has less than a 500th.
        """
        std = self.process.table.std
        held = (40 * std / std.max()).clamp(max=1) ** 2  # 0 for a deterministic step
        return torch.where(self.step_weights > 0, self.step_weights, self.held_coef * held)

    @property
    def held_coef(self) -> float:
        """The price of the KL of a step that the policy gradient leaves out, relative to ``kl_coef``."""
        return 1.0

    @property
    def loss_scale(self) -> float:
        """The divisor of the loss: D, the dimensions of a latent."""
        return float(math.prod(self.process.model.latent_shape))

    def train(self) -> None:
        """One update: passes over the iteration's transitions, with an optimiser step for each batch.

        The first batch finds the policy as it was when it drew the images, so its ratios are exactly 1.
        """
        buffer = self.rollout_buffer
        # Before any step is taken: advantages are about the policy that drew the images.
        buffer.advantages = self.advantages(buffer)
        for epoch in range(self.n_epochs):
            # Keyed by iteration and epoch, so that a resumed run makes the same batches.
            rng = make_generator(self.run_seed, Purpose.BATCHES, self.iteration, epoch)
            for batch in buffer.batches(self.batch_size, rng, self.timestep_fraction, self.step_importance()):
                with self.optimizer_step():
                    self.backward(batch)
        if self.kl_coef:
            self.log_metrics({"late_output_mse": self.deterministic_output_mse()})

    @torch.no_grad()
    def deterministic_output_mse(self) -> Tensor:
        """The drift of the deterministic steps, which no batch has: that of one step of each valid image, (n,).

        As of the rollout, whose means are kept: the pre-trained model's pass is all that it costs.

        Returns:
            The mean squared difference of the outputs; empty if all steps are stochastic.
        """
        buffer, table = self.rollout_buffer, self.process.table
        steps = torch.nonzero(~table.stochastic).flatten()
        valid = torch.nonzero(buffer.valid[buffer.own.start : buffer.own.stop]).flatten()
        if not len(steps):
            return table.std.new_zeros(0)
        rng = make_generator(self.run_seed, Purpose.DRIFT, self.iteration)
        chosen = torch.from_numpy(rng.integers(len(steps), size=len(buffer))[buffer.own.start : buffer.own.stop])
        step, image = steps[chosen.to(steps.device)], torch.arange(len(buffer.own), device=steps.device)
        state = State(buffer.latents[image, step], step, buffer.conditioning)
        reference, _ = self.policy.reference_transition(state)
        return table.output_mse(step, buffer.means[image, step], reference)[valid]

    def loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """-A rho of each transition, clipped, (B,)."""
        mean, std = self.policy.transition(batch.state)
        policy_loss, metrics = self.policy_gradient_loss(batch, mean, std)
        return batch.weight * policy_loss / self.loss_scale, metrics

    def policy_gradient_loss(self, batch: Transitions, mean: Tensor, std: Tensor) -> tuple[Tensor, Metrics]:
        """-A rho of each transition, with the weights of the steps; see :func:`losses.policy_gradient_loss`.

        Args:
            batch: B transitions.
            mean: (B, C, h, w) of the current policy.
            std: (B,).

        Returns:
            (B,) in units of the reward; and metrics, those of the ratio for the steps with a weight only.
        """
        weights = self.step_weights[batch.step]
        # Steps that are left out have hardly any noise. So their ratios are huge, and infinity times 0 is no number.
        trained = weights > 0
        of_trained, metrics = losses.policy_gradient_loss(
            batch.actions[trained],
            mean[trained],
            batch.old_means[trained],
            std[trained],
            batch.advantages[trained],
            self.clip_range,
            self.clip_type,
            self.ratio,
        )
        loss = torch.zeros_like(weights).masked_scatter(trained, weights[trained] * of_trained)
        metrics["policy_gradient_loss"] = batch.weight * loss.detach() / self.loss_scale
        return loss, metrics

    def kl_loss(self, batch: Transitions, mean: Tensor, std: Tensor) -> tuple[Tensor, Metrics]:
        """KL( p_theta || p_reference ) of each transition, with the weights of the steps.

        Args:
            batch: B transitions.
            mean: (B, C, h, w) of the current policy.
            std: (B,).

        Returns:
            (B,) in nats of the whole latent, and metrics.
        """
        reference, _ = self.policy.reference_transition(batch.state)
        penalty = self.kl_step_weights[batch.step] * self.divergence(batch, mean, reference, std)
        return penalty, self.kl_metrics(batch, mean.detach(), reference, std)

    def divergence(self, batch: Transitions, mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
        """KL of transitions with means (B, C, h, w) and std (B,) to those of the reference, (B,), in nats."""
        return diffusion.kl_divergence(mean, reference, std)

    def kl_metrics(self, batch: Transitions, mean: Tensor, reference: Tensor, std: Tensor) -> Metrics:
        """The KL to the reference in nats of a whole image, over the steps that explore; and the drift of the others.

        The drift is the mean squared difference of the outputs: nats of steps with hardly any noise say little. That of
        deterministic steps is :meth:`deterministic_output_mse`.
        """
        table = self.process.table
        exploring = table.exploring[batch.step]
        kl = exploring * diffusion.kl_divergence(mean, reference, std)
        late_mse = table.output_mse(batch.step, mean, reference)[~exploring]
        return {"kl_to_reference": batch.weight * kl * table.stochastic.count_nonzero(), "late_output_mse": late_mse}

    def step_importance(self) -> Tensor:
        """Relative frequency with which each step is chosen if not all are trained on, (T,): its share of the loss."""
        return (self.step_weights + self.kl_step_weights) / 2 if self.kl_coef else self.step_weights

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
