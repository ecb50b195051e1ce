"""Best of n, distilled: fine-tuning on the winners of a rejection sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.supervised import Supervised, same_prompt


class BestOfN(Supervised):
    """Minimises E[ -log p_theta(x_0 | z) ] over the best of each n pictures of the pre-trained model.

    The same choice works without any training, at n times the cost of each picture:
    ``evaluate(..., best_of=n)``.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`.
        n: pictures of the same prompt that each winner is chosen from; what is left over of a prompt, or all of it if
            there are fewer, is one more group.
        **kwargs: further arguments of :class:`~agents.supervised.Supervised`.

    Raises:
        ValueError: if an argument is out of range, or the environment is no denoising environment.
    """

    def __init__(self, policy: Any = "DenoisingPolicy", env: Any = None, *, n: int = 8, **kwargs: Any) -> None:
        if n < 2:
            raise ValueError(f"n must be at least 2, or every picture is the best, got {n}")
        self.n = n
        super().__init__(policy, env, **kwargs)

    def picture_weights(self, rewards: Tensor, prompts: Tensor) -> Tensor:
        """1 for winners, 0 for the others."""
        weights = torch.zeros_like(rewards)
        groups = same_prompt(prompts)
        for group in groups.unique():
            for rows in torch.nonzero(groups == group).flatten().split(self.n):
                weights[rows[rewards[rows].argmax()]] = 1
        return weights
