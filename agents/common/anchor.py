"""The anchor: images of the pre-trained model on which the policy keeps the loss that it was trained with.

DDRL (Ye et al. 2025) holds a policy near the data by adding the ordinary diffusion loss to the reward's: the forward KL
of data and policy, up to weights and a constant. A KL on the policy's own images sees what the policy draws; this one
sees what it no longer draws. The pre-trained model's own images stand for the data here, as the paper allows.

Letters used for shapes: N images, B of them in a batch, C x h x w a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agents.common import distributed
from agents.common.matching import NoisyImages, add_noise, draw_noise, encode_distinct
from agents.common.randomness import ImageNoise, Purpose, make_generator

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm


@dataclass(frozen=True)
class Anchor:
    """Images of the pre-trained model.

    They are functions of the run's seed, so they are drawn again and not saved.

    Attributes:
        latents: (N, C, h, w) x_0.
        prompts: the N prompts.
    """

    latents: Tensor
    prompts: list[str]

    @classmethod
    @torch.no_grad()
    def draw(cls, agent: DenoisingAlgorithm, n_images: int) -> Anchor:
        """Draws images for the prompts of the agent's environment, as many side by side as in a rollout."""
        process, reference = agent.process, agent.policy.reference_transition
        # As many images on every rank, as they may have to call the model together; those beyond the last are left out.
        own, largest = distributed.share(n_images), -(-n_images // distributed.count())
        end = own.start + largest
        generators = [make_generator(agent.run_seed, Purpose.ANCHOR, image) for image in range(max(n_images, end))]
        # The prompt of an image, its x_T and its steps' noise come from one generator, one after the other.
        prompts = [agent.denoising_env.prompts.sample(generator, 1)[0] for generator in generators]
        parts = []
        for first in range(own.start, end, agent.n_envs):
            rows = slice(first, min(first + agent.n_envs, end))
            noise = ImageNoise(generators[rows], generators[rows], process.model.latent_shape, process.model.device)
            latents = noise.initial_latents()
            for step in process.denoise(latents, process.encode(prompts[rows]), noise, reference):
                latents = step.next_latents
            parts.append(latents)
        return cls(distributed.gather(torch.cat(parts)[: len(own)], n_images), prompts[:n_images])

    def batch(self, agent: DenoisingAlgorithm) -> NoisyImages:
        """Returns some of the images, with noise, for the agent's next optimiser step."""
        rng = make_generator(agent.run_seed, Purpose.ANCHOR_BATCHES, agent._n_updates)
        rows = rng.permutation(len(self.prompts))[: agent.batch_size]
        latents = self.latents[torch.from_numpy(rows).to(self.latents.device)]
        prompts = [self.prompts[row] for row in rows]
        step, noise = draw_noise(agent.process, len(rows), rng)
        weight = torch.ones(len(rows), device=latents.device)
        return add_noise(agent.process, latents, step, noise, weight, *encode_distinct(agent.process, prompts))
