"""RWR: reward-weighted regression (Peters & Schaal 2007; for diffusion, Lee et al. 2023 and Black et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from agents.supervised import Supervised, same_prompt
from dpok_gym.checks import positive


class RWR(Supervised):
    """Minimises E[ -w log p_theta(x_0 | z) ] over pictures of the pre-trained model, by the weights of DDPO's Sec. 4.1:

        w = exp(r / temperature) / Z,     or, sparse,     w = 1 if r is among the best of its prompt, else 0.

    Z is the mean over the pictures of the same prompt, so that easy prompts do not crowd out the others. This is one
    round of it; that paper also goes on to draw pictures with the model so trained, and to train on these.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: see :class:`~agents.on_policy.DenoisingAlgorithm`.
        temperature: in units of the reward; smaller takes the best pictures only, larger all alike.
        sparse_fraction: share of each prompt's pictures that get weight 1, in (0, 1]; None for exponential weights.
            Pictures that are as good as the last of them get it too.
        **kwargs: further arguments of :class:`~agents.supervised.Supervised`.

    Raises:
        ValueError: if an argument is out of range, or the environment is no denoising environment.
    """

    def __init__(
        self,
        policy: Any = "DenoisingPolicy",
        env: Any = None,
        *,
        temperature: float = 0.2,
        sparse_fraction: float | None = None,
        **kwargs: Any,
    ) -> None:
        if sparse_fraction is not None and not 0 < sparse_fraction <= 1:
            raise ValueError(f"sparse_fraction must lie in (0, 1], or be None, got {sparse_fraction}")
        self.temperature = positive("temperature", temperature)
        self.sparse_fraction = sparse_fraction
        super().__init__(policy, env, **kwargs)

    def picture_weights(self, rewards: Tensor, prompts: Tensor) -> Tensor:
        """See the class; the mean over each prompt's pictures is 1 with exponential weights."""
        weights = torch.zeros_like(rewards)
        groups = same_prompt(prompts)
        for group in groups.unique():
            rows = groups == group
            found = rewards[rows]
            if self.sparse_fraction is None:
                weights[rows] = torch.softmax(found / self.temperature, dim=0) * len(found)
            else:
                n_best = math.ceil(self.sparse_fraction * len(found))
                weights[rows] = (found >= found.topk(n_best).values[-1]).to(weights)
        return weights
