"""The transitions of a sampler as a table with one row for each denoising step.

For every sampler here the mean of p(x_{t-1} | x_t, z) is linear in x_t and in the network's output, whatever the
network predicts (noise, velocity or the clean sample):

    mean_i = sample_coef[i] * x_t + output_coef[i] * output,        std[i],        timesteps[i].

i counts denoising steps, 0 for the first (noisiest) one. A step with a std of 0 is deterministic: it has no density, so
nothing can be learned from which x_{t-1} it took.

Letters used for shapes: T denoising steps, B transitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from dpok_gym.diffusion import expand, reduce
from dpok_gym.utils.validation import check_choice, check_integer, shorten

#: What an error of the network is measured in.
ErrorSpace = Literal["output", "clean", "velocity"]


@dataclass(frozen=True)
class TransitionTable:
    """All denoising steps of one sampler, computed in float64 and kept in float32.

    Attributes:
        timesteps: (T,) what the network is told, falling: int64, or float32 for a flow-matching model.
        sample_coef: (T,) coefficient of x_t in the mean of x_{t-1}.
        output_coef: (T,) coefficient of the network's output in that mean.
        std: (T,) standard deviation of x_{t-1} in each dimension; 0 where the step is deterministic.
        signal: (T,) coefficient of x_0 in x_t.
        noise: (T,) coefficient of the noise: x_t = signal x_0 + noise eps.
        clean_sample_coef: (T,) coefficient of x_t in the predicted x_0.
        clean_output_coef: (T,) coefficient of the network's output in the predicted x_0.
    """

    timesteps: Tensor
    sample_coef: Tensor
    output_coef: Tensor
    std: Tensor
    signal: Tensor
    noise: Tensor
    clean_sample_coef: Tensor
    clean_output_coef: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> TransitionTable:
        """Returns the same table on another device."""
        return TransitionTable(*(getattr(self, field.name).to(device) for field in fields(self)))

    def mean(self, step: Tensor, sample: Tensor, output: Tensor) -> Tensor:
        """Returns the mean of p(x_{t-1} | x_t).

        Args:
            step: (B,) int64 in [0, T).
            sample: (B, ...) x_t.
            output: (B, ...) the network's output for it.

        Returns:
            (B, ...) float32.
        """
        sample_coef, output_coef = expand(self.sample_coef[step], sample), expand(self.output_coef[step], sample)
        return sample_coef * sample.float() + output_coef * output.float()

    def add_noise(self, step: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
        """Draws x_t from q(x_t | x_0).

        Args:
            step: (B,) int64 in [0, T).
            clean: (B, ...) x_0.
            noise: (B, ...) standard normal.

        Returns:
            (B, ...) x_t.
        """
        return expand(self.signal[step], clean) * clean + expand(self.noise[step], clean) * noise

    def target(self, step: Tensor, clean: Tensor, sample: Tensor) -> Tensor:
        """Returns the output of a perfect network: the noise, the velocity or x_0, whichever the model predicts.

        Args:
            step: (B,) int64 in [0, T).
            clean: (B, ...) x_0.
            sample: (B, ...) x_t, a sample of q(x_t | x_0).

        Returns:
            (B, ...).
        """
        from_sample = expand(self.clean_sample_coef[step], sample)
        from_output = expand(self.clean_output_coef[step], sample)
        return (clean - from_sample * sample) / from_output

    def output_weights(self) -> Tensor:
        """Returns std / |output_coef| of each step, (T,).

        The score of a step, as a function of the network's output, has a standard deviation of |output_coef| / std. So
        a policy gradient with these weights reaches the output with the same strength at every step. Without them, one
        late step has most of its variance: with Stable Diffusion's betas at T = 20 the last but one has 73 % (86 % if
        the network predicts the velocity), though little of the image is left to decide there. The weight of a
        deterministic step is 0.
        """
        return self.std / self.output_coef.abs()

    @property
    def stochastic(self) -> Tensor:
        """(T,) bool: whether a step draws x_{t-1} from a density. The others take the mean."""
        return self.std > 0

    @property
    def exploring(self) -> Tensor:
        """(T,) bool: whether the noise of a step is at least a tenth of the largest one. Deterministic steps explore
        nothing.

        With Stable Diffusion's betas, the last two steps explore nothing, whatever T is: their std is below 0.05. What
        they draw cannot be seen, but their KL can be huge. The last but one removes most of the noise that is left, so
        its |output_coef| / std is 3 to 8, and everywhere else at most 1.2. A KL goes with the square of that.
        """
        return self.stochastic & (self.std >= 0.1 * self.std.max())

    def error_scale(self, space: ErrorSpace) -> Tensor:
        """Returns by how much an error of the network's output counts in another space, (T,).

        Args:
            space: "output" for the output itself (1); "clean" for the x_0 that it predicts; "velocity" for the velocity
                that belongs to this x_0, of a variance-preserving diffusion or of flow matching.
        """
        check_choice("the space of errors", space, "output", "clean", "velocity")
        if space == "output":
            return torch.ones_like(self.noise)
        clean = self.clean_output_coef.abs()
        # x_0 = signal x_t - noise v, and for flow matching x_0 = x_t - noise v.
        return clean if space == "clean" else clean / self.noise

    def output_mse(self, step: Tensor, mean: Tensor, other_mean: Tensor) -> Tensor:
        """Returns the mean squared difference of the two network outputs that led to these means, (B,).

        Args:
            step: (B,) int64 in [0, T).
            mean: (B, ...).
            other_mean: (B, ...), of the same x_t.
        """
        return reduce(((mean - other_mean) / expand(self.output_coef[step], mean)).square(), "mean")


def eta_of_steps(eta: float, n_steps: int, sde_steps: Sequence[int] | None = None) -> Tensor:
    """Returns the eta of each denoising step, (T,) float64: 0, which is no noise, outside of the stochastic steps.

    Args:
        eta: amount of noise of the stochastic steps.
        n_steps: T.
        sde_steps: the first stochastic step, in [0, T), and the number of them, at least 1 (the window of MixGRPO and
            Flow-GRPO-Fast); None for all steps.

    Raises:
        ValueError: if the window is not within the T steps.
    """
    etas = torch.full((n_steps,), float(eta), dtype=torch.float64)
    if sde_steps is None:
        return etas
    if isinstance(sde_steps, str) or not isinstance(sde_steps, Sequence) or len(sde_steps) != 2:
        raise ValueError(
            f"sde_steps must be two integers, the first stochastic step and the number of them, got "
            f"{shorten(sde_steps)}"
        )
    first = check_integer("the first of sde_steps", sde_steps[0], minimum=0)
    end = first + check_integer("the number of sde_steps", sde_steps[1])
    if end > n_steps:
        raise ValueError(
            f"sde_steps={tuple(sde_steps)} ends after step {end - 1}, but the last of the {n_steps} denoising steps is "
            f"step {n_steps - 1}: begin earlier, or take fewer"
        )
    etas[:first] = etas[end:] = 0
    return etas
