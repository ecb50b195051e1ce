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
    from agents.cli.samples import Sample
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
    from agents.cli.page import DENOISING, TRAINING, write_page
    from agents.cli.run_folder import SAMPLES, SUMMARY, load_agent
    from agents.cli.samples import N_SHOWN, list_samples
    from agents.cli.tables import say
    from agents.common.evaluation import cycle_prompts, shown_images
    from dpok_gym.utils.reading import read_json
    from dpok_gym.utils.validation import MAX_SEED, check_integer

    config = Config.read(options.run, options.trust)
    check_integer("--n", options.n, maximum=N_SHOWN)
    if options.seed is not None:
        check_integer("--seed", options.seed, minimum=0, maximum=MAX_SEED)
    if options.prompt is not None and not options.prompt.strip():
        raise ValueError("--prompt is blank; give the text to draw, in quotation marks")
    changes: dict[str, Any] = {"device": options.device, "reward": no_reward}
    if options.model is not None:
        changes["model"] = str(options.model)
    console = Console()
    agent = load_agent(options.run, config, config.make_env(options.n, **changes), options.device)
    prompts = agent.denoising_env.prompts.train
    drawn = [options.prompt] * options.n if options.prompt else cycle_prompts(prompts, options.n)
    first = config.evaluation_seed if options.seed is None else options.seed
    rows, times = _denoising(agent, drawn, [first + index for index in range(options.n)], config.algorithm_name)
    path = _write(rows, times, options.run / DENOISING, config, drawn, block=2)
    say(console, f"the denoising before and after: {path}")
    samples = list_samples(options.run / SAMPLES)
    if samples:
        drawn = cycle_prompts(prompts, config.eval_images)
        drawn = [drawn[index] for index in shown_images(drawn, N_SHOWN)]
        path = _write(*_training(samples, len(drawn)), options.run / TRAINING, config, drawn)
        say(console, f"the training: {path}")
    else:
        say(console, f"{options.run} has no {SAMPLES}, so there is no animation of the training")
    if (options.run / SUMMARY).is_file():
        say(console, f"the page of the run: {write_page(options.run, dict(read_json(options.run / SUMMARY)), config)}")
    return 0


def _write(
    rows: dict[str, NDArray[np.uint8]],
    times: Sequence[str],
    path: Path,
    config: Config,
    prompts: Sequence[str],
    block: int = 1,
) -> Path:
    """Writes an animation with a title; the prompts are above the images if there are several."""
    from agents.cli.animation import write_gif

    title, captions = config.heading, prompts
    if len(set(prompts)) == 1:
        title, captions = f"{title}\n“{prompts[0]}”", ()
    return write_gif(rows, times, path, title, captions, block)


def _denoising(
    agent: DenoisingAlgorithm, prompts: Sequence[str], seeds: Sequence[int], name: str
) -> tuple[dict[str, NDArray[np.uint8]], list[str]]:
    """Draws the same seeds with the pre-trained and the fine-tuned model; returns rows of frames, and their times."""
    n_steps = agent.process.num_inference_steps
    every = math.ceil(n_steps / _MAX_FRAMES)
    rows = {}
    for model, transition in (("pre-trained", agent.policy.reference_transition), (name, agent.policy.transition)):
        states, expected = _frames(agent.process, prompts, seeds, transition, every)
        rows[f"{model}:\nthe state x_t"] = states
        rows[f"{model}:\nx_0 expected"] = expected
    return rows, [f"after {step} of {n_steps} steps" for step in [*range(0, n_steps, every), n_steps]]


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


def _training(samples: Sequence[Sample], n: int) -> tuple[dict[str, NDArray[np.uint8]], list[str]]:
    """Returns the frames of n images of the same seeds that the run has drawn, and their times."""
    import numpy as np
    from PIL import Image

    frames = [np.stack(np.split(np.asarray(Image.open(sample.path)), n, axis=1)) for sample in samples]
    return {"the same\nseeds": np.stack(frames)}, [f"after {sample.progress}" for sample in samples]
