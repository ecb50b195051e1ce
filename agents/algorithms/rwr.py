"""RWR: reward-weighted regression (Peters & Schaal 2007; for diffusion, Lee et al. 2023 and Black et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from agents.algorithms.forward_process import ForwardProcess
from agents.common.buffer import number_groups
from agents.common.policy import DenoisingPolicy
from dpok_gym.utils.validation import check_fraction, check_positive


class RWR(ForwardProcess):
    """Fine-tunes on images of the pre-trained model, weighted by the exponential of their reward.

    It minimises E[ -w log p_theta(x_0 | z) ] with the weights of DDPO's Sec. 4.1:

        w = exp(r / temperature) / Z,     or, sparse,     w = 1 if r is among the best of its prompt, else 0.

    Z is the mean over the images of the same prompt, so that easy prompts do not crowd out the others. This is one
    round; the paper goes on to draw images with the model so trained, and to train on these.

    The paper's code multiplies rewards by its "temperature" of 1/5, so its weights are exp(0.2 r): the default here, a
    temperature of 5. Rewards between 0 and 1 need a smaller one, or all weights are nearly alike.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        temperature: in units of the reward, above 0; a small one takes the best images only, a large one all alike.
        sparse_fraction: share of each prompt's images that get weight 1, in (0, 1]; None for exponential weights.
            Images that are as good as the last of them get it too.
    """

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        temperature: float = 5.0,
        sparse_fraction: float | None = None,
        **kwargs: Any,
    ) -> None:
        if sparse_fraction is not None:
            check_fraction("sparse_fraction (unless None)", sparse_fraction, zero=False)
        self.temperature = check_positive("temperature", temperature)
        self.sparse_fraction = sparse_fraction
        super().__init__(policy, env, **kwargs)

    def image_weights(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """Exponential weights with a mean of 1 over each prompt's images, or 1 for the best ones."""
        weights = torch.zeros_like(rewards)
        groups = number_groups(prompts).to(rewards.device)
        for group in groups.unique():
            rows = groups == group
            of_prompt = rewards[rows]
            if self.sparse_fraction is None:
                # softmax is exp(r / temperature) over its sum; times the number of images, the mean weight is 1.
                weights[rows] = torch.softmax(of_prompt / self.temperature, dim=0) * len(of_prompt)
            else:
                n_best = math.ceil(self.sparse_fraction * len(of_prompt))
                # Ties with the last winner win too, so that the order of drawing decides nothing.
                weights[rows] = (of_prompt >= of_prompt.topk(n_best).values[-1]).to(weights)
        return weights
