"""``dpok sample``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from agents.cli.arguments import UsageError, default_hint, given, parse_options
from agents.cli.steering import SteeringOptions, make_steering

if TYPE_CHECKING:
    from torch import Tensor, nn

    from agents.cli.config import Config
    from agents.common.evaluation import Evaluation
    from agents.common.steering import Steering
    from dpok_gym.vector_env import DenoisingVectorEnv


@dataclass
class Sample:
    """Draw images for a prompt with a pre-trained or a fine-tuned model."""

    prompt: str
    """Text to draw."""
    lora: Annotated[Path | None, default_hint("FOLDER", "none: the pre-trained model")] = None
    """Run folder of dpok train (its model and sampler settings are used too), or file or folder of a LoRA."""
    env: Annotated[str | None, default_hint("ID", "the run's, or that of dpok train")] = None
    """Environment id, for its model and sampler settings."""
    model: Annotated[str | None, default_hint("NAME|FOLDER|HUB-ID", "the environment's")] = None
    """Model to draw with: a registered name such as sd15, a local diffusers folder, or a hub id."""
    n: int = 16
    """Number of images, 1 or more."""
    seed: int = 0
    """Seed of the first image, 0 or more. Image k has seed + k, and is the same in every call."""
    out: Path = Path("sample.png")
    """PNG file to write."""
    num_inference_steps: Annotated[int | None, default_hint("INT", "the environment's")] = None
    """Denoising steps of each image, 1 or more, usually 10 to 50."""
    guidance_scale: Annotated[float | None, default_hint("FLOAT", "the environment's")] = None
    """Scale of classifier-free guidance, 0 or more. 1 is none; a larger scale follows the prompt more closely."""
    negative_prompt: str | None = None
    """Text that guidance leads away from; it needs a guidance scale other than 1."""
    image_size: Annotated[int | tuple[int, int] | None, default_hint("INT|HEIGHT WIDTH", "the model's")] = None
    """Pixels of a side, or height and width. Images get worse far from the size that the model was trained with."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_hint("NAME", "float32")] = None
    """Precision of the frozen weights: float32, or bfloat16 or float16 for half of the memory."""
    trust: bool = False
    """Run the code that the config of a run in --lora names: models, rewards and the like of modules. Also read a LoRA
    that is a pickle, which may run code."""
    device: str = "auto"
    """Device of the networks: auto, cpu, cuda, cuda:1, ..."""
    reward: Annotated[str | None, default_hint("NAME[=WEIGHT],...", "the run's, or the environment's")] = None
    """Reward that --best-of or --steering chooses by."""
    steer: Annotated[SteeringOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=SteeringOptions)


def parse(argv: Sequence[str]) -> Sample:
    """Reads the options."""
    return parse_options(Sample, "dpok sample", argv)


def run(options: Sample) -> int:
    """Draws images into a labelled grid; returns the exit code."""
    # These load torch; the help does not need it.
    from rich.console import Console

    from agents.cli import plots
    from agents.cli.config import FILE_NAME, Config
    from agents.cli.tables import say
    from agents.common.steering import UNSTEERED
    from dpok_gym.utils.validation import MAX_SEED, check_integer

    check_integer("--n", options.n, maximum=10**6)
    check_integer("--seed", options.seed, minimum=0, maximum=MAX_SEED)
    if not options.prompt.strip():
        raise ValueError("--prompt is blank; give the text to draw, in quotation marks")
    steering = make_steering(options.steer)
    if options.reward is not None and steering == UNSTEERED:
        raise UsageError("--reward is what --best-of or --steering chooses by; give one of these too")
    if options.out.suffix.lower() != ".png":
        raise ValueError(f"--out must be a PNG file, such as sample.png, got {str(options.out)!r}")
    if options.out.is_dir() or any(folder.is_file() for folder in options.out.parents):
        raise ValueError(f"--out {options.out} is a folder, or lies in a file; choose another file")
    lora, run_folder = options.lora, None
    if lora is not None:
        # The option may name a run folder, or the LoRA's folder in it. Both know the run's model and sampler.
        holders = [folder for folder in (lora, lora.parent) if (folder / FILE_NAME).is_file()]
        run_folder = holders[0] if holders else None
        lora = lora / "lora" if run_folder == lora else lora
    config = None if run_folder is None else Config.read(run_folder, options.trust)
    env = _make_env(options, config, steering)
    evaluation = _draw(options, env, lora, run_folder, steering)
    labels = [f"seed {options.seed + k}" for k in range(options.n)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plots.image_grid(evaluation.images, labels, options.out, f"“{options.prompt}”", evaluation.aligned)
    share = ""
    if evaluation.aligned_share is not None:
        share = f", {evaluation.aligned_share:.0%} of them fully aligned"
    say(Console(), f"{options.n} images{share}: {options.out}")
    return 0


def _make_env(options: Sample, config: Config | None, steering: Steering) -> DenoisingVectorEnv:
    """Makes the environment to draw in, with the settings of the options, the run and the id, in this order."""
    from agents.cli.environments import (
        EVALUATION_BATCH_SIZE,
        environment_kwargs,
        make_env,
        parse_reward,
    )
    from agents.common.steering import UNSTEERED
    from dpok_gym.registration import DEFAULT_ENVIRONMENT

    if config is not None and options.env is None:
        env_id, kwargs = config.env, dict(config.env_kwargs)
    else:
        env_id = DEFAULT_ENVIRONMENT if options.env is None else options.env
        kwargs = environment_kwargs(env_id)
    reward = kwargs["reward"] if options.reward is None else options.reward
    wanted = {} if steering == UNSTEERED else parse_reward(reward)
    changes = ("model", "num_inference_steps", "guidance_scale", "negative_prompt", "image_size", "dtype")
    kwargs |= given(options, *changes) | {"device": options.device, "prompts": [options.prompt], "reward": _no_reward}
    n_envs = min(options.n, EVALUATION_BATCH_SIZE)
    # The judge of an embedded world marks the aligned images. Only an environment tells if there is one for the prompt.
    env = make_env(env_id, n_envs, **kwargs)
    reward = wanted
    if env.world is not None and env.world.alignment_reward is not None:
        reward = {env.world.alignment_reward: 0.0} | wanted
    return make_env(env_id, n_envs, **(kwargs | {"reward": reward})) if reward else env


def _draw(
    options: Sample, env: DenoisingVectorEnv, lora: Path | None, run_folder: Path | None, steering: Steering
) -> Evaluation:
    """Draws the images with the pre-trained model, with a LoRA, or with the denoiser that a run trained as a whole."""
    from agents.common.evaluation import sample_images
    from dpok_gym.models.lora import LoRA

    # Image k has the seed of the options plus k, so it is the same for any number of images.
    sample = partial(sample_images, env.process, env, [options.prompt] * options.n, options.seed, steering=steering)
    if lora is None:
        return sample()
    # A run with --lora-rank 0 has no LoRA; its denoiser is in its checkpoints.
    if run_folder is not None and lora == run_folder / "lora" and not lora.is_dir():
        if options.dtype:
            raise ValueError("a run that trained the whole denoiser draws in its own precision; leave out --dtype")
        denoiser = _load_denoiser(run_folder, env)
        return sample(transition=partial(env.process.transition, denoiser=denoiser))
    model = env.process.model
    allow_pickle = options.trust or model.options.get("allow_pickle", False)
    with LoRA.from_folder(model.denoiser, lora, model.lora_prefix, allow_pickle).enabled():
        return sample()


def _load_denoiser(run_folder: Path, env: DenoisingVectorEnv) -> nn.Module:
    """Returns the denoiser of a run's newest checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint, or none with a denoiser.
    """
    from agents.common.checkpoint import find_checkpoint
    from dpok_gym.models.lora import reference_copy
    from dpok_gym.utils.reading import read_tensors

    path = find_checkpoint(run_folder) / "denoiser.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_folder} has neither a LoRA nor a {path.name}; resume it with: dpok train --resume --out {run_folder}"
        )
    # A copy, because other environments share the model's own denoiser.
    denoiser = reference_copy(env.process.model.denoiser)
    try:
        denoiser.load_state_dict(read_tensors(path))
    except RuntimeError as error:  # torch's, for tensors of other names or shapes
        raise ValueError(f"{path} is of another model: {error}; train anew") from error
    return denoiser


def _no_reward(images: Tensor, prompts: list[str]) -> Tensor:
    return images.new_zeros(len(prompts))
