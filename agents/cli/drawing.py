"""Drawing images in commands: the options of model and sampler, and the LoRA of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from agents.cli.arguments import default_hint, given
from agents.cli.option_types import IntegersOrNone, MappingOrNone

if TYPE_CHECKING:
    from torch import Tensor, nn

    from agents.cli.config import Config
    from dpok_gym.samplers import Transition
    from dpok_gym.vector_env import DenoisingVectorEnv


@dataclass
class DrawingOptions:
    """Which model draws, and by which sampler. Each option changes what the run or the environment says."""

    env: Annotated[str | None, default_hint("ID", "the run's, or that of dpok train")] = None
    """Environment id, for its model and sampler settings."""
    model: Annotated[str | None, default_hint("NAME|FOLDER|HUB-ID", "the environment's")] = None
    """Model to draw with: a registered name such as sd15, a local diffusers folder, or a hub id."""
    num_inference_steps: Annotated[int | None, default_hint("INT", "the environment's")] = None
    """Denoising steps of each image, 1 or more, usually 10 to 50."""
    sampler: Annotated[str | None, default_hint("NAME", "the environment's")] = None
    """How noise is added: ddim, or ode for none; flow-matching models also know flow-sde, dance-sde, cps, precise."""
    eta: Annotated[float | None, default_hint("FLOAT", "the environment's")] = None
    """Amount of noise in each step, at least 0, and at most 1 for ddim and cps; 0 is none."""
    sde_steps: Annotated[IntegersOrNone, default_hint("INT INT", "the environment's")] = None
    """The first step that adds noise, from 0, and the number of them: 0 and all steps for noise in each."""
    guidance_scale: Annotated[float | None, default_hint("FLOAT", "the environment's")] = None
    """Scale of classifier-free guidance, 0 or more. 1 is none; a larger scale follows the prompt more closely."""
    negative_prompt: str | None = None
    """Text that guidance leads away from; it needs a guidance scale other than 1."""
    image_size: Annotated[int | tuple[int, int] | None, default_hint("INT|HEIGHT WIDTH", "the model's")] = None
    """Pixels of a side, or height and width. Images get worse far from the size that the model was trained with."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_hint("NAME", "float32")] = None
    """Precision of the frozen weights: float32, or bfloat16 or float16 for half of the memory."""
    model_kwargs: Annotated[MappingOrNone, default_hint("NAME=VALUE ...", "the environment's")] = None
    """Further arguments of dpok_gym.models.load_model, in place of the environment's, such as true_cfg_scale=4."""
    device: str = "auto"
    """Device of the networks: auto, cpu, cuda, cuda:1, ..."""


#: The options that are arguments of an environment by the same name.
ENVIRONMENT_OPTIONS = (
    *("model", "num_inference_steps", "sampler", "eta", "sde_steps", "guidance_scale", "negative_prompt"),
    *("image_size", "dtype", "model_kwargs"),
)


def resolve_environment(options: DrawingOptions, config: Config | None) -> tuple[str, dict[str, Any]]:
    """Returns the id and the arguments of the environment to draw in, with a reward and prompts of its own.

    Args:
        options: those of the command, which come first.
        config: of the run to draw with; None for the pre-trained model of ``options.env``.
    """
    from agents.cli.environments import environment_kwargs
    from dpok_gym.registration import DEFAULT_ENVIRONMENT

    if config is not None and options.env is None:
        env_id, kwargs = config.env, dict(config.env_kwargs)
    else:
        env_id = DEFAULT_ENVIRONMENT if options.env is None else options.env
        kwargs = environment_kwargs(env_id)
    return env_id, kwargs | given(options, *ENVIRONMENT_OPTIONS) | {"device": options.device}


@contextmanager
def fine_tuned(
    env: DenoisingVectorEnv, lora: Path | None, *, trust: bool, dtype: str | None
) -> Iterator[Transition | None]:
    """Lets the environment's model draw as fine-tuned in the block.

    Args:
        env: the environment.
        lora: file or folder of a LoRA, or a checkpoint that has the whole denoiser; None for the pre-trained model.
        trust: whether a LoRA that is a pickle is read.
        dtype: the precision that was asked for.

    Yields:
        The transition for :func:`agents.common.evaluation.sample_images`; None for the process's own.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it is of another model.
    """
    from agents.common.checkpoint import DENOISER
    from dpok_gym.models.lora import LoRA

    if lora is None:
        yield None
    elif (lora / DENOISER).is_file():  # a checkpoint of a run with --lora-rank 0
        if dtype:
            raise ValueError("a run that trained the whole denoiser draws in its own precision; leave out --dtype")
        yield partial(env.process.transition, denoiser=_load_denoiser(lora / DENOISER, env))
    else:
        model = env.process.model
        allow_pickle = trust or model.options.get("allow_pickle", False)
        with LoRA.from_folder(model.denoiser, lora, model.lora_prefix, allow_pickle).enabled():
            yield None


def no_reward(images: Tensor, prompts: list[str]) -> Tensor:
    """Returns 0 for each image (B, 3, H, W): the reward of an environment that only draws."""
    return images.new_zeros(len(prompts))


def _load_denoiser(path: Path, env: DenoisingVectorEnv) -> nn.Module:
    """Returns the denoiser of a checkpoint's file."""
    from dpok_gym.models.lora import reference_copy
    from dpok_gym.utils.reading import read_tensors

    # A copy, because other environments share the model's own denoiser.
    denoiser = reference_copy(env.process.model.denoiser)
    try:
        denoiser.load_state_dict(read_tensors(path))
    except RuntimeError as error:  # torch's, for tensors of other names or shapes
        raise ValueError(f"{path} is of another model: {error}; train anew") from error
    return denoiser
