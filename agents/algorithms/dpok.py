"""DPOK: Diffusion Policy Optimization with KL regularization (Fan et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import explained_variance
from torch import Tensor

from agents.algorithms.policy_gradient import PolicyGradient
from agents.common import distributed, losses
from agents.common.advantages import center, generalized_advantages
from agents.common.buffer import TrajectoryBuffer, Transitions
from agents.common.critic import CriticKind, RewardCritic, ValueNetwork
from agents.common.losses import ClipType, Metrics, Ratio
from agents.common.normalization import RunningStatistics
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import Purpose, make_generator
from dpok_gym.utils.validation import (
    check_choice,
    check_fraction,
    check_integer,
    check_non_negative,
    check_positive,
)

#: An adapted ``kl_coef`` stays within this factor of the one of the beginning, on both sides.
_KL_COEF_RANGE = 1e4


class DPOK(PolicyGradient):
    """Online policy gradient on the denoising steps, regularised towards the pre-trained model.

    Minimises, over trajectories of the current model (Eq. 8 and 9 of the paper, with the importance ratio and clipping
    of its App. A.6 and the value baseline of its App. A.5),

        E[ sum_t  -alpha A_t rho_t  +  beta KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ],

    where A_t = r(x_0, z) - V(x_t, t, z), and rho_t is the clipped ratio of the new to the old transition density. Both
    terms are sums over the latent's dimensions, the KL in nats, and both get the same weights and the same scale. So
    ``kl_coef`` / ``reward_weight`` is the price of a nat in units of the reward, whatever the other arguments are.

    To follow an update, read five files: :meth:`loss` and :meth:`advantages` here; the loop over batches and the two
    terms, ``PolicyGradient.train`` (policy_gradient.py); one optimiser step, ``optimizer_step`` and ``backward``
    (common/updates.py); the clipped ratio (common/losses.py); its log-ratio and the KL (dpok_gym/diffusion.py). Three
    calls on the way can be taken at their word: ``TrajectoryBuffer.batches`` gives random transitions of the rollout,
    ``DenoisingPolicy.transition`` the mean and std of p_theta(x_{t-1} | x_t, z), and ``generalized_advantages`` the
    reward less V if ``gamma`` and ``gae_lambda`` are 1.

    The defaults minimise the paper's objective with less noise than the paper's own settings do: ``ratio``,
    ``clip_type``, ``skip_last_steps``, ``center_advantage`` and ``normalize_loss`` are ours.
    ``PRESETS["paper"]`` and ``PRESETS["official-code"]`` are the published settings for Stable Diffusion.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        reward_weight: alpha, weight of the policy gradient beside the KL, at least 0. Only its ratio to ``kl_coef``
            matters.
        kl_coef: beta, weight of the KL to the pre-trained model, in units of the reward per nat, at least 0. The
            optimum is the pre-trained model's distribution times exp(alpha r / beta), as far as the steps' Gaussians
            can follow it. 0 trains without KL and saves the pre-trained model's pass; too large a value keeps the model
            where it was.
        kl_estimator: "exact" is the KL of the Gaussians; "output-mse" is the squared difference of the networks'
            outputs, which lacks a factor that differs between timesteps (the published code).
        kl_placement: "loss" adds the KL of each transition to the loss (the paper; it drops a term of the gradient);
            "reward" also charges the exact KL of later steps that explore to the earlier actions that led there, which
            is the full gradient of Eq. 8 over these steps.
        target_kl: nats per image that ``kl_coef`` is adapted to hold, over the steps that explore; within a factor of
            1e4 of the given ``kl_coef``. None leaves ``kl_coef`` as it is. See :meth:`_adapt_kl_coef`.
        use_critic: take V, which a critic learns, as the baseline.
        critic_kind: "reward" rewards the image that the denoiser predicts, and learns how far to trust that from a few
            images (:class:`~agents.common.critic.RewardCritic`). It costs a decoding and a reward for each image at the
            last steps; ``policy_kwargs={"critic_kwargs": {"look_fraction": 0.2}}`` halves that. "network" is the
            paper's network on x_t; after 640 images it explains nothing.
        vf_learning_rate: learning rate of the critic "network", at least 0.
        vf_batch_size: transitions for each step of the critic "network", at least 1; None for the whole rollout.
        vf_epochs: passes of the critic "network" over the rollout, at least 1.
        center_advantage: subtract the mean advantage of each denoising step. Without it, an error of V that all images
            share adds noise to the gradient.
        normalize_loss: divide both terms by the standard deviation of all advantages so far, ``train/loss_scale`` in
            the log. So limits on the gradient's norm suit rewards of all scales; the optimum does not move.
        gamma: discount per denoising step, in [0, 1]; the paper has none (1).
        gae_lambda: 1 for the paper's advantage, less trusts the critic more, in [0, 1].
        batch_size: transitions of an optimiser step, at least 1; None for all there are.
        skip_last_steps: see :class:`~agents.algorithms.policy_gradient.PolicyGradient`; the KL still holds steps that
            the policy gradient leaves out.
        ratio: see :class:`~agents.algorithms.policy_gradient.PolicyGradient`.
        clip_type: see :class:`~agents.algorithms.policy_gradient.PolicyGradient`.
        clip_range: largest change of a transition in an iteration, in nats of the whole latent, above 0.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        reward_weight: float = 1.0,
        kl_coef: float = 1e-3,
        kl_estimator: Literal["exact", "output-mse"] = "exact",
        kl_placement: Literal["loss", "reward"] = "loss",
        target_kl: float | None = None,
        use_critic: bool = True,
        critic_kind: CriticKind = "reward",
        vf_learning_rate: float = 3e-4,
        vf_batch_size: int | None = 256,
        vf_epochs: int = 1,
        center_advantage: bool = True,
        normalize_loss: bool = True,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        batch_size: int | None = 64,
        skip_last_steps: int | Literal["auto"] = "auto",
        ratio: Ratio = "centred",
        clip_type: ClipType = "kl",
        clip_range: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.reward_weight = check_non_negative("reward_weight", reward_weight)
        self.kl_coef = self.initial_kl_coef = check_non_negative("kl_coef", kl_coef)
        self.kl_estimator = check_choice("kl_estimator", kl_estimator, "exact", "output-mse")
        self.kl_placement = check_choice("kl_placement", kl_placement, "loss", "reward")
        if target_kl is not None and not check_positive("target_kl, in nats,", target_kl) * kl_coef:
            raise ValueError("target_kl needs a kl_coef above 0 to begin with, got 0")
        if kl_placement == "reward" and reward_weight == 0:
            raise ValueError(
                "kl_placement='reward' charges kl_coef / reward_weight of the KL, so reward_weight must be above 0"
            )
        self.target_kl = target_kl
        self.use_critic = use_critic
        self.critic_kind = check_choice("critic_kind", critic_kind, "network", "reward")
        self.vf_learning_rate = check_non_negative("vf_learning_rate", vf_learning_rate)
        self.vf_batch_size = None if vf_batch_size is None else check_integer("vf_batch_size", vf_batch_size)
        self.vf_epochs = check_integer("vf_epochs", vf_epochs)
        self.center_advantage = center_advantage
        self.normalize_loss = normalize_loss
        self.advantage_statistics = RunningStatistics()
        super().__init__(
            policy,
            env,
            batch_size=batch_size,
            skip_last_steps=skip_last_steps,
            ratio=ratio,
            clip_type=clip_type,
            clip_range=clip_range,
            **kwargs,
        )
        self.gamma, self.gae_lambda = check_fraction("gamma", gamma), check_fraction("gae_lambda", gae_lambda)

    def _setup_model(self) -> None:
        super()._setup_model()
        self._connect_critic()

    def set_env(self, env: GymEnv | VectorEnv, force_reset: bool = True) -> None:
        """Puts the agent, and its critic, on another environment, which must sample as the one it was made for."""
        super().set_env(env, force_reset)
        self._connect_critic()

    def _connect_critic(self) -> None:
        """Gives the critic the environment's reward."""
        if isinstance(self.policy.critic, RewardCritic) and self.env is not None:
            self.policy.critic.judge = self.denoising_env.judge

    @property
    def nat_price(self) -> float | None:
        """See the base class; None without a KL, or with one that is adapted, or with rewards that are standardised."""
        is_fixed = self.target_kl is None and self.reward_normalizer is None
        return self.kl_coef / self.reward_weight if is_fixed and self.kl_coef * self.reward_weight > 0 else None

    @property
    def records_reference_kl(self) -> bool:  # type: ignore[override]
        """The KL of a rollout is needed only as a part of the reward."""
        return self.kl_placement == "reward" and self.kl_coef > 0

    @property
    def loss_scale(self) -> float:
        """The divisor of both terms of the loss: D, times the standard deviation of alpha A if that is wanted."""
        if not self.normalize_loss:
            return super().loss_scale
        return super().loss_scale * self.advantage_statistics.std * (self.reward_weight or 1.0)

    def loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """-alpha A rho + beta KL of each transition (Eq. 9), (B,)."""
        mean, std = self.policy.transition(batch.state)
        policy_loss, metrics = self.policy_gradient_loss(batch, mean, std)
        loss = self.reward_weight * policy_loss
        metrics["policy_gradient_loss"] *= self.reward_weight
        # A weight of 0 needs no pre-trained model, which would cost a pass of the denoiser.
        if self.kl_coef:
            penalty, kl_metrics = self.kl_loss(batch, mean, std)
            loss, metrics = loss + self.kl_coef * penalty, metrics | kl_metrics
        return batch.weight * loss / self.loss_scale, metrics

    def divergence(self, batch: Transitions, mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
        """The exact KL (Eq. 8), or the published code's estimate of it, (B,)."""
        if self.kl_estimator == "exact":
            return super().divergence(batch, mean, reference, std)
        # The sum over the dimensions, as in the other term; the mean is the published code's.
        return mean[0].numel() * self.process.table.output_mse(batch.step, mean, reference)

    def advantages(self, buffer: TrajectoryBuffer) -> Tensor:
        """A_t = r - V(x_t, t, z) of each transition, (N, T)."""
        rewards = buffer.rewards.clone()
        if self.records_reference_kl:
            # The KL at x_t is a cost of the action that led to x_t, hence of step t - 1. No action led to x_T.
            charged = buffer.kl * self.process.table.exploring
            rewards[:, :-1] -= self.kl_coef / self.reward_weight * charged[:, 1:]
        if isinstance(self.policy.critic, RewardCritic):
            buffer.values = self.policy.critic.values(buffer)
        elif self.use_critic:
            with torch.no_grad():
                for index in range(buffer.num_inference_steps):
                    buffer.values[:, index] = buffer.gather(self.policy.values(buffer.state_at(index)))
        # Without a critic the values are 0, and the advantage is the reward itself.
        advantages, buffer.returns = generalized_advantages(rewards, buffer.values, self.gamma, self.gae_lambda)
        if self.center_advantage:
            advantages = center(advantages, buffer.valid)
        self.advantage_statistics.update(advantages[buffer.valid].flatten())
        self.logger.record("train/loss_scale", self.loss_scale)
        return advantages

    def train(self) -> None:
        """Updates the denoiser as every policy gradient does; then the critic, and the weight of the KL."""
        # The critic comes last: its values of this iteration are part of the advantages already.
        super().train()
        if self.use_critic:
            self._train_critic()
        if self.target_kl is not None:
            self._adapt_kl_coef(self.target_kl)

    def _train_critic(self) -> None:
        """Regression of V(x_t, t, z) on the returns."""
        buffer = self.rollout_buffer
        critic = self.policy.critic
        if isinstance(critic, RewardCritic):
            critic.fit(buffer)
        elif isinstance(critic, ValueNetwork):
            self._train_value_network(critic)
        if buffer.valid.any():
            values = buffer.values[buffer.valid].flatten().cpu().numpy()
            returns = buffer.returns[buffer.valid].flatten().cpu().numpy()
            self.logger.record("train/explained_variance", float(explained_variance(values, returns)))

    def _train_value_network(self, critic: ValueNetwork) -> None:
        """Passes over the rollout, with a step on || V - return ||^2 for each batch."""
        for epoch in range(self.vf_epochs):
            # After the denoiser's epochs, so that no order of batches comes twice.
            rng = make_generator(self.run_seed, Purpose.BATCHES, self.iteration, self.n_epochs + epoch)
            for batch in self.rollout_buffer.batches(self.vf_batch_size, rng):
                loss = losses.value_loss(self.policy.values(batch.state), batch.returns)
                self.policy.optimizer.zero_grad()  # to None, so the step leaves the denoiser where it is
                (loss.sum() / batch.whole_size).backward()
                distributed.sum_gradients(list(critic.parameters()))
                self.policy.optimizer.step()
                self.log_metrics({"value_loss": loss})

    @property
    def held_coef(self) -> float:
        """The steps that the policy gradient leaves out are held by the ``kl_coef`` of the beginning."""
        return 1.0 if self.target_kl is None else self.initial_kl_coef / self.kl_coef

    def _adapt_kl_coef(self, target: float) -> None:
        """beta <- beta (KL / target)^(1/2), by at most a third up or a tenth down in an iteration.

        As in Ziegler et al. (2019, Sec. 2.2), but multiplicative: at the optimum, a KL is proportional to 1 / beta^2.
        It falls slowly, because the KL needs many iterations to grow. A target beyond what the reward leads to is not
        reached: then beta stays at 1e-4 of the one of the beginning, from which it can come back. It grows to 1e4 times
        that one at most.
        """
        kl = self.mean_metrics().get("kl_to_reference")
        if kl is not None:  # no image may have had a valid reward
            adapted = self.kl_coef * min(max((kl / target) ** 0.5, 0.9), 4 / 3)
            lowest, highest = self.initial_kl_coef / _KL_COEF_RANGE, self.initial_kl_coef * _KL_COEF_RANGE
            self.kl_coef = min(max(adapted, lowest), highest)
        self.logger.record("train/kl_coef", self.kl_coef)

    def _update_learning_rate(self, optimizers: Any) -> None:
        super()._update_learning_rate(optimizers)
        if isinstance(self.policy.critic, ValueNetwork):
            self.policy.optimizer.param_groups[1]["lr"] = self.vf_learning_rate
            self.logger.record("train/vf_learning_rate", self.vf_learning_rate)

    def algorithm_state(self) -> dict[str, Any]:
        """Adds the adapted weight of the KL and the statistics of the advantages."""
        mine = {"kl_coef": self.kl_coef, "advantage_statistics": self.advantage_statistics.state()}
        return super().algorithm_state() | mine

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with the adapted weight of the KL and the statistics of the advantages."""
        super().load_algorithm_state(state)
        self.advantage_statistics = RunningStatistics(*state["advantage_statistics"])
        if self.target_kl is not None:
            self.kl_coef = state["kl_coef"]
