"""The folder of a run: its files, and the agent that is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.cli.config import Config
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    progress_of,
)
from agents.common.evaluation import Evaluation
from agents.common.model_card import Training, public_name, sampling_of
from dpok_gym.models.lora_files import FILE_NAME as LORA_FILE
from dpok_gym.prompts import list_prompt_sets
from dpok_gym.utils.files import replacing
from dpok_gym.utils.reading import read_arrays, read_json
from dpok_gym.utils.validation import check_path
from dpok_gym.vector_env import DenoisingVectorEnv

SUMMARY, LOG, TENSORBOARD, LORA = "summary.json", "progress.csv", "tensorboard", "lora"
EVALUATION_BEFORE, LEARNING_CURVE, BEFORE_AFTER = "evaluation_before.npz", "learning_curve.png", "before_after.png"
#: Figures that only some runs have: images of prompts that were not trained on, and the best policy where it is known.
HELD_OUT, OPTIMUM = "held_out.png", "optimum.png"
SAMPLES, PAGE = "samples", "index.html"


def load_run(
    folder: str | Path, device: str = "auto", model: str | Path | None = None, trust: bool = False
) -> DenoisingAlgorithm:
    """Loads the agent of a run from its newest checkpoint.

    Args:
        folder: a run folder of ``dpok train``.
        device: device of the networks: "auto", "cpu", "cuda", ...
        model: the folder of the run's model, if it has moved; None for the model in the run's config.
        trust: whether modules that the run's config names may be imported, which runs their code; their names are
            printed. Nothing else in the folder can run code.

    Returns:
        The agent. Its ``env`` is the run's environment.

    Raises:
        FileNotFoundError: if the folder is no run folder, or has no checkpoint.
        ValueError: if a file in the folder is damaged, or its config names code and is not trusted.
    """
    folder = check_path("the run folder", folder)
    config = Config.read(folder, trust)
    find_checkpoint(folder)  # for its error, before a model is loaded
    changes = {} if model is None else {"model": str(model)}
    return load_agent(folder, config, config.make_env(config.n_envs, device=device, **changes), device)


def find_weights(folder: Path) -> Path:
    """Returns the folder with the newest weights of a run: its newest checkpoint, or else its LoRA.

    The checkpoint is at least as new as the LoRA, which is written at the end, but it may have been removed.

    Raises:
        FileNotFoundError: if there is neither.
    """
    if not list_checkpoints(folder) and (folder / LORA).is_dir():
        return folder / LORA
    return find_checkpoint(folder)


def load_agent(folder: Path, config: Config, env: DenoisingVectorEnv, device: str) -> DenoisingAlgorithm:
    """Returns the agent of a run's newest checkpoint, in an environment with the run's model and sampler."""
    checkpoint = find_checkpoint(folder)
    agent = make_agent(config, env, checkpoint, device)
    load_checkpoint(agent, checkpoint)
    agent._training = describe_run(folder, config, sampling_of(agent.process))
    agent._training_iteration = agent.iteration
    return agent


def make_agent(
    config: Config, env: DenoisingVectorEnv, checkpoint: Path | None, device: str | None = None
) -> DenoisingAlgorithm:
    """Makes the agent that a checkpoint is loaded into, or that a run begins with."""
    if checkpoint is not None and config.policy_kwargs["lora"] is not None:
        # The file of the LoRA that the run began with may be gone; the checkpoint's has the same layers and ranks.
        config = replace(config, policy_kwargs=config.policy_kwargs | {"lora": str(checkpoint / LORA_FILE)})
    return config.make_agent(env, device)


def describe_run(folder: Path, config: Config, sampling: Mapping[str, Any]) -> Training:
    """Returns what a model card tells of a run, whose model is not loaded.

    Args:
        folder: the run folder.
        config: its settings.
        sampling: how it draws, see :class:`~agents.common.model_card.Training`.
    """
    try:
        summary = dict(read_json(folder / SUMMARY))
    except (FileNotFoundError, ValueError, TypeError):
        summary = {}  # the run has not come to its end
    checkpoints = list_checkpoints(folder)
    images, steps = progress_of(checkpoints[-1]) if checkpoints else (summary.get("pictures", 0), 0)
    choices = config.algo_kwargs.get("choices")
    is_complete = summary.get("interrupted") is False and summary.get("pictures") == images
    prompts = str(config.env_kwargs["prompts"])
    is_set = prompts in list_prompt_sets() or public_name(prompts) != prompts
    figures = [folder / name for name in (BEFORE_AFTER, LEARNING_CURVE) if is_complete and (folder / name).is_file()]
    return Training(
        model=str(config.env_kwargs["model"]),
        algorithm=config.algo.upper() if ":" not in config.algo else config.algo.rpartition(":")[2],
        prompts=public_name(prompts),
        is_one_prompt=not is_set,
        rewards={} if choices else {name: _weight(value) for name, value in config.env_kwargs["reward"].items()},
        sampling=sampling,
        settings=config.algo_kwargs | config.policy_kwargs,
        seed=config.seed,
        images=images,
        choices=public_name(choices) if choices else None,
        optimizer_steps=steps,
        scores=summary if is_complete else {},
        figures=figures,
    )


def _weight(value: Any) -> float:
    return value.get("weight", 1.0) if isinstance(value, Mapping) else value


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Writes an evaluation as arrays, without pickle."""
    arrays: dict[str, Any] = {f"rewards/{name}": values for name, values in evaluation.rewards.items()}
    for name, value in vars(evaluation).items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
    names = [evaluation.alignment_reward or "", evaluation.quality_reward or ""]  # an array of texts has no None
    with replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, prompts=np.array(evaluation.prompts), judge=np.array(names), **arrays)


def load_evaluation(path: Path) -> Evaluation:
    """Reads what :func:`save_evaluation` wrote.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        arrays = read_arrays(path)
        rewards = {name.removeprefix("rewards/"): arrays[name] for name in arrays if name.startswith("rewards/")}
        alignment, quality = (str(name) or None for name in arrays["judge"])
        return Evaluation(
            prompts=arrays["prompts"].tolist(),
            images=arrays["images"],
            reward=arrays["reward"],
            rewards=rewards,
            step_kl=arrays["step_kl"],
            step_mse=arrays["step_mse"],
            exploring=arrays["exploring"],
            alignment_reward=alignment,
            quality_reward=quality,
        )
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} is damaged") from error
