"""Best of n, distilled: fine-tuning on the winners of a rejection sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.algorithms.forward_process import ForwardProcess
from agents.common.buffer import number_groups
from agents.common.policy import DenoisingPolicy
from dpok_gym.utils.validation import check_integer


class BestOfN(ForwardProcess):
    """Minimises E[ -log p_theta(x_0 | z) ] over the best of each n images of the pre-trained model.

    The same choice works without any training, at n times the cost of each image:
    ``evaluate(..., steering=BestOf(n))``.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        n: images of the same prompt that each winner is chosen from, at least 2. If a prompt's images are no multiple
            of n, those left over are one more group.
    """

    def __init__(
        self, policy: str | type[DenoisingPolicy] = "DenoisingPolicy", env: Any = None, *, n: int = 8, **kwargs: Any
    ) -> None:
        self.n = check_integer("n (or every image is the best)", n, minimum=2)
        super().__init__(policy, env, **kwargs)

    def image_weights(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """1 for winners, 0 for the others."""
        weights = torch.zeros_like(rewards)
        groups = number_groups(prompts).to(rewards.device)
        for group in groups.unique():
            # In the order in which they were drawn: n images in a row compete.
            for rows in torch.nonzero(groups == group).flatten().split(self.n):
                weights[rows[rewards[rows].argmax()]] = 1
        return weights
