"""The number of choices that each way to learn from them needs: ``python -m benchmarks.feedback``.

A simulated person compares images of the pre-trained shapes model for one prompt, as in :mod:`dpok_gym.shapes.choices`,
and errs in some of the choices. From the same files of choices, the model learns in the ways of ``feedback.yaml``:

- ``DPOK``: a reward is fitted to the choices, and DPOK follows it;
- ``best of 4``: the same reward chooses among four images of the pre-trained model, which is not trained;
- ``Diffusion-DPO``: the model learns from the choices themselves.

The judge decides the choices, and scores all images in the end; nothing is trained on it. The reward begins with an
untrained network, as ``dpok fit-reward`` does: the shipped ``shapes-preference`` has learned from 18,000 choices of
this person.

The choices are kept in ``--work``, and each run is one line of ``runs.jsonl`` (:mod:`benchmarks.runs`): an
interrupted sweep continues where it stopped, and ``--report`` makes no runs. ``--tune`` makes the runs by which the
settings were chosen, on choices of another seed, and ranks them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from agents import DPOK, BestOf, DiffusionDPO, evaluate
from agents.cli.environments import EVALUATION_BATCH_SIZE, evaluation_rewards
from agents.common.callbacks import format_seconds
from agents.common.evaluation import cycle_prompts
from agents.common.steering import UNSTEERED
from benchmarks.feedback_report import PRETRAINED, rank, report
from benchmarks.runs import HERE, Description, Record, find_records, fresh_processes, sweep_and_report, sweep_options
from benchmarks.training_run import summarize
from dpok_gym.models import load_model
from dpok_gym.prompts import load_prompts
from dpok_gym.rewards.preference import LearnedReward, load_comparisons
from dpok_gym.rewards.preference.fit import Fit, fit
from dpok_gym.samplers import DenoisingProcess
from dpok_gym.shapes.captions import parse_prompt
from dpok_gym.shapes.choices import JUST_NOTICEABLE, sample_images, utilities
from dpok_gym.shapes.scenes import IMAGE_SIZE
from dpok_gym.shapes.world import WORLD
from dpok_gym.utils.files import replacing
from dpok_gym.vector_env import DenoisingVectorEnv

#: Images that are drawn at a time for the choices.
_BATCH = 50


def main() -> None:
    """Draws the choices and makes the runs that are missing, and reports."""
    parser = sweep_options(__doc__, HERE / "feedback.yaml")
    parser.add_argument("--work", type=Path, default=Path("runs/feedback"), help="folder for images and choices")
    parser.add_argument("--tune", action="store_true", help="make the runs of the tuning instead, and rank them")
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    folder = options.out or HERE / "results" / "feedback"
    runs = list(tuning(settings) if options.tune else descriptions(settings))
    file = folder / ("tuning.jsonl" if options.tune else "runs.jsonl")
    write_report: Callable[[Sequence[Record]], None] = rank
    if not options.tune:
        write_report = partial(report, targets=settings["targets"], folder=folder)
    if not options.report:
        announce(runs, file, settings["seconds"], options.processes)
        draw_all(options.work, settings, sorted({run["seed"] for run in runs}), options.processes)
    sweep_and_report(runs, file, options, write_report, images=False, run=partial(run, work=options.work))


def descriptions(settings: dict[str, Any]) -> Iterator[Description]:
    """Yields the descriptions of the runs of ``feedback.yaml``, those of the first seed first."""
    for seed in range(settings["seeds"]):
        common = settings["common"] | {"seed": seed}
        yield common | {"task": "none", "label": PRETRAINED, "error_rate": 0.0, "choices": 0, "settings": {}}
        for error_rate in settings["error_rates"]:
            for n_choices in settings["choices"]:
                for label, way in settings["ways"].items():
                    run = {"label": label, "error_rate": error_rate, "choices": n_choices}
                    run |= {"settings": own_settings(way, n_choices)}
                    yield common | {"task": f"{n_choices} choices, {error_rate:.0%} errors"} | run


def own_settings(way: dict[str, Any], n_choices: int) -> dict[str, Any]:
    """Returns the settings of a way for a number of choices: as tuned for the number that is nearest, as a ratio."""
    tuned: dict[int, dict[str, Any]] = way.get("by_choices", {n_choices: {}})
    nearest = min(tuned, key=lambda number: abs(math.log(number / n_choices)))
    return {name: value for name, value in way.items() if name != "by_choices"} | tuned[nearest]


def tuning(settings: dict[str, Any]) -> Iterator[Description]:
    """Yields the descriptions of the runs by which the settings were chosen; the label names what is changed."""
    of_tuning = settings["tuning"]
    common = settings["common"] | {"seed": of_tuning["seed"], "error_rate": of_tuning["error_rate"]}
    for way, changes in of_tuning["changes"].items():
        for change in changes:
            label = ", ".join([way, *(f"{name} {value:g}" for name, value in change.items())])
            for n_choices in of_tuning["choices"]:
                run = {"task": f"{n_choices} choices", "label": label, "choices": n_choices}
                yield common | run | {"settings": own_settings(settings["ways"][way], n_choices) | change}


def announce(runs: Sequence[Description], file: Path, seconds: dict[str, float], processes: int) -> None:
    """Prints how long the missing runs take, from the seconds that one of each way took when it was measured."""
    missing = [run for run, record in zip(runs, find_records(runs, file), strict=True) if record is None]
    total = sum(seconds[run["label"].partition(",")[0]] for run in missing) / processes
    print(f"{len(missing)} runs are missing: about {format_seconds(total)}, with {processes} processes")


# ------------------------------------------------------------------------------------------------------------- choices


def draw_all(work: Path, settings: dict[str, Any], seeds: Sequence[int], processes: int) -> None:
    """Draws the images of all seeds and writes the files of choices that are missing."""
    with fresh_processes(processes) as pool:
        list(pool.map(partial(draw_choices, work, settings), seeds))


def choices_file(work: Path, seed: int, error_rate: float, n_choices: int) -> Path:
    """Returns the path of a file of choices."""
    return work / f"seed-{seed}" / f"choices-{error_rate:g}-{n_choices}.jsonl"


def draw_choices(work: Path, settings: dict[str, Any], seed: int) -> None:
    """Draws pairs of images, and lets the person compare them; each image is in one pair only.

    More choices begin with the fewer ones, and a person who errs less errs in some of the same ones.
    """
    folder = work / f"seed-{seed}"
    sizes, rates = settings["choices"], settings["error_rates"]
    if all(choices_file(work, seed, rate, n).is_file() for rate in rates for n in sizes):
        return
    pairs = draw_pairs(folder / "images", settings["common"], max(sizes), seed)
    luck = np.random.default_rng([seed, 1]).random(len(pairs))
    for rate in rates:
        lines = []
        for (first, second, difference), chance in zip(pairs, luck, strict=True):
            preferred = int((difference < 0) != (chance < rate))
            line = {"prompt": settings["common"]["prompt"], "images": [f"images/{first}", f"images/{second}"]}
            lines.append(json.dumps(line | {"preferred": preferred, "who": "simulated"}) + "\n")
        for n in sizes:
            with replacing(choices_file(work, seed, rate, n)) as file:
                file.write_text("".join(lines[:n]), encoding="utf-8")


def draw_pairs(folder: Path, common: dict[str, Any], n_pairs: int, seed: int) -> list[tuple[str, str, float]]:
    """Draws images of the pre-trained model until the person sees a difference in so many pairs of them.

    Args:
        folder: for the images.
        common: the settings of all runs.
        n_pairs: number of pairs.
        seed: of the images.

    Returns:
        For each pair the names of the two images, and how much more the person likes the first one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = DenoisingProcess(load_model("shapes", "cpu"), num_inference_steps=common["num_inference_steps"])
    pairs: list[tuple[str, str, float]] = []
    prompt, batch = common["prompt"], 0
    while len(pairs) < n_pairs:
        rngs = [np.random.default_rng([seed, 0, batch, number]) for number in range(_BATCH)]
        images = sample_images(process, [prompt] * _BATCH, rngs)
        seen = utilities(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, [parse_prompt(prompt)])[0]
        for number in range(0, _BATCH, 2):
            difference = float(seen[number] - seen[number + 1])
            if abs(difference) >= JUST_NOTICEABLE:
                names = [f"{batch:02}-{number + k:02}.png" for k in (0, 1)]
                for k, name in enumerate(names):
                    Image.fromarray(images[number + k]).save(folder / name)
                pairs.append((names[0], names[1], difference))
        batch += 1
    return pairs[:n_pairs]


# ---------------------------------------------------------------------------------------------------------------- runs


def run(description: Description, row_file: Path | None = None, *, work: Path) -> Record:
    """Learns from the choices in one way, and evaluates.

    Args:
        description: one of :func:`descriptions`.
        row_file: not used.
        work: the folder of the choices.

    Returns:
        The description, and ``scores`` (see :func:`benchmarks.training_run.summarize`), ``seconds`` without the
        evaluation, and the ``agreement`` of the fitted reward, if there is one, with the choices it was not fitted to.
    """
    settings, seed, label = dict(description["settings"]), description["seed"], description["label"]
    choices = choices_file(work, seed, description["error_rate"], description["choices"])
    result: Record = {}
    reward: Any = dict.fromkeys(WORLD.evaluation_rewards, 0.0)
    seconds = 0.0
    if "fit" in settings:
        fitted, seconds = fit_reward(choices, seed, **settings.pop("fit"))
        reward = {score_of(fitted.reward): 1.0}
        result["agreement"] = fitted.held_out.agreement
    started = time.perf_counter()
    env, evaluation_env = (_make_env(description, reward, n) for n in (64, EVALUATION_BATCH_SIZE))
    steering = BestOf(settings.pop("n")) if "n" in settings else UNSTEERED
    trains = label != PRETRAINED and steering is UNSTEERED
    agent: Any
    if "fit" in description["settings"] or not trains:
        images = settings.pop("images", 0)
        agent = DPOK(env=env, seed=seed, device="cpu", held_out_reward=None, **settings)
        if trains:
            agent.learn(images * agent.process.num_inference_steps)
    else:
        n_gradient_steps = math.ceil(settings.pop("epochs") * description["choices"] / settings["batch_size"])
        settings |= {"choices": choices, "n_gradient_steps": n_gradient_steps}
        agent = DiffusionDPO(env=env, seed=seed, device="cpu", **settings)
        agent.learn(0)
    result["seconds"] = round(seconds + time.perf_counter() - started, 1)
    prompts = cycle_prompts(load_prompts(description["prompt"]).train, description["eval_images"])
    # Far from the seeds of training, and the same for all ways.
    first = 1_000_000 * (seed + 1)
    evaluation = evaluate(agent.policy, evaluation_env, prompts, first, reference=not trains, steering=steering)
    scores = summarize(evaluation)
    if not trains:  # as in benchmarks.training_run
        scores["kl"] = steering.kl_bound
    return description | {"scores": scores} | result


def fit_reward(choices: Path, seed: int, epochs: int, held_out: float) -> tuple[Fit, float]:
    """Fits a reward to a file of choices, with an untrained network at the start.

    It is kept beside the choices, as two ways learn from the same reward.

    Args:
        choices: the file.
        seed: of the fit.
        epochs: passes over the choices.
        held_out: share of the choices that it is not fitted to.

    Returns:
        The fit, and the seconds that it took when it was made.
    """
    kept = choices.with_name(f"{choices.stem}-{epochs}-{held_out:g}.pt")
    if kept.is_file():
        return torch.load(kept, weights_only=False)
    started = time.perf_counter()
    comparisons = load_comparisons(choices, IMAGE_SIZE)
    fitted = fit(comparisons, epochs=epochs, seed=seed, device="cpu", held_out=held_out)
    result = fitted, time.perf_counter() - started
    part = kept.with_suffix(f".{os.getpid()}")  # another process may fit the same reward meanwhile
    torch.save(result, part)
    part.replace(kept)
    return result


def score_of(reward: LearnedReward) -> Any:
    """Returns the reward as a function with a name, which an environment may have beside others."""

    def learned(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return reward(images, prompts)

    return learned


def _make_env(description: Description, reward: Any, num_envs: int) -> DenoisingVectorEnv:
    return DenoisingVectorEnv(
        num_envs,
        prompts=description["prompt"],
        reward=evaluation_rewards(WORLD, reward) if num_envs == EVALUATION_BATCH_SIZE else reward,
        num_inference_steps=description["num_inference_steps"],
        decode_batch_size=16,
        device="cpu",
    )


if __name__ == "__main__":
    main()
