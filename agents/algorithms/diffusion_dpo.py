"""Diffusion-DPO: direct preference optimisation (Wallace et al., CVPR 2024), with the safeguard of Diffusion-SDPO."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any, Self

import torch
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import Tensor
from torch.nn import functional as F

from agents.common import losses
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.losses import Metrics
from agents.common.matching import choose_batch, draw_noise
from agents.common.monitor import TrainingWarning
from agents.common.pairs import NoisyPairs, Pairs, add_noise_to_pairs, best_and_worst, read_pairs
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import Purpose, make_generator
from dpok_gym.utils.validation import check_fraction, check_integer, check_path, check_positive, shorten


class DiffusionDPO(DenoisingAlgorithm):
    """Learns from pairs of images of which one is preferred, without a reward in between.

    Minimises, over the pairs, the denoising steps t and the noise eps (Eq. 14 of arXiv 2311.12908),

        E[ -log sigmoid( r_w - r_l ) ],      r = beta / 2 (e_pre - e),

    for the winner w and the loser l of a pair, with the same t and eps for both. e = || output - target ||^2 is the
    denoiser's squared error for the noisy image, a mean over the dimensions, and e_pre that of the pre-trained model.
    So r, the *implicit reward*, says how much better than the pre-trained model this one denoises the image. The output
    may be the noise, the velocity or x_0, whichever the model predicts. There is no guidance in the loss.

    The pairs come from one of two places:

    - With ``choices``, a file of people's choices, all from there. ``learn`` takes ``n_gradient_steps`` on them, and
      draws no image: ``total_timesteps``, the environment's reward and ``group_size`` do not matter. Choices of neither
      image, such as ties, are left out, as in the published code. Each image is encoded once.
    - Without, each iteration draws fresh images with the policy, pairs the image of the highest reward with that of
      the lowest in each group of ``group_size`` images for a prompt, and takes ``steps_per_iteration`` on these pairs.

    **Beta.** It is that of the published code, github.com/SalesforceAIResearch/DiffusionDPO: 2000 for Stable Diffusion
    1.5 and 5000 for XL in the paper, 5000 for both in the code. diffusers' script writes ``beta_dpo`` for beta / 2. As
    e is a mean over the D dimensions, the same strength needs a beta in proportion to D: 5000 for the 16,384 dimensions
    of Stable Diffusion is 80 for 256. Online, Flow-GRPO's code has 100.

    **Where it goes.** If people choose with the probability sigmoid(R_w - R_l), the loss of the likelihoods themselves
    is lowest at p_pre exp(R / b), with b in proportion to beta. The errors at single noise levels stand for them, so
    this holds roughly. With few pairs, the loss can fall further for as long as the loser's error rises: soon both
    images get worse (``train/winner_reward`` below 0), and so do all others. Then take fewer steps, a larger beta, or
    ``sdpo``.

    **Diffusion-SDPO** (arXiv 2511.03317) multiplies the gradient of the loser's error by the largest lambda in [0, 1]
    at which a step does not raise the winner's error, see :func:`agents.common.losses.safe_loser_scale`. The published
    code has one lambda for all pairs on a device, and this one for each pair.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: a denoising environment, see :class:`~agents.common.algorithm.DenoisingAlgorithm`.
        choices: file of choices, as ``dpok label`` writes it; None for pairs of fresh images by the reward.
        beta: above 0; a larger one stays nearer to the pre-trained model. It goes with the size of a latent, see above.
        sdpo: scale the loser's gradient so that the winner's error cannot rise.
        sdpo_mu: share of its own gradient that the winner keeps at least, in [0, 1]; 0 only forbids that its error
            rises. The authors train with 0.6 to 0.9. With ``sdpo`` only.
        group_size: images in a row that are drawn for the same prompt, at least 2; it divides ``images_per_iteration``.
            Larger groups have clearer pairs, and fewer. Without ``choices`` only.
        n_gradient_steps: optimiser steps in all, at least 1. With ``choices`` only.
        steps_per_iteration: optimiser steps between two rows of the log, and without ``choices`` between two drawings;
            at least 1.
        batch_size: pairs of an optimiser step, chosen at random, so that one may come twice; at least 1. None for all
            there are, each once.

    Raises:
        ValueError: if an argument is out of range, or an iteration without ``choices`` has no whole number of groups.
    """

    states_of_an_element = 2

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: Any = None,
        *,
        choices: str | os.PathLike[str] | None = None,
        beta: float = 2000.0,
        sdpo: bool = False,
        sdpo_mu: float = 0.0,
        group_size: int = 8,
        n_gradient_steps: int = 1000,
        steps_per_iteration: int = 50,
        batch_size: int | None = 64,
        **kwargs: Any,
    ) -> None:
        self.choices = None if choices is None else check_path("the file of choices", choices)
        self.beta = check_positive("beta", beta)
        self.sdpo = sdpo
        self.sdpo_mu = check_fraction("sdpo_mu", sdpo_mu)
        if sdpo_mu and not sdpo:
            raise ValueError(f"sdpo_mu={sdpo_mu} has no effect without the safeguard: set sdpo=True, or leave it out")
        self.group_size = check_integer("group_size", group_size, minimum=2)
        self.n_gradient_steps = check_integer("n_gradient_steps", n_gradient_steps)
        self.steps_per_iteration = check_integer("steps_per_iteration", steps_per_iteration)
        self.draws_images = choices is None
        self._pairs: Pairs | None = None
        #: Of the choices that the training began with; None before it began.
        self._digest: str | None = None
        super().__init__(policy, env, batch_size=batch_size, **kwargs)

    def check_setup(self) -> None:
        """Checks that an iteration has whole groups, if it draws images: the rows of a rollout give the groups."""
        super().check_setup()
        if self.draws_images:
            self.check_whole_groups()

    def prepare(self) -> str:
        """Reads the choices; errors as :func:`agents.common.pairs.read_pairs`, and if they are not those of before."""
        if self.choices is None:
            return super().prepare()
        is_known, pairs = self._pairs is not None, self.pairs()
        if not is_known and self.env is not None and set(pairs.prompts).isdisjoint(self.denoising_env.prompts.train):
            warnings.warn(
                f"the choices are for other prompts, such as {shorten(pairs.prompts[0])}, than those that the model is "
                "measured with; give the environment the prompts of the choices",
                TrainingWarning,
                stacklevel=2,
            )
        n_prompts = len(set(pairs.prompts))
        return (
            f"{len(pairs)} choices between {len(pairs.latents)} images, for {n_prompts} prompt{'s' * (n_prompts > 1)}; "
            "no image is drawn in training"
        )

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Draws and learns in turn, or with ``choices`` takes the optimiser steps that are left; arguments as SB3's."""
        if self.choices is None:
            return super().learn(
                total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
            )
        if reset_num_timesteps:
            self._n_updates, self._digest = 0, None
        name = tb_log_name or type(self).__name__
        total, callback = self._setup_learn(total_timesteps, callback, reset_num_timesteps, name, progress_bar)
        callback.on_training_start(locals(), globals())
        while not self.is_done(total):
            n_pairs = self._n_steps_now * (self.batch_size or len(self.pairs()))
            self._fit_iteration(callback, log_interval, 2 * n_pairs)
        callback.on_training_end()
        return self

    def is_done(self, total_timesteps: int) -> bool:
        """Returns whether all images are drawn, or with ``choices`` all optimiser steps taken."""
        return super().is_done(total_timesteps) if self.draws_images else self.n_fitted >= self.n_gradient_steps

    def count_optimizer_steps(self, total_images: int) -> int:
        """Returns the optimiser steps of a training: those of its iterations, or with ``choices`` all it is to take."""
        if not self.draws_images:
            return self.n_gradient_steps
        return self.steps_per_iteration * math.ceil(total_images / (self.images_per_iteration or self.n_envs))

    @property
    def n_fitted(self) -> int:
        """Optimiser steps taken on the choices; 0 without them."""
        return 0 if self.draws_images else self._n_updates

    def train(self) -> None:
        """Takes the optimiser steps of an iteration, each on random pairs with random noise."""
        pairs = self.pairs()
        for _ in range(self._n_steps_now if len(pairs) else 0):
            if not self.draws_images:
                self._update_current_progress_remaining(self.n_fitted + 1, self.n_gradient_steps)
                self._update_learning_rate(self.policy.optimizer)
            rng = make_generator(self.run_seed, Purpose.FIT, self._n_updates)
            chosen = choose_batch(len(pairs), self.batch_size, rng)
            step, noise = draw_noise(self.process, len(chosen), rng)
            batch = add_noise_to_pairs(self.process, pairs, chosen, step, noise)
            with self.optimizer_step():
                self.backward(batch.share())

    @property
    def _n_steps_now(self) -> int:
        left = self.steps_per_iteration if self.draws_images else self.n_gradient_steps - self.n_fitted
        return min(self.steps_per_iteration, left)

    def loss(self, batch: NoisyPairs) -> tuple[Tensor, Metrics]:
        """-log sigmoid( beta / 2 [ (e_pre - e)_w - (e_pre - e)_l ] ) of each pair, (B,)."""
        target = batch.target.flatten(0, 1)
        output = self.policy.predict_output(batch.state, guidance_scale=1.0)
        # The pre-trained model is fixed.
        with torch.no_grad():
            reference = self.policy.predict_output(batch.state, reference=True, guidance_scale=1.0)
        error = losses.denoising_loss(output, target).unflatten(0, (-1, 2))  # (B, 2): of the winner and of the loser
        reference_error = losses.denoising_loss(reference, target).unflatten(0, (-1, 2))
        metrics = {}
        if self.sdpo:
            winner, loser = (output - target).detach().unflatten(0, (-1, 2)).unbind(1)
            scale = losses.safe_loser_scale(winner, loser, self.sdpo_mu)
            # The value stays; the gradient is that of scale times the loser's error.
            error = torch.stack([error[:, 0], losses.scale_gradient(error[:, 1], scale)], dim=1)
            metrics["loser_scale"] = scale
        winner_reward, loser_reward = (self.beta / 2 * (reference_error - error)).unbind(1)
        margin = winner_reward - loser_reward
        loss = -F.logsigmoid(margin)
        metrics |= {
            "preference_loss": loss,
            "winner_reward": winner_reward,
            "loser_reward": loser_reward,
            "reward_margin": margin,
            # Before the first step all margins are 0: a coin is right in half of the cases.
            "implicit_accuracy": (margin.sign() + 1) / 2,
            "winner_error": error[:, 0],
            "loser_error": error[:, 1],
        }
        return loss, {name: values.detach() for name, values in metrics.items()}

    def pairs(self) -> Pairs:
        """Returns the pairs that are learned from: of the choices, or of the images drawn last.

        Raises:
            ValueError: if the choices are not those that this training began with; further errors as
                :func:`agents.common.pairs.read_pairs`.
        """
        if self.choices is None:
            buffer = self.rollout_buffer
            latents = buffer.gather(buffer.latents[:, -1])
            return best_and_worst(latents, buffer.final_rewards, buffer.valid, buffer.prompts, self.group_size)
        if self._pairs is None:
            self._pairs = read_pairs(self.choices, self.process.model)
        if self._digest not in (None, self._pairs.digest):
            raise ValueError(
                f"the choices in {str(self.choices)!r} are not those that this training began with: bring them back, "
                "or train anew"
            )
        self._digest = self._pairs.digest
        return self._pairs

    def algorithm_state(self) -> dict[str, Any]:
        """Adds a digest of the choices, which are in no state themselves."""
        return super().algorithm_state() | {"choices_digest": self._digest}

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with the choices that the digest is of."""
        super().load_algorithm_state(state)
        self._digest = state["choices_digest"]
