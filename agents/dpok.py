"""DPOK: Diffusion Policy Optimization with KL regularization (Fan et al., NeurIPS 2023)."""

from __future__ import annotations

import time
from collections import defaultdict
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import explained_variance
from torch import Tensor, nn

from agents import losses
from agents.on_policy import DenoisingAlgorithm
from agents.policy import DenoisingPolicy
from agents.rollout_buffer import TrajectoryBuffer, Transitions
from dpok_gym import diffusion
from dpok_gym.memory import BatchSize

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


class DPOK(DenoisingAlgorithm):
    """Online policy gradient on the denoising steps, regularised towards the pre-trained model.

    Minimises, over trajectories of the current model (Eq. 8, 9 of the paper, with importance ratio and clipping as in
    its App. A.6 and the value baseline of App. A.5),

        E[ sum_t  -alpha A_t rho_t  +  beta KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ],

    A_t = r(x_0, z) - V(x_t, t, z), rho_t the clipped ratio of the new to the old transition density.

    The constructor's defaults are set for the embedded model, ``**PRESETS["paper"]`` and ``**PRESETS["official-code"]``
    are the papers' settings for Stable Diffusion.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: an id such as "DPOK-Shapes-v0", a Gymnasium environment or vector environment, or an SB3 ``VecEnv``.
        learning_rate: of the denoiser. A LoRA on the embedded model takes 1e-3, on Stable Diffusion 1e-5 to 3e-4; too
            large a rate shows as a high clip fraction and pictures that fall apart.
        final_lr_fraction: what is left of the learning rate at the end of ``learn``, in [0, 1], falling linearly; 1
            keeps it. A falling rate averages out the noise of the last updates.
        n_steps: denoising steps of each environment in a rollout, a multiple of T; None for T, one picture each.
        n_envs: environments when ``env`` is an id. More pictures in a rollout mean less noise in the gradient.
        batch_size: transitions for each optimiser step; None for the whole rollout.
        micro_batch_size: transitions in each forward and backward pass, whose gradients add up to those of the batch;
            smaller takes less memory and changes nothing else. None for the batch, "auto" for what fits into memory.
        n_epochs: passes over the rollout. Above 1, the ratio and its clipping matter more.
        timestep_fraction: random share of the transitions that is trained on, in (0, 1]; cheaper, and noisier. With
            ``step_weighting="output"``, steps that weigh more are chosen more often, and weighed less for that.
        clip_range: how far the log-ratio of the whole transition may move, in nats, whatever the latent's size and the
            reduction are. 1.64 is the papers' 1e-4 per dimension at 4x64x64. Smaller learns more slowly.
        clipping: "pessimistic" (PPO, the paper) or "clamp" (its code), see :func:`agents.losses.policy_gradient_loss`.
        log_prob_reduction: "mean" takes densities and KL per latent dimension, which keeps ratios near 1 (the code);
            "sum" takes them as they are (the equations), with much more variable weights.
        step_weighting: "likelihood" sums the policy gradient over the steps as it is (the paper and its code);
            "output" lets it reach the network's output equally strong from every step, so that the early ones, which
            decide most of a picture, are heard, see :meth:`dpok_gym.diffusion.Schedule.output_weights`. It scales the
            loss, not the ratio.
        reward_weight: alpha.
        kl_coef: beta, per nat. 0 trains without regularisation; too large a value keeps the model where it was.
        kl_estimator: "exact" is the KL of the Gaussians; "output-mse" the squared difference of the networks' outputs,
            which drops a weight that varies between timesteps (the code).
        kl_in: "loss" adds the KL of the transition alone (the paper, which drops a term of the gradient); "reward" also
            charges the exact KL of later steps to the earlier actions that led there: the full gradient of Eq. 8
            (with ``normalize_advantage=False``, which would weigh the two parts differently).
        use_critic: whether V is the baseline; otherwise the rewards are used as they are.
        vf_learning_rate: learning rate of the critic.
        vf_batch_size: transitions for each step of the critic; None for the whole rollout.
        vf_epochs: passes of the critic over the rollout.
        normalize_advantage: whether a rollout's advantages get mean 0 and standard deviation 1, so that the reward's
            scale does not matter.
        gamma: discount per denoising step; the paper has none (1).
        gae_lambda: 1 for the paper's advantage, less trusts the critic more.
        max_grad_norm: largest norm of the denoiser's gradient.
        stats_window_size: episodes that the logged means of rewards go over.
        tensorboard_log: folder for TensorBoard.
        policy_kwargs: arguments of :class:`~agents.policy.DenoisingPolicy`, such as ``{"lora_rank": 16}``.
        verbose: 0 silent, 1 logs to the console.
        seed: of everything random.
        device: of the policy, "auto" for a GPU if there is one; should be the environment's.
        _init_setup_model: SB3's own.

    Raises:
        ValueError: if an argument is out of range, or the environment is none that a denoising policy can act in.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: GymEnv | VectorEnv | str | None = None,
        learning_rate: float | Schedule = 1e-3,
        final_lr_fraction: float = 1.0,
        n_steps: int | None = None,
        n_envs: int = 64,
        batch_size: int | None = None,
        micro_batch_size: int | Literal["auto"] | None = 128,
        n_epochs: int = 1,
        timestep_fraction: float = 1.0,
        clip_range: float = 1.64,
        clipping: losses.Clipping = "pessimistic",
        log_prob_reduction: diffusion.Reduction = "mean",
        step_weighting: Literal["likelihood", "output"] = "output",
        reward_weight: float = 1.0,
        kl_coef: float = 0.01,
        kl_estimator: Literal["exact", "output-mse"] = "exact",
        kl_in: Literal["loss", "reward"] = "loss",
        use_critic: bool = True,
        vf_learning_rate: float = 3e-4,
        vf_batch_size: int | None = 256,
        vf_epochs: int = 1,
        normalize_advantage: bool = True,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        max_grad_norm: float = 1.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.micro_batch_size = micro_batch_size
        self.vf_batch_size = _at_least_one("vf_batch_size", vf_batch_size)
        for name, value in {"n_epochs": n_epochs, "vf_epochs": vf_epochs}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.n_epochs = n_epochs
        self.vf_epochs = vf_epochs
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction must lie in (0, 1], got {timestep_fraction}")
        self.timestep_fraction = timestep_fraction
        if not 0 <= final_lr_fraction <= 1:
            raise ValueError(f"final_lr_fraction must lie in [0, 1], got {final_lr_fraction}")
        self.final_lr_fraction = final_lr_fraction
        self.clip_range = _not_negative("clip_range", clip_range)
        self.clipping: losses.Clipping = _one_of("clipping", clipping, "pessimistic", "clamp")
        self.log_prob_reduction: diffusion.Reduction = _one_of("log_prob_reduction", log_prob_reduction, "mean", "sum")
        self.step_weighting = _one_of("step_weighting", step_weighting, "likelihood", "output")
        self.reward_weight = _not_negative("reward_weight", reward_weight)
        self.kl_coef = _not_negative("kl_coef", kl_coef)
        self.kl_estimator = _one_of("kl_estimator", kl_estimator, "exact", "output-mse")
        self.kl_in = _one_of("kl_in", kl_in, "loss", "reward")
        self.use_critic = use_critic
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            n_envs=n_envs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            normalize_advantage=normalize_advantage,
            vf_learning_rate=vf_learning_rate,
            max_grad_norm=max_grad_norm,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.lr_schedule = partial(_falling, self.lr_schedule, self.final_lr_fraction)

    def _setup_model(self) -> None:
        super()._setup_model()
        self._micro_batches = BatchSize("micro_batch_size", self.micro_batch_size)

    def train(self) -> None:
        """One update: every batch of the rollout takes a step of the denoiser, then the critic learns the returns."""
        started = time.perf_counter()
        self._update_learning_rate(self.policy.optimizer)
        parameters = self.policy.denoiser_parameters()
        found: dict[str, list[Tensor]] = defaultdict(list)
        importance = None
        if self.step_weighting == "output":
            importance = (self.policy.schedule.output_weights() + 1) / 2  # half for the reward, half for the KL
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size, self.timestep_fraction, importance):
                seen = self._micro_batches.run(partial(self._backward, batch), len(batch))
                for name, values in seen.items():
                    found[name] += values
                found["grad_norm"].append(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)[None])
                self.policy.optimizer.step()
                self._n_updates += 1
        if self.use_critic:
            self._train_critic(found)
        self._log(found, time.perf_counter() - started)

    def _backward(self, batch: Transitions, micro_batch_size: int) -> dict[str, list[Tensor]]:
        """The gradient of the batch's mean loss, a micro-batch at a time; returns what is worth logging."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        self.policy.optimizer.zero_grad()
        for part in batch.split(micro_batch_size):
            # The block holds on through the backward pass, which may run parts of the network again.
            reference, _ = self._reference(part.observation)
            with self.policy.tuned():
                loss = self._loss(part, reference, found)
                (loss.sum() / len(batch)).backward()
        return found

    def _loss(self, part: Transitions, reference: Tensor, found: dict[str, list[Tensor]]) -> Tensor:
        """-alpha A rho + beta KL of each transition, (B,)."""
        mean, std = self.policy.transition(part.observation)
        log_ratio = diffusion.log_ratio(part.actions, mean, part.old_means, std, self.log_prob_reduction)
        dims = mean[0].numel() if self.log_prob_reduction == "mean" else 1
        clip_range = self.clip_range / dims
        policy_loss = losses.policy_gradient_loss(log_ratio, part.advantages, clip_range, self.clipping)
        if self.step_weighting == "output":
            policy_loss = self.policy.schedule.output_weights()[part.step] * policy_loss
        kl = diffusion.kl_divergence(mean, reference, std)
        if self.kl_estimator == "exact":
            kl_loss = kl / dims
        else:
            kl_loss = self.policy.schedule.output_mse(part.step, mean, reference) * mean[0].numel() / dims
        for name, values in {
            "policy_gradient_loss": policy_loss,
            "kl_to_pretrained": kl * len(self.policy.schedule),
            "mean_ratio": log_ratio.exp(),
            "clip_fraction": (log_ratio.abs() > clip_range).float(),
        }.items():
            found[name].append(part.weight * values.detach())
        return part.weight * (self.reward_weight * policy_loss + self.kl_coef * kl_loss)

    @torch.no_grad()
    def _reference(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The pre-trained model's transition in the same states."""
        return self.policy.transition(observation, reference=True)

    def _train_critic(self, found: dict[str, list[Tensor]]) -> None:
        """Regression of V(x_t, t, z) on the returns."""
        for _ in range(self.vf_epochs):
            for batch in self.rollout_buffer.get(self.vf_batch_size):
                loss = losses.value_loss(self.policy.predict_values(batch.observation), batch.returns).mean()
                self.policy.optimizer.zero_grad()  # to None, so the step leaves the denoiser where it is
                loss.backward()
                self.policy.optimizer.step()
                found["value_loss"].append(loss.detach()[None])

    def _values(self, observation: Any) -> Tensor:
        if self.use_critic:
            return self.policy.predict_values(observation)
        return torch.zeros(len(observation["latent"]), device=self.policy.model.device)

    def _on_denoised(self, rows: slice, t: int, buffer: TrajectoryBuffer, observation: Any, means: Tensor) -> None:
        # The KL at x_t is a cost of the action that led to x_t, hence of step t - 1. That of x_T is nobody's fault.
        if self.kl_in == "reward" and t > 0:
            reference, std = self._reference(observation)
            kl = diffusion.kl_divergence(means, reference, std)
            buffer.rewards[rows, t - 1] -= self.kl_coef / max(self.reward_weight, 1e-12) * kl

    def _log(self, found: dict[str, list[Tensor]], seconds: float) -> None:
        for name, values in found.items():
            self.logger.record(f"train/{name}", torch.cat(values).mean().item())
        buffer = self.rollout_buffer
        if self.use_critic and buffer.valid.any():
            predicted, returns = (
                part[buffer.valid].flatten().cpu().numpy() for part in (buffer.values, buffer.returns)
            )
            self.logger.record("train/explained_variance", float(explained_variance(predicted, returns)))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/update_pictures_per_second", len(buffer.means) / seconds)


def _falling(schedule: Schedule, final_fraction: float, progress_remaining: float) -> float:
    """A learning rate that also falls linearly to a fraction of itself; the progress goes from 1 to 0."""
    return schedule(progress_remaining) * (final_fraction + (1 - final_fraction) * progress_remaining)


def _at_least_one(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, or None for all at once, got {value}")
    return value


def _not_negative(name: str, value: float) -> float:
    if not (value >= 0 and np.isfinite(value)):
        raise ValueError(f"{name} must be a number of at least 0, got {value}")
    return value


def _one_of(name: str, value: Any, *allowed: str) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value
