"""Checks of what a training is given: its prompts, its reward, and the images of its model.

Letters used for shapes: B images, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers.utils import logging

from agents.common.buffer import number_groups
from agents.common.doctor.finding import Finding, judge
from agents.common.image_statistics import equal_share, variance_within
from dpok_gym.models import TextToImageModel
from dpok_gym.models.scheduler_configs import for_diffusers, is_flow_matching
from dpok_gym.prompts import find_unobservable
from dpok_gym.rewards import Reward
from dpok_gym.rewards.base import Components
from dpok_gym.samplers import DenoisingProcess
from dpok_gym.samplers.flow_matching import trailing_levels

#: Largest difference between two scores of the same image, in standard deviations between images.
_REPEATABLE, _RANDOM = 1e-4, 0.05
#: Difference of pixels in [0, 1] that is rounding: the largest in float32; the mean in half precision, in which the
#: pipeline also keeps its latents.
_SAME_IMAGE, _SAME_IMAGE_HALF = 1 / 255, 0.05


def find_refused(model: TextToImageModel, prompts: Sequence[str], max_bytes: int, skip_long: bool) -> dict[int, str]:
    """Returns the prompts that a training would refuse, by their number, with the reason.

    Args:
        model: the model that reads them.
        prompts: all prompts.
        max_bytes: bytes of UTF-8 that an observation can hold.
        skip_long: whether prompts that are too long are left out instead.
    """
    refused = dict(find_unobservable(prompts, max_bytes)) | dict(model.find_unreadable(prompts))
    skipped = {number for number, _ in model.find_long(prompts)} if skip_long else ()
    return {number: reason for number, reason in refused.items() if number not in skipped}


def check_prompts(model: TextToImageModel, prompts: Sequence[str], max_bytes: int, skip_long: bool = False) -> Finding:
    """Checks how many prompts can be used, how long they are, and how many come twice; arguments as above."""
    refused = find_refused(model, prompts, max_bytes, skip_long)
    n_long, copies = len(list(model.find_long(prompts))), len(prompts) - len(set(prompts))
    length = f"{max(len(prompt.encode(errors='replace')) for prompt in prompts)} bytes"
    if (counted := model.longest_prompt(prompts)) is not None:
        length = "{} of {} tokens".format(*counted)
    advice = "a prompt that stands there twice is drawn twice as often; leave out the copies if that is not meant"
    if n_long:
        advice = "prompts that are too long are left out, or lose their end: shorten them"
    if refused:
        number = min(refused)
        advice = f"the first one that is refused is number {number + 1}: {refused[number]}"
    return judge(
        "prompts",
        f"{len(prompts)}, the longest with {length}; {n_long} too long; {len(refused)} refused; {copies} copies",
        "none too long or refused, no copies",
        advice,
        bool(refused),
        copies + n_long > 0,
    )


def check_reward(reward: Reward, images: Tensor, prompts: Sequence[str]) -> list[Finding]:
    """Checks that a reward is finite, repeatable, leaves its images alone, and differs within a prompt.

    Args:
        reward: the reward.
        images: (B, 3, H, W) in [0, 1].
        prompts: B texts, several images for each.
    """
    prompts = list(prompts)
    before = images.clone()
    started = time.perf_counter()
    scores = reward.components(images, prompts)
    seconds = time.perf_counter() - started
    total = _total(reward, scores)
    finite = total.isfinite()
    if not finite.all():
        return [
            judge(
                "reward: finite",
                f"{int((~finite).sum())} of {len(total)} rewards are nan or infinite",
                "none",
                "fix the reward, or leave such images out with non_finite='mask'",
                True,
            )
        ]
    names = ", ".join(f"{name} {_range(values)}" for part in scores.values() for name, values in part.items())
    return [
        judge(
            "reward: finite",
            f"total {_range(total)} ({names}); {1000 * seconds / len(total):.3g} ms per image",
            "finite numbers",
            "",
            False,
        ),
        _check_repeatable(reward, images, prompts, total),
        _check_images_left_alone(reward, before, prompts),
        _check_variation(total, prompts),
    ]


def total_of(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Returns the weighted sum of the components of images (B, 3, H, W), (B,) float64, which may be nan."""
    return _total(reward, reward.components(images, list(prompts)))


def _total(reward: Reward, scores: Components) -> Tensor:
    return torch.stack([values.double() for values in reward.weigh(scores).values()]).sum(dim=0)


def _range(values: Tensor) -> str:
    return f"{values.min():.3g} to {values.max():.3g}"


def _check_repeatable(reward: Reward, images: Tensor, prompts: list[str], total: Tensor) -> Finding:
    again = total_of(reward, images, prompts)
    spread = total.std(correction=0).item()
    difference = (again - total).abs().max().item()
    share = difference / spread if spread else float(difference > 0)
    return judge(
        "reward: repeatable",
        f"the same images twice differ by at most {difference:.3g}, {share:.2%} of the spread between images",
        "0",
        "the reward must be a function of image and prompt alone: no dropout (network.eval()), no random augmentation",
        not share <= _RANDOM,
        share > _REPEATABLE,
    )


def _check_images_left_alone(reward: Reward, images: Tensor, prompts: list[str]) -> Finding:
    writers = []
    for name, function in reward.functions.items():
        given = images.clone()
        function(given, list(prompts))
        if not torch.equal(given, images):
            writers.append(name)
    return judge(
        "reward: leaves its images alone",
        f"{', '.join(writers)} writes into the images that it is given" if writers else "the images stay as they were",
        "they stay",
        "work on a copy (images = images.clone()); a training gives copies, but other programs do not",
        bool(writers),
    )


def _check_variation(total: Tensor, prompts: list[str]) -> Finding:
    variance, equal = variance_within(total[:, None], prompts), equal_share(total, prompts)
    name, normal = "reward: varies within a prompt", "as much within prompts as between them; no prompt without"
    if variance is None or equal is None:
        return Finding(name, "not checked", "one image for each prompt", normal)
    within = variance.sqrt().item()
    groups = number_groups(prompts)
    means = [total[groups == group].mean() for group in range(int(groups.max()) + 1)]
    between = torch.stack(means).std().item() if len(means) > 1 else 0.0
    others = f", {between:.3g} between the means of {len(means)} prompts" * (len(means) > 1)
    return judge(
        name,
        f"standard deviation {within:.3g} within a prompt{others}; {equal:.0%} of the {len(total)} images "
        "are of a prompt whose images all get the same",
        normal,
        "images of a prompt are compared with each other, and equal rewards teach nothing: use a finer reward, or "
        "prompts that the model sometimes fulfils",
        equal == 1,
        equal > 0.5 or within < 0.1 * between,
    )


@torch.no_grad()
def check_pipeline(process: DenoisingProcess, prompts: Sequence[str], seed: int) -> Finding:
    """Compares images of the process with those of diffusers' own pipeline, drawn with the same noise.

    The pipelines of flow-matching models add no noise in their steps, so it is left out here too.

    Args:
        process: the denoising process, with the LoRA off.
        prompts: of the images.
        seed: of the noise.
    """
    name, normal = "images equal the pipeline's", f"at most {_SAME_IMAGE:.3f} (of 1)"
    model, config = process.model, process.config
    is_flow = is_flow_matching(model.scheduler_config)
    if is_flow:
        process = DenoisingProcess(model, "ode", config.num_inference_steps, guidance_scale=config.guidance_scale)
    elif config.sde_steps is not None:
        return Finding(
            name, "not checked", "diffusers' pipelines add noise in all steps, not in sde_steps only", normal
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # importing pipelines tells of image processors that are not needed here
    try:
        pipeline = model.to_pipeline()
    except ValueError as error:
        return Finding(name, "not checked", str(error), normal)
    finally:
        logging.set_verbosity(verbosity)
    pipeline.set_progress_bar_config(disable=True)
    prompts, shape = list(prompts), (len(prompts), *model.latent_shape)
    dtype = next(model.denoiser.parameters()).dtype
    start = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    # The pipeline draws the noise of each step from the generator that it is given; so does the process here.
    generator = torch.Generator(model.device).manual_seed(seed)
    latents = start
    for step in process.denoise(
        latents, process.encode(prompts), lambda _: torch.randn(shape, generator=generator, device=model.device)
    ):
        latents = step.next_latents
    ours = torch.cat([model.decode(row[None]) for row in latents]).cpu()
    call = model.pipeline_call(start.to(dtype), config.guidance_scale)
    if not is_flow:
        call["eta"] = config.eta
    else:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(for_diffusers(model.scheduler_config))
        if model.scheduler_config.get("timestep_spacing") == "trailing":
            call["sigmas"] = trailing_levels(process.num_inference_steps)
    theirs = pipeline(
        prompt=prompts,
        generator=torch.Generator(model.device).manual_seed(seed),
        num_inference_steps=process.num_inference_steps,
        output_type="pt",
        **call,
    ).images
    if model.device.type != "cpu":
        model.offload_text_encoder()  # as the environment left it
    differences = (ours - theirs.float().cpu()).abs()
    is_half = dtype != torch.float32
    difference, limit = (differences.mean(), _SAME_IMAGE_HALF) if is_half else (differences.max(), _SAME_IMAGE)
    return judge(
        name,
        f"pixels differ by {differences.mean():.2g} on average and by {differences.max():.2g} at most, in "
        f"{len(prompts)} images",
        f"{limit} on average, in half precision" if is_half else normal,
        "what is trained is not what the pipeline draws: check the scheduler's config (prediction_type, "
        "timestep_spacing) and the guidance",
        not difference <= limit,
    )
