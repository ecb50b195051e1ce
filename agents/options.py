"""The options of the commands, and the settings of ``dpok train`` for the models that ship with the package.

Neither torch nor anything else that takes long is loaded here, so that help and mistakes in the options come at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

SHAPES, MIXTURE = "DPOK-Shapes-v0", "DPOK-Mixture-v0"

#: Settings of ``dpok train`` for the embedded model, for two cores of a laptop. Prompts and budget are taken with
#: every preset, the rest (of the environment and the algorithms) with the preset "default". What is not here is theirs.
LAPTOP: dict[str, Any] = {
    "prompts": "three green squares",
    "reward": "shapes-alignment=1,shapes-quality=0.2",
    "num_inference_steps": 10,
    "decode_batch_size": 16,
    "pictures": 2240,
    "n_envs": 64,
    "learning_rate": 3e-3,
    "final_lr_fraction": 0.05,
    "policy_kwargs": {"lora_rank": 16, "target_modules": "all"},
}

#: The same, of each algorithm.
LAPTOP_ALGORITHMS: dict[str, dict[str, Any]] = {
    "dpok": {
        "batch_size": 64,
        "use_critic": False,  # for one prompt, the mean of the rollout's rewards is the better baseline
    },
    "ddpo": {"batch_size": 64},
    "grpo": {"batch_size": 64},
    "reinforce": {"n_envs": 32},
    "sft": {},
    "rwr": {},
    "best-of-n": {},
    "draft": {"batch_size": 16, "n_last_steps": 2},
}

#: Settings for the model with a known answer (benchmarks/mixture.py): all of the objective as the paper's Eq. 8 has it,
#: unscaled, and its full gradient. That is not to be clipped: a clipped one leads elsewhere if its noise is lopsided.
CLASSROOM: dict[str, Any] = {
    "pictures": 15_360,
    "n_envs": 256,
    "learning_rate": 1e-2,
    "final_lr_fraction": 0.02,
    "step_weighting": "likelihood",
    "normalize_advantage": False,
    "kl_in": "reward",
    "kl_coef": 0.5,
    "max_grad_norm": 100.0,
    "vf_learning_rate": 3e-3,
    "policy_kwargs": {"critic_hidden": 64, "max_batch_size": None},
}

#: Pictures drawn in training for any other environment: the paper's budget for one prompt.
PICTURES = 20_000


def _auto(metavar: str, default: str) -> Any:
    """For an option whose default depends on others: how the help shows it."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass
class Train:
    """Fine-tune a text-to-image model with a reward, and compare it with the pre-trained model.

    The run folder gets config.yaml, model.zip, the LoRA, logs, learning_curve.png, before_after.png and summary.json.
    Ctrl-C ends a run early and keeps what was learned.
    """

    seed: int = 0
    """Seed of prompts, noise and initial weights, 0 or more; the same seed repeats a run."""
    out: Annotated[Path | None, _auto("FOLDER", "runs/<env>-<algo>-seed<seed>-<time>")] = None
    """Run folder to write; it must not hold a run already, unless that is to be resumed."""
    env: str = SHAPES
    """Environment id: DPOK-Shapes-v0 (embedded model), DPOK-Mixture-v0 (dots, a known answer), DPOK-SD15-v0, ..."""
    prompts: Annotated[str | None, _auto("TEXT|SET|FILE", f"{LAPTOP['prompts']!r} for {SHAPES}, else the env's")] = None
    """What to draw: a prompt, a named set (colour, count, composition, location, shapes, dpok), or a file of lines."""
    reward: Annotated[
        str | None, _auto("NAME[=WEIGHT],...", f"{LAPTOP['reward']} for {SHAPES}, else the environment's")
    ] = None
    """What pictures are rewarded for: a reward, or a weighted sum such as shapes-alignment=1,shapes-quality=0.2.

    MODULE:NAME is one, of yours; and so is http://HOST:PORT, of a server such as dpok serve-reward (several addresses
    with spaces between them share the work).
    """
    normalize_rewards: bool = False
    """Standardise each reward of a sum by its running mean and std before weighting; logs and evaluations stay raw."""
    reward_workers: Annotated[int | None, _auto("INT", "the environment's, 0")] = None
    """Threads that judge pictures while others are decoded, 0 or more; for rewards that wait for a server, say."""
    model: Annotated[str | None, _auto("NAME|FOLDER", "the environment's")] = None
    """Model to fine-tune: shapes, sd15, a local diffusers folder, or a hub id."""
    algo: Literal["dpok", "ddpo", "grpo", "reinforce", "sft", "rwr", "best-of-n", "draft"] = "dpok"
    """Algorithm: dpok is policy gradient with a KL penalty (Fan et al. 2023).

    ddpo, grpo and reinforce are other policy gradients. sft (weighted by the reward), rwr (by its exponential) and
    best-of-n (on winners) learn from pictures of the pre-trained model. draft follows the gradient of the reward,
    which must have one.
    """
    preset: Literal["default", "paper", "official-code"] = "default"
    """Settings that the options below change: of this project, or of DPOK's paper or code for Stable Diffusion."""
    pictures: Annotated[
        int | None,
        _auto("INT", f"{LAPTOP['pictures']} for {SHAPES}, {CLASSROOM['pictures']} for {MIXTURE}, else {PICTURES}"),
    ] = None
    """Pictures to draw in training, 1 or more, rounded up to whole iterations; the budget of the run."""
    n_envs: Annotated[int | None, _auto("INT", "the preset's")] = None
    """Pictures in each iteration, 1 or more, usually 10 to 256; more are slower, with less noise in the gradient."""
    kl_coef: Annotated[float | None, _auto("FLOAT", "the preset's")] = None
    """Weight of the KL to the pre-trained model, per nat, 0 or more; 0 allows any drift, a large value none."""
    learning_rate: Annotated[float | None, _auto("FLOAT", "the preset's")] = None
    """Learning rate per optimiser step; 1e-5 to 3e-4 for Stable Diffusion, 1e-3 for shapes; too much ruins them."""
    lora_rank: Annotated[int | None, _auto("INT", "the preset's")] = None
    """Rank of the LoRA, usually 4 to 16; 0 trains all of the denoiser's weights."""
    lora_layers: Annotated[Literal["attention", "all"] | None, _auto("attention|all", "the preset's")] = None
    """Layers that get a LoRA: attention is usual for large models; small ones learn more with all of them."""
    batch_size: Annotated[int | None, _auto("INT", "the preset's")] = None
    """Transitions (denoising steps; for sft, rwr, best-of-n and draft pictures) in each optimiser step, 1 or more.

    Smaller takes more steps in each iteration.
    """
    micro_batch_size: Annotated[int | Literal["auto"] | None, _auto("INT|auto", "the preset's")] = None
    """The same in each forward and backward pass, 1 or more; smaller saves memory and changes nothing else."""
    n_epochs: Annotated[int | None, _auto("INT", "the preset's")] = None
    """Passes over each iteration's pictures, usually 1 to 4; more learn more from each picture, up to the clipping."""
    timestep_fraction: Annotated[float | None, _auto("FLOAT", "the preset's")] = None
    """Random share of the denoising steps that is trained on, in (0, 1]; less is faster and noisier."""
    clip_range: Annotated[float | None, _auto("FLOAT", "the preset's")] = None
    """How far a transition's log-probability may move in an iteration, in nats, above 0; smaller is slower, safer."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Further arguments of the algorithm's class, the policy and the environment; see their documentation.

    For example --set kl_in=reward use_critic=true max_batch_size=8 eta=0.5 "model_kwargs={vae_tiling: true}".
    """
    num_inference_steps: Annotated[
        int | None, _auto("INT", f"{LAPTOP['num_inference_steps']} for {SHAPES}, else the environment's")
    ] = None
    """Denoising steps of each picture, 1 or more, usually 10 to 50; more are finer and cost more."""
    guidance_scale: Annotated[float | None, _auto("FLOAT", "the environment's")] = None
    """Scale of classifier-free guidance, 0 or more; 1 is none and halves the cost, Stable Diffusion has 5 to 7.5."""
    negative_prompt: str | None = None
    """Text that guidance leads away from; needs a guidance scale other than 1."""
    image_size: Annotated[int | tuple[int, int] | None, _auto("INT|HEIGHT WIDTH", "the model's")] = None
    """Pixels of a side, or height and width; far from what the model was trained with, pictures get worse."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, _auto("NAME", "float32")] = None
    """Precision of the frozen weights: float32, or bfloat16 for half of the memory; float16 can draw only."""
    eval_pictures: int = 256
    """Pictures drawn before and after training to measure the change, 1 or more; their seeds are not trained on."""
    device: str = "auto"
    """Where the networks run: auto, cpu, cuda, cuda:1, ..."""
    gradient_checkpointing: bool = False
    """Compute parts of the denoiser twice instead of keeping them: a third slower, for a fraction of the memory."""
    autocast: bool = False
    """Run the denoiser in bfloat16, which is faster on recent GPUs and less exact."""
    resume: bool = False
    """Continue the run in --out with its own settings, up to --pictures pictures in all if that is given."""


@dataclass
class Sample:
    """Draw pictures for a prompt with a pre-trained or a fine-tuned model."""

    prompt: str
    """Text to draw."""
    lora: Annotated[Path | None, _auto("FOLDER", "none: the pre-trained model")] = None
    """Run folder of dpok train (its model and sampler settings are taken too), or folder with a LoRA."""
    env: Annotated[str | None, _auto("ID", f"the run's, or {SHAPES}")] = None
    """Environment id, for its model and sampler settings."""
    model: Annotated[str | None, _auto("NAME|FOLDER", "the environment's")] = None
    """Model to draw with: shapes, sd15, a local diffusers folder, or a hub id."""
    n: int = 16
    """Pictures, 1 or more."""
    seed: int = 0
    """Seed of the first picture, 0 or more; picture k has seed + k, and looks alike in every call."""
    out: Path = Path("sample.png")
    """File to write, as PNG."""
    num_inference_steps: Annotated[int | None, _auto("INT", "the environment's")] = None
    """Denoising steps of each picture, 1 or more, usually 10 to 50."""
    guidance_scale: Annotated[float | None, _auto("FLOAT", "the environment's")] = None
    """Scale of classifier-free guidance, 0 or more; 1 is none, more follows the prompt more closely."""
    negative_prompt: str | None = None
    """Text that guidance leads away from; needs a guidance scale other than 1."""
    image_size: Annotated[int | tuple[int, int] | None, _auto("INT|HEIGHT WIDTH", "the model's")] = None
    """Pixels of a side, or height and width; far from what the model was trained with, pictures get worse."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, _auto("NAME", "float32")] = None
    """Precision of the frozen weights: float32, bfloat16 or float16; half of it saves half of the memory."""
    device: str = "auto"
    """Where the networks run: auto, cpu, cuda, cuda:1, ..."""


@dataclass
class Evaluate:
    """Score a run on its training prompts and on prompts it never saw, before and after training.

    Rewards that it was not trained on are scored too. Writes evaluation.json into the run folder.
    """

    run: tyro.conf.Positional[Path]
    """Run folder of dpok train."""
    model: Annotated[Path | None, _auto("FOLDER", "where it was")] = None
    """Where the run's model is now, if it has moved."""
    pictures: int = 256
    """Pictures for each set of prompts, before and after, 1 or more."""
    seed: Annotated[int | None, _auto("INT", "the run's, which repeats its own evaluation")] = None
    """Seed of the pictures, 0 or more."""
    reward: Annotated[str | None, _auto("NAME,...", "shapes-preference for shapes, else the JPEG size")] = None
    """Further rewards to score with, which the run was not trained on; shapes have alignment and quality anyway."""
    device: str = "auto"
    """Where the networks run: auto, cpu, cuda, cuda:1, ..."""


@dataclass
class FitReward:
    """Learn a reward from people's choices between two pictures, for dpok train --reward FOLDER.

    The folder gets the reward (config.json and model.safetensors), and how well it agrees with choices held out:
    fit.json and calibration.png. Ctrl-C keeps the best so far; a run that was killed goes on when it is started again.
    """

    choices: tyro.conf.Positional[Path]
    """JSONL file with a choice on each line, its paths relative to the file.

    {"prompt": "a red star", "pictures": ["a.png", "b.png"], "preferred": 0, "who": "ada", "when": "2026-01-31T12:00"}
    """
    out: Annotated[Path, _auto("FOLDER", "none: it must be given")]
    """Folder to write; it must not hold a reward already."""
    start: Annotated[Path | None, _auto("FOLDER", "none: learn from nothing")] = None
    """Reward to start from, written by this command; fewer choices are enough then, of prompts with its words only."""
    held_out: float = 0.1
    """Share of the choices that is measured on and not learned from, above 0 and below 1; no picture is on both sides.
    """
    epochs: int = 30
    """Passes over the choices, 1 or more; more with few choices, until the held-out loss no longer falls."""
    batch_size: int = 64
    """Choices in each optimiser step, 1 or more."""
    learning_rate: float = 1.5e-3
    """Highest learning rate, usually 5e-4 to 3e-3."""
    picture_size: Annotated[int | None, _auto("INT", "64, or that of --start")] = None
    """Pixels of the side that pictures are resized to, a multiple of 8 from 16 on; more sees finer details, slower."""
    seed: int = 0
    """Seed of the split, the first weights and the order of the choices, 0 or more."""
    device: str = "auto"
    """Where the network runs: auto, cpu, cuda, cuda:1, ..."""


@dataclass
class ServeReward:
    """Serve a reward over HTTP, for dpok train --reward http://HOST:PORT.

    There is no authentication: whoever reaches the port can have pictures judged.
    """

    reward: tyro.conf.Positional[str]
    """What is served, written as in dpok train: NAME, or NAME=WEIGHT,NAME=WEIGHT."""
    host: str = "127.0.0.1"
    """Interface to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on, 0 for any free one."""
    max_batch: int = 64
    """Pictures in a request, 1 or more; larger requests are refused."""
