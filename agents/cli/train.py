"""``dpok train``."""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.algorithms.presets import PRESETS, default_algorithm
from agents.algorithms.registry import list_algorithms, load_algorithm
from agents.cli.arguments import (
    UsageError,
    default_hint,
    make_options,
    parse_options,
    parse_some_options,
    to_command_line,
)
from agents.cli.config import (
    FILE_NAME,
    Config,
    config_file,
    default_config,
    describe_settings,
    find_algorithm_paths,
    find_paths,
    named_code,
)
from agents.cli.environments import environment_class
from agents.cli.recipe import Recipe
from agents.cli.run import Run
from agents.cli.run_folder import LOG, SUMMARY, find_weights
from agents.cli.signals import SIGNALS, exit_code
from agents.cli.tables import say
from agents.common import distributed
from agents.common.arguments import describe_arguments
from agents.common.checkpoint import DENOISER, find_checkpoint, list_checkpoints
from agents.common.policy import DenoisingPolicy
from dpok_gym.models.lora_files import find_lora_file
from dpok_gym.registration import DEFAULT_ENVIRONMENT, ENVIRONMENTS
from dpok_gym.utils.files import locked
from dpok_gym.utils.validation import check_path

#: Options that may change when a run is resumed.
_CHANGEABLE = ("images", "device", "checkpointing_steps", "checkpointing_minutes", "checkpoints_total_limit")

_ENV_HELP = (
    f"Environment, which sets the model, the prompts and the reward: {', '.join(ENVIRONMENTS)}; or MODULE:ID of one of "
    "yours."
)
_ALGO_HELP = (
    f"Algorithm, whose own options are below: {', '.join(list_algorithms())}; or MODULE:CLASS of one of yours. dpok is "
    "policy gradient with a KL penalty (Fan et al. 2023); ddpo, grpo and reinforce are other policy gradients. sft "
    "(weighted by the reward), rwr (by its exponential) and best-of-n (on winners) learn from images of the "
    "pre-trained model. diffusion-dpo learns from people's --choices, or from pairs of its own images. draft follows "
    "the gradient of the reward, which must have one."
)
_PRESET_HELP = "Named settings, which the other options change: " + "; ".join(
    f"{name} ({preset.description})" for name, preset in PRESETS.items()
)


@dataclass
class RunOptions:
    """Seed, folder, task and length of the run."""

    seed: int = 0
    """Seed of prompts, noise and first weights, 0 or more. The same seed repeats a run."""
    out: Annotated[Path | None, default_hint("FOLDER", "runs/<env>-<algo>-seed<seed>-<time>")] = None
    """Run folder to write. It must not hold a run already, unless the run is resumed."""
    env: Annotated[str, tyro.conf.arg(help=_ENV_HELP, metavar="ID")] = DEFAULT_ENVIRONMENT
    algo: Annotated[str, tyro.conf.arg(help=_ALGO_HELP, metavar="NAME")] = "dpok"
    preset: Annotated[str, tyro.conf.arg(help=_PRESET_HELP, metavar="NAME")] = "laptop"
    images: int = 2240
    """Images to draw in training, 1 or more, rounded up to whole iterations. More take longer and learn more."""
    n_envs: int = 64
    """Images that are drawn side by side, 1 or more, usually 10 to 256. More need more memory."""
    eval_images: int = 256
    """Images drawn before and after training to measure the change, 1 or more. Training never uses their seeds."""
    device: str = "auto"
    """Device of the networks: auto, cpu, cuda, cuda:1, ..."""
    checkpointing_steps: int = 10
    """Iterations between two checkpoints, 1 or more. A killed run loses at most these."""
    checkpointing_minutes: float | None = None
    """Minutes after which a checkpoint is due before that, above 0; iterations of large models take long."""
    checkpoints_total_limit: int = 2
    """Number of checkpoints to keep, 1 or more. The oldest ones are removed."""
    resume: bool = False
    """Go on with the run in --out, with its own settings; --images asks for more images in all."""
    resume_from_checkpoint: Annotated[str | None, default_hint("latest|NAME|PATH", "latest, with --resume")] = None
    """Go on from this checkpoint; later ones are removed. It implies --resume."""
    trust: bool = False
    """Run the code that a resumed run's config, or --config, names: rewards, algorithms, models, environments."""
    config: Annotated[Path | None, default_hint("FILE", "none")] = None
    """YAML file of options, named as here without the hyphens in front. Options of the command line change them."""
    dry_run: bool = False
    """Print the settings, the memory and the work to expect; draw nothing. What is printed is a file for --config."""


@dataclass
class _FirstOptions:
    """The options that decide which further options there are, and their defaults."""

    # None stands for an option that is not on the command line: the preset depends on the environment then.
    env: str | None = None
    algo: str | None = None
    preset: str | None = None
    out: Path | None = None
    resume: bool = False
    resume_from_checkpoint: str | None = None
    trust: bool = False
    config: Path | None = None


@dataclass
class Train:
    """The options of ``dpok train``, as :func:`parse` reads them.

    Attributes:
        out: the run folder; None for a new one in runs/.
        config: the settings.
        resume_from: "latest", or the name or path of a checkpoint; None for a new run.
        is_dry: whether only to say what the training would take.
    """

    out: Path | None
    config: Config
    resume_from: str | None
    is_dry: bool = False


def parse(argv: Sequence[str]) -> Train:
    """Reads the options.

    It does so twice: environment, algorithm and preset first, because all other options depend on them.

    Raises:
        ValueError: if an option, or a value, is wrong.
    """
    first = parse_some_options(_FirstOptions, argv)
    # A resumed run has the options of its own environment and algorithm, even if the defaults have changed since.
    resumes = first.resume or first.resume_from_checkpoint is not None
    if resumes and first.out is None:
        raise UsageError("--resume needs the run folder: --out FOLDER")
    if resumes and first.config is not None:
        raise UsageError("--resume keeps the run's own settings; leave out --config")
    recipe = None if first.config is None else Recipe(first.config)
    if recipe is not None:
        env, algo = (str(recipe.options.get(name)) for name in ("env", "algo"))
        recipe.check_code(named_code(env, algo, None, (), None), first.trust)  # it would run now
        # The last of two values counts, so the command line comes last.
        first = parse_some_options(_FirstOptions, [*recipe.first_words(("env", "algo", "preset")), *argv])
    if resumes and first.out is not None and (first.out / FILE_NAME).is_file():
        base = Config.read(first.out, first.trust)
    else:
        algo = first.algo or default_algorithm(first.preset)
        base = default_config(first.env or DEFAULT_ENVIRONMENT, algo, first.preset)
    options = options_class(base)
    words = []
    if recipe is not None:
        words = recipe.words(options)
        # The file alone, as it is read: a value may be written in several forms.
        of_file = _config_of(parse_options(options, "dpok train", words), base).code()
        recipe.check_code([code for code in of_file if code not in base.code()], first.trust)
    parsed: Any = parse_options(options, "dpok train", [*words, *argv])
    config = _config_of(parsed, base)
    if not resumes:
        return Train(parsed.run.out, config, None, parsed.run.dry_run)
    changed = _changed_options(config, base)
    if changed and (first.out / FILE_NAME).is_file():  # type: ignore[operator]  # checked above
        raise UsageError(f"--resume keeps the run's own settings; leave out {', '.join(changed)}")
    return Train(parsed.run.out, config, parsed.run.resume_from_checkpoint or "latest", parsed.run.dry_run)


def run(options: Train) -> int:
    """Trains, evaluates before and after, and writes the run folder; returns the exit code.

    Several ranks train together if torchrun or accelerate launch has started them; rank 0 alone writes.
    """
    if options.is_dry:
        from agents.cli.dry_run import describe  # diffusers takes seconds to import

        log = options.out / LOG if options.out and options.resume_from else None
        print(describe(options.config, log))
        return 0
    distributed.start()
    try:
        code = _train(options)
    except BaseException as error:
        distributed.report(error)
        raise
    distributed.stop()
    return code


def _train(options: Train) -> int:
    SIGNALS.deferred = distributed.count() > 1  # see agree()
    folder = Path(distributed.gather_texts(str(options.out or _new_folder(options.config)))[0])
    if options.resume_from is not None:
        config_file(folder)  # raises an error if this is no run folder
    with locked(folder) if distributed.is_main() else nullcontext():
        run = _prepare(folder, options)
        run.begin()
        try:
            # The pre-trained model comes first: if its evaluation fails, no training is lost.
            before = run.evaluate_before()
            run.learn()
            run.save()
            run.write_results(before, *run.evaluate_after())
        except KeyboardInterrupt as error:
            say(run.console, "interrupted: saving the run (a second signal leaves at once)")
            say(run.console, f"interrupted: {run.keep()}")
            return exit_code(error)
        except Exception:
            # A reward's server that cannot be reached any more, for example. What was learned until then is kept.
            say(run.console, f"stopped by an error: {run.keep()}")
            raise
        finally:
            run.close()
    return 0


def _prepare(folder: Path, options: Train) -> Run:
    """Makes a new run, or loads the one to resume."""
    config, which = options.config, options.resume_from
    if which is None:
        if list_checkpoints(folder) or (folder / SUMMARY).exists():
            raise FileExistsError(
                f"{folder} already holds a run; choose another --out, or resume it: "
                f"dpok train --resume --out {shlex.quote(str(folder))}"
            )
        return Run(folder, _find_lora(config))
    if which == "latest" and not list_checkpoints(folder):
        if (folder / SUMMARY).exists():
            raise FileNotFoundError(f"{folder} has no checkpoint any more; train anew, in another --out")
        run = Run(folder, config)
        say(run.console, f"{folder} has no checkpoint yet: the run begins anew")
        return run
    return Run(folder, config, find_checkpoint(folder, which))


def _new_folder(config: Config) -> Path:
    """Returns the name of a new run folder; the last part tells runs apart that start in the same second."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    name = f"{config.env}-{config.algo}-seed{config.seed}-{stamp}"
    return Path("runs") / name.replace("/", "-").replace(":", "-")


def options_class(base: Config) -> type:
    """Makes the dataclass of all options, with the settings of a config as defaults."""
    arguments = describe_arguments(environment_class(base.env)).values()
    of_algorithm = describe_settings(load_algorithm(base.algo))
    shared = {name: getattr(base, name) for name in _shared_names()}
    sections: dict[str, Any] = {
        "run": RunOptions(**shared),
        "environment": make_options("environment", arguments, base.env_kwargs)(),
        "algorithm": make_options("algorithm", of_algorithm, base.algo_kwargs)(),
        "policy": make_options("policy", describe_settings(DenoisingPolicy), base.policy_kwargs)(),
    }
    made: list[Any] = []
    for name, default in sections.items():
        # Without this, tyro would call the options --algorithm.kl-coef and the like.
        kind: Any = Annotated[type(default), tyro.conf.OmitArgPrefixes]
        made.append((name, kind, field(default_factory=partial(copy, default))))
    options = make_dataclass("Train", made)
    options.__doc__ = (
        "Fine-tune a text-to-image model with a reward, and compare it with the pre-trained model.\n\n"
        "The run folder gets config.yaml, checkpoints, the LoRA, logs, figures, summary.json, and index.html, which "
        "shows all of it in a browser. Ctrl-C ends a run early and keeps what was learned."
    )
    return options


def _shared_names() -> set[str]:
    """Returns the options of the run that the config keeps under the same name."""
    of_config = {setting.name for setting in fields(Config)}
    return {option.name for option in fields(RunOptions)} & of_config


def _config_of(parsed: Any, base: Config) -> Config:
    """Returns the config with what the options change."""
    values: dict[str, Any] = {name: getattr(parsed.run, name) for name in _shared_names()}
    sections = {"env_kwargs": parsed.environment, "algo_kwargs": parsed.algorithm, "policy_kwargs": parsed.policy}
    for name, options in sections.items():
        settings = dict(getattr(base, name))
        for option, value in vars(options).items():
            # The option holds some values in another form, such as a reward as a text. If it was not changed, the value
            # itself is kept: the text of a reward lacks the settings of its components.
            if value != to_command_line(option, settings[option]):
                settings[option] = list(value) if isinstance(value, tuple) else value
        values[name] = settings
    values["env_kwargs"] = find_paths(values["env_kwargs"])
    values["algo_kwargs"] = find_algorithm_paths(values["algo_kwargs"])
    return replace(base, **values)


def _find_lora(config: Config) -> Config:
    """Returns the config with the absolute path of the LoRA's file, which a run in another working folder finds too."""
    if config.policy_kwargs["lora"] is None:
        return config
    path = check_path("--lora", config.policy_kwargs["lora"])
    if (path / FILE_NAME).is_file():  # the folder of a run
        path = find_weights(path)
        if (path / DENOISER).is_file():
            raise ValueError("--lora names a run that trained the whole denoiser (--lora-rank 0), which has no LoRA")
    return replace(config, policy_kwargs=config.policy_kwargs | {"lora": str(find_lora_file(path).absolute())})


def _changed_options(config: Config, base: Config) -> list[str]:
    """Returns the options that a resumed run must not change, but that were changed."""
    changed = []
    for option in fields(Config):
        ours, theirs = getattr(config, option.name), getattr(base, option.name)
        if isinstance(ours, dict):
            changed += [name for name in ours if ours[name] != theirs[name]]
        elif ours != theirs and option.name not in _CHANGEABLE:
            changed.append(option.name)
    return [f"--{name.replace('_', '-')}" for name in changed]
