"""``dpok watch``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from agents.cli.arguments import default_hint, parse_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agents.cli.config import Config
    from agents.common.algorithm import DenoisingAlgorithm
    from dpok_gym.samplers import DenoisingProcess, Transition

#: Frames of the denoising at most, beside the first one: of more steps, evenly spaced ones are shown.
_MAX_FRAMES = 20


@dataclass
class Watch:
    """Animate a run: the denoising of the same seeds before and after training, and images while the model learned.

    Writes denoising.gif and training.gif into the run folder, whose index.html then shows them.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Run folder of dpok train."""
    n: int = 4
    """Images side by side in denoising.gif, 1 to 8."""
    prompt: Annotated[str | None, default_hint("TEXT", "the run's")] = None
    """Text to draw in denoising.gif."""
    seed: Annotated[int | None, default_hint("INT", "that of the run's evaluation")] = None
    """Seed of the first image of denoising.gif, 0 or more."""
    model: Annotated[Path | None, default_hint("FOLDER", "the run's")] = None
    """Folder of the run's model, if it has moved."""
    trust: bool = False
    """Run the code that the run's config names: rewards, algorithms, models and environments of modules."""
    device: str = "auto"
    """Device of the networks: auto, cpu, cuda, cuda:1, ..."""


def parse(argv: Sequence[str]) -> Watch:
    """Reads the options."""
    return parse_options(Watch, "dpok watch", argv)


def run(options: Watch) -> int:
    """Writes the animations; returns the exit code."""
    # These load torch; the help does not need it.
    from rich.console import Console

    from agents.cli.config import Config
    from agents.cli.drawing import no_reward
    from agents.cli.page import write_page
    from agents.cli.run_folder import SAMPLES, SUMMARY, load_agent
    from agents.cli.samples import N_SHOWN, list_samples
    from agents.cli.tables import say
    from dpok_gym.utils.reading import read_json
    from dpok_gym.utils.validation import MAX_SEED, check_integer

    config = Config.read(options.run, options.trust)
    check_integer("--n", options.n, maximum=N_SHOWN)
    if options.seed is not None:
        check_integer("--seed", options.seed, minimum=0, maximum=MAX_SEED)
    changes: dict[str, Any] = {"device": options.device, "reward": no_reward}
    if options.prompt is not None:
        if not options.prompt.strip():
            raise ValueError("--prompt is blank; give the text to draw, in quotation marks")
        changes["prompts"] = [options.prompt]
    if options.model is not None:
        changes["model"] = str(options.model)
    console = Console()
    agent = load_agent(options.run, config, config.make_env(options.n, **changes), options.device)
    say(console, f"the denoising before and after: {_watch_denoising(options, config, agent)}")
    samples = list_samples(options.run / SAMPLES)
    if samples:
        say(console, f"the training: {_watch_training(options, config, samples)}")
    else:
        say(console, f"{options.run} has no {SAMPLES}, so there is no animation of the training")
    if (options.run / SUMMARY).is_file():
        say(console, f"the page of the run: {write_page(options.run, dict(read_json(options.run / SUMMARY)), config)}")
    return 0


def _watch_denoising(options: Watch, config: Config, agent: DenoisingAlgorithm) -> Path:
    from agents.cli.animation import write_gif
    from agents.cli.page import DENOISING
    from agents.common.evaluation import cycle_prompts

    prompts = cycle_prompts(agent.denoising_env.prompts.train, options.n)
    first = config.evaluation_seed if options.seed is None else options.seed
    seeds = [first + index for index in range(options.n)]
    n_steps = agent.process.num_inference_steps
    every = math.ceil(n_steps / _MAX_FRAMES)
    rows, name = {}, config.algo.rpartition(":")[2].upper()
    for model, transition in {
        "pre-trained": agent.policy.reference_transition,
        name: agent.policy.transition,
    }.items():
        states, expected = _frames(agent.process, prompts, seeds, transition, every)
        rows[f"{model}:\nthe state x_t"] = states
        rows[f"{model}:\nx_0 expected"] = expected
    times = [f"after {step} of {n_steps} steps" for step in [*range(0, n_steps, every), n_steps]]
    title = f"{name} on {config.env}, seed {config.seed}"
    captions: Sequence[str] = prompts
    if len(set(prompts)) == 1:
        title, captions = f"{title}\n“{prompts[0]}”", ()
    return write_gif(rows, times, options.run / DENOISING, title, captions, paired=True)


def _frames(
    process: DenoisingProcess, prompts: Sequence[str], seeds: Sequence[int], transition: Transition, every: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draws images; returns the states on their way and the x_0 expected of them, (frames, B, H, W, 3) each."""
    import numpy as np
    import torch

    from agents.cli.samples import decode
    from agents.common.evaluation import denoise_seeds

    states, expected = [], []
    with torch.no_grad():
        for step in denoise_seeds(process, prompts, seeds, transition):
            if step.index % every == 0:
                states.append(decode(process.model, step.state.latents))
                expected.append(decode(process.model, process.predicted_clean(step.state, step.mean)))
    last = decode(process.model, step.next_latents)
    return np.stack([*states, last]), np.stack([*expected, last])


def _watch_training(options: Watch, config: Config, samples: Sequence[Any]) -> Path:
    """Animates the rows of images that the run has drawn."""
    import numpy as np
    from PIL import Image

    from agents.cli.animation import write_gif
    from agents.cli.page import TRAINING
    from agents.cli.samples import N_SHOWN

    n = min(N_SHOWN, config.eval_images)
    frames = np.stack([np.stack(np.split(np.asarray(Image.open(sample.path)), n, axis=1)) for sample in samples])
    times = [f"after {sample.progress}" for sample in samples]
    title = f"{config.algo.rpartition(':')[2].upper()} on {config.env}, seed {config.seed}"
    half = math.ceil(n / 2) if n > 4 and n % 2 == 0 else n
    rows = {f"images {first + 1} to {first + half}": frames[:, first : first + half] for first in range(0, n, half)}
    return write_gif(rows, times, options.run / TRAINING, title)
