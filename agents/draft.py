"""DRaFT: direct reward fine-tuning (Clark et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.on_policy import DenoisingAlgorithm, Found
from agents.rollout_buffer import Batch
from dpok_gym import diffusion


@dataclass
class LastSteps(Batch):
    """The ends of trajectories: latents (B, C, h, w) K steps before x_0, noise (B, K, C, h, w) from there on.

    ``prompt`` is (B, L), ``index`` (B,) the number of the picture in the rollout.
    """

    latents: Tensor
    noise: Tensor
    prompt: Tensor
    index: Tensor


class DRaFT(DenoisingAlgorithm):
    """Minimises -E[ r(x_0, z) ] by the gradient of the reward itself, through the last K denoising steps (DRaFT-K).

    An upper reference for rewards whose gradient is known: algorithms that see nothing but the rewards' values cannot
    be expected to learn from fewer pictures. Nothing keeps the model near the pre-trained one.

    Each rollout's pictures are drawn again with the same noise, x_{t-1} = mean_theta(x_t) + std_t noise_t, from the
    state K steps before the end, now with gradients; then decoded and judged with gradients too.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`; its reward must be differentiable, as
            :class:`~dpok_gym.rewards.preference.PreferenceReward` is.
        n_last_steps: K. The late steps alone decide little of what a picture shows; each more costs time and memory.
        batch_size: pictures in each optimiser step; None for the whole rollout.
        micro_batch_size: most pictures at a time in a backward pass, which holds what the decoder and the reward
            computed too.
        **kwargs: further arguments of :class:`~agents.on_policy.DenoisingAlgorithm`.

    Raises:
        ValueError: if an argument is out of range, the reward is not differentiable, or the environment is none that a
            denoising policy can act in.
    """

    def __init__(
        self,
        policy: Any = "DenoisingPolicy",
        env: Any = None,
        *,
        n_last_steps: int = 1,
        micro_batch_size: Any = 16,
        **kwargs: Any,
    ) -> None:
        self.n_last_steps = n_last_steps
        super().__init__(policy, env, micro_batch_size=micro_batch_size, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        n_denoising = len(self.policy.schedule)
        if not 1 <= self.n_last_steps <= n_denoising:
            raise ValueError(
                f"n_last_steps must be from 1 to the {n_denoising} denoising steps, got {self.n_last_steps}"
            )
        if self.env is not None:
            self.env.get_attr("reward")[0].check_differentiable()

    def train(self) -> None:
        """One pass over the rollout's pictures."""
        buffer, first = self.rollout_buffer, len(self.policy.schedule) - self.n_last_steps
        rows = torch.nonzero(buffer.valid).flatten()
        rows = rows[torch.randperm(len(rows)).to(rows.device)]
        steps, std = range(first, len(self.policy.schedule)), self.policy.schedule.std
        noise = [
            diffusion.noise_of(buffer.latents[rows, t + 1], buffer.means[rows, t], std[t].expand(len(rows)))
            for t in steps
        ]
        ends = LastSteps(buffer.latents[rows, first], torch.stack(noise, dim=1), buffer.prompt[rows], rows)
        with self._update(len(rows)) as found:
            for batch in ends.split(self.batch_size):
                self._take_step(batch, found)

    def _loss(self, part: LastSteps, reference: Any, found: Found) -> Tensor:
        """-r(x_0, z) of each picture, (B,)."""
        latents = part.latents
        for step, noise in enumerate(part.noise.unbind(dim=1), len(self.policy.schedule) - self.n_last_steps):
            observation = {"latent": latents, "step": torch.full_like(part.index, step), "prompt": part.prompt}
            mean, std = self.policy.transition(observation)
            latents, _ = diffusion.sample_with_log_prob(mean, std, noise)
        assert self.env is not None
        texts = [self.rollout_buffer.texts[i] for i in part.index.tolist()]
        reward = self.env.get_attr("reward")[0].differentiable(self.policy.model.decode(latents), texts)
        found["reward"].append(reward.detach())
        return -reward.to(latents.device)
