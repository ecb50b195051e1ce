"""``dpok fit-reward``."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from agents.cli.arguments import UsageError, default_hint, given, parse_options

if TYPE_CHECKING:
    from dpok_gym.rewards.preference.fit import Measured
    from dpok_gym.rewards.preference.reward import LearnedReward

#: Files that the folder gets beside the reward.
_CHECKPOINT, _FIGURE, _SUMMARY = "checkpoint.safetensors", "calibration.png", "fit.json"


@dataclass
class FitReward:
    """Learn a reward from people's choices between two images, for dpok train --reward FOLDER.

    The folder gets the reward (config.json and model.safetensors), and its agreement with choices that are held out:
    fit.json and calibration.png. Ctrl-C keeps the best weights so far. The same command continues a fit that was
    interrupted or killed.
    """

    choices: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """JSONL file with a choice on each line, its paths relative to the file.

    {"prompt": "a red star", "images": ["a.png", "b.png"], "preferred": 0, "who": "ada", "when": "2026-01-31T12:00"}
    """
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; it must not hold a reward already."""
    network: Annotated[Literal["small", "clip"] | None, default_hint("NAME", "small, or that of --start")] = None
    """Network that learns: small, for small and simple images such as shapes; or clip, a head on the features of CLIP,
    for images of the real world."""
    clip: Annotated[str | None, default_hint("FOLDER|HUB-ID", "CLIP ViT-L/14")] = None
    """CLIP of --network clip, with its tokenizer. The reward's folder only names it."""
    lora_rank: int = 0
    """Rank of a LoRA on CLIP, usually 4 to 16, for some thousand choices and a GPU, with a smaller --batch-size. 0 is
    the head only, which is learned in seconds after CLIP has read each image once."""
    start: Annotated[str | None, default_hint("FOLDER|NAME", "none: an untrained one")] = None
    """Reward to start from: a folder that this command wrote, or shapes-preference. Fewer choices are enough then; a
    small network knows the words of its own prompts only."""
    held_out: Annotated[float | None, default_hint("FLOAT", "50 choices, but 0.1 to 0.3")] = None
    """Share of the choices that is measured on and not learned from, in (0, 1). No image is on both sides."""
    epochs: int = 30
    """Passes over the choices, 1 or more. The weights of the epoch with the lowest held-out loss are kept."""
    batch_size: int = 64
    """Choices in each optimiser step, 1 or more."""
    learning_rate: Annotated[
        float | None, default_hint("FLOAT", "1.5e-3; with --start 3e-4; with --network clip 5e-3, with a LoRA 3e-4")
    ] = None
    """Highest learning rate; a third to three times of the default is usual."""
    image_size: Annotated[int | None, default_hint("INT", "64, or that of --start")] = None
    """Pixels of the side that images are resized to, a multiple of 8 from 16 on. More is slower, with finer details."""
    seed: int = 0
    """Seed of the split, the first weights and the order of the choices, 0 or more."""
    device: str = "auto"
    """Device of the network: auto, cpu, cuda, cuda:1, ..."""


def parse(argv: Sequence[str]) -> FitReward:
    """Reads the options."""
    return parse_options(FitReward, "dpok fit-reward", argv)


def run(options: FitReward) -> int:
    """Fits a reward to choices and measures it; returns the exit code."""
    # These load torch; the help does not need it.
    from dpok_gym.utils.files import locked
    from dpok_gym.utils.validation import check_integer

    check_integer("--seed", options.seed, minimum=0)
    with locked(options.out):
        return 0 if _is_fitted(options.out) else _fit(options)


def _is_fitted(folder: Path) -> bool:
    """Returns whether the folder holds a reward that lacked its figure only, which is drawn then.

    Raises:
        FileExistsError: if the folder holds a reward.
    """
    from agents.cli import plots
    from dpok_gym.rewards.preference.fit import Measured
    from dpok_gym.rewards.preference.reward import CONFIG
    from dpok_gym.utils.reading import read_json

    # The checkpoint is removed last: a fit that still has one goes on.
    if (folder / _CHECKPOINT).exists() or not (folder / CONFIG).exists():
        return False
    refusal = FileExistsError(f"{folder} already holds a reward; choose another --out")
    if (folder / _FIGURE).exists():
        raise refusal
    try:
        held_out = Measured(**read_json(folder / _SUMMARY)["held_out"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refusal from error
    plots.calibration(held_out, folder / _FIGURE, _title(held_out))
    print(f"{folder} holds a reward already; its {_FIGURE} is drawn again")
    return True


def _fit(options: FitReward) -> int:
    from rich.console import Console

    from agents.cli import plots
    from agents.cli.signals import exit_code
    from agents.cli.tables import calibration_table, describe_agreement, say, write_json
    from dpok_gym.choices.agreement import self_agreement
    from dpok_gym.choices.records import read_choices
    from dpok_gym.rewards.preference.data import load_comparisons
    from dpok_gym.rewards.preference.fit import fit

    console = Console()
    people = self_agreement(read_choices(options.choices))
    reward = _starting_point(options)
    if reward is None:
        comparisons = load_comparisons(options.choices, 64 if options.image_size is None else options.image_size)
    else:
        comparisons = load_comparisons(options.choices, reward.image_size, reward.resize)
    n_ties = int((comparisons.outcomes == 0.5).sum())
    console.print(f"{len(comparisons)} choices between {len(comparisons.images)} images, {n_ties} of them ties")

    def log(row: dict[str, Any]) -> None:
        numbers = f"loss {row['loss']:.3f}, held-out {row['held_out_loss']:.3f}, agreement {row['agreement']:.1%}"
        console.print(f"epoch {row['epoch']}: {numbers}", highlight=False)

    checkpoint = options.out / _CHECKPOINT
    result = fit(
        comparisons,
        reward=reward,
        **given(options, "epochs", "held_out", "seed", "batch_size", "learning_rate", "device"),
        checkpoint=checkpoint,
        log=log,
    )
    result.reward.save(options.out)
    held_out = result.held_out
    plots.calibration(held_out, options.out / _FIGURE, _title(held_out))
    summary: dict[str, Any] = {"choices": str(options.choices), "trained_on": result.trained_on, "epoch": result.epoch}
    summary |= {"interrupted": result.interrupted is not None, "held_out": asdict(held_out)}
    summary["repeats"] = asdict(people) if people.repeats else None
    write_json(options.out / _SUMMARY, summary)
    console.print(calibration_table(held_out))
    say(console, describe_agreement(held_out, people))
    say(console, f"use it with: dpok train --reward {options.out}")
    if result.interrupted is not None:
        say(console, "interrupted: this is the best reward so far; the same command goes on")
        return exit_code(result.interrupted)
    checkpoint.unlink()  # last: a fit without one is complete
    return 0


def _title(held_out: Measured) -> str:
    return f"{held_out.choices:,} choices held out"


def _starting_point(options: FitReward) -> LearnedReward | None:
    """Returns the reward to start from; None for an untrained small one."""
    if options.start is not None:
        reward = _load_start(options.start, options.device)
        if options.network not in (None, reward.kind) or options.clip is not None or options.lora_rank:
            raise UsageError(f"{options.start} has a network; leave out --network, --clip and --lora-rank")
    elif options.network == "clip":
        import torch

        from dpok_gym.rewards.preference.clip import ClipReward

        torch.manual_seed(options.seed)  # a LoRA begins at random
        reward = ClipReward(**given(options, "clip", "lora_rank", "device"))
    elif options.clip is not None or options.lora_rank:
        raise UsageError("--clip and --lora-rank need --network clip")
    else:
        return None
    if options.image_size not in (None, reward.image_size):
        raise UsageError(f"the network takes images of {reward.image_size} pixels; leave out --image-size")
    return reward


def _load_start(start: str, device: str) -> LearnedReward:
    """Loads the reward in a folder, or a registered one, for the fit to change."""
    from dpok_gym import list_rewards
    from dpok_gym.rewards.preference.reward import LearnedReward
    from dpok_gym.rewards.registry import load_reward
    from dpok_gym.utils.device import find_device

    if os.path.isdir(start) or start not in list_rewards():
        return LearnedReward.load(start, device=device)
    reward = copy.deepcopy(load_reward(start))  # the registry keeps the loaded one
    if not isinstance(reward, LearnedReward):
        raise UsageError(f"--start cannot be {start!r}: it was not learned from choices; give a folder")
    reward.device = find_device(device)
    reward.network.to(reward.device)
    return reward
