"""The transition table of DDIM (Song et al. 2021), for variance-preserving diffusion models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpok_gym.samplers.transition_table import TransitionTable, eta_of_steps
from dpok_gym.utils.validation import check_fraction, check_integer

#: Of x_t and of the network's output, each (T,).
Coefficients = tuple[Tensor, Tensor]


def make_ddim_table(
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    eta: float = 1.0,
    sde_steps: Sequence[int] | None = None,
) -> TransitionTable:
    """Builds the table of DDIM (Song et al. 2021, Eq. 12 and 16) from the config of a diffusers scheduler.

    The predicted clean sample is never clipped: with clipping, the mean would not be linear in the output.

    Args:
        scheduler_config: any config that ``DDIMScheduler.from_config`` reads. It has the betas, the spacing of the
            timesteps, and what the network predicts.
        num_inference_steps: T, from 1 to the number of training timesteps.
        eta: amount of noise, in [0, 1]. 1 is that of the diffusion's posterior (DDPM); with 0 all steps are
            deterministic.
        sde_steps: the first stochastic step and the number of them; the other steps have an eta of 0. None for all.

    Raises:
        ValueError: if T, eta or the window is out of range, if the spacing has no T timesteps, if a transition stays at
            the same noise, if the config belongs to another kind of diffusion, or if the prediction type is not one of
            epsilon, v_prediction and sample.
    """
    from diffusers import DDIMScheduler  # slow to import, and only needed here

    check_fraction("eta", eta)
    kind = scheduler_config.get("_class_name", "DDIMScheduler")
    if kind not in {cls.__name__ for cls in DDIMScheduler().compatibles} - {"EDMEulerScheduler"}:
        raise ValueError(
            f"the model comes with a {kind}, whose diffusion is not the variance-preserving one of DDIM with betas; "
            "models of that kind are not supported"
        )
    scheduler = DDIMScheduler.from_config(scheduler_config)  # only its noise schedule and timesteps are used
    timesteps = _make_timesteps(scheduler, num_inference_steps)
    previous = timesteps - scheduler.config.num_train_timesteps // num_inference_steps  # as DDIMScheduler.step does it
    # In float64: 1 - alpha / alpha_prev is the difference of two nearly equal numbers.
    alphas = scheduler.alphas_cumprod.double()
    alpha = alphas[timesteps]
    alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod.double())

    if not bool((alpha_prev > alpha).all()):
        raise ValueError(
            "the sampler's last step removes no noise; load the model with timestep_spacing='leading' or 'trailing' "
            "(--timestep-spacing), or take fewer num_inference_steps"
        )
    # Eq. 16: the variance of x_{t-1} given x_t.
    etas = eta_of_steps(eta, len(timesteps), sde_steps)
    variance = etas**2 * (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    clean, noise = _prediction_coefficients(scheduler.config.prediction_type, alpha)

    # Eq. 12: x_{t-1} = sqrt(alpha_prev) x_0 + direction * eps + std * noise, where x_0 and eps are linear in x_t and
    # in the network's output; each is a pair of coefficients.
    direction = (1 - alpha_prev - variance).clamp(min=0).sqrt()
    sample_coef = alpha_prev.sqrt() * clean[0] + direction * noise[0]
    output_coef = alpha_prev.sqrt() * clean[1] + direction * noise[1]
    columns = (sample_coef, output_coef, variance.sqrt(), alpha.sqrt(), (1 - alpha).sqrt(), *clean)
    return TransitionTable(timesteps, *(column.float() for column in columns))


def _make_timesteps(scheduler: Any, num_inference_steps: int) -> Tensor:
    """Returns the T training timesteps of the scheduler, (T,) int64, falling."""
    n_train = scheduler.config.num_train_timesteps
    check_integer("num_inference_steps", num_inference_steps, 1, n_train)
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.long()
    if len(timesteps) != num_inference_steps or timesteps.min() < 0 or timesteps.max() >= n_train:
        raise ValueError(
            f"the model's timestep spacing, {scheduler.config.timestep_spacing!r} with offset "
            f"{scheduler.config.steps_offset}, does not find {num_inference_steps} of the {n_train} training "
            f"timesteps; choose another num_inference_steps, such as {num_inference_steps - 1}"
        )
    return timesteps


def _prediction_coefficients(prediction_type: str, alpha: Tensor) -> tuple[Coefficients, Coefficients]:
    """Returns the coefficients in the predicted x_0 and in the predicted noise.

    Source: Salimans & Ho 2022 (App. D) for the velocity, v = sqrt(alpha) eps - sqrt(1 - alpha) x_0.
    """
    if prediction_type == "epsilon":
        if bool((alpha == 0).any()):
            raise ValueError("epsilon prediction is undefined at zero terminal SNR; such a model predicts v")
        clean = (1 / alpha.sqrt(), -((1 - alpha) / alpha).sqrt())
        noise = (torch.zeros_like(alpha), torch.ones_like(alpha))
    elif prediction_type == "v_prediction":
        clean = (alpha.sqrt(), -(1 - alpha).sqrt())
        noise = ((1 - alpha).sqrt(), alpha.sqrt())
    elif prediction_type == "sample":
        clean = (torch.zeros_like(alpha), torch.ones_like(alpha))
        noise = (1 / (1 - alpha).sqrt(), -(alpha / (1 - alpha)).sqrt())
    else:
        raise ValueError(
            f"prediction_type {prediction_type!r} is not epsilon, v_prediction or sample: such a model is not supported"
        )
    return clean, noise
