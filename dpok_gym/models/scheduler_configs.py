"""Configs of diffusers' schedulers, changed so that every denoising step has a density."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dpok_gym.utils.validation import check_choice

TimestepSpacing = Literal["leading", "trailing"]

#: Entries of the config of a flow-matching model that diffusers' own scheduler does not know.
_NOT_OF_DIFFUSERS = ("prediction_type", "timestep_spacing", "dynamic_shift")


def is_flow_matching(config: Mapping[str, Any]) -> bool:
    """Returns whether a model with such a diffusers scheduler was trained with flow matching."""
    return (
        "FlowMatch" in str(config.get("_class_name"))
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def for_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what diffusers' ``FlowMatchEulerDiscreteScheduler`` knows of the config of a flow-matching model."""
    return {name: value for name, value in config.items() if name not in _NOT_OF_DIFFUSERS}


def with_euler_steps(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of the ``FlowMatchEulerDiscreteScheduler`` with the noise levels of another flow scheduler.

    Sana comes with a ``DPMSolverMultistepScheduler`` with ``use_flow_sigmas``. In T steps that goes through the levels
    0.999, 0.999 (1 - 1/T), ..., 0.999/T, before they are shifted, and tells the network their integer part in 1000ths.
    Here they are 1, 1 - 1/T, ..., 1/T: after a shift of 3 no level differs by more than 0.0004. At exactly 1 the
    latents are pure noise, as those are that the first step gets, and the noise of "flow-sde" does not explode.

    Args:
        config: of any scheduler. One without ``use_flow_sigmas`` stays as it is, as one does whose shift depends on the
            size of the image.
    """
    if not config.get("use_flow_sigmas") or config.get("use_dynamic_shifting"):
        return dict(config)
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": config.get("num_train_timesteps", 1000),
        "prediction_type": config.get("prediction_type", "epsilon"),
        "shift": config.get("flow_shift", 1.0),
        "timestep_spacing": "trailing",
    }


def with_spacing(config: Mapping[str, Any], spacing: TimestepSpacing) -> dict[str, Any]:
    """Returns a config with another spacing of the timesteps.

    Args:
        config: of any scheduler.
        spacing: as for :func:`with_density`. A flow-matching model knows "trailing" alone: the noise levels 1, 1 - 1/T,
            ..., 1/T, before they are shifted, whatever its scheduler finds by itself.

    Raises:
        ValueError: if a model of that kind has no such spacing.
    """
    check_choice("timestep_spacing", spacing, "leading", "trailing")
    if not is_flow_matching(config):
        return with_density(config, spacing)
    if spacing != "trailing":
        raise ValueError(
            f"a flow-matching model has no timestep_spacing={spacing!r}: choose 'trailing', or leave it out for the "
            "noise levels of its own scheduler"
        )
    return {**config, "timestep_spacing": spacing}


def with_density(config: Mapping[str, Any], spacing: TimestepSpacing | None = None) -> dict[str, Any]:
    """Returns a config with which every step of DDIM adds noise.

    The betas and what the network predicts stay as they are; they are all that DDIM needs of the scheduler that a model
    comes with. A deterministic scheduler may let the last step end in the clean sample, without noise and so without a
    density, as with ``timestep_spacing="linspace"`` or ``set_alpha_to_one=True``. Here it ends at the first training
    timestep instead, as in the published Stable Diffusion models. The config of a flow-matching model stays as it is.

    Args:
        config: any config that ``DDIMScheduler.from_config`` reads.
        spacing: of the timesteps: "leading" ends near timestep 1, "trailing" begins at the last timestep, which models
            with a terminal signal-to-noise ratio of zero need. None takes the config's own, but "trailing" for
            "linspace": that has no density, and begins at the same timestep.
    """
    from diffusers import DDIMScheduler  # slow to import

    if is_flow_matching(config):
        return dict(config)
    known = DDIMScheduler.from_config(config).config
    if spacing is None:
        spacing = "trailing" if known.timestep_spacing == "linspace" else known.timestep_spacing
    changes = {"timestep_spacing": spacing, "set_alpha_to_one": False}
    if spacing == "leading":
        changes["steps_offset"] = max(1, known.steps_offset)
    # What a class took for its default is no property of the model; diffusers would leave the changes out by this list.
    kept = {name: value for name, value in config.items() if name != "_use_default_values"}
    return kept | changes


def describe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns the entries of one config that another one has differently; "" if there are none."""
    return ", ".join(f"{name}={after[name]!r}" for name in before if name in after and before[name] != after[name])
