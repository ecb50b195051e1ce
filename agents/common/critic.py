"""The value functions: the reward that a half-denoised image leads to, on average.

:class:`ValueNetwork` is the paper's, :class:`RewardCritic` the one that learns from a few hundred images.

Letters used for shapes: N images of a rollout, M images that are kept, T denoising steps, B states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from agents.common.buffer import TrajectoryBuffer
from dpok_gym.judging import Outcome
from dpok_gym.models.base import Conditioning
from dpok_gym.samplers import DenoisingProcess, State
from dpok_gym.utils.validation import check_fraction, check_integer, check_positive

CriticKind = Literal["network", "reward"]

#: Most numbers of a latent that :class:`ValueNetwork` reads: those of Stable Diffusion 1.5, for which it was made.
MAX_LATENT_DIMS = 4 * 64 * 64

#: Most images that :class:`RewardCritic` keeps: its regression compares each with each, which takes 0.4 GB for these.
MAX_IMAGES = 4096


class ValueNetwork(nn.Module):
    """V(x_t, t, z): the reward that a half-denoised image and its prompt lead to, on average.

    The network of DPOK (Fan et al. 2023, App. A.5): a multilayer perceptron on the latent and the prompt's features.
    Each hidden layer is multiplied by gains that are learned for each denoising step.

    The network does not grow with the latent: one of more than :data:`MAX_LATENT_DIMS` numbers is averaged over squares
    first, the smallest that are large enough. That keeps what is where, and averages noise out. For FLUX's 16 x 128 x
    128 numbers they are squares of 4 x 4, and the network has 4.5 million weights and not 67.

    Args:
        latent_shape: (C, h, w).
        text_width: F, features of a prompt.
        num_inference_steps: T.
        hidden: width of each of the three hidden layers.
    """

    def __init__(
        self, latent_shape: Sequence[int], text_width: int, num_inference_steps: int, hidden: int = 256
    ) -> None:
        super().__init__()
        channels, *sides = latent_shape

        def count(square: int) -> int:
            return channels * math.prod(-(-side // square) for side in sides)

        squares = range(1, max(sides) + 1)
        self.square = next((square for square in squares if count(square) <= MAX_LATENT_DIMS), max(sides))
        widths = [count(self.square) + text_width, hidden, hidden, hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.gains = nn.ModuleList()
        for _ in self.layers:
            self.gains.append(nn.Embedding.from_pretrained(torch.rand(num_inference_steps, hidden), freeze=False))
        self.head = nn.Linear(hidden, 1)
        # V is 0 at first: random values would add more noise to the first advantages than small rewards have.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Values (B,) of latents (B, C, h, w), denoising steps (B,) and prompt features (B, F)."""
        latents = latents.float()
        if self.square > 1:
            latents = functional.avg_pool2d(latents, self.square, ceil_mode=True)
        hidden = torch.cat([latents.flatten(1), text.float()], dim=1)
        for layer, gain in zip(self.layers, self.gains, strict=True):
            hidden = torch.relu(layer(hidden)) * gain(step)
        return self.head(hidden).squeeze(1)


class RewardCritic:
    r"""V(x_t, t, z) from the reward of the image that the denoiser predicts.

    At x_t the denoiser predicts the finished latent, x0(x_t) (Ho et al. 2020, Eq. 15). The reward q_t = r(x0(x_t), z)
    of that image is a good guess of the final reward once the noise is low (Li et al. 2024, SVDD, use it as the value).
    For each step this critic learns how far to trust the guess, and how good each prompt's images are:

        V(x_t, t, z) = a_t + b_t q_t + c_{t,z}.

    That is a ridge regression with a closed form: nothing but a_t is free of a penalty, so V is the mean reward where
    nothing else is known. The reward must be cheap enough to be asked again: one decoding and one reward for each image
    and each step that is looked at.

    Args:
        process: the denoising process of the policy.
        look_fraction: share of the denoising steps, the last ones, at which the predicted image is rewarded, in
            [0, 1]. 0 leaves only the means of the prompts. Early predictions are too blurred to say anything.
        n_rollouts: latest rollouts that are kept, at least 1. An image takes 8 T + 4 F + 8 bytes for F features of a
            prompt: 0.2 MB for 640 images of the embedded model in 10 steps, 2.2 MB with Stable Diffusion 1.5 in 50.
            The regression takes 25 M^2 bytes for a moment, 10 MB for 640 images. Of more than :data:`MAX_IMAGES`, the
            oldest are left out.
        forgetting: weight of a rollout beside the one after it, in (0, 1]. Less follows a policy that changes fast;
            more is less noisy.
        prompt_strength: images of a prompt that count as much as the belief that all prompts are alike, above 0.

    Attributes:
        judge: gives the outcome of latents and prompts, as :meth:`DenoisingVectorEnv.judge` does.
    """

    def __init__(
        self,
        process: DenoisingProcess,
        look_fraction: float = 0.4,
        n_rollouts: int = 10,
        forgetting: float = 0.8,
        prompt_strength: float = 4.0,
    ) -> None:
        n_steps = process.num_inference_steps
        n_looks = math.ceil(check_fraction("look_fraction", look_fraction) * n_steps)
        self.n_rollouts = check_integer("n_rollouts", n_rollouts)
        check_fraction("forgetting (1 forgets nothing)", forgetting, zero=False)
        self.forgetting = forgetting
        self.prompt_strength = check_positive("prompt_strength", prompt_strength)
        self.process = process
        self.looks = range(n_steps - n_looks, n_steps)
        self.judge: Callable[[Tensor, Sequence[str]], Outcome] | None = None
        self._age = torch.zeros(0, dtype=torch.int64)
        self._guesses, self._returns = torch.zeros(2, 0, n_steps).unbind()
        self._text = torch.zeros(0, process.model.text_width)
        self._latest, self._latest_text = torch.zeros(0, n_steps), torch.zeros(0, process.model.text_width)
        self._regression: Regression | None = None

    def values(self, buffer: TrajectoryBuffer) -> Tensor:
        """V of all states of a rollout, (N, T); in the first rollout, the mean of its rewards.

        The guesses are remembered for :meth:`fit`.
        """
        steps = torch.zeros(len(buffer.own), dtype=torch.int64, device=buffer.means.device)
        guesses = [
            self._guess(buffer.latents[:, index], steps + index, buffer.means[:, index], buffer.own_prompts)
            for index in range(buffer.num_inference_steps)
        ]
        # Each rank asks for the rewards of its own images' predictions; all solve the same regression.
        self._latest = buffer.gather(torch.stack(guesses, dim=1).cpu())
        self._latest_text = buffer.gather(self._text_of(buffer.conditioning))
        if self._regression is None:
            mean = buffer.final_rewards[buffer.valid].mean() if buffer.valid.any() else 0.0
            return torch.zeros_like(buffer.values) + mean
        return self._regression(self._latest, self._latest_text).to(buffer.values)

    def state_values(self, state: State, mean: Tensor, prompts: Sequence[str]) -> Tensor:
        """V of B states, (B,); 0 before the first rollout.

        Args:
            state: B states.
            mean: (B, C, h, w) of p(x_{t-1} | x_t, z), which holds the predicted x_0.
            prompts: B texts.
        """
        if self._regression is None:
            return torch.zeros(len(mean), device=mean.device)
        guesses = self._guess(state.latents, state.step, mean, prompts).cpu()
        n_steps = self.process.num_inference_steps
        values = self._regression(guesses[:, None].expand(-1, n_steps), self._text_of(state.conditioning))
        return values[torch.arange(len(values)), state.step.cpu()].to(mean)

    def fit(self, buffer: TrajectoryBuffer) -> None:
        """Adds a rollout, whose :meth:`values` have been asked for last, and solves the regression anew.

        Raises:
            ValueError: if they have not.
        """
        if len(self._latest) != len(buffer):
            raise ValueError("ask for the values() of a rollout before fit(): they remember the predictions' rewards")
        valid = buffer.valid.cpu()
        new = int(valid.sum())
        if not new:
            return
        kept = self._age < self.n_rollouts - 1

        def add(old: Tensor, latest: Tensor) -> Tensor:
            return torch.cat([old[kept], latest])[-MAX_IMAGES:]

        self._text = add(self._text, self._latest_text[valid])
        self._age = add(self._age + 1, torch.zeros(new, dtype=torch.int64))
        self._guesses = add(self._guesses, self._latest[valid])
        self._returns = add(self._returns, buffer.returns.cpu()[valid])
        self._solve()

    def _solve(self) -> None:
        weights = self.forgetting ** self._age.double()
        self._regression = Regression(self._guesses, self._returns, self._text, weights, self.prompt_strength)

    def _text_of(self, conditioning: Conditioning) -> Tensor:
        """Features of the prompts, (N, F) on the CPU, where the small regression is solved."""
        return self.process.model.text_features(conditioning).detach().float().cpu()

    def _guess(self, latents: Tensor, step: Tensor, mean: Tensor, prompts: Sequence[str]) -> Tensor:
        """q_t of B states, (B,); nan where the step is not looked at or the reward is not valid."""
        guesses = torch.full((len(latents),), math.nan, device=latents.device)
        rows = torch.nonzero(step >= self.looks.start).flatten()
        if not len(rows):
            return guesses
        if self.judge is None:
            raise ValueError(
                "this critic asks for the rewards of predicted images: set policy.critic.judge to the judge() of a "
                "denoising environment, or choose the critic 'network'"
            )
        clean = self.process.predicted_clean(State(latents[rows], step[rows], {}), mean[rows])
        rewards = self.judge(clean, [prompts[row] for row in rows.tolist()]).rewards
        total = rewards.total.to(guesses)
        guesses[rows] = torch.where(rewards.valid.to(total.device), total, math.nan)
        return guesses

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the rollouts that are kept; what was learned follows from them."""
        return {"age": self._age, "guesses": self._guesses, "returns": self._returns, "text": self._text}

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Puts back what :meth:`state_dict` returned; ``strict`` has no effect, as all of it is needed.

        Raises:
            RuntimeError: if it is of another critic or of another number of denoising steps.
        """
        expected = {name: value.shape[1:] for name, value in self.state_dict().items()}
        if {name: value.shape[1:] for name, value in state.items()} != expected:
            raise RuntimeError("it is not the state of a RewardCritic of this model and number of denoising steps")
        self._age, self._guesses, self._returns, self._text = (state[name].cpu() for name in expected)
        self._regression = None
        if len(self._age):
            self._solve()


class Regression:
    """The ridge regression of :class:`RewardCritic`, for all denoising steps.

    With weights w_i and guesses q scaled to mean 0 and variance 1, it minimises at each step

        sum_i w_i (y_i - a - b q_i - c_{z_i})^2  +  b^2  +  strength * |c|^2,

    where |c| is the norm of the kernel of :meth:`_kernel`: each prompt has a term of its own, and a part that is linear
    in the text's features and so holds for prompts that were never seen.

    Args:
        guesses: (M, T), nan where there is none.
        returns: (M, T) y.
        text: (M, F) features of the prompts.
        weights: (M,) above 0.
        strength: penalty of the prompts' terms, above 0.
    """

    def __init__(self, guesses: Tensor, returns: Tensor, text: Tensor, weights: Tensor, strength: float) -> None:
        self._strength, self._text = strength, text.double()
        self._text_mean = self._text.mean(dim=0)
        # A single prompt has features without spread; its kernel is then the prompt's own term alone.
        self._text_scale = (self._text - self._text_mean).square().mean().sqrt().clamp(min=1e-6)
        w = weights[:, None] * guesses.isfinite()
        total = w.sum(dim=0).clamp(min=1e-9)  # 0 at steps that are not looked at
        q = guesses.nan_to_num().double()
        self._centre = (w * q).sum(dim=0) / total
        self._scale = ((w * (q - self._centre).square()).sum(dim=0) / total).sqrt().clamp(min=1e-9)
        # The prompts' terms are left to the covariance of the errors, C = kernel / strength + 1 / w, which is the same
        # at all steps. What remains is a regression on two columns (generalised least squares).
        covariance = self._kernel(self._text) / strength + (1 / weights).diag()
        q, y = self._standardise(guesses), returns.double()
        solved = torch.linalg.solve(covariance, torch.cat([torch.ones_like(q[:, :1]), q, y], dim=1))
        inverse_1, (inverse_q, inverse_y) = solved[:, :1], solved[:, 1:].chunk(2, dim=1)
        aa, ab, bb = inverse_1.sum(), inverse_q.sum(dim=0), (q * inverse_q).sum(dim=0) + 1  # + 1: the penalty of b
        ay, by = inverse_y.sum(dim=0), (q * inverse_y).sum(dim=0)
        self._slope = (by - ab * ay / aa) / (bb - ab.square() / aa)
        self._intercept = (ay - ab * self._slope) / aa
        self._dual = inverse_y - inverse_1 * self._intercept - inverse_q * self._slope

    def _kernel(self, text: Tensor) -> Tensor:
        """Likeness of prompts (N, F) to the kept ones: that of their features, and 1 more if they are equal; (N, M)."""
        features, kept = (text - self._text_mean) / self._text_scale, (self._text - self._text_mean) / self._text_scale
        equal = torch.cdist(text, self._text, p=torch.inf, compute_mode="donot_use_mm_for_euclid_dist") == 0
        return features @ kept.T / text.shape[1] + equal

    def _standardise(self, guesses: Tensor) -> Tensor:
        return ((guesses.double() - self._centre) / self._scale).nan_to_num()

    def __call__(self, guesses: Tensor, text: Tensor) -> Tensor:
        """Returns the values (N, T) of guesses (N, T) and prompts' features (N, F)."""
        of_prompt = self._kernel(text.double()) @ self._dual / self._strength
        return (self._intercept + self._slope * self._standardise(guesses) + of_prompt).float()
