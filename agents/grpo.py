"""GRPO: group relative policy optimisation on the denoising steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from agents.on_policy import Found
from agents.policy_gradient import PolicyGradient
from agents.rollout_buffer import Transitions
from dpok_gym.checks import not_negative


class GRPO(PolicyGradient):
    """Policy gradient with pictures compared in groups of the same prompt, and KL to the pre-trained model.

    Minimises, as DanceGRPO (Xue et al. 2025, Eq. 5 and 6) and Flow-GRPO (Liu et al. 2025, Eq. 4 and 5) do,

        E[ sum_t  -A rho_t  +  beta KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ],

    rho_t the clipped ratio of the new to the old density, A = (r - mean) / std over the picture's group.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`; its number of environments must be a multiple of the
            group's size.
        group_size: pictures of each prompt; more tell their mean and spread better, fewer leave room for more prompts.
        same_noise: whether the pictures of a group start from the same x_T, as in DanceGRPO; they differ less then.
        kl_coef: beta, per nat. 0 trains without regularisation (and saves the pre-trained model's pass).
        **kwargs: further arguments of :class:`~agents.policy_gradient.PolicyGradient`.

    Raises:
        ValueError: if an argument is out of range, groups do not fit into the environments, or the environment is none
            that a denoising policy can act in.
    """

    def __init__(
        self,
        policy: Any = "DenoisingPolicy",
        env: Any = None,
        *,
        group_size: int = 16,
        same_noise: bool = False,
        kl_coef: float = 0.01,
        **kwargs: Any,
    ) -> None:
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2, to compare a picture with its group, got {group_size}")
        self.group_size = group_size
        self.same_noise = same_noise
        self.kl_coef = not_negative("kl_coef", kl_coef)
        super().__init__(policy, env, **kwargs)

    def _setup_model(self) -> None:
        if self.n_envs % self.group_size:
            raise ValueError(
                f"the {self.n_envs} environments cannot be split into groups of {self.group_size}; choose group_size "
                "so that it divides their number"
            )
        super()._setup_model()

    def _begin_episodes(self, env: VecEnv, first: bool) -> None:
        """The same prompt, and noise if so wished, for each group of environments."""
        rng = np.random.default_rng(int(torch.randint(2**62, ())))  # torch's generator is saved with the agent
        options: list[dict[str, Any]] = []
        for prompt in env.get_attr("prompts")[0].sample(rng, env.num_envs // self.group_size):
            option = {"prompt": prompt}
            if self.same_noise:
                option["latent"] = rng.standard_normal(self.policy.model.latent_shape, np.float32)
            options += [option] * self.group_size
        env.set_options(options)
        self._last_obs = env.reset()  # type: ignore[assignment]

    def _advantages(self, rewards: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
        members = nn.functional.one_hot(rows // self.group_size).to(rewards)
        members = members[:, members.any(dim=0)]  # a group may have no valid reward
        centred = rewards - members @ _mean(rewards, members)
        return centred / (members @ _mean(centred.square(), members).sqrt() + 1e-6)

    def _loss(self, part: Transitions, reference: Any, found: Found) -> Tensor:
        """-A rho + beta KL of each transition, (B,)."""
        mean, std = self.policy.transition(part.observation)
        loss = self._policy_loss(part, mean, std, found)
        if reference is not None:
            loss = loss + self.kl_coef * self._kl(part, mean, reference, std, found) / self._dims
        return part.weight * loss

    def _step_importance(self, output_weights: Tensor) -> Tensor:
        return (output_weights + 1) / 2 if self.kl_coef else output_weights  # half for the reward, half for the KL

    def _reference(self, part: Transitions) -> Tensor | None:
        return self._pretrained_means(part.observation) if self.kl_coef else None


def _mean(values: Tensor, members: Tensor) -> Tensor:
    """The mean of (N,) values in each of the groups of (N, n_groups) members, (n_groups,)."""
    return values @ members / members.sum(dim=0)
