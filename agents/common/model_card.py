"""Model cards: what a model was trained from, how, and how to draw with it; for readers and for the hub.

A card names no folder of the machine that trained: of a path it shows the last part, of a reward server nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from agents.common.arguments import describe_arguments
from dpok_gym.models.lora_files import Ranks
from dpok_gym.models.registry import find_source
from dpok_gym.models.scheduler_configs import is_flow_matching
from dpok_gym.rewards.remote.access import is_address
from dpok_gym.samplers.flow_matching import trailing_levels
from dpok_gym.utils.files import replacing, write_text
from dpok_gym.utils.reading import parse_json
from dpok_gym.utils.validation import shorten

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm
    from dpok_gym.models import TextToImageModel
    from dpok_gym.samplers import DenoisingProcess

CARD = "README.md"
Format = Literal["diffusers", "kohya", "peft", "merged"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LIBRARIES = {"diffusers": "diffusers", "kohya": "diffusers", "peft": "peft", "merged": "diffusers"}
#: What an image depends on beside prompt and seed, and what the code that draws it must know of the pipeline.
SAMPLING = (
    "sampler",
    "num_inference_steps",
    "eta",
    "sde_steps",
    "guidance_scale",
    "true_cfg_scale",
    "negative_prompt",
    "image_size",
    "timestep_spacing",
    "is_flow_matching",
    "denoiser",
    "loads_lora_files",
    "pipeline_options",
)
#: Those of them that are arguments of a pipeline's call.
_OF_CALL = ("num_inference_steps", "eta", "guidance_scale", "true_cfg_scale", "negative_prompt")
#: The note in a LoRA's file that has these values, as JSON.
_SAMPLING_NOTE = "dpok_gym.sampling"
#: Arguments of an algorithm that say nothing about how it learned.
_NOT_SHOWN = ("policy", "env", "policy_kwargs", "stats_window_size", "tensorboard_log", "verbose", "device", "seed")


@dataclass(frozen=True)
class Training:
    """The entries of a model card about a training.

    Attributes:
        model: what the model was loaded by.
        algorithm: the name of the algorithm.
        prompts: the name of the prompt set; the prompt itself if there is one only.
        is_one_prompt: whether there is one only.
        rewards: the weight of each reward; None for one that is not known. None at all if it learned from choices.
        sampling: the values of :data:`SAMPLING` that were trained with.
        settings: the arguments of the algorithm and its policy.
        seed: of the training.
        images: drawn in training.
        choices: name of the file of people's choices that it learned from; None if it learned from images it drew.
        optimizer_steps: taken on that file.
        scores: means of an evaluation before and after, as ``summary.json`` has them; empty for none.
        figures: PNG files.
    """

    model: str
    algorithm: str
    prompts: str
    is_one_prompt: bool
    rewards: Mapping[str, float | None]
    sampling: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: int
    images: int
    choices: str | None = None
    optimizer_steps: int = 0
    scores: Mapping[str, Any] = field(default_factory=dict)
    figures: Sequence[Path] = ()

    @classmethod
    def of(cls, agent: DenoisingAlgorithm) -> Training:
        """Describes the training of an agent that is in no run folder."""
        process = agent.process
        prompts, is_one_prompt, rewards = "", False, []
        if agent.env is not None:
            env = agent.denoising_env
            is_one_prompt = len(env.prompts.train) == 1
            prompts = env.prompts.train[0] if is_one_prompt else public_name(env.prompts.name)
            rewards = env.reward.names if agent.draws_images else []
        settings = {
            name: getattr(agent, name)
            for name in describe_arguments(type(agent))
            if name not in _NOT_SHOWN and hasattr(agent, name)
        }
        return cls(
            model=process.model.name,
            algorithm=type(agent).__name__,
            prompts=prompts,
            is_one_prompt=is_one_prompt,
            rewards=dict.fromkeys(rewards),
            sampling=sampling_of(process),
            settings=settings | agent.policy.settings,
            seed=agent.run_seed,
            images=agent.images_drawn,
            choices=None if agent.draws_images else public_name(getattr(agent, "choices", "a file")),
            optimizer_steps=getattr(agent, "n_fitted", 0),
        )


def sampling_of(process: DenoisingProcess) -> dict[str, Any]:
    """Returns the arguments of a sampler, as :class:`Training` has them."""
    model, known = process.model, process.config
    return {
        "sampler": known.sampler,
        "num_inference_steps": known.num_inference_steps,
        "eta": known.eta,
        "sde_steps": known.sde_steps,
        "guidance_scale": known.guidance_scale,
        "true_cfg_scale": model.options.get("true_cfg_scale"),
        "negative_prompt": model.options.get("negative_prompt"),
        "image_size": model.options.get("image_size"),
        "timestep_spacing": _spacing_of(model),
        "is_flow_matching": is_flow_matching(model.scheduler_config),
        "denoiser": model.lora_prefix.removesuffix("."),
        "loads_lora_files": model.loads_lora_files,
        "pipeline_options": dict(model.pipeline_options),
    }


def _spacing_of(model: TextToImageModel) -> str | None:
    """Returns the spacing of the timesteps; with flow matching None, if it is that of the model's own pipeline."""
    if is_flow_matching(model.scheduler_config):
        return model.options.get("timestep_spacing")
    return model.scheduler_config.get("timestep_spacing", "leading")


def noted_sampling(notes: Mapping[str, str]) -> dict[str, Any]:
    """Returns the values of :data:`SAMPLING` that the notes of a LoRA's file have.

    Raises:
        ValueError: if they lack some.
    """
    values = parse_json(notes.get(_SAMPLING_NOTE, ""), f"the note {_SAMPLING_NOTE} of the LoRA")
    if not isinstance(values, dict) or not values.keys() >= set(SAMPLING):
        raise ValueError(f"the note {_SAMPLING_NOTE} of the LoRA does not say {', '.join(SAMPLING)}; write it again")
    return {name: values[name] for name in SAMPLING}


def public_name(text: str) -> str:
    """Returns the name of a model, a reward or a file without the folder that it is in."""
    if is_address(text):
        return "a reward server"
    is_path = os.path.isabs(text) or text.startswith(("~", ".")) or os.path.exists(text)
    return Path(text).name if is_path else text


def hub_id(model: str) -> str | None:
    """Returns the hub id that the name of a model stands for; None if it is of a folder, a file or a function."""
    source = find_source(model)
    is_id = isinstance(source, str) and _HUB_ID.fullmatch(source) and public_name(source) == source
    return str(source) if is_id else None


def usage_hint(sampling: Mapping[str, Any]) -> str:
    """Returns how to draw, in a few words: scheduler, steps and guidance."""
    window = sampling["sde_steps"]
    where = f" in steps {window[0]} to {window[0] + window[1] - 1} and 0 in the others" if window else ""
    noise = f"eta {sampling['eta']}{where}"
    if sampling["is_flow_matching"]:
        scheduler = f"the sampler “{sampling['sampler']}” for flow matching ({noise})"
    else:
        scheduler = f"the scheduler DDIM ({noise}, spacing {sampling['timestep_spacing']})"
    true_cfg = f", true CFG scale {sampling['true_cfg_scale']}" if sampling["true_cfg_scale"] else ""
    return (
        f"{scheduler}, {sampling['num_inference_steps']} steps, guidance scale {sampling['guidance_scale']}{true_cfg}"
    )


def lora_notes(process: DenoisingProcess) -> dict[str, str]:
    """Returns the notes in the header of a LoRA's file: its base model, and how to draw with it.

    The names are those of the ModelSpec and of kohya's scripts, which ComfyUI and AUTOMATIC1111's web UI show.
    """
    model = process.model
    name = hub_id(model.name) or public_name(model.name)
    height, width = model.image_shape
    # The specification has no word for what a flow-matching model predicts.
    prediction = {"modelspec.prediction_type": "v" if _predicts_velocity(model) else "epsilon"}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"LoRA of {name}",
        "modelspec.implementation": "diffusers",
        **({} if is_flow_matching(model.scheduler_config) else prediction),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.usage_hint": f"{usage_hint(sampling_of(process))}, strength 1",
        "ss_sd_model_name": name,
        _SAMPLING_NOTE: json.dumps(sampling_of(process)),
        **_family_notes(model),
    }


def _predicts_velocity(model: TextToImageModel) -> bool:
    return model.scheduler_config.get("prediction_type") == "v_prediction"


def _family_notes(model: TextToImageModel) -> dict[str, str]:
    """Returns the notes by which other tools tell which models a LoRA fits; none for other kinds of denoisers."""
    config: Any = getattr(model.denoiser, "config", {})
    width = config.get("cross_attention_dim")
    if width is None or model.lora_prefix != "unet.":
        return {}
    if config.get("addition_embed_type") == "text_time":
        architecture, version = "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"
    elif width == 1024:  # the text features of Stable Diffusion 2.x
        architecture, version = f"stable-diffusion-v2-{'768-v' if _predicts_velocity(model) else '512'}", "sd_v2"
    else:
        architecture, version = "stable-diffusion-v1", "sd_v1"
    return {
        "modelspec.architecture": f"{architecture}/lora",
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
    }


def write_card(
    folder: Path, training: Training, kind: Format, ranks: Ranks | None = None, repo_id: str | None = None
) -> Path:
    """Writes a model card, and copies the figures beside it.

    Args:
        folder: where the files of the model are.
        training: what the card tells.
        kind: the format of these files.
        ranks: of the LoRA; None for a whole model.
        repo_id: where the folder goes to on the hub; None if it stays here.

    Returns:
        The card's path.
    """
    for figure in training.figures:
        with replacing(folder / figure.name) as copy:
            shutil.copyfile(figure, copy)
    parts = [
        _front_matter(training, kind),
        f"# {_title(training)}",
        _introduction(training, ranks),
        _usage(training, kind, repo_id or f"path/to/{folder.name}"),
        _scores(training),
        *(f"![{figure.stem.replace('_', ' ')}]({figure.name})" for figure in training.figures),
        _settings(training),
        "Made with [dpok-gym](https://github.com/dpok-gym/dpok-gym). The license of the base model applies to what was "
        "trained from it; add your own to the header of this file.",
    ]
    path = folder / CARD
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _title(training: Training) -> str:
    return f"{public_name(training.model)}, fine-tuned with {training.algorithm}"


def _front_matter(training: Training, kind: Format) -> str:
    tags = ["text-to-image", "diffusers", "reinforcement-learning", "dpok-gym"]
    content: dict[str, Any] = {"library_name": _LIBRARIES[kind], "pipeline_tag": "text-to-image"}
    if base := hub_id(training.model):
        content |= {"base_model": base, "base_model_relation": "finetune" if kind == "merged" else "adapter"}
    if training.is_one_prompt:
        content["instance_prompt"] = training.prompts
    content["tags"] = tags if kind == "merged" else ["lora", *tags]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _introduction(training: Training, ranks: Ranks | None) -> str:
    what = "a whole pipeline, with what was learned in its weights" if ranks is None else f"a LoRA of {ranks}"
    prompts = f"the prompt “{training.prompts}”" if training.is_one_prompt else f"the prompts `{training.prompts}`"
    shown = []
    for name, weight in training.rewards.items():
        shown.append(f"`{public_name(name)}`" + ("" if weight is None else f" (weight {weight})"))
    lines = [f"- base model: `{hub_id(training.model) or public_name(training.model)}`", f"- {what}"]
    lines += [f"- trained on {prompts}"] * bool(training.prompts)
    lines += [f"- reward: {', '.join(shown)}"] * bool(shown)
    if training.choices is None:
        lines.append(f"- images drawn in training: {training.images:,} (seed {training.seed})")
    else:
        steps = f"{training.optimizer_steps:,} optimiser steps (seed {training.seed})"
        lines.append(f"- learned from people's choices between images, `{training.choices}`, in {steps}")
    return "\n".join(lines)


def _usage(training: Training, kind: Format, place: str) -> str:
    """Returns how to draw: the code for diffusers, and the settings for other programs."""
    sampling = training.sampling
    base = place if kind == "merged" else hub_id(training.model) or public_name(training.model)
    peft = [f"pipe.{sampling['denoiser']} = PeftModel.from_pretrained(pipe.{sampling['denoiser']}, {place!r})"]
    file = [f"pipe.load_lora_weights({place!r})"]
    load = {"diffusers": file, "kohya": file, "peft": ["from peft import PeftModel", "", *peft], "merged": []}[kind]
    if sampling["is_flow_matching"]:
        classes, scheduler = "DiffusionPipeline", []
        others = "The pipeline draws with its own solver, without noise in the steps; other numbers of steps work too"
    else:
        classes = "DDIMScheduler, DiffusionPipeline"
        scheduler = [
            "pipe.scheduler = DDIMScheduler.from_config(",
            f"    pipe.scheduler.config, {_scheduler_arguments(sampling)}",
            ")",
        ]
        others = "Other schedulers and numbers of steps work too"
    code = [
        f"from diffusers import {classes}",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({base!r})",
        *load,
        *scheduler,
        f"image = pipe({_arguments(training)}).images[0]",
    ]
    lines = [
        "## How to draw",
        "",
        f"It was trained with {usage_hint(sampling)}{'' if kind == 'merged' else ', at strength 1'}. {others}, but "
        "what was learned shows most with these.",
        "",
    ]
    if kind == "diffusers" and not sampling["loads_lora_files"]:
        lines.append(
            "The pipeline of this model reads no LoRA files. `dpok export RUN --format peft` writes the LoRA for peft, "
            "and `--format merged` a whole pipeline."
        )
    else:
        lines += ["```python", *code, "```"]
    if kind == "kohya":
        lines += [
            "",
            "In ComfyUI, the sampler `ddpm` with the scheduler `ddim_uniform` is nearest. In AUTOMATIC1111's web UI, "
            f"it is the sampler DDIM with “Eta for DDIM” at {sampling['eta']}.",
        ]
    return "\n".join(lines)


def _scheduler_arguments(sampling: Mapping[str, Any]) -> str:
    """Returns what a model's own scheduler config may have otherwise, as code."""
    spacing = sampling["timestep_spacing"]
    offset = ", steps_offset=1" if spacing == "leading" else ""
    return f"timestep_spacing={spacing!r}{offset}, set_alpha_to_one=False, clip_sample=False"


def _arguments(training: Training) -> str:
    """Returns the arguments of a pipeline's call, as code."""
    sampling = training.sampling
    known = {name: sampling[name] for name in _OF_CALL if sampling[name] is not None}
    if sampling["is_flow_matching"]:
        del known["eta"]  # their pipelines have no such argument
        if sampling["timestep_spacing"] == "trailing":
            known["sigmas"] = [round(level, 6) for level in trailing_levels(sampling["num_inference_steps"])]
    size = sampling["image_size"]
    if size is not None:
        known["height"], known["width"] = (size, size) if isinstance(size, int) else size
    arguments = {
        "prompt": training.prompts if training.is_one_prompt else "...",
        **known,
        **sampling["pipeline_options"],
    }
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _scores(training: Training) -> str:
    """Returns a table of an evaluation before and after; empty if there was none."""
    scores = training.scores
    if not scores or scores.get("reward_after") is None:
        return ""
    label = "reward trained on" if training.choices is None else "reward (not trained on)"
    rows = [(label, scores["reward_before"], scores["reward_after"])]
    before = scores.get("rewards_before", {})  # of an older run with other rewards, perhaps
    for name, after in scores.get("rewards_after", {}).items():
        rows.append((f"`{public_name(name)}`", before.get(name), after))
    if scores.get("aligned_before") is not None:
        rows.insert(0, ("share of fully aligned images", scores["aligned_before"], scores["aligned_after"]))
    lines = [f"## Results\n\nMeans of {scores['eval_images']} images.\n", "| | before | after |", "|---|---|---|"]
    for name, *numbers in rows:
        lines.append(f"| {name} | {' | '.join('' if number is None else f'{number:.3f}' for number in numbers)} |")
    lines.append(f"| KL to the base model, nats per image | 0 | {scores['kl_to_pretrained']:.2f} |")
    return "\n".join(lines)


def _settings(training: Training) -> str:
    """Returns a table of the settings that a text can show."""
    lines = ["## Settings", "", "| setting | value |", "|---|---|"]
    for name, value in training.settings.items():
        if isinstance(value, str):
            value = public_name(value)
        elif isinstance(value, Mapping):  # a reward, for example
            value = {public_name(str(key)): part for key, part in value.items()}
        try:
            text = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError):  # a function, for example
            continue
        lines.append(f"| `{name}` | `{shorten(text).strip(chr(39))}` |")
    return "\n".join(lines)
