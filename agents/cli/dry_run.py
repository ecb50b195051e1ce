"""``dpok train --dry-run``: the memory, the passes and the time of a training, before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from agents.algorithms.awm import AWM
from agents.algorithms.diffusion_dpo import DiffusionDPO
from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.draft import DRaFT
from agents.algorithms.forward_process import ForwardProcess
from agents.algorithms.online_forward_process import OnlineForwardProcess
from agents.algorithms.policy_gradient import PolicyGradient
from agents.algorithms.registry import load_algorithm
from agents.cli.config import Config, reward_names
from agents.cli.logs import read_log
from agents.cli.recipe import format_recipe
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.callbacks import format_seconds
from agents.common.critic import ValueNetwork
from agents.common.held_out import find_clip
from agents.common.memory import LIBRARIES, MARGIN, N_COPIES, Rehearsal, free_memory, size_of, with_margin
from dpok_gym.id_settings import describe_settings
from dpok_gym.models.architecture import Architecture, find_architecture
from dpok_gym.models.base import TextToImageModel
from dpok_gym.models.loading import check_argument_names
from dpok_gym.samplers.process import DenoisingProcess, check_sampler
from dpok_gym.utils.device import find_device
from dpok_gym.worlds import find_world

#: Parameters of the reward networks, in millions, with the names of :func:`dpok_gym.rewards.registry.list_rewards`. On
#: a GPU they are in half precision. Rewards that are not here have no network, or are somebody's own.
_REWARD_PARAMETERS = {
    "aesthetic": 304,
    "clip-score": 428,
    "hpsv2": 986,
    "hpsv2.1": 986,
    "image-reward": 446,
    "pickscore": 986,
}
_NO_NETWORK = ("jpeg-compressibility", "jpeg-incompressibility")


@dataclass(frozen=True)
class Passes:
    """Passes of the denoiser in an update, each of one latent.

    Attributes:
        elements: of the loss: transitions or noisy images.
        forward: with a gradient.
        backward: backward passes.
        without_gradient: of the pre-trained model or the old policy.
        optimizer_steps: steps of the optimiser.
        is_per_iteration: False if the numbers are those of the whole training.
    """

    elements: int
    forward: int
    backward: int
    without_gradient: int
    optimizer_steps: int
    is_per_iteration: bool = True


def describe(config: Config, log: Path | None = None) -> str:
    """Returns the settings as a recipe, and the memory, passes and time to expect as comments in it.

    Args:
        config: the settings.
        log: the log of a run with these settings that has begun; None if there is none.

    Raises:
        ValueError: as a run with these settings does, as far as its errors need no weights; see :func:`check`.
    """
    check(config)
    notes = [
        *_describe_memory(config),
        "",
        *_describe_passes(config),
        "",
        *_describe_time(config, log),
    ]
    comments = "\n".join(f"# {note}".rstrip() for note in notes)
    return f"{format_recipe(options_of(config))}\n{comments}"


def check(config: Config) -> DenoisingAlgorithm:
    """Makes what a run makes of its settings, without the weights: the denoising process and the algorithm.

    Returns:
        The agent, without a policy. It has no ``process`` if the networks of the model are not known.

    Raises:
        ValueError: as a run does. Without the process, only what holds for every model is checked.
    """
    agent = config.make_agent(None)
    names = ("sampler", "num_inference_steps", "eta", "guidance_scale", "sde_steps")
    settings = {name: config.env_kwargs[name] for name in names}
    check_sampler(**settings)
    model = _find_model(config)
    if model is not None:
        agent.process = DenoisingProcess(model, **settings)
        agent.check_setup()
    return agent


def _find_model(config: Config) -> TextToImageModel | None:
    """Returns the model of a run without its weights; None if its networks are not known."""
    env = config.env_kwargs
    further = env["model_kwargs"] or {}
    check_argument_names(further)
    try:
        architecture = find_architecture(env["model"], **further)
    except ValueError:
        return None
    model = architecture.make(torch.float32, env["model"])
    # Weights without content may claim any place and precision; the transition table has content.
    model.device, model.options = torch.device("cpu"), {"dtype": env["dtype"]}
    return model.with_options(
        image_size=env["image_size"],
        negative_prompt=env["negative_prompt"],
        true_cfg_scale=further.get("true_cfg_scale", 1.0),
        long_prompts="truncate",  # without a tokenizer, nobody knows how long a prompt is
        timestep_spacing=env["timestep_spacing"],
    )


def options_of(config: Config) -> dict[str, Any]:
    """Returns the options of ``dpok train`` that lead to a config, by their names in Python."""
    sections = ("env_kwargs", "algo_kwargs", "policy_kwargs")
    options = {name: value for name, value in vars(config).items() if name not in sections}
    for section in sections:
        options |= getattr(config, section)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """The memory of a training on its device, in bytes.

    Attributes:
        kept: what is there all the time, by its description.
        phases: what each phase takes beside that, by its description; one phase runs at a time.
        on_gpu: whether it is a GPU.
        rehearsal: where the sizes come from.
    """

    kept: Mapping[str, int]
    phases: Mapping[str, int]
    on_gpu: bool
    rehearsal: Rehearsal

    @property
    def counted(self) -> int:
        """The sum of what is kept and the largest phase."""
        return sum(self.kept.values()) + max(self.phases.values())

    @property
    def expected(self) -> int:
        """The same with a margin for what is not counted."""
        return with_margin(self.counted, "cuda" if self.on_gpu else "cpu")


def estimate_memory(config: Config, architecture: Architecture, on_gpu: bool = True, free: int | None = None) -> Memory:
    """Estimates the memory of a training from its settings alone.

    Args:
        config: the settings.
        architecture: of the model.
        on_gpu: whether it runs on a GPU: text encoders leave it then, and rewards are in half precision.
        free: bytes that are free, for settings that are "auto"; None if that is not known.
    """
    env, algo, policy = config.env_kwargs, config.algo_kwargs, config.policy_kwargs
    algorithm = load_algorithm(config.algo)
    rehearsal = Rehearsal(
        architecture,
        env["dtype"],
        env["image_size"],
        vae_tiling=bool((env["model_kwargs"] or {}).get("vae_tiling")),
        true_cfg_scale=(env["model_kwargs"] or {}).get("true_cfg_scale", 1.0),
        lora_rank=policy["lora_rank"],
        target_modules=policy["target_modules"],
        guidance_scale=env["guidance_scale"],
        guidance_gradient=policy["guidance_gradient"],
        autocast=policy["precision"] == "bfloat16",  # "auto" may take more
    )
    trained, latent = size_of(rehearsal.trained), 4 * math.prod(rehearsal.model.latent_shape)
    n_images, n_steps = algo["images_per_iteration"] or config.n_envs, env["num_inference_steps"]
    millions = {name: f"{number / 1e6:,.0f} million parameters" for name, number in rehearsal.parameters.items()}
    kept = {
        f"denoiser, {env['dtype']}, {millions['denoiser']}": rehearsal.denoiser_bytes,
        f"autoencoder, {millions['autoencoder']}": rehearsal.decoder_bytes,
    }
    encoders, encoding = f"text encoders, {millions['text encoders']}", rehearsal.encode()
    if on_gpu:  # else they are on the CPU
        phases = {f"encoding a prompt, with the {encoders}": encoding + rehearsal.text_encoder_bytes}
    else:
        kept[encoders] = rehearsal.text_encoder_bytes
        phases = {"encoding a prompt": encoding}
    what = "LoRA" if rehearsal.lora else "trained copy of the denoiser"
    n_copies = N_COPIES + 1 + _keeps_old(algorithm, algo)
    kept[f"{what}, {n_copies} times: its gradient, AdamW" + " and the old policy" * (n_copies > 4)] = n_copies * trained
    if algo.get("use_critic") and algo["critic_kind"] == "network":
        with torch.device("meta"):
            model = rehearsal.model
            critic = ValueNetwork(model.latent_shape, model.text_width, n_steps, policy["critic_hidden"])
            kept["critic, 4 times"] = 4 * size_of(critic.parameters())
    kept[f"trajectories of {n_images} images"] = n_images * (2 * n_steps + 1) * latent
    kept["their prompts, encoded"] = n_images * rehearsal.prompt_bytes
    if issubclass(algorithm, ForwardProcess):
        kept[f"{config.images} latents to learn from"] = config.images * latent
    if algo["anchor_coef"]:
        kept[f"{algo['anchor_images']} latents of the anchor"] = algo["anchor_images"] * latent
    bytes_each = 2 if on_gpu else 4
    for what, names in (
        ("reward", list(env["reward"])),
        ("held-out reward, if it is here:", _held_out_rewards(config)),
    ):
        for name in names:
            if name in _REWARD_PARAMETERS:
                kept[f"{what} {name}"] = _REWARD_PARAMETERS[name] * 10**6 * bytes_each
    phases |= _phases(config, rehearsal, None if free is None else free - sum(kept.values()))
    return Memory(kept, phases, on_gpu, rehearsal)


def _held_out_rewards(config: Config) -> list[str]:
    """Returns the rewards that are logged only; for "auto" the one that is taken if its files are here."""
    chosen, model = config.algo_kwargs["held_out_reward"], config.env_kwargs["model"]
    if chosen == "auto":
        has_other = find_world(model) is not None or "clip-score" in config.env_kwargs["reward"]
        return [] if has_other or find_clip() is None else ["clip-score"]
    return reward_names(chosen)


def _phases(config: Config, rehearsal: Rehearsal, free: int | None) -> dict[str, int]:
    """Returns the memory of updates, rollouts and decoding."""
    algo, policy = config.algo_kwargs, config.policy_kwargs
    update: dict[str, Any] = {"guided": _learns_guided(config)}
    if issubclass(load_algorithm(config.algo), DRaFT):
        update |= {"n_steps": algo["n_last_steps"], "decodes": True}
    n = _micro_batch(config)
    checkpoints = policy["gradient_checkpointing"]
    if checkpoints == "auto":
        checkpoints = rehearsal.needs_checkpointing(n, free)
    how = "with" if checkpoints else "without"
    at_a_time = policy["max_batch_size"]
    at_a_time = min(config.n_envs, at_a_time if isinstance(at_a_time, int) else config.n_envs)
    decoded = config.env_kwargs["decode_batch_size"]
    decoded = 1 if decoded == "auto" else min(decoded, config.n_envs)
    return {
        f"update, {n} at a time, {how} gradient checkpointing": rehearsal.update(n, checkpoints, **update),
        f"rollout, {at_a_time} at a time": rehearsal.rollout(at_a_time),
        f"decoding, {decoded} at a time": rehearsal.decode(decoded),
    }


def _learns_guided(config: Config) -> bool:
    """Returns whether the guided output is trained."""
    return not issubclass(load_algorithm(config.algo), (OnlineForwardProcess, ForwardProcess, DiffusionDPO))


def _micro_batch(config: Config) -> int:
    """Returns the latents of a forward and backward pass; for "auto", which takes what fits, those of an element."""
    agent = config.make_agent(None, device="cpu")  # the config's own may be missing here
    agent.n_steps = config.env_kwargs["num_inference_steps"]  # a run takes it from its environment; here is none
    return agent.states_of_a_pass


def _keeps_old(algorithm: type, algo: Mapping[str, Any]) -> bool:
    return issubclass(algorithm, OnlineForwardProcess) or algo.get("max_kl") is not None


def _describe_memory(config: Config) -> Iterator[str]:
    device = find_device(config.device)
    try:
        env = config.env_kwargs
        architecture = find_architecture(env["model"], **(env["model_kwargs"] or {}))
    except ValueError as error:
        yield f"memory: not known: {error}"
        return
    free = free_memory(device)
    memory = estimate_memory(config, architecture, device.type != "cpu", free)
    foreign = describe_settings(config.env.rpartition(":")[2], env, architecture.pipeline)
    if foreign is not None:
        yield f"warning: {foreign}"
    yield f"memory on {device}, computed from the configs of the networks, GiB:"
    for what, size in memory.kept.items():
        yield f"  {size / 2**30:6.2f}  {what}"
    yield "  and the largest of"
    for what, size in memory.phases.items():
        yield f"  {size / 2**30:6.2f}  {what}"
    yield from _describe_blocks(config, memory.rehearsal)
    own = [name for name in env["reward"] if name not in (*_REWARD_PARAMETERS, *_NO_NETWORK)]
    if own:
        yield f"     ?    the reward {', '.join(own)}"
    libraries = f" and {LIBRARIES / 2**30:g} GiB" * memory.on_gpu
    yield f"  {memory.expected / 2**30:6.2f}  in all, with {MARGIN:.0%}{libraries} for what is not counted"
    if free is not None:
        enough = "it fits" if memory.expected <= free else "it does not fit"
        yield f"  {free / 2**30:6.2f}  free now: {enough}"


def _describe_blocks(config: Config, rehearsal: Rehearsal) -> Iterator[str]:
    n, guided = _micro_batch(config), _learns_guided(config)
    plain, checkpointed = (rehearsal.blocks(n, checkpoints, guided) for checkpoints in (False, True))
    yield "  kept in an update from the forward to the backward pass; less with gradient checkpointing"
    for blocks, less in zip(plain, checkpointed, strict=True):
        each = f"{blocks.parameters / blocks.number / 1e6:,.1f} million parameters each"
        yield f"  {blocks.kept / 2**30:6.2f}  {blocks.number} {blocks.name}, {each}; {less.kept / 2**30:.2f}"


# -------------------------------------------------------------------------------------------------------------- passes


def count_forward_passes(config: Config) -> int:
    """Returns the denoiser's passes of one latent: 2 with guidance, unless the model reads its scale as an input."""
    scale, model = config.env_kwargs["guidance_scale"], _find_model(config)
    if model is None:
        return 1 if scale == 1 else 2
    return model.num_forward_passes(scale)


def count_update_passes(config: Config) -> Passes | None:
    """Returns the denoiser's passes in an update; None for an algorithm of the user's own base."""
    own, algo = _count_own_passes(config), config.algo_kwargs
    if own is None or not algo["anchor_coef"]:
        return own
    of_anchor = own.optimizer_steps * min(algo["batch_size"] or algo["anchor_images"], algo["anchor_images"])
    return replace(own, forward=own.forward + of_anchor, backward=own.backward + of_anchor)


def _count_own_passes(config: Config) -> Passes | None:
    """Returns the passes of the algorithm's own loss, without the anchor."""
    algo, algorithm = config.algo_kwargs, load_algorithm(config.algo)
    n_steps = config.env_kwargs["num_inference_steps"]
    n_images = algo["images_per_iteration"] or config.n_envs
    guided = count_forward_passes(config)
    back = 1 if config.policy_kwargs["guidance_gradient"] == "conditional" else guided
    reference = 1 if algo.get("kl_coef") else 0

    def of_batches(n: int, forward: int, backward: int, without_gradient: int) -> Passes:
        batches = math.ceil(n / (algo["batch_size"] or n))
        return Passes(n, forward * n, backward * n, without_gradient * n, batches)

    if issubclass(algorithm, PolicyGradient):
        agent: Any = check(config)
        trained = stochastic = n_steps
        if hasattr(agent, "process"):
            trained = int(agent.step_importance().count_nonzero())
            stochastic = int(agent.process.table.stochastic.count_nonzero())
        n = round(algo["timestep_fraction"] * n_images * trained) * algo["n_epochs"]
        passes = of_batches(n, guided, back, guided * reference)
        # The drift of the deterministic steps is that of one of them for each image.
        drift = n_images * guided * reference * (stochastic < n_steps)
        return replace(passes, without_gradient=passes.without_gradient + drift)
    if issubclass(algorithm, OnlineForwardProcess):
        n = n_images * min(algo["steps_per_image"] or n_steps, n_steps) * algo["n_epochs"]
        old = 1 if issubclass(algorithm, DiffusionNFT) else 0
        if issubclass(algorithm, AWM):
            old = 1 + bool(algo["ema_coef"])
        return of_batches(n, 1, 1, old + reference)
    if issubclass(algorithm, DiffusionDPO):
        is_online = algo["choices"] is None
        steps = algo["steps_per_iteration" if is_online else "n_gradient_steps"]
        pairs = steps * (algo["batch_size"] or n_images // algo["group_size"])
        return Passes(pairs, 2 * pairs, 2 * pairs, 2 * pairs, steps, is_per_iteration=is_online)
    if issubclass(algorithm, DRaFT):
        passes = of_batches(n_images, guided, back, 0)
        k = algo["n_last_steps"]
        # The gradient goes through the pre-trained model's passes too.
        return Passes(n_images, passes.forward * k * (1 + reference), passes.backward * k, 0, passes.optimizer_steps)
    if issubclass(algorithm, ForwardProcess):
        steps = algo["n_gradient_steps"]
        n = steps * (algo["batch_size"] or config.images)
        return Passes(n, n, n, n * (algo.get("regularization") == "KL-O"), steps, is_per_iteration=False)
    return None


def _describe_passes(config: Config) -> Iterator[str]:
    algo, n_steps = config.algo_kwargs, config.env_kwargs["num_inference_steps"]
    n_images = algo["images_per_iteration"] or config.n_envs
    guided = count_forward_passes(config)
    iterations = math.ceil(config.images / n_images)
    with_reference = (algo.get("kl_placement") == "reward" and algo["kl_coef"] > 0) or algo.get("max_kl") is not None
    drawing = n_images * n_steps * guided * (1 + with_reference)
    if algo.get("choices") is not None:
        iterations, drawing = 0, 0
    update = count_update_passes(config)
    yield f"denoiser passes of one latent{', two for a guided output' * (guided == 2)}; {iterations} iterations:"
    if iterations:
        yield f"  {drawing:>11,}  rollout of {n_images} images in {n_steps} steps"
    total = iterations * drawing
    if algo["anchor_coef"]:
        anchor = algo["anchor_images"] * n_steps * guided
        total += anchor
        yield f"  {anchor:>11,}  {algo['anchor_images']} images of the anchor, once"
    if update is None:
        yield "            ?  update: not known for this algorithm"
    else:
        when = "update" if update.is_per_iteration else "fit, once" + ", after all iterations" * bool(iterations)
        of_what = f"of {update.elements:,} elements in {update.optimizer_steps:,} steps"
        yield f"  {update.forward:>11,}  {when}: forward, {of_what}"
        yield f"  {update.backward:>11,}  {when}: backward, about twice a forward pass each"
        yield f"  {update.without_gradient:>11,}  {when}: forward without a gradient, of the pre-trained or old model"
        of_update = update.forward + update.backward + update.without_gradient
        total += of_update * (iterations if update.is_per_iteration else 1)
    # Before: the pre-trained model. After: the fine-tuned one, and the pre-trained one for the KL.
    evaluation = 3 * config.eval_images * n_steps * guided
    yield f"  {evaluation:>11,}  evaluation of {config.eval_images} images, before and after training"
    yield f"  {total + evaluation:>11,}  in all" + " without updates" * (update is None)
    if config.policy_kwargs["gradient_checkpointing"]:
        yield "  gradient checkpointing, where it is on, repeats the forward passes with a gradient"


# ---------------------------------------------------------------------------------------------------------------- time


def _describe_time(config: Config, log: Path | None) -> Iterator[str]:
    rows = read_log(log) if log is not None and log.is_file() else []
    seconds = seconds_left(rows, config.images)
    if seconds is None:
        yield "time: dpok train says it once two iterations have run; then --dry-run --resume --out FOLDER does too"
    else:
        yield f"time: {format_seconds(seconds)} more for the images that are left, at the latest speed in {log}"
    if issubclass(load_algorithm(config.algo), ForwardProcess):
        yield "  the fit comes on top of it"


def seconds_left(rows: Sequence[Mapping[str, float]], images: int) -> float | None:
    """Returns the seconds that the rest of a training takes, without its evaluations.

    Args:
        rows: of the log.
        images: of the whole training.

    Returns:
        None if fewer than two iterations have run: the first one is slower, as it compiles and fills caches.
    """
    drawn = [row for row in rows if "time/rollout_images_per_second" in row]
    if len(drawn) < 2:
        return None
    speeds = [drawn[-1].get(f"time/{part}_images_per_second") for part in ("rollout", "update")]
    left = max(images - drawn[-1]["rollout/images"], 0)
    return left * sum(1 / speed for speed in speeds if speed)
