"""``dpok sample``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from agents.cli.arguments import UsageError, default_hint, parse_options
from agents.cli.drawing import DrawingOptions, fine_tuned, no_reward, resolve_environment
from agents.cli.steering import SteeringOptions, make_steering

if TYPE_CHECKING:
    from agents.cli.config import Config
    from agents.common.steering import Steering
    from dpok_gym.vector_env import DenoisingVectorEnv


@dataclass
class Sample:
    """Draw images for a prompt with a pre-trained or a fine-tuned model."""

    prompt: str
    """Text to draw."""
    lora: Annotated[Path | None, default_hint("FOLDER", "none: the pre-trained model")] = None
    """Run folder of dpok train (its model and sampler settings are used too), or file or folder of a LoRA."""
    n: int = 16
    """Number of images, 1 or more."""
    seed: int = 0
    """Seed of the first image, 0 or more. Image k has seed + k, and is the same in every call."""
    out: Path = Path("sample.png")
    """PNG file to write."""
    trust: bool = False
    """Run the code that the config of a run in --lora names: models, rewards and the like of modules. Also read a LoRA
    that is a pickle, which may run code."""
    reward: Annotated[str | None, default_hint("NAME[=WEIGHT],...", "the run's, or the environment's")] = None
    """Reward that --best-of or --steering chooses by."""
    draw: Annotated[DrawingOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DrawingOptions)
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
    from agents.cli.run_folder import find_weights
    from agents.cli.tables import say
    from agents.common.evaluation import sample_images
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
        lora = find_weights(lora) if run_folder == lora else lora
    config = None if run_folder is None else Config.read(run_folder, options.trust)
    env = _make_env(options, config, steering)
    with fine_tuned(env, lora, trust=options.trust, dtype=options.draw.dtype) as transition:
        # Image k has the seed of the options plus k, so it is the same for any number of images.
        prompts = [options.prompt] * options.n
        evaluation = sample_images(env.process, env, prompts, options.seed, transition, steering=steering)
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
    from agents.cli.environments import EVALUATION_BATCH_SIZE, make_env, parse_reward
    from agents.common.steering import UNSTEERED

    env_id, kwargs = resolve_environment(options.draw, config)
    reward = kwargs["reward"] if options.reward is None else options.reward
    wanted = {} if steering == UNSTEERED else parse_reward(reward)
    kwargs |= {"prompts": [options.prompt], "reward": no_reward}
    n_envs = min(options.n, EVALUATION_BATCH_SIZE)
    # The judge of an embedded world marks the aligned images. Only an environment tells if there is one for the prompt.
    env = make_env(env_id, n_envs, **kwargs)
    reward = wanted
    if env.world is not None and env.world.alignment_reward is not None:
        reward = {env.world.alignment_reward: 0.0} | wanted
    return make_env(env_id, n_envs, **(kwargs | {"reward": reward})) if reward else env
