"""Pairs of images for ``dpok label``, drawn with a model, or with two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agents.cli.config import Config
from agents.cli.drawing import DrawingOptions, fine_tuned, no_reward, resolve_environment
from agents.cli.environments import EVALUATION_BATCH_SIZE, make_env
from agents.cli.run_folder import describe_run, find_weights
from agents.common.evaluation import sample_images
from agents.common.model_card import public_name
from dpok_gym.choices.pairs import IMAGES, Pair, begin, hash_file, is_complete, write_pairs
from dpok_gym.prompts import PromptSet, load_prompts
from dpok_gym.samplers import Transition
from dpok_gym.utils.files import replacing
from dpok_gym.vector_env import DenoisingVectorEnv


@dataclass(frozen=True)
class Source:
    """A model that draws one image of each pair, or both.

    Attributes:
        run: run folder of ``dpok train``; None for the pre-trained model.
        config: of the run that the settings are from; None for those of the environment id.
    """

    run: Path | None
    config: Config | None

    @property
    def step(self) -> int:
        """Number of images that the model was trained on by its run, or of optimiser steps on a file of choices."""
        if self.run is None or self.config is None:
            return 0
        training = describe_run(self.run, self.config, {})
        return training.images if training.choices is None else training.optimizer_steps


def find_sources(runs: Sequence[Path], trust: bool) -> list[Source]:
    """Returns the model of the first image of each pair, and that of the second one.

    Args:
        runs: none for the pre-trained model against itself; one run, for the pre-trained model against it; or two.
        trust: whether code that the runs' configs name may run.

    Raises:
        FileNotFoundError: if a folder is no run folder.
        ValueError: if there are more runs, or a config is damaged or not trusted.
    """
    if len(runs) > 2 or len(set(runs)) < len(runs):
        raise ValueError("--run takes one run, which is compared with the pre-trained model, or two different ones")
    sources = [Source(run, Config.read(run, trust)) for run in runs]
    if len(sources) < 2:
        sources.insert(0, Source(None, sources[0].config if sources else None))
    return sources if len(sources) == 2 else sources * 2


def draw_pairs(
    folder: Path,
    options: DrawingOptions,
    sources: Sequence[Source],
    prompts: str | None,
    n_images: int,
    seed: int,
    *,
    trust: bool = False,
    log: Callable[[int], object],
) -> None:
    """Draws pairs of images into a folder. Images that are there already, of a call that was killed, are kept.

    Both images of pair k have the same prompt. If they are of two models, both have the seed ``seed + k``: they begin
    with the same noise, and differ by the model alone. Else they have the seeds ``seed + 2k`` and ``seed + 2k + 1``.

    Args:
        folder: the folder of the pairs.
        options: model and sampler, which come before those of the sources.
        sources: the model of the first images, and that of the second ones.
        prompts: text, name of a set, or file; None for those of the run.
        n_images: of both, an even number; larger than before, if there are pairs already.
        seed: of the first image.
        trust: whether a LoRA that is a pickle is read.
        log: is called with the number of images that have become ready.

    Raises:
        ValueError: if a prompt cannot be read, or the folder was begun in another way.
    """
    config = sources[1].config
    if prompts is None:
        if config is None:
            raise ValueError("--prompts is missing; give the text to draw, in quotation marks, a set or a file")
        prompts = str(config.env_kwargs["prompts"])
    loaded = load_prompts(prompts)
    settings = {
        "prompts": list(loaded.train) if loaded.name != "text" else prompts,
        "runs": [[source.run.as_posix(), source.step] for source in sources if source.run],
        "images": n_images,
        "seed": seed,
        "drawing": {name: value for name, value in asdict(options).items() if value is not None and name != "device"},
    }
    if is_complete(folder, settings, may_grow=["images"]):
        return
    texts = _choose_prompts(loaded, n_images // 2, seed)
    # Made first, because it checks the options and the prompts before anything is written.
    envs = [_make_env(options, source, loaded, min(n_images, EVALUATION_BATCH_SIZE)) for source in sources]
    begin(folder, settings)
    n_pairs = n_images // 2
    paths = [[folder / IMAGES / f"{k:05}{side}.png" for side in "ab"] for k in range(n_pairs)]
    if sources[0] == sources[1]:  # image 2k + i is that of side i of pair k
        jobs = [(sources[0], envs[0], list(chain(*paths)), [text for text in texts for _ in range(2)])]
    else:
        jobs = [(sources[i], envs[i], [pair[i] for pair in paths], texts) for i in range(2)]
    origins = []
    for source, env, files, of_files in jobs:
        with _fine_tuned(env, source, options, trust) as transition:
            for first in range(0, len(files), env.num_envs):
                part = files[first : first + env.num_envs]
                if not all(path.exists() for path in part):
                    wanted = of_files[first : first + env.num_envs]
                    evaluation = sample_images(env.process, env, wanted, seed + first, transition)
                    for path, pixels in zip(part, evaluation.images, strict=True):
                        with replacing(path) as file:
                            Image.fromarray(pixels).save(file, "PNG")
                log(len(part))
        origins.append([_origin(source, env) | {"seed": seed + k} for k in range(len(files))])
    pairs = []
    for k, (one, other) in enumerate(paths):
        of_pair = (origins[0][2 * k], origins[0][2 * k + 1]) if len(jobs) == 1 else (origins[0][k], origins[1][k])
        pairs.append(Pair(k, texts[k], (one, other), (hash_file(one), hash_file(other)), of_pair))
    write_pairs(folder, settings, pairs)


def _choose_prompts(prompts: PromptSet, n: int, seed: int) -> list[str]:
    """Returns the prompts of ``n`` pairs; those of fewer pairs are the first of them."""
    rng = np.random.default_rng(seed)
    if prompts.weights:
        return prompts.sample(rng, n)
    order = rng.permutation(len(prompts.train))  # the prompts of a file may be sorted
    return [prompts.train[order[k % len(order)]] for k in range(n)]


def _make_env(options: DrawingOptions, source: Source, prompts: PromptSet, n_envs: int) -> DenoisingVectorEnv:
    env_id, kwargs = resolve_environment(options, source.config)
    return make_env(env_id, n_envs, **(kwargs | {"prompts": prompts, "reward": no_reward}))


def _fine_tuned(
    env: DenoisingVectorEnv, source: Source, options: DrawingOptions, trust: bool
) -> AbstractContextManager[Transition | None]:
    lora = find_weights(source.run) if source.run else None
    return fine_tuned(env, lora, trust=trust, dtype=options.dtype)


def _origin(source: Source, env: DenoisingVectorEnv) -> dict[str, Any]:
    """Returns where a model's images are from, see :class:`dpok_gym.choices.records.Choice`."""
    run = source.run.as_posix() if source.run else None
    return {"model": public_name(env.process.config.model), "run": run, "step": source.step}
