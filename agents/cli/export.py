"""``dpok export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from agents.cli.arguments import UsageError, default_hint, parse_options

if TYPE_CHECKING:
    from agents.cli.config import Config
    from agents.common.model_card import Training
    from dpok_gym.models.lora_files import Ranks


@dataclass
class Export:
    """Write what a run learned as other programs read it, with a model card.

    diffusers is a folder for load_lora_weights(); its file is for ComfyUI too, if the denoiser is a transformer. kohya
    is a file for ComfyUI, AUTOMATIC1111's web UI and others, if the denoiser is a UNet. peft is a folder for
    PeftModel.from_pretrained(). merged is a whole pipeline for from_pretrained(), and for --model.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Run folder of dpok train."""
    format: Literal["diffusers", "kohya", "peft", "merged"] = "diffusers"
    """Format of the files: a LoRA for diffusers, for kohya's scripts and web UIs, or for peft; or the whole model."""
    out: Annotated[Path | None, default_hint("FOLDER", "RUN/export-FORMAT")] = None
    """Folder to write, which must be new or empty."""
    figures: bool = True
    """Copy the figures of the run, which show images and prompts, beside the card."""
    model: Annotated[Path | None, default_hint("FOLDER", "the run's")] = None
    """Folder of the run's model, if it has moved; only merged needs it."""
    trust: bool = False
    """Run the code that the run's config names: algorithms, models and environments of modules."""
    device: str = "auto"
    """Device of the networks for merged: auto, cpu, cuda, cuda:1, ..."""


def parse(argv: Sequence[str]) -> Export:
    """Reads the options."""
    return parse_options(Export, "dpok export", argv)


def run(options: Export) -> int:
    """Writes the files and the card; returns the exit code."""
    # These load torch; the help does not need it.
    from rich.console import Console

    from agents.cli.config import Config
    from agents.cli.tables import say
    from agents.common.model_card import write_card

    config = Config.read(options.run, options.trust)
    folder = options.out or options.run / f"export-{options.format}"
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; choose another folder with --out")
    if options.model is not None and options.format != "merged":
        raise UsageError("--model is for --format merged; a LoRA is written without the model")
    write = _write_merged if options.format == "merged" else _write_lora
    training, ranks = write(options, config, folder)
    if not options.figures:
        training = replace(training, figures=())
    card = write_card(folder, training, options.format, ranks)
    say(Console(), f"wrote {folder}; {card} says how to use it")
    return 0


def _write_lora(options: Export, config: Config, folder: Path) -> tuple[Training, Ranks]:
    """Writes the LoRA of a run, for which no model is loaded; returns what the card tells, and the ranks."""
    from agents.cli.run_folder import describe_run, find_weights
    from agents.common.checkpoint import DENOISER
    from agents.common.model_card import hub_id, noted_sampling
    from dpok_gym.models.lora_files import FILE_NAME, Ranks, read_saved, write_diffusers, write_kohya, write_peft

    last = find_weights(options.run)
    if (last / DENOISER).is_file():
        raise UsageError("the run trained the whole denoiser (--lora-rank 0), which is no LoRA: use --format merged")
    saved = read_saved(last / FILE_NAME)
    training = describe_run(options.run, config, noted_sampling(saved.notes))
    if options.format == "diffusers":
        write_diffusers(saved.state, folder, saved.prefix, saved.notes)
    elif options.format == "peft":
        write_peft(saved.state, folder, hub_id(training.model), saved.notes)
    elif saved.prefix != "unet.":
        raise UsageError(
            "kohya's format is for the UNets of Stable Diffusion, and the run trained another denoiser: use --format "
            f"diffusers, whose file {FILE_NAME} ComfyUI reads for transformers"
        )
    else:
        write_kohya(saved.state, folder / f"{folder.name}.safetensors", saved.notes)
    return training, Ranks.of(saved.state)


def _write_merged(options: Export, config: Config, folder: Path) -> tuple[Training, None]:
    """Writes the run's model, with what was learned in its weights; returns what the card tells."""
    from agents.cli.drawing import no_reward
    from agents.cli.run_folder import load_agent

    if options.model is not None and not options.model.exists():
        raise FileNotFoundError(f"there is no folder {options.model}; --model is the folder of the run's model")
    changes = {} if options.model is None else {"model": str(options.model)}
    # Nothing is scored, and a reward may be a large network. Weights in half precision would lose small changes.
    env = config.make_env(1, device=options.device, reward=no_reward, dtype="float32", **changes)
    agent = load_agent(options.run, config, env, options.device)
    agent.save_pretrained(folder)
    return agent.training, None
