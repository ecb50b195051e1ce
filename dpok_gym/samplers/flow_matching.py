"""The transition tables of flow-matching models (rectified flow): Stable Diffusion 3, FLUX, Sana and their kin.

The network predicts the velocity v = eps - x_0 at x_s = (1 - s) x_0 + s eps. The noise level s is diffusers' sigma, and
falls from 1 to 0. From s to the next level n, h = s - n, a kernel draws the next latents from

    N(A x_s + B v, std^2 I).

With std = 0 this is Euler's step of the probability-flow ODE, A = 1 and B = -h, whatever the kernel. With noise there
are two kinds of kernels:

- Those that keep the schedule, "ddim", "cps" and "precise", split the noise of level n into an old part and a new one:
  (1 - n) x_0 + c eps + std z, with the predicted x_0 and eps, and c^2 + std^2 = n^2. At the last step n is 0, so the
  step is deterministic and the image is clean.
- "flow-sde" and "dance-sde" take Euler and Maruyama's step of a stochastic differential equation with the diffusion
  g(s). Their latents are noisier than level n says, and the noise of the last step stays in the image that the reward
  sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dpok_gym.models.scheduler_configs import for_diffusers
from dpok_gym.samplers.transition_table import TransitionTable, eta_of_steps
from dpok_gym.utils.validation import check_choice, check_fraction, check_integer, check_non_negative

Kernel = Literal["ddim", "flow-sde", "dance-sde", "cps", "precise", "ode"]

#: The kernels, with the eta that their papers' codes use.
KERNELS: dict[str, float] = {
    "ddim": 1.0,
    "flow-sde": 0.7,
    "dance-sde": 0.3,
    "cps": 0.8,
    "precise": 1.5,
    "ode": 0.0,
}

#: A step of "flow-sde" adds noise of about eta. More than this many times as much leaves nothing of the image.
_MAX_FLOW_SDE_STD = 2.0


def make_flow_table(
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    kernel: Kernel = "ddim",
    eta: float | None = None,
    sde_steps: Sequence[int] | None = None,
    *,
    sigmas: Sequence[float] | Literal["trailing"] | None = None,
    sequence_length: int | None = None,
) -> TransitionTable:
    """Builds the table of a flow-matching model from the config of its diffusers scheduler.

    The noise levels are those that ``FlowMatchEulerDiscreteScheduler`` itself finds, because the model was always
    sampled so. That includes its double shift of the smallest sigma (diffusers issue 13243): Stable Diffusion 3.5 in 10
    steps ends with 0.278, 0.0089, 0. ``sigmas="trailing"`` gives 0.429, 0.25, 0.

    The std of each kernel, with r = n (1 - s) / (s (1 - n)), and the noise that it leaves in the image, ``std[-1]``:

    - "ddim": eta n sqrt(1 - r^2) (Song et al. 2021; eta is that of :func:`make_ddim_table`). It leaves none.
    - "flow-sde": eta sqrt(h s / (1 - s)) (Flow-GRPO, arXiv 2505.05470). It leaves eta s / sqrt(1 - s) of the last s:
      in 10 steps 0.21 for FLUX of 1024 pixels, latents having a std of about 1. For Stable Diffusion 3.5 it is 0.006,
      but the step before it adds 0.225, where the denoiser expects 0.009.
    - "dance-sde": eta sqrt(h) (DanceGRPO, arXiv 2505.07818). It leaves eta sqrt(s) of the last s: 0.15 and 0.03.
    - "cps": n sin(eta pi / 2) (Flow-CPS, arXiv 2509.05952). It leaves none, but the images vary less than the data,
      however many steps there are.
    - "precise": n sqrt(1 - r^(eta^2)) (arXiv 2605.23522). It leaves none.
    - "ode": 0. It leaves none.

    Args:
        scheduler_config: of a ``FlowMatchEulerDiscreteScheduler``. An entry ``dynamic_shift`` says how it depends on
            the size of an image: "linear", the default, or "empirical", as in FLUX.2, where it depends on T too.
        num_inference_steps: T, from 1 to the number of training timesteps.
        kernel: how the noise is added.
        eta: amount of noise, at least 0; at most 1 for "ddim" and "cps"; 0 is the ODE, and "ode" does not look at it.
            None for the kernel's own in :data:`KERNELS`. 1 for "ddim" is sqrt(2) for "precise" and, in the limit of
            many steps, for "flow-sde".
        sde_steps: the first stochastic step and the number of them; the other steps are those of the ODE. None for all.
        sigmas: T noise levels before the shift, as diffusers' ``set_timesteps`` takes them; "trailing" for 1, 1 - 1/T,
            ..., 1/T, as the pipelines of FLUX and others have them; None for the scheduler's.
        sequence_length: tokens of an image in the transformer, such as 4096 for 1024 x 1024 pixels in FLUX; only for
            schedulers with dynamic shifting, whose shift depends on it.

    Raises:
        ValueError: if an argument is out of range, the config is that of another kind of diffusion, the noise levels do
            not fall from at most 1 to 0, or a step of "flow-sde" begins so near 1 that its noise explodes.
    """
    check_choice("the kernel of a flow-matching model", kernel, *KERNELS)
    eta = read_eta(kernel, eta)
    levels, timesteps = _noise_levels(scheduler_config, num_inference_steps, sigmas, sequence_length)
    sample_coef, output_coef, std = _transitions(kernel, levels, eta_of_steps(eta, len(timesteps), sde_steps))
    s = levels[:-1]
    columns = (sample_coef, output_coef, std, 1 - s, s, torch.ones_like(s), -s)  # x_0 = x_s - s v
    return TransitionTable(timesteps, *(column.float() for column in columns))


def trailing_levels(num_inference_steps: int) -> list[float]:
    """Returns the noise levels before the shift of "trailing": 1, 1 - 1/T, ..., 1/T."""
    return [float(level) for level in np.linspace(1, 1 / num_inference_steps, num_inference_steps)]


def read_eta(kernel: Kernel, eta: float | None) -> float:
    """Returns the amount of noise of a kernel: its own in :data:`KERNELS` for None, and always 0 for "ode".

    Raises:
        ValueError: if it is below 0, or above 1 for "ddim" or "cps".
    """
    if eta is None or kernel == "ode":
        return KERNELS[kernel]
    if kernel in ("ddim", "cps"):
        return check_fraction("eta", eta)
    return check_non_negative("eta", eta)


def _make_scheduler(config: Mapping[str, Any]) -> Any:
    """Makes the scheduler of a config, after checks that it is one whose tables are known here."""
    from diffusers import FlowMatchEulerDiscreteScheduler  # slow to import, and only needed here

    kind = config.get("_class_name", FlowMatchEulerDiscreteScheduler.__name__)
    if kind != FlowMatchEulerDiscreteScheduler.__name__:
        raise ValueError(
            f"the model comes with a {kind}; the only flow-matching scheduler that is supported is a "
            f"{FlowMatchEulerDiscreteScheduler.__name__}: load the pipeline with that one, and with the same shift"
        )
    prediction_type = config.get("prediction_type")
    if prediction_type not in (None, "flow_prediction"):
        raise ValueError(
            f"the model comes with a {kind}, for networks that predict the flow's velocity, but its prediction_type is "
            f"{prediction_type!r}: that network belongs to another scheduler, such as DDIMScheduler"
        )
    if config.get("invert_sigmas"):
        raise ValueError("schedulers with invert_sigmas, as Mochi has, are not supported")
    return FlowMatchEulerDiscreteScheduler.from_config(for_diffusers(config))


def _noise_levels(
    config: Mapping[str, Any],
    num_inference_steps: int,
    sigmas: Sequence[float] | Literal["trailing"] | None,
    sequence_length: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns the scheduler's sigmas with the last 0, (T + 1,) float64, and what the network is told, (T,) float32."""
    scheduler = _make_scheduler(config)
    n_steps = check_integer("num_inference_steps", num_inference_steps, 1, scheduler.config.num_train_timesteps)
    if sigmas == "trailing":
        sigmas = trailing_levels(n_steps)
    if sigmas is not None and len(sigmas) != n_steps:
        raise ValueError(f"sigmas must hold one noise level for each of the {n_steps} steps, got {len(sigmas)}")
    mu = None
    if scheduler.config.use_dynamic_shifting:
        mu = _dynamic_shift(scheduler.config, n_steps, sequence_length, config.get("dynamic_shift", "linear"))
    scheduler.set_timesteps(n_steps, sigmas=sigmas, mu=mu)
    levels = scheduler.sigmas.double()
    _check_levels(levels)
    return levels, scheduler.timesteps


def _dynamic_shift(config: Any, n_steps: int, sequence_length: int | None, kind: str) -> float:
    """Returns mu: linear in the length of the image's sequence, as in the pipelines of FLUX.1 and SD3, or FLUX.2's."""
    if sequence_length is None:
        raise ValueError(
            "the model's scheduler shifts the noise levels by the image's size (use_dynamic_shifting): give the "
            "sequence_length"
        )
    check_integer("sequence_length", sequence_length)
    check_choice("dynamic_shift", kind, "linear", "empirical")
    if kind == "empirical":
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu  # slow to import

        return float(compute_empirical_mu(sequence_length, n_steps))
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (sequence_length - config.base_image_seq_len))


def _check_levels(levels: Tensor) -> None:
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(f"the noise levels (sigmas) must lie in [0, 1], got {levels.min():.6g} to {levels.max():.6g}")
    stays = (levels.diff() >= 0).nonzero().flatten().tolist()
    if stays:
        step = stays[0]
        raise ValueError(
            f"the noise levels (sigmas) must fall at every step, but step {step} goes from {levels[step]:.6g} to "
            f"{levels[step + 1]:.6g}: take fewer num_inference_steps, or give other sigmas"
        )


def _transitions(kernel: str, levels: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns A, B and std of each step, (T,) float64.

    Args:
        kernel: one of :data:`KERNELS`.
        levels: (T + 1,) from at most 1 to 0.
        eta: (T,) amount of noise of each step.
    """
    s, n = levels[:-1], levels[1:]
    h = s - n
    if kernel in ("flow-sde", "dance-sde"):
        g_squared = eta**2
        if kernel == "flow-sde":
            # At s = 1 the published code divides by 1 - n, so that the first step adds noise of eta.
            g_squared = g_squared * s / (1 - torch.where(s == 1, n, s))
        std = (g_squared * h).sqrt()
        _check_explosion(levels, eta, std)
        # dx = (v + g^2 / (2 s) eps) ds + g dw backwards in time, with eps = x + (1 - s) v.
        drift = g_squared * h / (2 * s)
        return 1 - drift, -h - (1 - s) * drift, std
    ratio = n * (1 - s) / (s * (1 - n))  # of the noise-to-signal ratios after and before; 0 at s = 1
    if kernel == "cps":
        std = n * (eta * math.pi / 2).sin()
    elif kernel == "precise":
        std = n * (1 - ratio**eta**2).sqrt()
    else:
        std = eta * n * (1 - ratio**2).sqrt()
    old = (n**2 - std**2).clamp(min=0).sqrt()
    # (1 - n) x_0 + old eps, with x_0 = x - s v and eps = x + (1 - s) v.
    return (1 - n) + old, (1 - s) * old - (1 - n) * s, std


def _check_explosion(levels: Tensor, eta: Tensor, std: Tensor) -> None:
    exploding = (std > _MAX_FLOW_SDE_STD * eta).nonzero().flatten().tolist()
    if exploding:
        step = exploding[0]
        raise ValueError(
            f"'flow-sde' explodes at step {step}, from sigma {levels[step]:.6g} to {levels[step + 1]:.6g}: "
            f"its variance is divided by 1 - sigma, which gives noise of {std[step]:.3g}; begin at sigma 1 exactly, "
            "take more num_inference_steps, or choose 'ddim'"
        )
