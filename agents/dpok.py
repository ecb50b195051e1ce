"""DPOK: Diffusion Policy Optimization with KL regularization (Fan et al., NeurIPS 2023)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import explained_variance
from torch import Tensor

from agents import losses
from agents.on_policy import Found
from agents.policy import DenoisingPolicy
from agents.policy_gradient import PolicyGradient
from agents.rollout_buffer import Normalization, TrajectoryBuffer, Transitions
from dpok_gym import diffusion
from dpok_gym.checks import fraction, integer, not_negative, one_of

#: Settings of the paper and of its published code, single prompt, where they are known; the rest is the default.
#: Both take 10 pictures and 5 optimiser steps an iteration. The code keeps the last two rollouts in its buffer, and
#: draws each minibatch anew; here each transition is used at most once, and then forgotten.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "n_envs": 10,
        "learning_rate": 1e-5,
        "batch_size": 32,
        "timestep_fraction": 0.32,  # 5 batches of 32 out of 10 pictures with 50 steps
        "reward_weight": 10.0,
        "normalize_advantage": False,
        "log_prob_reduction": "sum",
        "step_weighting": "likelihood",
        "clipping": "pessimistic",
        "kl_coef": 0.01,
        "kl_estimator": "exact",
        "kl_in": "loss",
        "max_grad_norm": 0.1,
        "vf_learning_rate": 1e-4,
        "vf_batch_size": None,
        "vf_epochs": 1,
        "policy_kwargs": {"lora_rank": 4},
    },
    "official-code": {
        "n_envs": 10,
        "learning_rate": 1e-5,
        "batch_size": 48,
        "micro_batch_size": 4,
        "timestep_fraction": 0.48,  # 5 batches of 48
        "reward_weight": 10.0,
        "normalize_advantage": False,
        "log_prob_reduction": "mean",
        "step_weighting": "likelihood",
        "clipping": "clamp",
        "kl_coef": 0.01,
        "kl_estimator": "output-mse",
        "kl_in": "loss",
        "max_grad_norm": 0.1,
        "vf_learning_rate": 1e-4,
        "vf_batch_size": None,
        "vf_epochs": 1,
        "policy_kwargs": {"lora_rank": 4},
    },
}


class DPOK(PolicyGradient):
    """Online policy gradient on the denoising steps, regularised towards the pre-trained model.

    Minimises, over trajectories of the current model (Eq. 8, 9 of the paper, with importance ratio and clipping as in
    its App. A.6 and the value baseline of App. A.5),

        E[ sum_t  -alpha A_t rho_t  +  beta KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ],

    A_t = r(x_0, z) - V(x_t, t, z), rho_t the clipped ratio of the new to the old transition density.

    The constructor's defaults are set for the embedded model, ``**PRESETS["paper"]`` and ``**PRESETS["official-code"]``
    are the papers' settings for Stable Diffusion.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`.
        reward_weight: alpha.
        kl_coef: beta, per nat. 0 trains without regularisation; too large a value keeps the model where it was.
        kl_estimator: "exact" is the KL of the Gaussians; "output-mse" the squared difference of the networks' outputs,
            which drops a weight that varies between timesteps (the code).
        kl_in: "loss" adds the KL of the transition alone (the paper, which drops a term of the gradient); "reward" also
            charges the exact KL of later steps to the earlier actions that led there: the full gradient of Eq. 8, with
            ``normalize_advantage="center"`` or False and ``step_weighting="likelihood"`` (else its two parts have
            different weights).
        target_kl_to_pretrained: nats per picture that ``kl_coef`` is adapted to hold, from where it was set: after each
            update it changes by up to a fifth, up if the KL is above the target and down if below (the controller of
            Ziegler et al. 2019, Sec. 2.2, with gain 1). None leaves it as it is.
        use_critic: whether V is the baseline; otherwise there is none but the mean that ``normalize_advantage``
            subtracts.
        vf_learning_rate: learning rate of the critic.
        vf_batch_size: transitions for each step of the critic; None for the whole rollout.
        vf_epochs: passes of the critic over the rollout.
        normalize_advantage: True gives a rollout's advantages mean 0 and standard deviation 1, so that the reward's
            scale does not matter; "center" takes off the mean of each denoising step, and leaves the scale; False takes
            them as they are. With ``log_prob_reduction="mean"``, E[rho] falls with the distance from the old policy, so
            that advantages which are negative on average push the model away from wherever it is.
        gamma: discount per denoising step; the paper has none (1).
        gae_lambda: 1 for the paper's advantage, less trusts the critic more.
        **kwargs: further arguments of :class:`~agents.policy_gradient.PolicyGradient`. The paper clips as PPO does
            (``clipping="pessimistic"``), its code clamps the ratio.

    Raises:
        ValueError: if an argument is out of range, or the environment is no denoising environment.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: GymEnv | VectorEnv | str | None = None,
        *,
        reward_weight: float = 1.0,
        kl_coef: float = 0.01,
        kl_estimator: Literal["exact", "output-mse"] = "exact",
        kl_in: Literal["loss", "reward"] = "loss",
        target_kl_to_pretrained: float | None = None,
        use_critic: bool = True,
        vf_learning_rate: float = 3e-4,
        vf_batch_size: int | None = 256,
        vf_epochs: int = 1,
        normalize_advantage: Normalization = True,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.reward_weight = not_negative("reward_weight", reward_weight)
        self.kl_coef = not_negative("kl_coef", kl_coef)
        self.kl_estimator = one_of("kl_estimator", kl_estimator, "exact", "output-mse")
        self.kl_in = one_of("kl_in", kl_in, "loss", "reward")
        if target_kl_to_pretrained is not None and not (target_kl_to_pretrained > 0 and kl_coef > 0):
            raise ValueError(
                "target_kl_to_pretrained must be a number of nats above 0, with a kl_coef above 0 to begin with, "
                f"got {target_kl_to_pretrained} and {kl_coef}"
            )
        if kl_in == "reward" and reward_weight == 0:
            raise ValueError(
                "kl_in='reward' charges kl_coef / reward_weight of the KL, so reward_weight must be above 0"
            )
        self.target_kl_to_pretrained = target_kl_to_pretrained
        self.use_critic = use_critic
        self.vf_learning_rate = not_negative("vf_learning_rate", vf_learning_rate)
        self.vf_batch_size = None if vf_batch_size is None else integer("vf_batch_size", vf_batch_size)
        self.vf_epochs = integer("vf_epochs", vf_epochs)
        self.normalize_advantage: Normalization = one_of(
            "normalize_advantage", normalize_advantage, True, False, "center"
        )
        super().__init__(policy, env, **kwargs)
        self.gamma, self.gae_lambda = fraction("gamma", gamma), fraction("gae_lambda", gae_lambda)

    def train(self) -> None:
        """One update: every batch of the rollout takes a step of the denoiser, then the critic learns the returns."""
        with self._update(len(self.rollout_buffer.means)) as found:
            self._train_denoiser(found)
            if self.use_critic:
                self._train_critic(found)
            if self.target_kl_to_pretrained is not None:
                self._adapt_kl_coef(found, self.target_kl_to_pretrained)

    def _loss(self, part: Transitions, reference: Any, found: Found) -> Tensor:
        """-alpha A rho + beta KL of each transition, (B,)."""
        mean, std = self.policy.transition(part.observation)
        policy_loss = self._policy_loss(part, mean, std, found)
        kl_loss = self._kl(part, mean, reference, std, found)
        if self.kl_estimator == "output-mse":
            kl_loss = self.policy.schedule.output_mse(part.step, mean, reference) * mean[0].numel()
        return part.weight * (self.reward_weight * policy_loss + self.kl_coef * kl_loss / self._dims)

    def _reference(self, part: Transitions) -> Tensor:
        return self._pretrained_means(part.observation)

    def _step_importance(self, output_weights: Tensor) -> Tensor:
        return (output_weights + 1) / 2  # half for the reward, half for the KL

    def _train_critic(self, found: Found) -> None:
        """Regression of V(x_t, t, z) on the returns."""
        for _ in range(self.vf_epochs):
            for batch in self.rollout_buffer.get(self.vf_batch_size):
                loss = losses.value_loss(self.policy.predict_values(batch.observation), batch.returns).mean()
                self.policy.optimizer.zero_grad()  # to None, so the step leaves the denoiser where it is
                loss.backward()
                self.policy.optimizer.step()
                found["value_loss"].append(loss.detach()[None])
        buffer = self.rollout_buffer
        if buffer.valid.any():
            predicted, returns = (
                part[buffer.valid].flatten().cpu().numpy() for part in (buffer.values, buffer.returns)
            )
            self.logger.record("train/explained_variance", float(explained_variance(predicted, returns)))

    def _adapt_kl_coef(self, found: Found, target: float) -> None:
        """beta <- beta (1 + e), e = KL / target - 1 within +-0.2."""
        if "kl_to_pretrained" in found:  # pictures may all have been masked
            kl = torch.cat(found["kl_to_pretrained"]).mean().item()
            self.kl_coef *= 1 + min(max(kl / target - 1, -0.2), 0.2)
        self.logger.record("train/kl_coef", self.kl_coef)

    def _update_learning_rate(self, optimizers: Any) -> None:
        super()._update_learning_rate(optimizers)
        self.policy.optimizer.param_groups[1]["lr"] = self.vf_learning_rate
        self.logger.record("train/vf_learning_rate", self.vf_learning_rate)

    def _values(self, observation: Any) -> Tensor:
        return self.policy.predict_values(observation) if self.use_critic else super()._values(observation)

    def _on_denoised(self, rows: slice, t: int, buffer: TrajectoryBuffer, observation: Any, means: Tensor) -> None:
        # The KL at x_t is a cost of the action that led to x_t, hence of step t - 1. That of x_T is nobody's fault.
        if self.kl_in == "reward" and t > 0:
            kl = diffusion.kl_divergence(means, self._pretrained_means(observation), self.policy.schedule.std[[t]])
            buffer.rewards[rows, t - 1] -= self.kl_coef / self.reward_weight * kl

    def _compute_advantages(self, buffer: TrajectoryBuffer) -> None:
        buffer.finish(self.gamma, self.gae_lambda, self.normalize_advantage)
